"""--chat and packed texts at every command that reads text, and what their reports say was read."""

import gzip
import json
import sys

import pytest
from small_text import make_tokenizer, prose, write

from moesparse import text
from moesparse.calibration.windows import windows_hash
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


def test_mixtures_and_records_at_every_command(place, tmp_path, monkeypatch, capsys):
    """Shares and --no-pack reach the windows, the report says what was drawn, and --resume holds to it."""
    code = write(tmp_path / "code.jsonl", "".join(json.dumps({"text": prose(9, seed=n)}) + "\n" for n in range(40)))
    talk = write(tmp_path / "talk.jsonl", "".join(json.dumps({"text": prose(3, seed=n)}) + "\n" for n in range(40)))
    mixed = ("--calibration", f"{code}=code:0.25", "--calibration", f"{talk}=talk:0.75")
    sizes = ("--samples", "8", "--length", "24", "--json")
    tokenizer = make_tokenizer()
    sources = [text.TextSource(code, "code", 0.25), text.TextSource(talk, "talk", 0.75)]
    rows, mask, domains = text.record_windows(sources, tokenizer, samples=8, length=24)
    held = [int(mask[[each == name for each in domains]].sum()) for name in ("code", "talk")]
    dense = place / "model"
    prune = ("prune", dense, "OUT", "--saliency", "wanda", "--update", "none", *mixed, *sizes)
    for name, words in {
        "prune": prune,
        "prune --whole": (*prune, "--whole"),
        "calibrate": ("calibrate", dense, "OUT", *mixed, *sizes),
    }.items():
        for packed in (True, False):
            target = tmp_path / f"{name.replace(' ', '')}{packed}"
            more = () if packed else ("--no-pack",)
            code_, out, err = run(monkeypatch, capsys, *(target if word == "OUT" else word for word in words), *more)
            assert code_ in (0, None), (name, err)
            result = json.loads(out)
            noted = result["sources"] if name == "calibrate" else result["calibration"]["sources"]
            assert [each["share"] for each in noted] == [0.25, 0.75]
            tokens = [48, 144] if packed else held
            assert [each["tokens"] for each in noted] == tokens
            assert (result["tokens"] if name == "calibrate" else result["calibration"]["tokens"]) == sum(tokens)
            if name == "calibrate" and not packed:
                assert result["text"] == windows_hash(rows, mask)
                assert f"tokens, {noted[0]['cut']} cut at their end" in err and noted[0]["cut"] > 0
    code_, _, err = run(monkeypatch, capsys, *prune[:2], tmp_path / "x", *prune[3:], "--dry-run")
    assert code_ in (0, None), err


def test_a_stopped_run_does_not_go_on_with_other_windows(place, tmp_path, monkeypatch, capsys):
    lines = "".join(json.dumps({"text": prose(9, seed=n)}) + "\n" for n in range(40))
    chosen = ("--calibration", write(tmp_path / "a.jsonl", lines), "--samples", "4", "--length", "16")
    words = ("calibrate", place / "model", tmp_path / "s", *chosen)

    def stopped(*args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moesparse.calibration.checkpoint.from_shards", stopped)
        assert run(monkeypatch, capsys, *words)[0] not in (0, None)
    code, _, err = run(monkeypatch, capsys, *words, "--no-pack", "--resume")
    assert code == 1 and "windows" in err, err
    code, _, err = run(monkeypatch, capsys, *words, "--resume")
    assert code in (0, None), err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--calibration", "A=a:0.4", "--calibration", "A=b:0.4"), "add up to 1, got 0.4 + 0.4 = 0.8"),
        (("--calibration", "A=a:0.4", "--calibration", "A=b"), "all sources must have a share, or none"),
        (("--calibration", "reap-code"), "--chat must come with --calibration reap-code, whose records are chats"),
        (("--calibration", "c5"), "must be a file, a published mix (c4, wikitext, reap-code) or a datasets name"),
        (
            ("--calibration", "A", "--no-pack", "--demonstrations-from-model", "4"),
            "--no-pack must be left out with --demonstrations-from-model",
        ),
        (("--calibration", "A=a:0.001", "--calibration", "A=b:0.999"), "--samples must be at least 1000 for a share"),
        (("--statistics", "A=a:0.4"), "--statistics must be FILE or FILE=DOMAIN, got a share of 0.4 for"),
    ],
)
def test_what_cannot_be_asked_of_text_is_said_at_once(place, tmp_path, monkeypatch, capsys, words, match):
    file = write(tmp_path / "a.txt", prose(200))
    asked = [word.replace("A", file, 1) if word.startswith("A") else word for word in words]
    more = ("--experts", "0.25", "--update", "none") if "--statistics" in asked else ()
    code, _, err = run(
        monkeypatch, capsys, "prune", place / "model", tmp_path / "x", *asked, *more, "--samples", "8", "--length", "8"
    )
    assert code in (1, 2) and match in " ".join(err.split()), err


def test_a_text_to_score_has_no_share(place, tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "a.txt", prose(200))
    code, _, err = run(monkeypatch, capsys, "eval", place / "model", "--text", f"{file}=a:0.4")
    assert code in (1, 2) and "--text must be FILE or FILE=DOMAIN, got a share of 0.4 for" in err


def test_embedded_text_is_named_without_a_path(tmp_path, monkeypatch, capsys):
    code, out, err = run(
        monkeypatch, capsys, "calibrate", "demo", tmp_path / "s", "--samples", "6", "--length", "16", "--json"
    )
    assert code in (0, None), err
    assert [each["source"].split()[0] for each in json.loads(out)["sources"]] == ["embedded"] * 6
