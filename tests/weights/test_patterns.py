"""masks.py: exact counts, ties, patterns a user may type, and the check that reports rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesparse.errors import MoESparseError, UsageError
from moesparse.weights import patterns as masks
from moesparse.weights.patterns import GROUP_SIZES, Pattern, check_mask, detect_patterns, mask_from_score

PATTERNS = [
    Pattern(n=2, m=4),
    Pattern(n=1, m=4),
    Pattern(n=3, m=8),
    Pattern(n=15, m=16),
    Pattern(n=16, m=32),
    Pattern(ratio=0.5),
    Pattern(ratio=0.1),
    Pattern(ratio=0.97),
]


def slow_mask(score, pattern):
    """By Python's stable sort: best first, the lower column before its equals."""
    flat = score.reshape(-1, score.shape[-1])
    size, kept = (pattern.m, pattern.n) if pattern.m else (flat.shape[1], round(flat.shape[1] * (1 - pattern.ratio)))
    mask = torch.zeros(flat.shape, dtype=torch.bool)
    for row in range(flat.shape[0]):
        values = flat[row].tolist()
        for start in range(0, len(values), size):
            order = sorted(range(start, start + size), key=lambda k: -values[k])
            mask[row, order[:kept]] = True
    return mask.view(score.shape)


@st.composite
def scores(draw):
    """Rows of few distinct values, so that ties, all-zero groups, -0.0 and infinities are the rule."""
    values = st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0, 3.0, float("inf"), float("-inf"), 1e-42])
    rows = draw(st.integers(1, 4))
    return torch.tensor(draw(st.lists(values, min_size=rows * 64, max_size=rows * 64))).view(rows, 64)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=40, deadline=None)
@given(score=scores())
def test_the_mask_is_the_stable_sorts_mask(pattern, score):
    mask = mask_from_score(score, pattern)
    assert torch.equal(mask, slow_mask(score, pattern))
    assert check_mask(mask, pattern).exact


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 7))
def test_rows_are_independent_and_only_the_order_of_scores_matters(pattern, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(3, rows, 96, generator=generator).sub_(0.5)
    mask = mask_from_score(score, pattern)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(mask_from_score(score[:, order], pattern), mask[:, order])
    # exact in floating point, so no new ties: scaling by a power of two, and a cube in float64
    assert torch.equal(mask_from_score(score * 2.0**40, pattern), mask)
    assert torch.equal(mask_from_score(score.double() ** 3, pattern), mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_dtype_and_layout_agrees_with_the_slow_way(pattern, dtype):
    # bf16 has 256 mantissa steps: 1024 columns are full of ties; a transposed view is what some families store
    score = torch.rand(2, 1024, 5, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    assert torch.equal(mask_from_score(score, pattern), slow_mask(score, pattern))


def test_chunks_do_not_show(monkeypatch):
    score = torch.rand(2, 9, 64, generator=torch.Generator().manual_seed(0)).mul_(8).round_()
    whole = [mask_from_score(score, pattern) for pattern in PATTERNS]
    # 100 elements: one row of 64 at a time; 1 element: still one row
    for chunk in (100, 1):
        monkeypatch.setattr(masks, "_CPU_CHUNK", chunk)
        assert all(torch.equal(a, mask_from_score(score, b)) for a, b in zip(whole, PATTERNS, strict=True))


def test_equal_scores_keep_the_lower_columns():
    assert mask_from_score(torch.zeros(1, 8), Pattern(n=2, m=4)).tolist() == [[True, True, False, False] * 2]
    assert mask_from_score(torch.zeros(1, 8), Pattern(ratio=0.5)).tolist() == [[True] * 4 + [False] * 4]
    assert mask_from_score(torch.tensor([[-0.0, 0.0, 0.0, -0.0]]), Pattern(n=2, m=4)).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 4, 8)])
def test_no_rows_give_an_empty_mask(shape):
    assert mask_from_score(torch.zeros(shape), Pattern(n=2, m=4)).shape == shape


def test_rounding_of_the_rows_count_follows_python():
    # 10 * 0.7 = 7 kept whatever the binary fraction; 5 of 9 at one half is 4.5, to even
    for in_features, ratio, kept in [(10, 0.3, 7), (9, 0.5, 4), (7, 0.5, 4), (1000, 0.333, 667)]:
        assert int(mask_from_score(torch.rand(1, in_features), Pattern(ratio=ratio)).sum()) == kept


def test_nan_names_the_tensor():
    score = torch.ones(2, 8)
    score[1, 3] = float("nan")
    for pattern in (Pattern(n=2, m=4), Pattern(ratio=0.5)):
        with pytest.raises(MoESparseError, match=r"layers\.0\.down_proj: scores must be numbers, got NaN"):
            mask_from_score(score, pattern, name="layers.0.down_proj")


def test_a_matrix_that_does_not_fit_is_named_with_its_sizes():
    with pytest.raises(UsageError, match=r"w: in_features must be a multiple of m=8 for pattern 4:8, got 12"):
        mask_from_score(torch.ones(2, 12), Pattern(n=4, m=8), name="w")
    with pytest.raises(UsageError, match=r"w: pattern 0\.99 must keep a weight in every row, keeps 0 of 12"):
        mask_from_score(torch.ones(2, 12), Pattern(ratio=0.99), name="w")
    with pytest.raises(UsageError, match="w: in_features must be a multiple"):
        check_mask(torch.ones(2, 12), Pattern(n=4, m=8), name="w")


@pytest.mark.parametrize("text", ["2:4", " 2:4 ", Pattern(n=2, m=4)])
def test_parse_reads_groups(text):
    assert Pattern.parse(text) == Pattern(n=2, m=4)


@pytest.mark.parametrize("text", ["0.5", 0.5, Pattern(ratio=0.5)])
def test_parse_reads_ratios(text):
    assert Pattern.parse(text) == Pattern(ratio=0.5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_survives_its_own_text(pattern):
    assert Pattern.parse(str(pattern)) == pattern
    assert pattern.kind == ("n:m" if pattern.m else "unstructured")
    assert pattern.density == pytest.approx(mask_from_score(torch.rand(1, 3200), pattern).float().mean().item())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:5", r"m in 4, 8, 16, 32, got 2:5"),
        ("2:2", r"m in 4, 8, 16, 32, got 2:2"),
        ("4:4", r"0 < n < m weights, got 4:4"),
        ("0:4", r"0 < n < m weights, got 0:4"),
        (1.2, r"between 0 and 1 \(the share removed\), got 1\.2"),
        ("0", r"between 0 and 1 \(the share removed\), got 0"),
        (1, r"between 0 and 1 \(the share removed\), got 1"),
        ("nan", r"between 0 and 1 \(the share removed\), got nan"),
        ("abc", r'n:m such as "2:4" or a ratio such as 0\.5, got \'abc\''),
        ("", r"n:m such as .* got ''"),
        (True, r"n:m such as .* got True"),
        (None, r"n:m such as .* got None"),
    ],
)
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(UsageError, match=message):
        Pattern.parse(text)


@pytest.mark.parametrize("fields", [{}, {"ratio": 0.5, "n": 2, "m": 4}, {"n": 2}, {"m": 4}, {"ratio": 0.5, "m": 4}])
def test_a_pattern_is_of_one_kind(fields):
    with pytest.raises(UsageError, match="either ratio or both n and m"):
        Pattern(**fields)


def test_check_counts_zeros_and_violations():
    weight = torch.tensor([[1.0, 2, 0, 0], [1, 0, 0, 0], [1, 2, 3, 0], [-0.0, 0, 0, 5]]).view(2, 2, 4)
    found = check_mask(weight, Pattern(n=2, m=4))
    # one row too full; two rows emptier than 2:4 asks, which is fine for hardware but not exact
    assert (found.holds, found.exact, found.violations, found.zeros, found.numel) == (False, False, 1, 9, 16)
    assert found.sparsity == 9 / 16
    emptier = check_mask(weight[1:, 1:], Pattern(n=2, m=4))
    assert emptier.holds
    assert not emptier.exact
    assert check_mask(weight[0, :1], Pattern(ratio=0.5)).exact
    assert check_mask(weight, Pattern(ratio=0.5)).violations == 1


def test_detect_finds_the_sparsest_pattern_first():
    mask = mask_from_score(torch.rand(3, 5, 64), Pattern(n=2, m=4))
    assert detect_patterns(mask)[0] == Pattern(n=2, m=4)
    # 2:4 implies at most half of every longer group
    assert {pattern.m for pattern in detect_patterns(mask)} == set(GROUP_SIZES)
    assert all(check_mask(mask, pattern).holds for pattern in detect_patterns(mask))
    assert detect_patterns(mask_from_score(torch.rand(9, 64), Pattern(n=4, m=8)))[0] == Pattern(n=4, m=8)
    assert detect_patterns(torch.ones(3, 64)) == ()
    # 36 = 9 * 4: only m = 4 divides; an empty and a group-less weight say nothing
    assert detect_patterns(torch.eye(36)) == (Pattern(n=1, m=4),)
    assert detect_patterns(torch.zeros(3, 6)) == detect_patterns(torch.zeros(0, 8)) == ()
