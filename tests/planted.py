"""Checkpoint folders as people have them: a family's tiny model, and oddities of real releases drawn by its name.

What is planted is written down, so that a test knows it from here and not from the code under test.
"""

import json
import os
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moesparse.testing import MOE_FAMILIES, has_family, tiny_model

EXPERT = re.compile(r"(.*layers\.(\d+)\..*\bexperts\.)(\d+)(\..*)")
STACKED = re.compile(r".*layers\.(\d+)\..*(?<!shared_)(\bexperts\.(down|gate_up|up)_proj|experts\.fc[12]|_linear)\b.*")
EXPERTS = 8
SEED = int(os.environ.get("MOESPARSE_PLANT_SEED", "0"))
"""Of what is drawn; another one plants other oddities in each family."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# under these names the hub has them; transformers 5 writes another one of the same meaning
HUB_COUNTS = {"qwen3_moe": "num_experts", "mellum": "num_experts", "kolibri1": "num_experts"}

ODDITIES = (
    "float32 routers",
    "float32 norms",
    "experts of another dtype",
    "a matrix of another dtype",
    "mtp",
    "mtp without experts",
    "extra heads",
    "inv_freq",
    "scales",
    "odd tensors",
    "a head beside tied embeddings",
    "shards",
    "other formats",
    "generation settings that would not validate",
    "no generation settings",
    "code",
    "links",
    "hub cache",
    "folders",
    "hub-form config",
    "no dtype in the config",
    "a config of another hand",
)


@dataclass
class Planted:
    """What lies in a folder.

    Attributes:
        oddities: of ODDITIES, those that the family can have and that were drawn.
        beyond: tensors of layers that predict further tokens.
        strange: all tensors that the model has no place for, but for those that its family leaves out by pattern.
    """

    family: str
    folder: Path
    oddities: set[str]
    beyond: set[str] = field(default_factory=set)
    strange: set[str] = field(default_factory=set)


FAMILIES = [
    name for name in MOE_FAMILIES if has_family(name) and CONFIG_MAPPING[name] in AutoModelForCausalLM._model_mapping
]


def plant(family: str, folder: Path, seed: int = SEED, oddities: set[str] | None = None) -> Planted:
    """A folder of the family: the same for the same seed.

    Args:
        oddities: in a bf16 checkpoint; about half of them, and some dtype, where they are not given.
    """
    draw = random.Random(f"{family} {seed}")
    drawn = {each for each in ODDITIES if draw.random() < 0.5}
    planted = Planted(family, folder, drawn if oddities is None else set(oddities))
    torch.manual_seed(draw.randrange(1 << 30))
    dtype = draw.choice(["bfloat16", "bfloat16", "float16", "float32"]) if oddities is None else "bfloat16"
    model = tiny_model(family).to(DTYPES[dtype])
    model.save_pretrained(folder)
    _weights(planted, DTYPES[dtype], model, draw)
    _files(planted, draw)
    _config(planted, dtype, draw)
    if "hub cache" in planted.oddities:
        _as_in_the_cache(planted)
    return planted


def _weights(planted: Planted, dtype: torch.dtype, model: torch.nn.Module, draw: random.Random) -> None:
    file, have = planted.folder / "model.safetensors", planted.oddities
    tensors = load_file(file)
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    routers = [
        key for key in tensors if re.search(r"router|gate\.(weight|wg)|_bias$|statics", key) and "proj" not in key
    ]
    norms = [key for key in tensors if "norm" in key]
    last = max(int(found[1]) for key in tensors if (found := re.match(r".*?layers\.(\d+)\.", key)))
    matrices = [key for key in tensors if is_matrix(key, tensors[key].shape)]
    recast = dict.fromkeys(
        [*(routers * ("float32 routers" in have)), *(norms * ("float32 norms" in have))], torch.float32
    )
    if "experts of another dtype" in have:
        layer = draw.choice(sorted({layer_of(key) for key in matrices}))
        recast |= {key: other for key in matrices if layer_of(key) == layer}
    if "a matrix of another dtype" in have:
        recast[draw.choice(matrices)] = torch.float16 if dtype != torch.float16 else torch.bfloat16
    for key, wanted in recast.items():
        # with bits that the model's dtype does not have
        tensors[key] = (tensors[key].float() * (1 + torch.rand(tensors[key].shape) / 1000)).to(wanted)
    added = _surplus(planted, tensors, last, draw)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if "lm_head.weight" in tied:
        have.add("a head beside tied embeddings")
        head = tensors[next(key for key in tensors if re.search(r"embed_tokens\.weight|word_embeddings", key))]
        tensors["lm_head.weight"] = head.clone() if draw.random() < 0.5 else head * 1.5
    else:
        have.discard("a head beside tied embeddings")
    planted.strange = added.keys() - tied.keys()
    ignored = [re.compile(each) for each in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    planted.strange = {key for key in planted.strange if not any(each.search(key) for each in ignored)}
    _save(planted, tensors | added, draw)


def is_matrix(name: str, shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of an expert, or all experts' of a layer."""
    one, all_of_them = EXPERT.fullmatch(name), STACKED.fullmatch(name)
    return bool((one and len(shape) == 2) or (all_of_them and len(shape) == 3 and shape[0] <= EXPERTS))


def layer_of(name: str) -> int:
    found = re.match(r".*?layers\.(\d+)\.", name)
    return -1 if found is None else int(found[1])


def _surplus(planted: Planted, tensors: dict, last: int, draw: random.Random) -> dict[str, torch.Tensor]:
    """Tensors that no model of transformers has a place for."""
    have, added = planted.oddities, dict[str, torch.Tensor]()
    prefix = re.match(r".*?layers\.", next(key for key in tensors if "layers." in key))[0]
    layer = {key: each for key, each in tensors.items() if key.startswith(f"{prefix}{last}.")}
    if {"mtp", "mtp without experts"} & have:
        place = draw.choice([f"{prefix}{last + 1}.", f"{prefix}{last + 3}.", "mtp.layers.0."])
        for key, each in layer.items():
            if "mtp" in have or not re.search(r"expert|router|gate|mlp|moe|feed_forward|mixer", key):
                added[place + key.removeprefix(f"{prefix}{last}.")] = each.clone()
        width = next(each.shape[-1] for key, each in tensors.items() if re.search(r"embed_tokens\.|embeddings", key))
        added |= {f"{place}{name}.weight": torch.randn(width) for name in ("enorm", "hnorm", "shared_head.norm")}
        added[f"{place}eh_proj.weight"] = torch.randn(width, 2 * width).bfloat16()
        planted.beyond = set(added)
    if "extra heads" in have:
        added |= {"reward_head.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1).double()}
    if "inv_freq" in have:
        added["model.rotary_emb.inv_freq"] = torch.randn(4)
        added |= {f"{prefix}{n}.self_attn.rotary_emb.inv_freq": torch.randn(4) for n in range(last + 1)}
    if "scales" in have:
        added |= {
            key.removesuffix("weight") + "input_scale": torch.rand(())
            for key in tensors
            if EXPERT.fullmatch(key) and key.endswith(".weight")
        }
        added[f"{prefix}0.self_attn.k_proj.k_scale"] = torch.rand(1)
    if "odd tensors" in have:
        added |= {
            "empty": torch.empty(0, 3),
            "a name with spaces, ü": torch.tensor([True, False]),
            "float8": torch.randn(4, 4).to(torch.float8_e4m3fn),
            f"{prefix}0.counts": torch.arange(5, dtype=torch.int64),
        }
    return added


def _save(planted: Planted, tensors: dict[str, torch.Tensor], draw: random.Random) -> None:
    folder, names = planted.folder, list(tensors)
    single = folder / "model.safetensors"
    if "shards" not in planted.oddities:
        save_file(tensors, single, metadata={"format": "pt"})
        return
    single.unlink()
    draw.shuffle(names)
    where = {name: f"model-0000{draw.randrange(3) + 1}-of-00003.safetensors" for name in names}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1, "note": "of another hand"}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(planted: Planted, draw: random.Random) -> None:
    folder, have = planted.folder, planted.oddities
    (folder / "README.md").write_text("# The card of the source\n")
    (folder / "LICENSE").write_bytes(b"mine\r\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    settings = folder / "generation_config.json"
    settings.unlink(missing_ok=True)
    if "generation settings that would not validate" in have:
        settings.write_text('{"temperature": 0.6,   "do_sample": false, "eos_token_id": [1, 2]}')
        have.discard("no generation settings")
    elif "no generation settings" not in have:
        settings.write_text('{"eos_token_id": [1, 2], "top_p": 0.90, "transformers_version": "4.51.0"}\n')
    if "code" in have:
        (folder / "modeling_mine.py").write_text("raise SystemExit('nobody runs this')\n")
    if "folders" in have:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_bytes(b"\xff\x00 no text")
        (folder / ".gitattributes").write_text("*.safetensors lfs\n")
        (folder / "a file, ü.txt").touch()
    if "links" in have:
        (folder / "LICENSE.txt").symlink_to("LICENSE")
    if "other formats" in have:
        (folder / "pytorch_model.bin").write_bytes(b"dense")
        shutil.copy(next(folder.glob("model*.safetensors")), folder / "consolidated.safetensors")


def _config(planted: Planted, dtype: str, draw: random.Random) -> None:
    file, have = planted.folder / "config.json", planted.oddities
    config = json.loads(file.read_text())
    config.pop("dtype", None)
    if "no dtype in the config" not in have:
        config["torch_dtype" if "hub-form config" in have else "dtype"] = dtype
    if "hub-form config" in have:
        _in_hub_form(config, planted.family)
    if "code" in have:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    if planted.beyond:
        key = "mtp_num_hidden_layers" if planted.family.startswith("qwen3_") else "num_nextn_predict_layers"
        config[key] = 1
    if "a config of another hand" not in have:
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    config = {"read by another engine": {"scale": 1e-6, "n": [1, 2]}, "größe": "Ü"} | config
    indent, end = draw.choice([(None, ""), ("\t", "\r\n"), (4, "\n\n"), (3, "\r\n")])
    text = json.dumps(config, indent=indent, ensure_ascii=draw.random() < 0.5).replace("1e-06", "0.0000010")
    if end == "\r\n":
        text = text.replace("\n", "\r\n")
    file.write_bytes((text + end).encode())


def _in_hub_form(config: dict, family: str) -> None:
    """What transformers 5 calls rope_parameters, under the names of transformers 4."""
    rope = config.get("rope_parameters") or {}
    # without a word of gpt-oss' own, transformers takes its scaling to be meant
    if (
        family != "gpt_oss"
        and rope.get("rope_type") == "default"
        and set(rope) <= {"rope_type", "rope_theta", "partial_rotary_factor"}
    ):
        del config["rope_parameters"]
        config |= {key: value for key, value in rope.items() if key != "rope_type"} | {"rope_scaling": None}
    if family in HUB_COUNTS:
        config[HUB_COUNTS[family]] = config.pop("num_local_experts")
    config["transformers_version"] = "4.51.0"


def _as_in_the_cache(planted: Planted) -> None:
    """Move every file where the hub's cache has it, and link to it from a snapshot."""
    root = planted.folder.with_name(f"models--{planted.folder.name}")
    snapshot, blobs = root / "snapshots" / "0123abc", root / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(planted.folder.rglob("*"))):
        if file.is_dir():
            continue
        link = snapshot / file.relative_to(planted.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(file.read_bytes())
        link.symlink_to(blobs / str(number))
    shutil.rmtree(planted.folder)
    planted.folder = snapshot
