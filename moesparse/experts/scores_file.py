"""Scores of experts as a file that can be published: whoever has it chooses at any ratio without text.

    {"format": "moesparse-scores", "format_version": 1, "statistics": "5f0c...", "tokens": 262144,
     "model": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "experts": 8},
     "moesparse": "0.1.0", "layers": [
    {"layer": 0, "router": [0.1203, ...], "scores": {"frequency": [...], "reap": [...], ...}},
    ...]}

Scores of other programs are read as well: "router" may be null, and a criterion may have any name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesparse.calibration.statistics import ANGLED_NORM_SUM, ModelStatistics
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.criteria import FAMILY, expert_scores
from moesparse.experts.origin import Origin, read_layers, write_layers

__all__ = ["ExpertScores"]

_FORMAT, _VERSION = "moesparse-scores", 1


@dataclass(frozen=True)
class ExpertScores:
    """How much each expert of a model matters, by one criterion or several.

    Attributes:
        origin: the model.
        criteria: name -> [blocks, E] float64, larger means keep; -inf for an expert without tokens.
        statistics: hash of the calibration text, or None.
        tokens: of that text, or None.
    """

    origin: Origin
    criteria: Mapping[str, Tensor]
    statistics: str | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, origin: Origin, statistics: ModelStatistics) -> ExpertScores:
        """By every criterion that the statistics of the model have the sums for."""
        angled = all(ANGLED_NORM_SUM in block.extra for block in statistics.blocks.values())
        names = [*FAMILY, *(["easy-ep"] if angled else [])]
        found = {name: expert_scores(statistics, name) for name in names}
        return cls(origin, found, statistics.text_hash, statistics.tokens)

    def by(self, criterion: str) -> Tensor:
        """[blocks, E] float64.

        Raises:
            UsageError: a criterion that is not there; lists those that are.
        """
        if criterion not in self.criteria:
            raise UsageError(f"criterion must be one that the scores hold, {', '.join(self.criteria)}, got {criterion}")
        return self.criteria[criterion]

    def check(self, found: Origin) -> None:
        """Refuse the scores of another model.

        Raises:
            CalibrationError: names what does not match.
        """
        self.origin.check(found, "scores")

    def identity(self) -> dict[str, Any]:
        """What a recipe says of them."""
        return {"statistics": self.statistics, "tokens": self.tokens}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; -inf becomes null."""

        def plain(row: Tensor) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in row.tolist()]

        head = {"format": _FORMAT, "format_version": _VERSION, **self.identity(), "model": self.origin.head()}
        layers = [
            {
                "layer": layer,
                "router": self.origin.routers[number],
                "scores": {name: plain(score[number]) for name, score in self.criteria.items()},
            }
            for number, layer in enumerate(self.origin.layers)
        ]
        write_layers(path, head, layers)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertScores:
        """Read what `save` wrote, or another program by the same format.

        Raises:
            CalibrationError: no such file, another kind of file, another version, or scores that are none; names it.
        """
        held, layers = read_layers(path, _FORMAT, _VERSION)
        origin = Origin.read(held.get("model"), layers, str(path))
        tables = [layer.get("scores") for layer in layers]
        names = list(tables[0]) if isinstance(tables[0], dict) else []
        if not names or not all(isinstance(table, dict) and list(table) == names for table in tables):
            raise CalibrationError(f'{path} must hold in each layer "scores" by the same criteria, at least one')
        found = {
            name: torch.tensor(
                [_row(table[name], origin.experts, f"{path}: {name}") for table in tables],  # type: ignore[index]
                dtype=torch.float64,
            )
            for name in names
        }
        tokens = held.get("tokens")
        if tokens is not None and type(tokens) is not int:
            raise CalibrationError(f'{path} must hold "tokens" as a number or null, got {tokens!r}')
        statistics = None if held.get("statistics") is None else str(held["statistics"])
        return cls(origin, found, statistics, tokens)


def _row(values: Any, experts: int, where: str) -> list[float]:
    fit = isinstance(values, list) and all(value is None or type(value) in (int, float) for value in values)
    row = [-math.inf if value is None else float(value) for value in values] if fit else []
    if len(row) != experts or any(math.isnan(value) or value == math.inf for value in row):
        raise CalibrationError(f"{where} must score each of {experts} experts by a number, or null for none")
    return row
