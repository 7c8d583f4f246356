"""What users do with a packed folder in transformers: device maps, batches, compile, memory, and a forgotten import."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

import moesparse
from moesparse.checkpoints.pretrained import save_pretrained
from moesparse.errors import UnsupportedModelError
from moesparse.packed.model import packed_blocks
from moesparse.testing import prune_by_magnitude, tiny_model

TOKENS = torch.tensor([[3, 4, 5, 6, 7]])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 63, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The masked dense twin, fp32."""
    return prune_by_magnitude(tiny_model("mixtral"))


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "packed"
    save_pretrained(model, path, packed=True, max_shard_size="100KB")
    return path


def stored(folder: Path) -> dict[str, bytes]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                tensors[key] = bytes(shard.get_tensor(key).reshape(-1).view(torch.uint8).numpy())
    return tensors


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_on_one_device_loads_and_saves_the_same(device_map, model, folder: Path, tmp_path: Path):
    pytest.importorskip("accelerate")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(list(packed_blocks(loaded))) == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": 100_000}},
    ],
    ids=["named", "by size"],
)
def test_offloading_is_refused(options: dict, folder: Path, tmp_path: Path):
    pytest.importorskip("accelerate")
    with pytest.raises(UnsupportedModelError, match=r"on disk: offloading is not supported. Give one device"):
        AutoModelForCausalLM.from_pretrained(folder, **options, offload_folder=tmp_path)


def test_continuous_batching_gives_the_tokens_of_the_dense_twin(model, folder: Path):
    pytest.importorskip("psutil")  # transformers sizes its cache by it, and has none without
    prompts = [[3, 4, 5], [7, 8, 9, 10, 11], [40]]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    results = loaded.generate_batch(inputs=prompts, generation_config=GenerationConfig(**GREEDY))
    got = [result.generated_tokens for result in results.values()]
    assert not any(result.error for result in results.values())
    expected = [model.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist() for p in prompts]
    assert sorted(got) == sorted(expected)


# as it is traced, and with the code that is made of it
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_it_compiles_without_a_graph_break(backend, model, folder: Path):
    compiled = torch.compile(AutoModelForCausalLM.from_pretrained(folder), fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS.flip(-1)):
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_without_the_import_it_fails_loudly(tmp_path: Path):
    # experts of their own, and experts stored in one tensor
    families = ["mixtral", "gpt_oss"]
    for family in families:
        save_pretrained(prune_by_magnitude(tiny_model(family)), tmp_path / family, packed=True)
    code = """
        import sys, traceback, transformers
        for folder in sys.argv[1:]:
            try:
                transformers.AutoModelForCausalLM.from_pretrained(folder)
                print("loaded")
            except Exception:
                traceback.print_exc()
            print("next", file=sys.stderr)
    """
    words = [sys.executable, "-c", textwrap.dedent(code), *(str(tmp_path / family) for family in families)]
    done = subprocess.run(words, capture_output=True, text=True)
    *said, rest = done.stderr.split("next\n")
    assert (done.returncode, done.stdout, len(said), rest) == (0, "", 2, "")
    for each in said:
        assert "moesparse" in each and "size mismatch" in each.lower().replace("mismatched sizes", "size mismatch")


def test_loading_takes_the_packed_size_and_one_block(tmp_path: Path):
    # the model, 341 MB in 6 blocks of 57, is written from its shapes alone
    code = """
        import sys, threading
        from pathlib import Path
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.core_model_loading import revert_weight_conversion
        from moesparse.checkpoints.pretrained import save_pretrained
        from moesparse.packed.conversions import conversions_of, packed_conversions
        from moesparse.packed.quantizer import MoESparseConfig, insert_packed
        from moesparse.packed.model import packed_blocks
        from moesparse.system.shard_writer import ShardWriter
        from moesparse.system.shards import TensorSpec
        from moesparse.testing import prune_by_magnitude, tiny_model

        folder = Path(sys.argv[1])
        layers = 6
        config = tiny_model("mixtral", num_hidden_layers=1).config
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, 1024, 2048
        config.dtype = torch.bfloat16
        patterns = {"gate_up_proj": "2:4", "down_proj": "2:4"}
        packing = MoESparseConfig({f"model.layers.{i}.mlp.experts": patterns for i in range(layers)})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        insert_packed(model, packing)
        model._weight_conversions = packed_conversions(conversions_of(model), packing.blocks)
        state = revert_weight_conversion(model, model.state_dict())
        specs = [TensorSpec.of(name, tensor.dtype, tensor.shape) for name, tensor in state.items()]
        (folder / "big").mkdir()
        with ShardWriter(folder / "big", specs, 10**8) as writer:
            for name, tensor in state.items():
                writer.write(name, torch.full(tensor.shape, 0x33, dtype=tensor.dtype))
        writer.write_index()
        config.quantization_config = packing
        config.save_pretrained(folder / "big")
        # what is imported on the way is not counted below
        save_pretrained(prune_by_magnitude(tiny_model("mixtral")), folder / "small", packed=True)
        AutoModelForCausalLM.from_pretrained(folder / "small")

        def anonymous():
            # pages of the mapped file are the system's to drop, and not counted
            status = Path("/proc/self/status").read_text()
            return int(status.split("RssAnon:")[1].split()[0]) * 1024

        for dtype in (torch.bfloat16, torch.float32):
            model = None
            before, peak, done = anonymous(), 0, threading.Event()

            def watch():
                global peak
                while not done.wait(0.001):
                    peak = max(peak, anonymous())

            watcher = threading.Thread(target=watch)
            watcher.start()
            model = AutoModelForCausalLM.from_pretrained(folder / "big", dtype=dtype)
            done.set()
            watcher.join()
            size = sum(parameter.nbytes for parameter in model.parameters())
            block = next(module.nbytes for _, module in packed_blocks(model))
            print((peak - before - size) / block, size / block)
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    loads = [[float(word) for word in line.split()] for line in out.splitlines()]
    assert len(loads) == 2
    for above, blocks in loads:
        assert blocks > 6
        assert 0 <= above < 1, loads


@pytest.mark.parametrize("prompt", ["The ", "def main("])
def test_200_tokens_of_a_calibrated_recipe_are_those_of_the_dense_folder(prompt: str, calibrated: Path):
    texts = []
    for name in ("dense", "packed"):
        loaded, tokenizer = moesparse.load_pretrained(calibrated / name)
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = loaded.generate(**inputs, do_sample=False, min_new_tokens=200, max_new_tokens=200)[0].tolist()
        texts.append(tokens)
        assert len(tokens) >= 200
        assert len(list(packed_blocks(loaded))) == (4 if name == "packed" else 0)
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model pruned with calibration and re-solved weights, dense and packed on the disk."""
    from moesparse.checkpoints.repack import pack_folder

    folder = tmp_path_factory.mktemp("calibrated")
    model, tokenizer = moesparse.demo.load()
    recipe = moesparse.Recipe(weights="2:4", saliency="moe-pruner", update="least-squares")
    report = moesparse.prune(model, moesparse.demo.windows("calibration")[:8], recipe)
    save_pretrained(model, folder / "dense", tokenizer=tokenizer, recipe=report.recipe)
    pack_folder(folder / "dense", folder / "packed")
    return folder
