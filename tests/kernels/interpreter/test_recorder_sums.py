"""The recorder's column sums by the kernel, as on a GPU, against its plain path, as on a CPU."""

import pytest
import torch

from moesparse.calibration import recorder
from moesparse.calibration.recorder import _BatchSums
from moesparse.calibration.statistics import ExpertStatistics

SIZES = {"hidden": 40, "activation": 24}
EPS = torch.finfo(torch.float32).eps


def summed(hidden, activation, routed, gates, moments, by_kernel, monkeypatch):
    """Statistics of one call: `routed` gives each expert's tokens, of which it records all."""
    monkeypatch.setattr(recorder, "use_triton", lambda tensor: by_kernel)
    statistics = ExpertStatistics.zeros(len(routed), SIZES, moments)
    batch = _BatchSums(statistics, hidden)
    assert batch.in_one_pass == by_kernel
    done = 0
    for expert, tokens in enumerate(routed):
        rows = slice(done, done + len(tokens))
        done += len(tokens)
        inputs = {"hidden": hidden[tokens], "activation": activation[rows]}
        batch.add(expert, inputs, torch.ones(len(tokens), 4, dtype=hidden.dtype), gates[rows])
    batch.add_energies(hidden, torch.cat(routed))
    assert batch.commit()
    return statistics


# the first expert's rows fill more than one chunk, the second has none, the last a single one; not all tokens are there
ROUTED = [
    torch.arange(150) % 70,
    torch.zeros(0, dtype=torch.int64),
    torch.tensor([3, 69, 3]),
    torch.tensor([0]),
]
ROWS = sum(map(len, ROUTED))


def close(actual, wanted, name, exact):
    if exact:
        assert torch.equal(actual, wanted), name
    else:
        # 150 rows are added in float32 on the plain path, some 16 roundings deep where they are added in pairs
        assert bool(((actual - wanted).abs() <= 16 * EPS * wanted).all()), name


@pytest.mark.parametrize("moments", ["none", "both"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sums_are_those_of_the_plain_path(dtype, exact, moments, monkeypatch):
    random = torch.Generator().manual_seed(0)
    if exact:
        # small integers and halves: no sum of their squares is rounded, so that every bit must be equal
        hidden = torch.randint(-8, 9, (70, 40), generator=random).to(dtype)
        activation = torch.randint(-8, 9, (ROWS, 24), generator=random).to(dtype)
        gates = torch.randint(1, 5, (ROWS,), generator=random).to(dtype) / 4
    else:
        hidden = torch.randn(70, 40, generator=random).to(dtype)
        activation = torch.randn(ROWS, 24, generator=random).to(dtype)
        gates = torch.rand(ROWS, generator=random).to(dtype)
    plain, kernel = (
        summed(hidden, activation, ROUTED, gates, moments, by_kernel, monkeypatch) for by_kernel in (False, True)
    )
    assert not kernel.energy["hidden"][1].any()
    for (name, wanted), actual in zip(plain.named_tensors().items(), kernel.tensors(), strict=True):
        close(actual, wanted, name, exact or "energy" not in name)


def test_a_model_in_float64_takes_the_plain_path():
    statistics = ExpertStatistics.zeros(2, SIZES)
    assert not _BatchSums(statistics, torch.zeros(3, 40, dtype=torch.float64)).in_one_pass


def test_a_whole_block_is_recorded_alike(monkeypatch):
    pytest.importorskip("transformers")
    from moesparse.models.blocks import find_moe_blocks
    from moesparse.testing import tiny_model

    model = tiny_model("mixtral")
    windows = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    found = []
    for by_kernel in (False, True):
        monkeypatch.setattr(recorder, "use_triton", lambda tensor, by_kernel=by_kernel: by_kernel)
        with recorder.record(find_moe_blocks(model)[:1]) as (watching,), torch.no_grad():
            watching.aim(mask.bool().flatten(), 0, 12)
            model(input_ids=windows, attention_mask=mask, use_cache=False)
        found.append(watching.statistics)
    assert int(found[0].tokens.sum()) == 2 * 19
    for (name, wanted), actual in zip(found[0].named_tensors().items(), found[1].tensors(), strict=True):
        close(actual, wanted, name, "energy" not in name)
