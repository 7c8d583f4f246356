"""docs/packed-format.md says to the byte what is written: its example is read from the page and compared."""

import json
import re
from pathlib import Path

import torch

from moesparse.packed.quantizer import FORMAT_VERSION, METHOD
from moesparse.system.shard_writer import ShardWriter
from moesparse.system.shards import TensorSpec
from moesparse_kernels import NMWeight

PAGE = (Path(__file__).parents[2] / "docs/packed-format.md").read_text()
EXAMPLE = PAGE[PAGE.index("## Example") :]
WEIGHT = torch.tensor([[1, 0, 0, -2, 0, 0.5, 3, 0], [0, 0, 0, 0, 7, 0, 0, 0]], dtype=torch.bfloat16)


def hex_lines() -> list[bytes]:
    return [bytes.fromhex(line) for line in re.findall(r"^    ((?:[0-9a-f]{2} ?)+)$", EXAMPLE, flags=re.MULTILINE)]


def test_the_example_is_what_packing_writes(tmp_path: Path):
    rows = [[float(word) for word in line.replace("|", " ").split()] for line in EXAMPLE.splitlines()[4:6]]
    assert torch.equal(torch.tensor(rows, dtype=torch.bfloat16), WEIGHT)
    values, index, start = hex_lines()[:2], hex_lines()[2:4], hex_lines()[4]
    packed = NMWeight.pack(WEIGHT[None], n=2, m=4)
    assert [bytes(row.view(torch.uint8).tolist()) for row in packed.values[0]] == values
    assert [bytes(row.tolist()) for row in packed.index[0]] == index

    key = "experts.0.w1.weight"
    specs = [TensorSpec.of(key, torch.bfloat16, (2, 4)), TensorSpec.of(f"{key}_meta", torch.uint8, (2, 1))]
    with ShardWriter(tmp_path, specs, 10**9) as writer:
        writer.write(key, packed.values[0])
        writer.write(f"{key}_meta", packed.index[0])
    header = re.search(r"^```\n(\{.*\})\n```", EXAMPLE, flags=re.MULTILINE)
    assert header is not None
    text = header[1].encode()
    text += b" " * (-len(text) % 8)
    assert start == len(text).to_bytes(8, "little")
    assert (tmp_path / "model.safetensors").read_bytes() == start + text + b"".join(values + index)


def test_the_decoder_on_the_page_reads_any_pattern():
    code = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert code is not None
    room: dict = {}
    exec(code[1], room)  # the page's own lines
    generator = torch.Generator().manual_seed(0)
    for n, m in ((2, 4), (1, 4), (6, 8), (3, 16), (8, 32)):
        weight = torch.randn(3, 5, 64, generator=generator)
        mask = torch.zeros(3, 5, 64 // m, m, dtype=torch.bool)
        mask.scatter_(-1, torch.rand(mask.shape, generator=generator).topk(n, dim=-1).indices, True)
        dense = weight * mask.flatten(-2)
        packed = NMWeight.pack(dense, n=n, m=m)
        assert packed.values.shape == (3, 5, 64 // m * n) and packed.index.shape == (3, 5, 8)
        for expert in range(3):
            for row in range(5):
                values, meta = packed.values[expert, row].tolist(), packed.index[expert, row].tolist()
                assert room["decode_row"](values, meta, 64) == dense[expert, row].tolist()


def test_the_config_on_the_page_is_the_version_that_is_written():
    found = re.search(r'"quantization_config": (\{.*?\n\})', PAGE, flags=re.DOTALL)
    assert found is not None
    config = json.loads(found[1])
    assert (config["quant_method"], config["format_version"]) == (METHOD, FORMAT_VERSION)
    assert f"format version {FORMAT_VERSION}" in PAGE.splitlines()[0]
