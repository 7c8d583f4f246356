"""Who is compared, and how each is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CONTENDERS", "Contender"]


@dataclass(frozen=True)
class Contender:
    """One way from folder to folder.

    Attributes:
        name: as it is printed.
        module: run by `python -m`, it does a job of benchmarks/peers/clock.py.
        options: what the module makes of the job.
        task: "2:4", or "experts", a quarter of the experts removed; "dense" is the model as it was.
        peer: whose environment it runs in; None is this one.
        parts: where it is measured: "quality" on the embedded model, "cost" on the synthetic one.
        like: a contender that is to choose the same weights or experts.
    """

    name: str
    module: str
    options: dict[str, Any]
    task: str = "2:4"
    peer: str | None = None
    parts: tuple[str, ...] = ("quality", "cost")
    like: str | None = None


# the rule's own contender of moesparse
_LIKE = {"wanda": "moesparse wanda", "sparsegpt": "moesparse sparsegpt + obs", "reap": "moesparse reap"}


def _ours(
    name: str,
    task: str = "2:4",
    parts: tuple[str, ...] = ("quality", "cost"),
    like: str | None = None,
    **options: Any,
) -> Contender:
    return Contender(f"moesparse {name}", "benchmarks.peers.ours", options, task, None, parts, like)


def _plain(rule: str) -> Contender:
    return Contender(f"plain {rule}", "benchmarks.peers.ours", {"rule": rule}, like=_LIKE[rule])


def _llm_compressor(
    modifier: str, fair: bool, save: str = "repacked", parts: tuple[str, ...] = ("quality", "cost")
) -> Contender:
    task, settings = ("experts", "routed") if modifier == "reap" else ("2:4", "experts, routed")
    name = f"llm-compressor {modifier}, {settings if fair else 'defaults'}"
    if save != "repacked":
        name += ", saved as it is"
    options = {"modifier": modifier, "fair": fair, "save": save}
    like = _LIKE[modifier] if save == "repacked" else None
    return Contender(name, "benchmarks.peers.llm_compressor.run", options, task, "llm-compressor", parts, like)


CONTENDERS: tuple[Contender, ...] = (
    Contender("dense", "", {}, "dense", None, ("quality",)),
    _ours("wanda", recipe={"saliency": "wanda", "update": "none"}),
    _ours("moe-pruner", recipe={"saliency": "moe-pruner", "update": "none"}),
    _ours(
        "moe-pruner, whole model",
        like="moesparse moe-pruner",
        recipe={"saliency": "moe-pruner", "update": "none"},
        whole=True,
    ),
    _ours("sparsegpt + obs", recipe={"saliency": "sparsegpt", "update": "obs"}),
    _ours("default", parts=("quality",), recipe={"saliency": "gated-admm"}),
    _plain("wanda"),
    _plain("sparsegpt"),
    _llm_compressor("wanda", fair=False),
    _llm_compressor("wanda", fair=True),
    _llm_compressor("wanda", fair=True, save="plain", parts=("quality",)),
    _llm_compressor("sparsegpt", fair=False, parts=("quality",)),
    _llm_compressor("sparsegpt", fair=True),
    _ours("reap", "experts", recipe={"weights": None, "experts": 0.25, "update": "none"}),
    _ours(
        "reap, whole model",
        "experts",
        like="moesparse reap",
        recipe={"weights": None, "experts": 0.25, "update": "none"},
        whole=True,
    ),
    _ours("reap + refit", "experts", recipe={"weights": None, "experts": 0.25}),
    _llm_compressor("reap", fair=False),
    _llm_compressor("reap", fair=True),
)
