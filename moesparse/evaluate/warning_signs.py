"""What in a comparison a reader should not miss, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from moesparse.evaluate.compared import Comparison
from moesparse.evaluate.continuations import chance
from moesparse.evaluate.divergence import Figures, format_perplexity
from moesparse.evaluate.scripts import COMMON

__all__ = ["warning_signs"]

TIMES, LEAST = 3.0, 0.01
"""How many times the mean a divergence must be to be named, and nats below which none is."""


def warning_signs(found: Comparison) -> list[str]:
    """One sentence for each sign of loss.

    A domain, or a script, whose mean KL is three times that of all other text; a language whose mean KL is three times
    that of the text; more loops than the dense model's.
    """
    signs = [
        f"{what} {name}: KL {figures.kl_mean:.3f} is {figures.kl_mean / max(rest, 1e-9):.1f} times the mean of the "
        f"other text, {rest:.3f}"
        for what, named in (("domain", found.domains), ("script", _letters(found.scripts)))
        for name, figures in named.items()
        if (rest := _mean_of_others(named, name)) is not None and _stands_out(figures.kl_mean, rest)
    ]
    mean = found.overall.kl_mean
    for name, figures in found.languages.items():
        if _stands_out(figures.kl_mean, mean):
            perplexity = figures.as_dict()["perplexity"]
            times = figures.kl_mean / max(mean, 1e-9)
            signs.append(
                f"language {name}: KL {figures.kl_mean:.3f} is {times:.1f} times that of the text, {mean:.3f}; its "
                f"perplexity goes from {format_perplexity(perplexity['dense'])} to "
                f"{format_perplexity(perplexity['pruned'])}"
            )
    if found.generation is not None:
        count = 2 * found.generation["prompts"]
        few, many = (
            sum(found.generation[kind][side]["looping"] for kind in ("greedy", "sampled"))
            for side in ("dense", "pruned")
        )
        if many > few:
            signs.append(
                f"loops: {many} of {count} continuations of the pruned model end in a loop, {few} of the dense one; "
                f"chance alone gives that or more in {chance(few, many, count):.1%} of such draws"
            )
    return signs


def _letters(scripts: Mapping[str, Figures]) -> dict[str, Figures]:
    return {name: figures for name, figures in scripts.items() if name != COMMON}


def _mean_of_others(named: Mapping[str, Figures], name: str) -> float | None:
    """Mean KL over the tokens of all others; None where there are none."""
    others = [figures for other, figures in named.items() if other != name]
    tokens = sum(figures.tokens for figures in others)
    return sum(figures.kl_mean * figures.tokens for figures in others) / tokens if tokens else None


def _stands_out(kl: float, mean: float) -> bool:
    return kl >= max(TIMES * mean, LEAST)
