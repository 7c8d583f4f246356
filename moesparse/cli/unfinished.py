"""How far a run is that has not finished its output, for `moesparse inspect`; and what is finished, for `--resume`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moesparse.cli.console import console, print_json

if TYPE_CHECKING:
    from moesparse.system.unfinished import Unfinished

__all__ = ["finished_report", "tell_finished", "tell_unfinished"]


def tell_unfinished(model: str, *, as_json: bool) -> bool:
    """Say how far the run is that works in a folder, or beside it; False where there is none.

    Args:
        model: the folder, or the file of statistics, that the run is to make.
        as_json: print one JSON object.
    """
    # "." has no name that another folder could be called after, and neither has the root
    path = Path(model) if Path(model).name else Path(model).absolute()
    found, step = _at(path) if path.name else (None, "")
    if found is None:
        return False
    if as_json:
        facts = dataclasses.asdict(found) | {"folder": str(found.folder), "step": step or None}
        print_json("inspect.unfinished", {"unfinished": facts})
        return True
    out = Console()
    out.print(_in_words(found, step), soft_wrap=not out.is_terminal, markup=False, highlight=False)
    return True


def _at(out: Path) -> tuple[Unfinished | None, str]:
    """The run whose output is to be there, and which step of two it is at where it has two."""
    from moesparse.calibration.checkpoint import unfinished_folder
    from moesparse.pruning.run import experts_folder
    from moesparse.system.unfinished import unfinished_run

    smaller = experts_folder(out)
    found = unfinished_run(out)
    if found is not None:
        return found, "2 of 2" if (smaller / "config.json").exists() else ""
    if (out / "config.json").exists():
        return None, ""
    found = unfinished_run(smaller) or _between(out)
    return (found, "1 of 2") if found is not None else (unfinished_run(unfinished_folder(out)), "")


def _between(out: Path) -> Unfinished | None:
    """A run that was stopped with its first step behind it and no layer of the second."""
    from moesparse.pruning.run import experts_folder, first_step
    from moesparse.system.unfinished import Unfinished

    held = first_step(out)
    if held is None:
        return None
    layers = len(held["experts"]["blocks"])
    return Unfinished(experts_folder(out), layers, layers, 0, 0, held["recipe"], None)


def _in_words(found: Unfinished, step: str) -> str:
    from moesparse.checkpoints.recipe_words import recipe_in_words

    where = f"{found.folder} holds a run that "
    where += "was stopped" if found.process is None else f"process {found.process} is at work on"
    where += f", step {step}" if step else ""
    total = "" if found.layers is None else f" of {found.layers}"
    far = [f"{found.done}{total} layers are finished"]
    if found.solved:
        far[0] += f" and {found.solved} matrices of experts of the next one"
    if found.measured:
        gone = "the text went through" if found.recipe is None else "experts were scored on"
        far = [f"{gone} {found.measured}{total} layers", *(far if found.done or found.recipe is not None else [])]
    text = f"{where}: {', '.join(far)}."
    if found.recipe is not None:
        text += f"\n{recipe_in_words(found.recipe)}"
    if found.process is None:
        text += "\nThe same command with --resume goes on."
    return text


def finished_report(folder: Path) -> dict[str, Any] | None:
    """The report in a folder that a run has finished; None where none has."""
    from moesparse.checkpoints.history import read_report
    from moesparse.system.folders import JOURNAL_FILE

    whole = (folder / "config.json").is_file() and not (folder / JOURNAL_FILE).exists()
    return read_report(folder) if whole else None


def tell_finished(
    held: Mapping[str, Any], out: Path, report: Path | None, more: Mapping[str, str], *, as_json: bool
) -> None:
    """What a run with --resume has to say where all of its work is done already.

    Args:
        held: the report in the folder.
        out: the folder.
        report: a file to write the report to as well.
        more: for the JSON.
        as_json: print one JSON object.
    """
    from moesparse.checkpoints.recipe_words import recipe_in_words

    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(held, indent=2))
    if as_json:
        print_json("prune", {**held, "output": str(out), "already_finished": True, **more})
        return
    text = held.get("calibration") or {}
    size = f" On {text['windows']} windows of {text['length']} tokens." if text.get("windows") else ""
    console.print(
        f"already finished: {out}, nothing was done. {recipe_in_words(held.get('recipe') or {})}{size}\n"
        f"next: moesparse eval {out}   |   moesparse inspect {out}   |   moesparse report {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
