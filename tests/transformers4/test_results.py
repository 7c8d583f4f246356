"""transformers 4.57 reads what is written as it reads the source, and its logits are those of transformers 5.

`make test-transformers4` makes an environment of its own for it and names its Python in TRANSFORMERS4_PYTHON.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import moesparse
from moesparse.testing import tiny_model

PYTHON = os.environ.get("TRANSFORMERS4_PYTHON")
if PYTHON is None:
    pytest.skip("no transformers 4 is named; make test-transformers4 runs this", allow_module_level=True)

# as the hub has them: what transformers 5 calls rope_parameters and dtype, under the names of transformers 4
HUB = {
    "qwen3_moe": {"num_experts": 8, "rope_theta": 1000000.0, "rope_scaling": None},
    "mixtral": {"num_local_experts": 8, "rope_theta": 1000000.0},
    "olmoe": {"num_experts": 8, "rope_theta": 50000.0, "rope_scaling": None},
    "deepseek_v3": {"n_routed_experts": 8, "rope_theta": 50000.0, "rope_scaling": None},
    "glm4_moe": {"n_routed_experts": 8, "rope_theta": 1000000, "rope_scaling": None, "partial_rotary_factor": 0.5},
}
READ = Path(__file__).with_name("read.py")


def in_hub_form(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    tiny_model(family).save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_parameters", "dtype", "num_experts", "num_local_experts", "n_routed_experts"):
        config.pop(key, None)
    file.write_text(json.dumps(config | HUB[family] | {"torch_dtype": "float32"}, indent=2))
    return folder


def read_by_4(folder: Path, out: Path) -> tuple[dict, torch.Tensor]:
    """The config and what loading says, and the logits."""
    assert PYTHON is not None
    done = subprocess.run([PYTHON, READ, folder, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), torch.load(out)


@pytest.mark.parametrize("family", HUB)
@pytest.mark.parametrize("whole", [False, True])
def test_results_read_as_their_source_does(family, whole, tmp_path):
    from transformers import AutoModelForCausalLM

    source = in_hub_form(family, tmp_path / "source")
    before, _ = read_by_4(source, tmp_path / "logits")
    assert before["version"].startswith("4.57.")
    windows = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    # six, three of each group: when corrected scores are below zero, transformers 4 takes experts of groups that a
    # token may not use, and transformers 5 does not
    for name, recipe, experts in (
        ("sparse", moesparse.Recipe(saliency="magnitude", update="none"), 8),
        ("fewer", moesparse.Recipe(weights=None, update="none", keep_experts=6), 6),
    ):
        out = tmp_path / name
        if whole:
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
            report = moesparse.prune(model, windows, recipe)
            moesparse.save_pretrained(model, out, source=source, recipe=report.recipe)
        else:
            moesparse.prune_checkpoint(source, out, windows, recipe)
        after, logits = read_by_4(out, tmp_path / "logits")
        assert after["loading"] == {"missing": 0, "unexpected": 0, "mismatched": 0}
        counts = {key for key in HUB[family] if "experts" in key}
        assert {key for key in before["config"] if after["config"][key] != before["config"][key]} == (
            counts if experts < 8 else set()
        )
        assert all(after["config"][key] == experts for key in counts)
        ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            want = ours(torch.arange(3, 60)[None]).logits
        # two implementations of one model in float32
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
