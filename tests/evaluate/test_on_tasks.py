"""lm-eval's tasks: the questions that ship, figures against what the model itself gives, and no network anywhere."""

import json
import math
import sys

import pytest
import torch
from small_text import make_tokenizer

import moesparse
from moesparse import demo, evaluate
from moesparse.cli import main
from moesparse.testing import tiny_model

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

from moesparse.evaluate import on_tasks, questions  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

LINES = (
    "And the LORD spake unto Moses, saying,",
    "a small boat (noun): a boat for one person",
    "def __init__(self, name):",
)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return demo.load()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The embedded model at 2:4, as the paper prunes and with nothing re-solved: dense with zeros, and packed."""
    model, tokenizer = demo.load()
    moesparse.prune(model, None, moesparse.Recipe(weights="2:4", saliency="magnitude", update="none"))
    root = tmp_path_factory.mktemp("pruned")
    moesparse.save_pretrained(model, root / "dense", tokenizer=tokenizer)
    moesparse.save_pretrained(model, root / "packed", tokenizer=tokenizer, packed=True)
    return root


@pytest.fixture(scope="module")
def all_tasks():
    """lm-eval's own files, read once for all tests."""
    return lm_eval_tasks.TaskManager(include_path=[on_tasks._OWN_TASKS])


@pytest.fixture
def known(all_tasks, monkeypatch):
    real = lm_eval_tasks.TaskManager

    def manager(include_path, include_defaults=True):
        return all_tasks if include_defaults else real(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", manager)


@pytest.fixture
def own_tasks(tmp_path):
    """Task files as a user writes them: bits per byte of short lines, and nine small ones by the paper's names."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    (folder / "lines.yaml").write_text(
        f"""
task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "lines.jsonl"}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )
    for number, name in enumerate(on_tasks.PAPER_TASKS):
        # the answer is the likely one in 9, 8, ... of the 9 questions
        rows = [
            {"q": "And the LORD spake unto", "a": ["Moses", "boat boat"], "right": int(row < number)}
            for row in range(9)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{a}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
        )
    return folder


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_the_questions_are_about_the_text(domain):
    text = demo.text("heldout", domain)
    rows = list(questions.continuation(domain)["test"])
    assert len(rows) == questions.QUESTIONS
    for row in rows:
        real = row["choices"][row["answer"]]
        assert f"{row['context']} {real}" in text
        assert len(set(row["choices"])) == 4
        assert not any(f"{row['context']} {other}" in text for other in row["choices"] if other != real)
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}
    assert len({row["context"] for row in rows}) == len(rows)

    words = list(questions.last_word(domain)["test"])
    assert len(words) > 0.8 * questions.QUESTIONS
    for row in words:
        assert f"{row['context']} {row['choices'][row['answer']]}" in text
        assert all(word in row["context"] for word in row["choices"])
        assert len(set(row["choices"])) == 4

    assert "".join(row["text"] for row in questions.pieces(domain)["test"]) == text
    assert rows == list(questions.continuation(domain)["test"])


def test_the_embedded_model_answers_far_above_chance(model_and_tokenizer):
    report = evaluate.tasks(*model_and_tokenizer, ["demo_continuation"], limit=16, batch_size=16)
    group = report["demo_continuation"]
    acc = group.metrics["acc"]
    # chance is 0.25; with 96 questions 0.45 lies 4.5 standard errors above it
    assert acc > 0.45
    assert group.samples == 96
    assert [task.depth for task in report.tasks] == [0] + [1] * len(demo.DOMAINS)
    parts = [report[f"demo_continuation::{domain}"].metrics["acc"] for domain in demo.DOMAINS]
    assert group.metrics["acc"] == pytest.approx(sum(parts) / len(parts))
    assert group.stderr["acc"] == pytest.approx(
        math.sqrt(group.metrics["acc"] * (1 - group.metrics["acc"]) / 96), rel=0.2
    )


def test_pruned_models_are_worse_and_packed_ones_the_same(model_and_tokenizer, pruned):
    options = {"limit": 2, "batch_size": 16}
    found = {"before": evaluate.tasks(*model_and_tokenizer, ["demo_perplexity"], **options)}
    for name in ("dense", "packed"):
        loaded = moesparse.load_pretrained(pruned / name, dtype=torch.float32)
        found[name] = evaluate.tasks(*loaded, ["demo_perplexity"], **options)
    bits = {name: report["demo_perplexity"].metrics["bits_per_byte"] for name, report in found.items()}
    assert bits["before"] + 0.05 < bits["dense"] < 2 * bits["before"]
    assert bits["packed"] == pytest.approx(bits["dense"], rel=1e-5)


def test_figures_are_what_the_model_gives(model_and_tokenizer, own_tasks):
    model, tokenizer = model_and_tokenizer
    nll = 0.0
    for line in LINES:
        # lm-eval puts the end-of-text token in front
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(line)["input_ids"]]])
        with torch.no_grad():
            nll += float(
                torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum")
            )
    report = evaluate.tasks(model, tokenizer, ["lines"], path=own_tasks, batch_size=1)
    wanted = nll / math.log(2) / sum(map(len, LINES))
    assert report["lines"].metrics["bits_per_byte"] == pytest.approx(wanted, rel=1e-4)
    assert report.tasks[0].samples == len(LINES)


def test_the_papers_mean_is_that_of_nine_accuracies(model_and_tokenizer, own_tasks):
    model, tokenizer = model_and_tokenizer
    model.train()
    report = evaluate.tasks(model, tokenizer, ["paper"], path=own_tasks)
    assert model.training
    model.eval()
    found = {task.name: task.metrics["acc"] for task in report.tasks}
    assert tuple(found) == on_tasks.PAPER_TASKS
    assert list(found.values()) == pytest.approx([(9 - number) / 9 for number in range(9)])
    assert report.paper_mean == pytest.approx(5 / 9)


def test_shots_seed_and_limit_reach_lm_eval(model_and_tokenizer, own_tasks):
    def ask(seed, **options):
        report = evaluate.tasks(*model_and_tokenizer, ["rte"], path=own_tasks, seed=seed, num_fewshot=2, **options)
        return report["rte"]

    first = ask(0)
    assert (first.shots, first.samples) == (2, 9)
    assert ask(0) == first
    assert ask(1, limit=4).samples == 4


def test_all_nine_are_tasks_of_lm_eval(all_tasks):
    assert set(on_tasks.PAPER_TASKS) <= set(all_tasks.all_tasks)
    assert "mmlu" in all_tasks.all_groups


def test_an_unknown_task_is_named_with_those_near_it(known):
    with pytest.raises(
        moesparse.MoESparseError, match=r"tasks must be demo, paper or .*, got 'helaswag'; near it: hella"
    ):
        evaluate.load_tasks(["helaswag"])


def test_a_task_of_the_hub_without_network_is_one_clear_error(known, monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(moesparse.MoESparseError, match=r"task arc_challenge could not be loaded: .*; without"):
        evaluate.load_tasks(["paper"])


def in_process(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moesparse", "eval", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_the_command_prints_json_and_writes_it(pruned, own_tasks, tmp_path, monkeypatch, capsys):
    words = ("--tasks", "lines,rte", "--tasks-path", own_tasks, "--limit", "3", "--num-fewshot", "1")
    file = tmp_path / "new" / "result.json"
    code, out, err = in_process(monkeypatch, capsys, pruned / "packed", *words, "--json", "-o", file)
    assert code in (0, None), err
    result = json.loads(out)
    assert [task["name"] for task in result["tasks"]] == ["lines", "rte"]
    assert result["tasks"][1]["metrics"].keys() == {"acc"}
    assert (result["limit"], result["seed"]) == (3, 0)
    assert json.loads(file.read_text()) == {"model": str(pruned / "packed")} | result


def test_the_command_shows_a_table(own_tasks, monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, "demo", "--tasks", "paper", "--tasks-path", own_tasks)
    assert code in (0, None), err
    rows = {line.strip("│ ").split("│")[0].strip(): line for line in out.splitlines() if "│" in line}
    assert rows.keys() >= {*on_tasks.PAPER_TASKS, "mean of the nine"}
    assert "0.5556" in rows["mean of the nine"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "demo", "--text", "a.txt"], 2, "--text must not be given with --tasks"),
        (["--limit", "3"], 2, "--limit must be given with --tasks"),
        (["--tasks", "demo", "--limit", "0"], 2, "Invalid value for '--limit'"),
        (["--tasks", ","], 2, "tasks must name at least one task, got none"),
        (["--tasks", "demo,demo_last_word"], 2, "tasks must name each task once, got demo, demo_last_word"),
        (["--tasks", "demo", "--tasks-path", "EMPTY"], 2, "must be a folder with task files (.yaml), got"),
        (["--tasks", "demo", "--tasks-path", "BROKEN"], 2, "broken.yaml must be YAML, got"),
        (["--tasks", "nodata", "--tasks-path", "NODATA"], 1, "task nodata could not be loaded: "),
        (["--tasks", "demo", "-o", "EMPTY"], 2, "--output must be a file to write, got the folder"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    for name in ("empty", "broken", "nodata"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "broken.yaml").write_text("task: [a")
    (tmp_path / "nodata" / "nodata.yaml").write_text(
        f"task: nodata\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/none.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: right\n"
    )
    words = [tmp_path / word.lower() if word in ("EMPTY", "BROKEN", "NODATA") else word for word in arguments]
    found, out, err = in_process(monkeypatch, capsys, "demo", *words)
    assert found == code, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(on_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(moesparse.MoESparseError, match=r"pip install 'moesparse\[eval\]'"):
        evaluate.load_tasks(["demo"])


@pytest.mark.parametrize("named", [None, 7], ids=["by nobody", "by the config"])
def test_a_tokenizer_without_special_tokens_is_asked_behind_a_named_one(named, own_tasks):
    (own_tasks / "write.yaml").write_text(
        f"""
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {own_tasks / "lines.jsonl"}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["never"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match}}]
"""
    )
    tokenizer = make_tokenizer()
    # no row of the embedding is left for a token that is added
    model = tiny_model("qwen3_moe", vocab_size=len(tokenizer))
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    model.config.bos_token_id, model.config.eos_token_id = None, named
    assert not tokenizer.all_special_ids
    vocabulary = len(tokenizer)
    prefix = tokenizer("\n")["input_ids"][0] if named is None else named
    nll = 0.0
    for line in LINES:
        ids = torch.tensor([[prefix, *tokenizer(line)["input_ids"]]])
        with torch.no_grad():
            nll += float(
                torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum")
            )
    with pytest.warns(UserWarning, match="neither BOS nor EOS: text without a context is scored behind the token"):
        report = evaluate.tasks(model, tokenizer, ["lines", "write"], path=own_tasks, batch_size=2)
    wanted = nll / math.log(2) / sum(map(len, LINES))
    assert report["lines"].metrics["bits_per_byte"] == pytest.approx(wanted, rel=1e-4)
    assert report["write"].metrics["exact_match"] == 0.0
    assert report.prefix == tokenizer.decode([prefix])
    # lm-eval gives tokenizers without padding a token: not to the caller's
    assert len(tokenizer) == vocabulary and tokenizer.pad_token is None
