"""Tasks of lm-eval (EleutherAI's evaluation harness) on any causal language model, packed or dense.

lm-eval does the asking and the scoring. Here: the set "demo", which needs no network; the preset "paper"; a typed
result; and one clear error where a task cannot be had.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moesparse.documents import PathLike
from moesparse.errors import MoESparseError, UsageError, reason_of
from moesparse.models.modes import let_experts_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PAPER", "PAPER_TASKS", "TaskResult", "TaskSet", "TasksReport", "load_tasks", "tasks"]

PAPER = "paper"
PAPER_TASKS = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "hellaswag",
    "mmlu",
    "openbookqa",
    "piqa",
    "rte",
    "winogrande",
)
"""The nine tasks of MoE-Pruner (Xie et al. 2024, arXiv 2410.12013), zero-shot; their mean is of plain accuracies."""

_OWN_TASKS = Path(__file__).parent


@dataclass(frozen=True)
class TaskResult:
    """Figures of a task, or of a group over its tasks.

    Attributes:
        name: as lm-eval calls it; "group::task" for a task that only its group holds.
        depth: 0 for what was asked for, 1 for the tasks of a group, and so on.
        metrics: name -> value, for example acc, acc_norm, bits_per_byte; a filter other than "none" follows the name
            behind a comma.
        stderr: standard error of a metric over the questions; without those that have none.
        samples: questions asked.
        shots: examples before each question, None for a group.
        version: of the task file, None if it has none.
    """

    name: str
    depth: int
    metrics: dict[str, float]
    stderr: dict[str, float]
    samples: int
    shots: int | None
    version: float | str | None


@dataclass(frozen=True)
class TasksReport:
    """Results in the order asked for, a group before its tasks, and what they were measured with.

    Attributes:
        tasks: the results.
        paper_mean: mean accuracy of the nine tasks when "paper" was asked for, else None.
        limit: questions a task, None for all.
        seed: of the choice of few-shot examples.
        batch_size: sequences in one forward.
        lm_eval: its version.
        prefix: the token that text without a context is scored behind, as it is written.
    """

    tasks: tuple[TaskResult, ...]
    paper_mean: float | None
    limit: int | None
    seed: int
    batch_size: int
    lm_eval: str
    prefix: str

    def __getitem__(self, name: str) -> TaskResult:
        """The result of one task or group."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TaskSet:
    """Tasks that were found and loaded, with their data."""

    names: tuple[str, ...]
    loaded: Any
    paper: bool


def load_tasks(names: Sequence[str], path: PathLike | None = None) -> TaskSet:
    """Find tasks and fetch their data; arguments and errors as for `tasks`."""
    if not names:
        raise UsageError("tasks must name at least one task, got none")
    if importlib.util.find_spec("lm_eval") is None:
        raise MoESparseError("tasks need lm-eval; pip install 'moesparse[eval]'")
    folder = None if path is None else _task_folder(path)
    wanted = tuple(dict.fromkeys(one for name in names for one in (PAPER_TASKS if name == PAPER else (name,))))
    with _quiet_lm_eval():
        return TaskSet(wanted, _load(wanted, folder), PAPER in names)


def tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str] | TaskSet,
    *,
    path: PathLike | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> TasksReport:
    """Ask a model the questions of lm-eval's tasks.

    Args:
        model: a transformers causal language model, on the device it should run on; asked in eval mode.
        tokenizer: its tokenizer.
        names: lm-eval's tasks, groups or tags; "demo", or one of its groups demo_continuation, demo_last_word and
            demo_perplexity, about the embedded held-out text; "paper" for PAPER_TASKS. Hub tasks fetch their data sets.
            Or what `load_tasks` found, so that a wrong name does not cost the loading of a model.
        path: a folder with task files of your own. They may name Python functions, which are run.
        num_fewshot: examples before each question; None leaves every task its own number, and so does a task that
            fixes zero.
        limit: questions of each task, the first ones; for a look only.
        batch_size: sequences in one forward.
        seed: of the choice of few-shot examples.

    Raises:
        UsageError: no name, an unknown one, a number out of range, or a folder without task files.
        MoESparseError: lm-eval is not installed, or the data of a task cannot be had.
    """
    for argument, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise UsageError(f"{argument} must be at least {least}, got {value}")
    wanted = names if isinstance(names, TaskSet) else load_tasks(names, path)
    training = model.training
    let_experts_run(model)
    with _quiet_lm_eval():
        from lm_eval.evaluator import evaluate

        for task in wanted.loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            task.set_config("num_fewshot", own or 0 if num_fewshot is None or own == 0 else num_fewshot)
            task.set_fewshot_seed(seed)
        asked = _asked(model, tokenizer, batch_size)
        try:
            # not simple_evaluate: it looks through the whole machine for its log, which takes longer than small tasks
            found: Any = evaluate(
                lm=asked,
                task_dict=wanted.loaded,
                limit=limit,
                log_samples=False,
                bootstrap_iters=100,
            )
        finally:
            model.train(training)
    results = tuple(one for name in wanted.names for one in _results(name, found))
    mean = None
    if wanted.paper:
        accuracies = {one.name: one.metrics["acc"] for one in results if one.depth == 0}
        mean = sum(accuracies[name] for name in PAPER_TASKS) / len(PAPER_TASKS)
    prefix = asked.tokenizer.decode([asked.prefix_token_id])
    return TasksReport(results, mean, limit, seed, batch_size, version("lm_eval"), prefix)


def _asked(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as lm-eval asks it.

    lm-eval scores a text that has no context behind BOS, or EOS. Where the tokenizer has neither, it is scored behind
    what the model's config names as one of them, or else behind a line's end; and nothing but its stop words and its
    length ends what the model writes.
    """
    from lm_eval.models.huggingface import HFLM

    class WithoutEnd(HFLM):
        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
            return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    # lm-eval gives a tokenizer without padding a token of its own, which the model may have no place for
    own = copy.deepcopy(tokenizer)
    if own.pad_token_id is None and own.unk_token_id is None and own.eos_token_id is None:
        own.pad_token = own.convert_ids_to_tokens(0)
    more: dict[str, Any] = {"pretrained": model, "tokenizer": own, "batch_size": batch_size}
    if own.bos_token_id is not None or own.eos_token_id is not None:
        return WithoutEnd(**more)
    config: Any = model.config
    named = [config.get_text_config().bos_token_id, config.get_text_config().eos_token_id]
    known = [token for token in named if isinstance(token, int) and 0 <= token < len(own)]
    prefix = (known or own("\n", add_special_tokens=False)["input_ids"] or [0])[0]
    warnings.warn(
        "the tokenizer has neither BOS nor EOS: text without a context is scored behind the token "
        f"{own.decode([prefix])!r}",
        stacklevel=3,
    )
    return WithoutEnd(**more, prefix_token_id=prefix)


def _task_folder(path: PathLike) -> Path:
    import yaml

    folder = Path(path)
    files = sorted(folder.glob("**/*.yaml"))
    if not files:
        raise UsageError(f"tasks path must be a folder with task files (.yaml), got {folder} without one")
    for file in files:
        try:
            # lm-eval leaves a file out that it cannot read
            list(yaml.parse(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"task file {file} must be YAML, got {' '.join(str(error).split())}") from error
    return folder


def _load(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's tasks and groups by these names, with their data, as its `evaluate` takes them."""
    from lm_eval.tasks import TaskManager

    paths = [_OWN_TASKS, *([folder] if folder else [])]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        # lm-eval's own are thousands of files, which take seconds to read
        manager = TaskManager(include_path=paths)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*manager.all_tasks, PAPER], n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise UsageError(f"tasks must be demo, paper or names that lm-eval knows, got {name!r}{hint}")
    loaded: list[Any] = []
    for name in names:
        try:
            found: Any = manager.load([name])
        # datasets raises its own, the hub's, the file system's and the network's errors, a task file any at all
        except Exception as error:
            raise MoESparseError(
                f"task {name} could not be loaded: {reason_of(error)}; without network take demo, or task files of "
                "your own"
            ) from error
        loaded += [found["groups"][name]] if name in found.get("groups", {}) else found["tasks"].values()
    try:
        return manager.load(loaded)
    except ValueError as error:
        raise UsageError(f"tasks must name each task once, got {', '.join(names)}: {error}") from error


def _results(name: str, found: Mapping[str, Any], depth: int = 0) -> Iterator[TaskResult]:
    """The result called `name`, and below a group those of its tasks. A tag is the list of its tasks."""
    groups = found.get("group_subtasks", {})
    if name in found["results"]:
        yield _result(name, found, depth)
    for child in groups.get(name, []):
        yield from _results(child, found, depth + 1)


def _result(name: str, found: Mapping[str, Any], depth: int) -> TaskResult:
    row = found["results"][name]
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in row.items():
        metric, comma, which = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        target = errors if metric.endswith("_stderr") else metrics
        target[metric.removesuffix("_stderr") + ("" if which == "none" else f",{which}")] = float(value)
    return TaskResult(
        name,
        depth,
        metrics,
        errors,
        _samples(name, found),
        found["n-shot"].get(name),
        found["versions"].get(name),
    )


def _samples(name: str, found: Mapping[str, Any]) -> int:
    if name in found["n-samples"]:
        return found["n-samples"][name]["effective"]
    return sum(_samples(child, found) for child in found["group_subtasks"].get(name, []))


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Its warnings are about its own command line."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
