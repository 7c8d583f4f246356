"""What the commands take over of a folder, and what they refuse of one before any work."""

import json

import pytest
from small_text import WORDS, make_tokenizer
from typer.testing import CliRunner

from moesparse.checkpoints.history import REPORT_FILE
from moesparse.cli import app, main
from moesparse.errors import MoESparseError
from moesparse.models.on_disk import LayersOnDisk
from moesparse.system.shards import Shards
from moesparse.testing import tiny_model

# what qwen3 says: transformers would write it in another order, and with the token of config.json in its place
SETTINGS = '{"do_sample": true,   "eos_token_id": [2, 7], "temperature": 0.6, "top_k": 20, "top_p": 0.95}'
# what no transformers would write: a temperature that is not used
INVALID = '{"do_sample": false, "eos_token_id": 2, "temperature": 0.6}'
QUICK = ("--saliency", "wanda", "--update", "none")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def ran(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    """In what words."""
    result = run(*arguments)
    assert isinstance(result.exception, MoESparseError) and "plan" not in result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS) * 200)
    return ("--calibration", file, "--samples", "8", "--length", "32")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny_model("qwen3_moe", vocab_size=320).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(SETTINGS)
    (folder / "LICENSE").write_text("mine")
    return folder


@pytest.mark.parametrize("settings", [SETTINGS, INVALID])
def test_generation_settings_go_through_every_command(settings, source, text, tmp_path):
    (source / "generation_config.json").write_text(settings)
    pruned = tmp_path / "pruned"
    ran("prune", source, pruned, *QUICK, *text)
    made = [pruned]

    def make(command, *arguments):
        out = tmp_path / f"out-{len(made)}"
        ran(command, *arguments, *(("-o", out) if command == "distill" else (out,)))
        made.append(out)
        return out

    if settings == SETTINGS:
        make("prune", source, *QUICK, *text, "--whole")
        make("prune", source, "--target-bytes", "0.7", "--no-compare-uniform", *QUICK, *text)
        make("prune", source, "--experts", "0.25", "--update", "none", *text)
        teacher = ("--teacher", source, "--epochs", "1", *text)
        make("distill", pruned, *teacher, "--mode", "global")
        make("distill", pruned, *teacher, "--mode", "blockwise")
        make("unpack", make("pack", pruned))
    else:
        make("prune", source, *QUICK, *text, "--whole")
    for out in made:
        assert (out / "generation_config.json").read_text() == settings, out
        assert (out / "LICENSE").read_text() == "mine", out


def test_weights_after_experts_and_a_distillation_without_a_refit(source, text, tmp_path):
    ran("prune", source, tmp_path / "fewer", "--keep-experts", "5", "--update", "none", *text)
    ran("prune", tmp_path / "fewer", tmp_path / "both", *QUICK, *text)
    recipe = json.loads((tmp_path / "both" / "config.json").read_text())["moesparse"]["recipe"]
    assert (recipe["keep_experts"], recipe["weights"]) == (5, "2:4")
    assert "5 of 8 experts kept" in (tmp_path / "both" / "README.md").read_text()
    assert run("inspect", tmp_path / "both", "--against", source).exit_code == 0

    teacher = ("--teacher", source, *text)
    told = ran("distill", tmp_path / "fewer", "-o", tmp_path / "trained", *teacher, "--epochs", "4", "--logits", "1")
    assert "lambda 0, the text alone trains them" in told.output
    before, after = (Shards.open(tmp_path / name) for name in ("fewer", "trained"))
    before, after = ({name: each.read(name) for name in each.tensors} for each in (before, after))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and all(".mlp.experts." in name for name in changed)
    assert "mode='global' trains them" in refused(
        "distill", tmp_path / "fewer", "-o", tmp_path / "no", *teacher, "--mode", "blockwise"
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--whole",), ("--experts", "0.25")], ids=str)
def test_a_link_out_of_the_folder_is_refused_before_any_work(more, source, text, tmp_path):
    store = tmp_path / "store"
    source.rename(store)
    source.mkdir()
    for file in store.iterdir():
        (source / file.name).symlink_to(file)
    said = refused("prune", source, tmp_path / "out", *text, *more)
    assert "must not lead out of its folder, got a link to" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more", [("--whole", "--allow-pruned"), ("--target-bytes", "0.7"), ("--experts", "0.25", "--whole")], ids=str
)
def test_a_whole_quantised_model_is_refused_before_any_work(more, source, text, tmp_path):
    file = source / "config.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"quantization_config": {"quant_method": "mxfp4"}}))
    # none could be read
    (source / "model.safetensors").write_bytes(b"")
    assert "mxfp4" in refused("prune", source, tmp_path / "out", *text, *more)
    assert not (tmp_path / "out").exists()


def test_other_formats_are_named_by_pack(source, text, tmp_path):
    ran("prune", source, tmp_path / "pruned", *QUICK, *text)
    (tmp_path / "pruned" / "model-q4.gguf").write_bytes(b"weights")
    told = ran("pack", tmp_path / "pruned", tmp_path / "packed")
    assert "model-q4.gguf: not copied" in told.output
    held = json.loads((tmp_path / "packed" / REPORT_FILE).read_text())
    assert held["surplus"] == {"formats": ["model-q4.gguf"]}


def test_an_error_of_transformers_is_not_called_ours(tmp_path, text, monkeypatch, capsys):
    """A config.json that contradicts itself, which transformers sees in its forward."""
    tiny_model("glm4v_moe", vocab_size=320).save_pretrained(tmp_path / "in")
    make_tokenizer().save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [8, 12, 12]
    file.write_text(json.dumps(config))
    arguments = ["prune", tmp_path / "in", tmp_path / "out", *QUICK, *text]
    monkeypatch.setattr("sys.argv", ["moesparse", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 1 and not (tmp_path / "out" / "config.json").exists()
    assert "It was raised in" in said and "of transformers' modeling_glm4v_moe.py" in said
    assert "This is a defect of moesparse" not in said

    # and one of ours is
    monkeypatch.setattr(LayersOnDisk, "open", lambda *_: [][1])
    with pytest.raises(SystemExit):
        main()
    assert "list index out of range This is a defect of moesparse" in " ".join(capsys.readouterr().err.split())
