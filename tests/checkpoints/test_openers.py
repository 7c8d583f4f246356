"""A folder that cannot be opened: one sentence with its cure, the same from every command, and no code of it is run."""

import json
import os
import pty
import re
import select
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import moesparse_command
from safetensors.torch import load_file, save_file
from small_text import make_tokenizer, prose, run_cure
from transformers import AutoModelForCausalLM, dynamic_module_utils

import moesparse
from moesparse.cli import main
from moesparse.errors import CheckpointError
from moesparse.models.meta import meta_model
from moesparse.models.tokenizer import find_tokenizer, load_tokenizer
from moesparse.testing import tiny_model

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4976698672\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint in several shards with a tokenizer, and a text."""
    root = tmp_path_factory.mktemp("good")
    tiny_model("qwen3_moe", vocab_size=320).save_pretrained(root / "model", max_shard_size="150KB")
    make_tokenizer().save_pretrained(root / "model")
    assert len(list((root / "model").glob("*.safetensors"))) > 2
    (root / "text.txt").write_text(prose(400))
    return root


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good / "model", tmp_path / "model")


def edit(file, **values):
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def commands(folder, good, tmp_path):
    """Name -> words of every command that opens a model."""
    out, sized = tmp_path / "out", ("--samples", "2", "--length", "16")
    text = ("--calibration", good / "text.txt", *sized)
    return {
        "prune": ("prune", folder, out, *text),
        "prune a dry run": ("prune", folder, out, "--dry-run", *text),
        "prune --whole": ("prune", folder, out, "--whole", *text),
        "calibrate": ("calibrate", folder, out, *text),
        "distill": ("distill", folder, "--teacher", good / "model", "-o", out, *text),
        "distill blockwise": ("distill", folder, "--teacher", good / "model", "-o", out, *text, "--mode", "blockwise"),
        "inspect": ("inspect", folder),
        "pack": ("pack", folder, out),
        "unpack": ("unpack", folder, out),
        "eval": ("eval", folder, "--text", good / "text.txt", "--length", "16"),
        "serve": ("serve", folder, "--port", "0"),
        "report": ("report", folder, "-o", tmp_path / "page.html"),
    }


def said(monkeypatch, capsys, words):
    """Exit code and what stands on standard error behind "error: "."""
    monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert "Traceback" not in err and "defect" not in err, err
    assert err.count("error: ") == 1, err
    return stop.value.code, " ".join(err.split("error: ")[1].split())


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def pointer_weights(folder):
    first_shard(folder).write_text(POINTER)


def cut(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


def cut_to_nothing(folder):
    first_shard(folder).write_bytes(b"")


def only_bin(folder):
    state = {}
    for shard in folder.glob("*.safetensors"):
        state |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    torch.save(state, folder / "pytorch_model.bin")


def only_gguf(folder):
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / INDEX).unlink()
    (folder / "q4.gguf").write_bytes(b"GGUF")


def tensor_twice(folder):
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(one).items()))
    save_file({**load_file(other), name: tensor}, other, metadata={"format": "pt"})


def absent_file(folder):
    first_shard(folder).unlink()


def absent_tensor(folder):
    shard = first_shard(folder)
    tensors = load_file(shard)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, shard, metadata={"format": "pt"})


def pointer_config(folder):
    (folder / "config.json").write_text(POINTER)


def no_config(folder):
    (folder / "config.json").unlink()


def no_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def empty_config(folder):
    (folder / "config.json").write_text("")


def no_type(folder):
    (folder / "config.json").write_text("{}")


def unknown_type(folder):
    edit(folder / "config.json", model_type="kimi_k9", auto_map={"AutoConfig": "configuration_kimi.KimiConfig"})
    (folder / "configuration_kimi.py").write_text("raise SystemExit('code of a checkpoint was run')\n")


def dtype_auto(folder):
    edit(folder / "config.json", dtype="auto")


def impossible(folder):
    edit(folder / "config.json", hidden_act="mystery")


FAULTS = {
    pointer_weights: r"model-00001-of-\d+\.safetensors must be the file itself, got the pointer that Git LFS .*git lfs",
    cut: r"is truncated: its header describes [\d,]+ bytes, the file has [\d,]+; download it again",
    cut_to_nothing: r"must be a safetensors file, got 0 bytes .*: download it again",
    only_bin: r"got pytorch_model\.bin; only safetensors weights are read\. This writes a folder .*: python -c ",
    only_gguf: r"must hold model\.safetensors or .*, got q4\.gguf; only safetensors weights are read$",
    tensor_twice: r"must lie in one shard, got .*00001.* and .*00002.*: download .* or load and save it once with",
    absent_file: r"must hold model-00001-of-\d+\.safetensors, which .*index\.json names, .* without it: download what",
    absent_tensor: r"must hold '.*' as .*index\.json says, and does not: .* of two checkpoints; download both again",
    pointer_config: r"config\.json must be the file itself, got the pointer that Git LFS leaves .*: run git lfs pull",
    no_config: r"(MODEL|SOURCE) must be a folder with a config\.json, got .* without one",
    no_json: r"config\.json must be valid JSON, got ",
    empty_config: r"config\.json must be valid JSON, got an empty file: download it again",
    no_type: r"config\.json must name its model_type, got None: take the config\.json of the original model",
    unknown_type: r"must name a model_type that transformers [\d.]+ has, got 'kimi_k9': take a transformers that has",
    dtype_auto: r"must name a dtype of torch, .*, got dtype = 'auto': name that of the weights, .*, or remove dtype",
    impossible: r"must (describe a model|be a checkpoint) that transformers can .*mystery|cannot serve .*mystery",
}

# what a plan, which is made of config.json alone, meets too
OF_CONFIG = (pointer_config, no_config, no_json, empty_config, no_type, unknown_type, dtype_auto, impossible)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_command_says_the_same_one_sentence(fault, folder, good, tmp_path, monkeypatch, capsys):
    fault(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    sentences = {}
    for name, words in commands(folder, good, tmp_path).items():
        if name.endswith("dry run") and fault not in OF_CONFIG:
            continue
        code, sentences[name] = said(monkeypatch, capsys, words)
        assert code == 1, (name, sentences[name])
    assert [name for name, sentence in sentences.items() if not re.search(FAULTS[fault], sentence)] == [], sentences
    assert len(set(sentences.values())) == 1 or fault in (no_config, impossible), sentences
    assert not (tmp_path / "out").exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# Cures that work


def test_the_command_for_bin_weights_writes_what_is_read(folder, good):
    only_bin(folder)
    with pytest.raises(CheckpointError, match="python -c") as refused:
        moesparse.load_pretrained(folder)
    run_cure(str(refused.value))
    made, _ = moesparse.load_pretrained(folder.with_name("model-safetensors"))
    wanted = moesparse.load_pretrained(good / "model")[0].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.state_dict().items())


def test_a_checkpoint_with_a_tensor_twice_is_mended_by_saving_it_once(folder, tmp_path):
    tensor_twice(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "once")
    moesparse.load_pretrained(tmp_path / "once")


def test_an_index_without_metadata_is_mended_as_the_message_says(folder):
    edit(folder / INDEX, metadata=...)
    with pytest.raises(CheckpointError, match=r'must hold "metadata", .*: add "metadata": \{\}$'):
        moesparse.load_pretrained(folder)
    edit(folder / INDEX, metadata={})
    moesparse.load_pretrained(folder)


# dtype


def no_dtype(folder, **values):
    edit(folder / "config.json", **{"dtype": ..., "torch_dtype": ...} | values)


def mixed(folder):
    """All bfloat16 but for the tensor that comes first by its place in the first file, and the one first by name."""
    no_dtype(folder)
    for shard in sorted(folder.glob("*.safetensors")):
        save_file({name: each.bfloat16() for name, each in load_file(shard).items()}, shard, metadata={"format": "pt"})


def norm_in_float32(folder):
    mixed(folder)
    shard = first_shard(folder)
    tensors = load_file(shard)
    last = sorted(tensors)[-1]
    save_file(tensors | {last: tensors[last].float()}, shard, metadata={"format": "pt"})


def first_in_float32(folder):
    mixed(folder)
    shard = first_shard(folder)
    tensors = load_file(shard)
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first].float()}, shard, metadata={"format": "pt"})


def noted_in_index(folder):
    no_dtype(folder)
    edit(folder / INDEX, metadata={"total_size": 1, "dtype": "float16"})


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        no_dtype,
        lambda folder: no_dtype(folder, torch_dtype=None),
        lambda folder: no_dtype(folder, torch_dtype="bfloat16"),
        lambda folder: no_dtype(folder, dtype="float16", torch_dtype="bfloat16"),
        mixed,
        norm_in_float32,
        first_in_float32,
        noted_in_index,
    ],
    ids=["float32", "none", "null", "old key", "both keys", "bfloat16", "a norm", "the first", "index"],
)
def test_dtypes_are_those_that_transformers_takes_by_itself(folder, change):
    change(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    wanted = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in meta_model(folder).state_dict().items()} == wanted
    loaded = moesparse.load_pretrained(folder)[0].state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == wanted


# Tokenizers


def test_a_tokenizer_is_said_to_be_missing_and_never_invented(folder, good, tmp_path, monkeypatch, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    # transformers makes one of a single token for this family
    assert find_tokenizer(folder) is None and moesparse.load_pretrained(folder)[1] is None
    reads = {"prune", "prune --whole", "calibrate", "distill", "distill blockwise", "eval", "serve"}
    for name, words in commands(folder, good, tmp_path).items():
        if name in reads:
            code, sentence = said(monkeypatch, capsys, words)
            assert code == 1 and re.search(r"must hold a tokenizer .*, got none of tokenizer\.json, ", sentence), name
    # what reads no text needs none
    main_ends_well(
        monkeypatch, capsys, "prune", folder, tmp_path / "out", *["--saliency", "magnitude", "--update", "none"]
    )
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "json must be the file itself, got"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "that transformers can load without running code"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "tokenizer_config.json and: |have its vocabulary beside it",
        ),
    ],
    ids=["pointer", "cut", "config alone"],
)
def test_a_tokenizer_that_cannot_be_loaded_is_said_with_its_reason(folder, change, match):
    change(folder)
    with pytest.raises(CheckpointError, match=match):
        load_tokenizer(folder)
    with pytest.warns(UserWarning, match=f"no tokenizer: .*({match})"):
        assert moesparse.load_pretrained(folder)[1] is None


def main_ends_well(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None), capsys.readouterr().err


# Quantised models


def test_a_quantised_model_whose_library_is_missing_is_one_sentence(folder, good, tmp_path, monkeypatch, capsys):
    edit(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    words = commands(folder, good, tmp_path)
    code, sentence = said(monkeypatch, capsys, words["eval"])
    wanted = (
        r"must be a checkpoint that transformers can load here, got one quantised by 'awq', to which it says: .*; give"
    )
    assert code == 1 and re.search(wanted, sentence), sentence
    code, sentence = said(monkeypatch, capsys, words["prune"])
    assert code == 1 and "must hold tensors of awq, as its quantization_config says, got plain ones alone" in sentence


# Code of a checkpoint


def with_code(folder, mark):
    """Code for everything that transformers can be told to take from a folder, under a type that it has itself."""
    code = f"open({str(mark)!r}, 'w').write('x')\nclass Thing: pass\n"
    for name in ("configuration_mine", "modeling_mine", "tokenization_mine", "processing_mine"):
        (folder / f"{name}.py").write_text(code)
    edit(
        folder / "config.json",
        auto_map={"AutoConfig": "configuration_mine.Thing", "AutoModelForCausalLM": "modeling_mine.Thing"},
    )
    tokens = {
        "auto_map": {"AutoTokenizer": ["tokenization_mine.Thing", None], "AutoProcessor": "processing_mine.Thing"}
    }
    edit(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer", **tokens)
    processor = {"processor_class": "Thing", "auto_map": {"AutoProcessor": "processing_mine.Thing"}}
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps(processor))


def on_a_terminal(words, cache, seconds=120):
    """What a command prints on a pseudo terminal where somebody answers y to every question, and its exit code."""
    pid, end = pty.fork()
    if pid == 0:
        code = 99
        try:
            # not those of pytest: streams of the terminal, where the command looks for somebody to ask
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(each, "rw"[each > 0]) for each in range(3))
            dynamic_module_utils.HF_MODULES_CACHE = str(cache)
            moesparse_command([*map(str, words)])
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    out, until = b"", time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if select.select([end], [], [], 0.2)[0]:
                data = os.read(end, 4096)
                out += data
                if b"?" in data or b"y/N" in out:
                    os.write(end, b"y\n")
        except OSError:
            break
    _, status = os.waitpid(pid, 0)
    os.close(end)
    return os.waitstatus_to_exitcode(status), out.decode(errors="replace")


@pytest.mark.parametrize("known", [True, False], ids=["known type", "unknown type"])
def test_no_code_of_a_checkpoint_is_run_on_a_terminal_and_nobody_is_asked(folder, good, tmp_path, known):
    mark = tmp_path / "CODE_WAS_RUN"
    with_code(folder, mark)
    if not known:
        edit(folder / "config.json", model_type="mine")
    words = commands(folder, good, tmp_path)
    code, out = on_a_terminal(words["prune"], tmp_path / "modules")
    assert (code == 0) == known, out
    assert "y/N" not in out and "trust_remote_code" not in out, out
    assert not mark.exists() and not (tmp_path / "modules").exists()


def test_no_command_runs_code_of_a_checkpoint(folder, good, tmp_path, monkeypatch, capsys):
    mark = tmp_path / "CODE_WAS_RUN"
    with_code(folder, mark)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    for name, words in commands(folder, good, tmp_path).items():
        if name == "serve":
            continue
        monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, words)])
        with pytest.raises(SystemExit):
            main()
        said = capsys.readouterr().err
        assert not mark.exists() and "trust_remote_code" not in said and "defect" not in said, (name, said)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").unlink(missing_ok=True) if (tmp_path / "out").is_file() else None


def test_every_opener_of_transformers_is_told_to_run_no_code():
    """In the source: whatever reads a folder by an Auto class says trust_remote_code=False."""
    package = Path(moesparse.__file__).parent
    calls = re.compile(r"\bAuto\w+\.from_(?:pretrained|config)\((?:[^()]|\([^()]*\))*\)", re.S)
    found = [(file, call) for file in package.rglob("*.py") for call in calls.findall(file.read_text())]
    assert len(found) >= 4
    careless = [call for file, call in found if "trust_remote_code=False" not in call and "model_path()" not in call]
    # docstrings and messages show plain calls
    assert [call for call in careless if not re.search(r"packed_folder|sys\.argv|\(model_config|\"out", call)] == []
