"""Mixtures by tokens, one record a window, and published mixes: what is drawn of several sources, counted by hand."""

import json
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import WORDS, make_tokenizer, prose, write, write_jsonl

from moesparse import text
from moesparse.documents import SourceRead
from moesparse.errors import CalibrationError, MissingFileError, MoESparseError, UsageError
from moesparse.presets import PRESETS
from moesparse.text import TextSource, packing, records
from moesparse.text.sampling import by_tokens, check_shares, sample_records, share_counts


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def sizes(rows, domains, mask=None):
    """Windows and tokens of each domain."""
    real = torch.ones_like(rows) if mask is None else mask
    found = {}
    for domain, row in zip(domains, real, strict=True):
        count, tokens = found.get(domain, (0, 0))
        found[domain] = (count + 1, tokens + int(row.sum()))
    return found


# Shares


def test_a_share_is_read_behind_the_domain(tmp_path):
    assert text.parse_source("a.jsonl=code:0.4") == TextSource("a.jsonl", "code", 0.4)
    assert text.parse_source("org/wiki:raw:test=wiki:.5") == TextSource("org/wiki:raw:test", "wiki", 0.5)
    odd = write(tmp_path / "a=b:0.4", "x")
    assert text.parse_source(odd) == TextSource(odd, "a=b:0")  # the file's name without its ending
    with pytest.raises(UsageError, match=r"share of a text source must be a number, as in .*:0\.4, got 'a=b:c'"):
        text.parse_source("a=b:c")
    with pytest.raises(UsageError, match=r"must be FILE, FILE=DOMAIN or FILE=DOMAIN:SHARE, got 'a=:0\.4'"):
        text.parse_source("a=:0.4")


def test_windows_are_shared_as_asked(tmp_path, tokenizer):
    files = [write(tmp_path / f"{name}.txt", prose(3000, seed=n)) for n, name in enumerate("abc")]
    sources = [TextSource(file, name, share) for file, name, share in zip(files, "xyx", (0.5, 0.3, 0.2), strict=True)]
    found: list[SourceRead] = []
    ids, domains = text.domain_windows(sources, tokenizer, samples=20, length=16, found=found)
    # 10, 6 and 4 of 20; a and c have the same domain
    assert sizes(ids, domains) == {"x": (14, 14 * 16), "y": (6, 6 * 16)}
    assert [(each.share, each.windows, each.tokens, each.cut) for each in found] == [
        (0.5, 10, 160, 0),
        (0.3, 6, 96, 0),
        (0.2, 4, 64, 0),
    ]
    again, _ = text.domain_windows(sources, tokenizer, samples=20, length=16)
    assert torch.equal(ids, again)


def test_a_source_too_short_for_its_share_is_refused(tmp_path, tokenizer):
    long, short = write(tmp_path / "a.txt", prose(3000)), write(tmp_path / "b.txt", "x" * 30)
    sources = [TextSource(long, "a", 0.5), TextSource(short, "b", 0.5)]
    # 30 tokens, BOS and EOS: two windows of 16
    with pytest.raises(CalibrationError, match=r"b\.txt must hold 5 windows of 16 .*share of 0\.5 in 10, got 2; "):
        text.domain_windows(sources, tokenizer, samples=10, length=16)
    with pytest.raises(CalibrationError, match=r"b\.txt must hold more than 1 records for its share of 0\.5 in 10"):
        text.record_windows(
            [TextSource(write_jsonl(tmp_path / "a.jsonl", [prose(9)] * 20), "a", 0.5), sources[1]],
            tokenizer,
            samples=10,
            length=16,
        )


@pytest.mark.parametrize(
    ("shares", "match"),
    [
        ((0.4, None), "all sources must have a share, or none, got 1 of 2 with one"),
        ((0.4, 0.4), r"must be above 0 and add up to 1, got 0\.4 \+ 0\.4 = 0\.8"),
        ((0.0, 1.0), r"must be above 0 and add up to 1, got 0 \+ 1 = 1"),
        ((1.5, -0.5), "must be above 0 and add up to 1"),
        ((float("nan"), 1.0), "must be above 0 and add up to 1"),
        ((float("inf"), 1.0), "must be above 0 and add up to 1"),
        ((0.01, 0.99), r"samples must be at least 100 for a share of 0\.01, got 4, of which it gets no window"),
    ],
)
def test_shares_that_cannot_be(tmp_path, tokenizer, shares, match):
    files = [write(tmp_path / f"{name}.txt", prose(500)) for name in "ab"]
    sources = [TextSource(file, "all", share) for file, share in zip(files, shares, strict=True)]
    with pytest.raises(UsageError, match=match):
        text.domain_windows(sources, tokenizer, samples=4, length=16)


def test_thirds_may_be_written_with_two_digits():
    assert check_shares([0.33, 0.33, 0.33]) == pytest.approx([1 / 3] * 3)
    assert check_shares([None, None]) is None


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.integers(1, 50), min_size=1, max_size=7), more=st.integers(0, 300))
def test_counts_are_within_one_of_their_share(parts, more):
    total = sum(parts)
    # the smallest part gets one at least
    samples = -(-total // min(parts)) + more
    counts = share_counts([part / total for part in parts], samples)
    assert sum(counts) == samples
    assert all(abs(count - Fraction(part * samples, total)) < 1 for count, part in zip(counts, parts, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=5), samples=st.integers(1, 60), seed=st.integers(0, 2**16)
)
def test_records_are_shared_by_their_tokens(parts, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 400, (samples,), generator=generator).tolist() for _ in parts]
    shares = [part / sum(parts) for part in parts]
    counts = by_tokens(lengths, shares, samples)
    assert sum(counts) == samples
    tokens = [sum(each[:count]) for each, count in zip(lengths, counts, strict=True)]
    for number, share in enumerate(shares):
        over = tokens[number] - share * sum(tokens)
        assert over <= max(lengths[number][: counts[number]], default=0) + 1e-6


# One record a window


def test_every_record_is_a_window_padded_on_the_right(tmp_path, tokenizer):
    documents = [prose(words, seed=words) for words in (1, 2, 5, 9, 40)]
    file = write_jsonl(tmp_path / "a.jsonl", documents)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    whole = [[bos, *tokenizer(each, add_special_tokens=False)["input_ids"], eos] for each in documents]
    length = len(whole[3]) + 1  # the last is longer
    assert len(whole[4]) > length > len(whole[3])
    found: list[SourceRead] = []
    ids, mask, domains = text.record_windows([TextSource(file, "d")], tokenizer, samples=5, length=length, found=found)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (5, length)
    got = sorted((row[real].tolist() for row, real in zip(ids, mask, strict=True)), key=len)
    assert got == [*whole[:4], whole[4][:length]]
    # behind a token that is no token there is none
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()
    assert (ids[~mask] == 0).all()
    assert domains == ["d"] * 5
    note = found[0]
    assert (note.documents, note.windows, note.tokens, note.cut) == (5, 5, sum(map(len, got)), 1)
    # no longer than the longest: nothing is run over columns of padding alone
    assert text.record_windows([TextSource(file, "d")], tokenizer, samples=5, length=4096)[0].shape[1] == len(whole[4])


def test_a_record_of_just_the_window_is_not_cut(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", ["x" * 14])  # 16 with BOS and EOS
    for length, cut in ((16, 0), (15, 1)):
        found: list[SourceRead] = []
        text.record_windows([TextSource(file, "d")], tokenizer, samples=1, length=length, found=found)
        assert found[0].cut == cut


def test_padding_is_the_tokenizers_own(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    file = write_jsonl(tmp_path / "a.jsonl", ["a", "a longer one"])
    ids, mask, _ = text.record_windows([TextSource(file, "d")], tokenizer, samples=2, length=64)
    assert not mask.all() and (ids[~mask] == tokenizer.pad_token_id).all()
    # its last token is an end of text too, and a real one
    assert (ids[mask] == tokenizer.eos_token_id).sum() == 2


def test_a_long_file_is_one_record_of_which_little_is_held(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(records, "MIN_PIECE_CHARS", 64)
    monkeypatch.setattr(records, "CHARS_PER_TOKEN", 16)
    content = prose(4000)
    found: list[SourceRead] = []
    ids, mask, _ = text.record_windows(
        [TextSource(write(tmp_path / "a.txt", content), "d")], tokenizer, samples=1, length=20, found=found
    )
    wanted = [tokenizer.bos_token_id, *tokenizer(content, add_special_tokens=False)["input_ids"]][:20]
    assert mask.all() and ids[0].tolist() == wanted and found[0].cut == 1
    # what is behind the cut is not kept
    chunks = [packing.Chunk("abc", True, False), packing.Chunk("def", False, False), packing.Chunk("ghi", False, True)]
    (record,) = sample_records(chunks, 1, 5, None, random.Random(0))
    assert record == packing.Chunk("abcde", True, False, False)


def test_records_of_a_mixture_make_up_its_shares(tmp_path, tokenizer):
    # those of a are about nine times as long as those of b
    long = write_jsonl(tmp_path / "a.jsonl", [prose(90, seed=n) for n in range(60)])
    short = write_jsonl(tmp_path / "b.jsonl", [prose(10, seed=n) for n in range(200)])
    sources = [TextSource(long, "a", 0.25), TextSource(short, "b", 0.75)]
    ids, mask, domains = text.record_windows(sources, tokenizer, samples=100, length=512)
    found = sizes(ids, domains, mask)
    total, longest = int(mask.sum()), int(mask.sum(1).max())
    assert abs(found["a"][1] - 0.25 * total) <= longest
    assert found["a"][0] + found["b"][0] == 100 and found["a"][0] < 10
    # without shares as many records of both, whatever their length
    even = text.record_windows([TextSource(long, "a"), TextSource(short, "b")], tokenizer, samples=100, length=512)
    assert {name: count for name, (count, _) in sizes(even[0], even[2], even[1]).items()} == {"a": 50, "b": 50}


def test_records_are_drawn_by_the_seed_and_none_twice(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [f"{n} {WORDS[n % 14]}" for n in range(300)])
    drawn = [text.record_windows([TextSource(file, "d")], tokenizer, samples=40, length=32, seed=n) for n in (0, 0, 1)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    as_rows = [sorted(row[real].tolist() for row, real in zip(*each[:2], strict=True)) for each in drawn]
    assert as_rows[0] != as_rows[2]
    assert len({tuple(row) for row in as_rows[0]}) == 40


def test_too_few_records_and_too_few_samples(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", ["a", "", "b"])
    with pytest.raises(CalibrationError, match=r"a\.jsonl must hold 3 records, a window each, got 2; .* or samples=2"):
        text.record_windows([TextSource(file, "d")], tokenizer, samples=3, length=8)
    with pytest.raises(UsageError, match=r"samples must be at least 2, a window for each domain \(d, e\), got 1"):
        text.record_windows([TextSource(file, "d"), TextSource(file, "e")], tokenizer, samples=1, length=8)
    with pytest.raises(UsageError, match="source must be a file or a list of files, got an empty list"):
        text.record_windows([], tokenizer, samples=1, length=8)


def test_an_endless_dataset_of_records_is_not_read_to_its_end(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield {"text": "old owls"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keywords: endless())
    ids, _, _ = text.record_windows([TextSource("crawl:train", "d")], tokenizer, samples=3, length=16)
    assert len(ids) == 3 and len(seen) <= 16 * 3 + 1


# Published mixes


def test_a_mix_stands_for_its_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text.named_sources(["c4"]) == [TextSource("allenai/c4:en:train", "c4")]
    assert text.named_sources(["wikitext=w"]) == [TextSource("Salesforce/wikitext:wikitext-2-raw-v1:train", "w")]
    mixed = text.named_sources(["reap-code=code:0.5", "a.jsonl=chat:0.5"])
    assert [each.domain for each in mixed] == ["code"] * 6 + ["chat"]
    assert check_shares([each.share for each in mixed]) == pytest.approx([0.5 / 6] * 6 + [0.5])
    # the six of REAP's README, 4096 samples of each
    assert [(each.path, each.domain) for each in text.named_sources(["reap-code"])] == [
        ("theblackcat102/evol-codealpaca-v1:train", "code"),
        ("open-r1/Mixture-of-Thoughts:code:train", "reasoning"),
        ("open-r1/Mixture-of-Thoughts:math:train", "reasoning"),
        ("open-r1/Mixture-of-Thoughts:science:train", "reasoning"),
        ("Salesforce/xlam-function-calling-60k:train", "tools"),
        ("SWE-bench/SWE-smith-trajectories:tool", "agent"),
    ]
    # a file of that name goes before
    write(tmp_path / "c4", "x")
    assert text.named_sources(["c4"]) == [TextSource("c4", "c4")]


def test_all_datasets_of_a_mix_are_read_in_their_own_form(monkeypatch):
    """Rows as the datasets have them: columns of their own, and JSON in strings."""
    datasets = pytest.importorskip("datasets")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.place }}){% endfor %}{% endfor %}"
    )
    talk = [{"role": "user", "content": prose(9)}, {"role": "assistant", "content": prose(30)}]
    called = {"function": {"name": "look", "arguments": '{"place": "here"}'}, "id": "1", "type": "function"}
    agent = [{"role": "user", "content": [{"type": "text", "text": "look"}]}]
    agent += [{"role": "assistant", "content": prose(30), "tool_calls": [called]}]
    rows = {
        "theblackcat102/evol-codealpaca-v1": {"instruction": prose(9), "output": prose(30)},
        "open-r1/Mixture-of-Thoughts": {"messages": talk, "num_tokens": 3, "source": "x"},
        "Salesforce/xlam-function-calling-60k": {
            "id": 1,
            "query": prose(9),
            "answers": json.dumps([{"name": "look", "arguments": {"place": prose(30)}}]),
            "tools": json.dumps([{"name": "look"}]),
        },
        "SWE-bench/SWE-smith-trajectories": {"messages": json.dumps(agent), "instance_id": "x", "patch": "y"},
    }

    def load_dataset(name, *config, split, streaming):
        assert streaming and split == ("tool" if "smith" in name else "train")
        assert config == () or (name == "open-r1/Mixture-of-Thoughts" and config[0] in ("code", "math", "science"))
        return datasets.Dataset.from_list([rows[name]] * 8)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found: list[SourceRead] = []
    sources = text.named_sources(["reap-code"])
    ids, domains = text.domain_windows(sources, tokenizer, samples=12, length=16, chat=True, found=found)
    assert sizes(ids, domains) == {
        "code": (2, 32),
        "reasoning": (6, 96),
        "tools": (2, 32),
        "agent": (2, 32),
    }
    assert [(each.windows, each.chats, each.left_out) for each in found] == [(2, 8, 0)] * 6


@pytest.mark.parametrize("mix", sorted(PRESETS))
def test_without_network_the_files_that_would_do_are_named(monkeypatch, mix):
    datasets = pytest.importorskip("datasets")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"

    def load_dataset(*args, **keywords):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(MoESparseError, match="could not be read: no route to host; without network give a") as refused:
        text.domain_windows(text.named_sources([mix]), tokenizer, samples=8, length=8, chat=PRESETS[mix].chats)
    for each in PRESETS[mix].datasets:
        assert f"{each.file} of {each.name.split(':')[0]}" in str(refused.value)


def test_a_name_that_is_no_mix_is_no_file(tokenizer):
    with pytest.raises(MissingFileError, match="c5 must be a file or a datasets name"):
        text.domain_windows(text.named_sources(["c5"]), tokenizer, samples=1, length=8)
