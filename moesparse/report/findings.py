"""What a report can be drawn from: a folder, statistics, perplexities; read, and checked against each other."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse.calibration.statistics import ModelStatistics
from moesparse.checkpoints.config_text import CONFIG_KEY
from moesparse.checkpoints.history import EARLIER, REPORT_FILE
from moesparse.errors import CalibrationError, CheckpointError, UsageError
from moesparse.system.shards import read_json

__all__ = [
    "Checkpoint",
    "Findings",
    "Routing",
    "geometric_mean",
    "read_checkpoint",
    "read_comparison",
    "read_results",
    "read_routing",
    "row_name",
]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a folder says of itself.

    Attributes:
        folder: where it is.
        config: config.json.
        run: moesparse_report.json, None when there is none.
        stored_bytes: of the weight files together.
    """

    folder: Path
    config: dict[str, Any]
    run: dict[str, Any] | None
    stored_bytes: int

    @property
    def recipe(self) -> dict[str, Any] | None:
        """How it was pruned, as config.json has it; None for a dense model."""
        return (self.config.get(CONFIG_KEY) or {}).get("recipe")

    @property
    def earlier(self) -> list[dict[str, Any]]:
        """The recipes of the commands before the last one."""
        return (self.config.get(CONFIG_KEY) or {}).get(EARLIER) or []

    @property
    def packed(self) -> bool:
        """The weight files hold n:m weights packed."""
        return (self.config.get("quantization_config") or {}).get("quant_method") == "moesparse"

    @property
    def removal(self) -> dict[str, Any] | None:
        """`ExpertReport.to_dict` of the run, None when it removed no experts."""
        return None if self.run is None else self.run.get("experts")

    @property
    def kept(self) -> dict[str, list[int]] | None:
        """Block -> the dense model's ids of the experts that are left, through earlier runs; position = id now."""
        return (self.config.get(CONFIG_KEY) or {}).get("kept_experts")


@dataclass(frozen=True, eq=False)
class Routing:
    """Where a dense model sent the tokens of one or more texts.

    Attributes:
        fingerprint: of the model.
        blocks: names in forward order.
        domains: name -> [blocks, E] int64, tokens each expert got.
        texts: name -> tokens of the text.
    """

    fingerprint: str
    blocks: tuple[str, ...]
    domains: dict[str, Tensor]
    texts: dict[str, int]

    @property
    def total(self) -> Tensor:
        """[blocks, E] int64, all texts together."""
        return torch.stack(list(self.domains.values())).sum(0)


@dataclass(frozen=True, eq=False)
class Findings:
    """All a page can show; every part may be missing.

    Attributes:
        title: of the page.
        checkpoint: the pruned (or dense) folder.
        routing: from files of statistics.
        tensors: what `inspect_folder` found in the weights, for folders without moesparse_report.json.
        before, after: perplexities of the dense and of the pruned model, as `moesparse eval --json` prints them.
        comparison: of the pruned model with the dense one, as `moesparse compare --json` prints it of one.
    """

    title: str
    checkpoint: Checkpoint | None = None
    routing: Routing | None = None
    tensors: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.routing is not None:
            _check_same_model(self.checkpoint, self.routing)
        if self.before is not None and self.after is not None:
            _check_same_texts(self.before, self.after)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; without what is not known."""
        found: dict[str, Any] = {"title": self.title, "perplexity before": self.before, "perplexity after": self.after}
        found |= {"tensors": self.tensors, "comparison": self.comparison}
        if self.checkpoint is not None:
            found |= {"recipe": self.checkpoint.recipe, "earlier": self.checkpoint.earlier or None}
            found |= {"kept_experts": self.checkpoint.kept, "report": self.checkpoint.run}
            found |= {"stored_bytes": self.checkpoint.stored_bytes, "packed": self.checkpoint.packed}
        if self.routing is not None:
            domains = {name: tokens.tolist() for name, tokens in self.routing.domains.items()}
            named = {"fingerprint": self.routing.fingerprint, "blocks": list(self.routing.blocks)}
            found |= {"routing": named | {"texts": self.routing.texts, "tokens per expert": domains}}
        return {name: value for name, value in found.items() if value is not None}


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the small files of a checkpoint; no weight is loaded.

    Raises:
        CheckpointError: there is no config.json, or a file is no JSON.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"SOURCE must be a folder with a config.json, got {path} without one")
    config = read_json(path / "config.json")
    run = read_json(path / REPORT_FILE, "a report") if (path / REPORT_FILE).is_file() else None
    return Checkpoint(path, config, run, sum(file.stat().st_size for file in path.glob("*.safetensors")))


def read_routing(files: Mapping[str, str | os.PathLike[str]]) -> Routing:
    """Read statistics, one file a domain.

    Args:
        files: domain -> file that `ModelStatistics.save` wrote.

    Raises:
        CalibrationError: a file cannot be read, or is of another model than the first.
    """
    domains: dict[str, Tensor] = {}
    texts: dict[str, int] = {}
    first: ModelStatistics | None = None
    for name, file in files.items():
        statistics = ModelStatistics.load(file)
        first = first or statistics
        if statistics.fingerprint != first.fingerprint or statistics.blocks.keys() != first.blocks.keys():
            raise CalibrationError(
                f"{file} must be statistics of the same model as the first ({first.fingerprint}), got those of "
                f"{statistics.fingerprint}"
            )
        counts = {sums.num_experts for sums in statistics.blocks.values()}
        if len(counts) != 1:
            raise CalibrationError(f"{file}: every block must have the same number of experts, got {sorted(counts)}")
        domains[name] = torch.stack([sums.tokens.cpu() for sums in statistics.blocks.values()])
        texts[name] = statistics.tokens
    if first is None:
        raise UsageError("files must name at least one file of statistics, got none")
    return Routing(first.fingerprint, tuple(first.blocks), domains, texts)


def read_results(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read perplexities that `moesparse eval --json` printed.

    Raises:
        CheckpointError: the file is missing or no JSON. UsageError: it is something else.
    """
    results = _read_json(Path(file))
    rows = results.get("files") if isinstance(results, dict) else None
    known = isinstance(rows, list) and rows and all(isinstance(row, dict) and "perplexity" in row for row in rows)
    if not known or "protocol" not in results:
        raise UsageError(f"{file} must be what `moesparse eval --json` prints, got another JSON file")
    return results


def read_comparison(file: str | os.PathLike[str], folder: Path | None) -> dict[str, Any]:
    """Read what `moesparse compare` found, of one pruned model.

    Args:
        file: that it wrote with -o, or what --json printed.
        folder: the pruned model that is asked about; where the file is of several, the one of this name is taken.

    Raises:
        CheckpointError: the file is missing or no JSON. UsageError: it is something else, or of another model.
    """
    held = _read_json(Path(file))
    kind = str(held.get("schema")).partition("/")[0] if isinstance(held, dict) else None
    if kind not in ("moesparse.compare", "moesparse.compare.several"):
        raise UsageError(f"{file} must be what `moesparse compare --json` prints, got another JSON file")
    models = held["models"] if kind == "moesparse.compare.several" else [held]
    named = {Path(model["pruned"]).resolve().name: model for model in models}
    if folder is None and len(models) == 1:
        return models[0]
    name = None if folder is None else folder.resolve().name
    if name not in named:
        raise UsageError(
            f"{file} must compare {name or 'one model'}, got {', '.join(str(model['pruned']) for model in models)}"
        )
    return named[name]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} must be a readable JSON file, got {error}") from error


def _check_same_model(checkpoint: Checkpoint, routing: Routing) -> None:
    wanted = (checkpoint.run or {}).get("fingerprint")
    if wanted is not None and wanted != routing.fingerprint:
        raise CalibrationError(
            f"statistics must come from the model {checkpoint.folder} was pruned from ({wanted}), got those of "
            f"{routing.fingerprint}"
        )
    E = routing.total.shape[1]
    kept = checkpoint.kept or {}
    if kept.keys() - set(routing.blocks) or any(max(ids) >= E for ids in kept.values()):
        raise CalibrationError(
            f"statistics must cover the blocks and experts {checkpoint.folder} was cut from, got {len(routing.blocks)} "
            f"blocks of {E} experts"
        )


def _check_same_texts(before: dict[str, Any], after: dict[str, Any]) -> None:
    if before["protocol"] != after["protocol"]:
        raise UsageError(
            f"perplexities before and after must be measured alike, got {before['protocol']} and {after['protocol']}"
        )
    first, second = ([(row_name(row), row.get("tokens")) for row in side["files"]] for side in (before, after))
    if first != second:
        raise UsageError(f"perplexities before and after must be of the same texts, got {first} and {second}")


def geometric_mean(results: dict[str, Any]) -> float:
    """Of the files' perplexities in what `moesparse eval --json` prints."""
    values = [row["perplexity"] for row in results["files"]]
    return math.exp(sum(map(math.log, values)) / len(values))


def row_name(row: dict[str, Any]) -> str:
    return str(row.get("name") or Path(row["file"]).stem)
