"""--chat and packed texts at every command that reads text, and what their reports say was read."""

import gzip
import json
import sys

import pytest
from small_text import make_tokenizer, prose, write

from moesparse import text
from moesparse.cli import main
from moesparse.evaluate import perplexity_of_files
from moesparse.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
SIZES = ("--samples", "4", "--length", "16", "--json")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a chat template, and chats in gzip."""
    root = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_model("qwen3_moe", vocab_size=320).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    talks = [
        [{"role": "user", "content": prose(20, seed=2 * n)}, {"role": "assistant", "content": prose(9)}] for n in (1, 2)
    ]
    write(
        root / "chat.jsonl.gz", gzip.compress("".join(json.dumps({"messages": each}) + "\n" for each in talks).encode())
    )
    return root


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def commands(place, out):
    chats = ("--calibration", place / "chat.jsonl.gz", *SIZES)
    dense = place / "model"
    return {
        "prune": ("prune", dense, out, "--saliency", "wanda", "--update", "none", *chats),
        "prune --whole": ("prune", dense, out, "--saliency", "wanda", "--update", "none", "--whole", *chats),
        "calibrate": ("calibrate", dense, out, *chats),
        "distill": ("distill", place / "pruned", "--teacher", dense, "-o", out, "--epochs", "1", *chats),
        "eval": ("eval", dense, "--text", place / "chat.jsonl.gz", "--length", "16", "--json"),
        "report": ("report", dense, "--text", place / "chat.jsonl.gz", "--length", "16", "-o", out),
    }


def test_every_command_that_reads_text_reads_chats_when_asked(place, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, capsys, *commands(place, place / "pruned")["prune"], "--chat")[0] in (0, None)
    for name, words in commands(place, tmp_path / "out").items():
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 1 and 'line 1 is a chat record ("messages")' in err and "give --chat" in err, (name, err)
        assert not (tmp_path / "out").exists()
    read = {"documents": 2, "chats": 2}
    for name, words in commands(place, tmp_path).items():
        target = tmp_path / name.replace(" ", "")
        code, out, err = run(monkeypatch, capsys, *(target if word == tmp_path else word for word in words), "--chat")
        assert code in (0, None), (name, err)
        if name in ("eval", "report"):
            continue
        assert "chat.jsonl.gz: 2 documents, 2 of them chats laid out by the tokenizer's template" in err, name
        if name.startswith("prune"):
            noted = json.loads((target / "moesparse_report.json").read_text())["calibration"]["sources"]
            assert json.loads(out)["calibration"]["sources"] == noted
        elif name == "calibrate":
            noted = json.loads(out)["sources"]
        assert read.items() <= noted[0].items() and noted[0]["source"].endswith("chat.jsonl.gz")


def test_the_figure_of_chats_is_that_of_their_layout(place, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, *commands(place, tmp_path)["eval"], "--chat")
    assert code in (0, None), err
    result = json.loads(out)
    assert (result["files"][0]["documents"], result["files"][0]["chats"]) == (2, 2)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    windows, _ = text.evaluation_windows(place / "chat.jsonl.gz", tokenizer, 16, chat=True)
    assert result["tokens"] == windows.shape[0] * 15
    model = tiny_model("qwen3_moe", vocab_size=320)
    again = perplexity_of_files(model, tokenizer, [place / "chat.jsonl.gz"], 16, chat=True)
    assert result["perplexity"] == pytest.approx(again.overall.perplexity)


def test_embedded_text_is_named_without_a_path(tmp_path, monkeypatch, capsys):
    code, out, err = run(
        monkeypatch, capsys, "calibrate", "demo", tmp_path / "s", "--samples", "6", "--length", "16", "--json"
    )
    assert code in (0, None), err
    assert [each["source"].split()[0] for each in json.loads(out)["sources"]] == ["embedded"] * 6
