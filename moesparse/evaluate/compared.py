"""A pruned model beside the dense one: what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moesparse.evaluate.divergence import Figures

__all__ = ["Comparison"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """A pruned model beside the dense one on the same text.

    Attributes:
        dense, pruned: folders.
        overall: over all text but that of `languages`.
        domains: of each.
        languages: of each domain that was said to be of a language.
        positions: [first, last] position in the window, 0 is its first token, and the figures there.
        scripts: of the scripts of the tokens, where a tokenizer is there.
        layers: of every layer with experts what `moesparse.evaluate.routing.agreement` gives, or None for its figures
            where nothing says which experts are left.
        changed: the tokens that changed most, in context.
        window: tokens of a window.
        generation: what both wrote, see `moesparse.evaluate.continuations.compare_written`; None where they did not.
    """

    dense: str
    pruned: str
    overall: Figures
    domains: dict[str, Figures]
    languages: dict[str, Figures]
    positions: list[tuple[int, int, Figures]]
    scripts: dict[str, Figures]
    layers: list[dict[str, Any]]
    changed: list[dict[str, Any]]
    window: int
    generation: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def loops(self) -> dict[str, float] | None:
        """The share of all continuations that loop, of either model."""
        if self.generation is None:
            return None
        kinds = [self.generation["greedy"], self.generation["sampled"]]
        return {side: sum(kind[side]["loops"] for kind in kinds) / len(kinds) for side in ("dense", "pruned")}

    def as_dict(self) -> dict[str, Any]:
        """For JSON, as docs/json.md lists it."""
        named = {
            name: {key: figures.as_dict() for key, figures in getattr(self, name).items()}
            for name in ("domains", "languages", "scripts")
        }
        positions = [{"from": first, "to": last, **figures.as_dict()} for first, last, figures in self.positions]
        return {
            "dense": self.dense,
            "pruned": self.pruned,
            **self.overall.as_dict(),
            **named,
            "positions": positions,
            "layers": self.layers,
            "changed": self.changed,
            "window": self.window,
            "loops": self.loops,
            "generation": self.generation,
            "warnings": self.warnings,
        }
