"""What a checkpoint says of the commands that made it, one after the other: reports, recipes and cards of all of them.

A folder that was pruned may be pruned again: experts first and weights in a second command, or the other way round. Its
config.json and its report then say what holds by now, and "earlier" keeps what the steps before said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesparse.checkpoints.card import card_in_form, is_packed_form
from moesparse.checkpoints.edit import Surplus, say_surplus
from moesparse.checkpoints.recipe_words import EXPERT_FIELDS, VALUE_FIELDS, WEIGHT_FIELDS, merges, refits
from moesparse.system.shards import read_json

__all__ = [
    "EARLIER",
    "REPORT_FILE",
    "card_after",
    "card_naming",
    "following",
    "joined_recipe",
    "joined_surplus",
    "noted_with",
    "read_report",
    "tell_surplus",
]

REPORT_FILE = "moesparse_report.json"
"""In a pruned checkpoint: the report of the run, as `moesparse.pruning.report.Report.to_dict` gives it."""

EARLIER = "earlier"
"""In a report: those of the commands before, first to last. In config.json's note: their recipes."""

# of a surplus: what is in the folder as it was
_THERE = ("carried", "mtp")


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The report in a folder; None where there is none, or that of half a command, which lies beside its output.

    Raises:
        CheckpointError: it is no JSON object.
    """
    file = Path(folder) / REPORT_FILE
    held = read_json(file, "a report") if file.is_file() else None
    return None if held is None or "inputs" in held else held


def following(before: Mapping[str, Any] | None, report: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a folder that was made of a pruned one: what holds by now, and "earlier" the reports before.

    Args:
        before: of the source; None where it was not pruned.
        report: of the run on it, of both steps where it says so itself, or the source's own with more in it.
    """
    if before is None or report.get(EARLIER) or _is_of_the_same_run(before, report):
        return dict(report)
    removal = report.get("experts")
    blocks = report.get("blocks") or _cut_blocks(before.get("blocks") or [], removal)
    return {
        **report,
        "recipe": joined_recipe(before.get("recipe"), report.get("recipe") or {}),
        "blocks": blocks,
        "experts": removal or before.get("experts"),
        "fingerprint": before.get("fingerprint") or report.get("fingerprint"),
        "sizes": _joined_sizes(before, report) if report.get("sizes") else {},
        "budget": report.get("budget") or (None if report.get("blocks") else before.get("budget")),
        "sparsity": report.get("sparsity", 0.0) if report.get("blocks") or not blocks else before.get("sparsity", 0.0),
        "surplus": joined_surplus(before.get("surplus"), report.get("surplus")),
        EARLIER: _with(before),
    }


def _with(before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reports before, and this one behind them."""
    return [*before.get(EARLIER, []), {key: value for key, value in before.items() if key != EARLIER}]


def _is_of_the_same_run(before: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    return all(before.get(key) == report.get(key) for key in ("seconds", "fingerprint", "version"))


def _joined_sizes(before: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    then, now = before.get("sizes") or {}, report["sizes"]
    after = dict(now["after"])
    if not report.get("blocks") and not _renews(report.get("experts")) and then:
        # every expert takes the same room, packed or not
        after["packed"] = after["experts"] * then["after"]["packed"] // then["after"]["experts"]
    return {"before": then.get("before") or now["before"], "after": after}


def _renews(removal: Mapping[str, Any] | None) -> bool:
    """Whether those that stay have new weights: refitted, or merged with others."""
    return bool(removal and (removal.get("refit") or removal.get("method")))


def _cut_blocks(blocks: Sequence[Mapping[str, Any]], removal: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What was said of pruned weights, of the experts that are left; nothing where their weights were solved anew."""
    if removal is None or _renews(removal):
        return []
    kept = {block["name"]: block["kept"] for block in removal["blocks"]}
    return [_cut_block(block, kept[block["name"]]) for block in blocks if block["name"] in kept]


def _cut_block(block: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    def cut(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[expert] for expert in kept]

    def kept_of(experts: Sequence[int]) -> list[int]:
        return [kept.index(expert) for expert in experts if expert in kept]

    def cut_values(values: Mapping[str, Any]) -> dict[str, Any]:
        named = {name: cut(values[name]) for name in ("error", "output_error")}
        return {**values, **named, "fallbacks": kept_of(values["fallbacks"])}

    tensors = [
        {
            **tensor,
            "shape": [len(kept), *tensor["shape"][1:]],
            "error_before": cut(tensor["error_before"]),
            "error_after": cut(tensor["error_after"]),
            "fallbacks": kept_of(tensor["fallbacks"]),
            "values": tensor.get("values") and cut_values(tensor["values"]),
        }
        for tensor in block["tensors"]
    ]
    held = {"tokens_per_expert": cut(block["tokens_per_expert"]), "rescale": cut(block["rescale"])}
    return {**block, "experts": len(kept), "tensors": tensors, **held}


def joined_recipe(before: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was pruned in two steps: what the second did not do stays as the first did it.

    Where the second removed experts and gave the others new weights, they no longer hold a pattern.
    """
    if before is None:
        return dict(recipe)
    known = {*recipe, *EXPERT_FIELDS, *WEIGHT_FIELDS, *VALUE_FIELDS}
    found = {**recipe, **{key: value for key, value in before.items() if key not in known}}
    removes = any(recipe.get(key) is not None for key in ("experts", "keep_experts"))
    prunes = any(recipe.get(key) is not None for key in ("weights", "patterns"))
    if not removes:
        found |= {key: before[key] for key in EXPERT_FIELDS if key in before}
    elif "mtp" not in recipe:
        # without a word the layers that predict further tokens may not have stayed
        found.pop("mtp", None)
    if not prunes and not (removes and (refits(recipe) or merges(recipe))):
        found |= {key: before[key] for key in WEIGHT_FIELDS if key in before}
        if recipe.get("values") is None:
            found |= {key: before[key] for key in VALUE_FIELDS if key in before}
            if recipe.get("output_dtype") is not None and before.get("values") is not None:
                # their codes went with the quantisation
                found["fake_quantised"] = True
    return found


def noted_with(
    noted: Mapping[str, Any], recipe: Mapping[str, Any], report: Mapping[str, Any] | None, version: str
) -> dict[str, Any]:
    """config.json's note of a model that was pruned once more.

    Args:
        noted: what it says by now.
        recipe: of the last step, or of all.
        report: of the folder, as `following` gives it.
        version: of moesparse.
    """
    before = noted.get("recipe")
    joined = joined_recipe(before, recipe)
    earlier = list(noted.get(EARLIER, []))
    if report is not None and report.get(EARLIER):
        earlier = [each["recipe"] for each in report[EARLIER]]
    elif before and any(value is not None and joined.get(key) != value for key, value in before.items()):
        earlier.append(before)
    return {**noted, "version": version, "recipe": joined, **({EARLIER: earlier} if earlier else {})}


def joined_surplus(before: Surplus | None, now: Surplus | None) -> Surplus:
    """Of two steps: what is in the folder now is what the last one carried over; what is gone is gone for good."""
    before, now = before or {}, now or {}
    gone = {
        what: list(dict.fromkeys([*before.get(what, []), *now.get(what, [])]))
        for what in {**before, **now}
        if what not in _THERE
    }
    if now.get("dropped"):
        gone.pop("mtp pruned", None)
    return {**{what: now[what] for what in _THERE if what in now}, **gone}


def tell_surplus(folder: Path, surplus: Surplus) -> None:
    """Have the report and the card in a folder name what was not taken over; nothing where no report of ours is."""
    held = read_report(folder)
    if held is None:
        return
    found = held | {"surplus": joined_surplus(held.get("surplus"), surplus)}
    found["surplus"] |= {what: names for what, names in (held.get("surplus") or {}).items() if what in _THERE}
    (folder / REPORT_FILE).write_text(json.dumps(found))
    card = folder / "README.md"
    if card.is_file():
        card.write_text(card_naming(card.read_text(errors="replace"), surplus))


def card_naming(card: str, surplus: Surplus) -> str:
    """A card that names what was not taken over; the one of the step before may have done so."""
    return card + "".join(f"\n{sentence}\n" for sentence in say_surplus(surplus) if sentence not in card)


def card_after(card: str, before: str) -> str:
    """A card with that of the step before it behind it, where it does not hold it already.

    Args:
        card: of the last step.
        before: text of the source's README.md.
    """
    text = before
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        text = text[4:].partition("\n---\n")[2]
    text = card_in_form(text.strip(), is_packed_form(card))
    title = text.removeprefix("# ")
    if title in card:
        return card
    return f"{card.rstrip()}\n\n## Before that: {title}\n" if title != text else f"{card.rstrip()}\n\n{text}\n"
