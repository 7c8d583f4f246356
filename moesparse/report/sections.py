"""One page about one pruned model: what was routed where, what went and why, what it cost, what it saved.

The page is drawn from what is at hand: a pruned folder (with the moesparse_report.json that `moesparse prune` leaves in
it, or without), files of statistics, measured perplexities. What none of them tells is named as missing at the end,
with what would supply it. The HTML is one file: inline style, inline SVG, no script, nothing fetched.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesparse.checkpoints.history import REPORT_FILE
from moesparse.checkpoints.recipe_words import recipe_in_words
from moesparse.experts.criteria import WEIGHT_CRITERION
from moesparse.report import figures
from moesparse.report.findings import (
    Findings,
    geometric_mean,
    row_name,
)
from moesparse.report.lost import what_was_lost
from moesparse.report.page import Page, Section, format_size, layer_of, ranges

__all__ = ["build", "chance_divergence", "even_shares", "jensen_shannon"]

_FORMS = {True: "packed", False: "dense with zeros, so that any program reads them"}


def jensen_shannon(shares: Tensor) -> Tensor:
    """Jensen-Shannon divergence between every two distributions.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy": JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2.

    Args:
        shares: [domains, layers, E], each row of E sums to 1.

    Returns:
        [layers, domains, domains] float64 in bits, between 0 (the same) and 1 (nothing in common).
    """
    p = shares.double().transpose(0, 1)
    middle = (p[:, :, None] + p[:, None]) / 2
    entropy = _entropy(p)
    return (_entropy(middle) - (entropy[:, :, None] + entropy[:, None]) / 2).clamp_min(0)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def even_shares(tokens: Tensor) -> Tensor:
    """[..., E] token counts as multiples of an even spread: 1 where an expert got 1 / E of its layer's tokens."""
    counts = tokens.double()
    return counts * counts.shape[-1] / counts.sum(-1, keepdim=True).clamp_min(1)


def chance_divergence(first: Tensor, second: Tensor) -> float:
    """Jensen-Shannon bits that two samples of ONE distribution show on average: (E - 1) / (8 ln 2) (1 / n + 1 / m).

    The leading term for independent draws of n and m tokens; tokens of one text depend on each other, so the true floor
    lies somewhat above.

    Args:
        first, second: [layers, E] token counts; the layer with the fewest tokens counts.
    """
    n, m = int(first.sum(-1).min()), int(second.sum(-1).min())
    if not n or not m:
        return math.inf
    return (first.shape[-1] - 1) / (8 * math.log(2)) * (1 / n + 1 / m)


def build(findings: Findings) -> Page:
    """Draw a page from what is known.

    Raises:
        UsageError: matplotlib is missing.
    """
    figures.check_plots()
    sections: list[Section] = []
    missing: list[str] = []
    for part in (
        _summary,
        what_was_lost,
        _perplexity,
        _sizes,
        _budget,
        _removal,
        _routing,
        _specialisation,
        _weights,
        _recipe,
    ):
        made = part(findings)
        if isinstance(made, str):
            missing.append(made)
        elif isinstance(made, list):
            sections += made
        elif made is not None:
            sections.append(made)
    return Page(findings.title, sections, missing, findings.to_dict())


def _summary(findings: Findings) -> Section | str | None:
    checkpoint = findings.checkpoint
    section = Section("In short")
    tiles: list[tuple[str, str]] = []
    if findings.before is not None and findings.after is not None:
        before, after = geometric_mean(findings.before), geometric_mean(findings.after)
        tiles.append((f"{before:.2f} → {after:.2f}", "perplexity, geometric mean of the texts"))
    if checkpoint is not None and checkpoint.run is not None and (sizes := checkpoint.run.get("sizes")):
        share = sizes["after"]["packed"] / sizes["before"]["experts"]
        tiles.append((f"{share:.1%}", "of the experts' bytes are left once packed"))
    if checkpoint is not None and (removal := checkpoint.removal):
        total, kept = removal["blocks"][0]["before"], sorted({len(block["kept"]) for block in removal["blocks"]})
        counts, where = (str(kept[0]), "every") if len(kept) == 1 else (f"{kept[0]} to {kept[-1]}", "a")
        tiles.append((f"{counts} of {total}", f"experts stay in {where} block, chosen by {removal['criterion']}"))
    if checkpoint is not None and checkpoint.recipe and checkpoint.recipe.get("weights"):
        recipe = checkpoint.recipe
        tiles.append((recipe["weights"], f"expert weights by {recipe['saliency']} + {recipe['update']}"))
    elif checkpoint is not None and checkpoint.recipe and checkpoint.recipe.get("target_bytes"):
        recipe = checkpoint.recipe
        tiles.append(("mixed", f"patterns for {recipe['target_bytes']} of the bytes, by {recipe['saliency']}"))
    if checkpoint is not None and checkpoint.recipe and checkpoint.recipe.get("values"):
        recipe, bits = checkpoint.recipe, (checkpoint.run or {}).get("bits")
        told = "" if bits is None else f", {bits:.2f} bits a weight in that format"
        label = f"expert weights rounded by {recipe['value_rule']}{told}; files no smaller yet"
        tiles.append((recipe["values"], label))
    if findings.routing is not None:
        layers, experts = findings.routing.total.shape
        tiles.append((f"{layers} × {experts}", "layers × experts in the dense model"))
        tiles.append((f"{sum(findings.routing.texts.values()):,}", "tokens in the statistics"))
    if not tiles:
        return None
    section.tile(tiles)
    return section


def _perplexity(findings: Findings) -> Section | str:
    if findings.after is None and findings.before is None:
        return (
            "Perplexity was neither measured nor read from a file. Add --evaluate for the embedded texts, or --text "
            "FILE, and --dense MODEL for the figures before pruning."
        )
    sides = {name: side for name, side in (("before", findings.before), ("after", findings.after)) if side is not None}
    some = next(iter(sides.values()))
    groups = {
        row_name(row): {name: side["files"][position]["perplexity"] for name, side in sides.items()}
        for position, row in enumerate(some["files"])
    }
    if len(groups) > 1:
        groups["geometric mean"] = {name: geometric_mean(side) for name, side in sides.items()}
    section = Section("Perplexity per text" if len(sides) == 1 else "Perplexity before and after")
    if findings.before is None:
        section.say("Of this model; the figures before pruning are not known: name the dense model with --dense.")
    if findings.after is None:
        section.say("Of the model before pruning; the figures after are not known.")
    words = "; ".join(
        f"{name} " + " to ".join(f"{value:.2f}" for value in group.values()) for name, group in groups.items()
    )
    section.show(
        "perplexity",
        f"Perplexity per text: {words}",
        partial(figures.bars, groups, label="perplexity, lower is better"),
    )
    header = ["text", *(f"perplexity {name}" for name in sides), *(f"bits/byte {name}" for name in sides), "tokens"]
    rows = []
    for position, row in enumerate(some["files"]):
        files = [side["files"][position] for side in sides.values()]
        bits = ["" if one.get("bits_per_byte") is None else f"{one['bits_per_byte']:.4f}" for one in files]
        rows.append([row_name(row), *(f"{one['perplexity']:.3f}" for one in files), *bits, f"{row['tokens']:,}"])
    section.tabulate(header, rows)
    protocol = some["protocol"]
    section.say(
        f"Windows of {protocol['window']} tokens, stride {protocol['stride']}, each scored on its own, the first token "
        "of a window not scored. Figures compare only at equal windows and texts."
    )
    return section


def _sizes(findings: Findings) -> Section | str | None:
    checkpoint = findings.checkpoint
    if checkpoint is None:
        return "Sizes, recipe and what was removed: no checkpoint folder was given, only statistics."
    section = Section("Bytes before and after")
    sizes = (checkpoint.run or {}).get("sizes")
    if not sizes:
        section.say(
            f"The weight files of this folder hold {format_size(checkpoint.stored_bytes)}. How large the model was "
            f"before is not known: the folder has no {REPORT_FILE} that says."
        )
        return section
    before, after = sizes["before"], sizes["after"]
    rest = after["model"] - after["experts"]
    groups = {
        "experts": {"before": before["experts"], "dense with zeros": after["experts"], "packed": after["packed"]},
        "whole model": {
            "before": before["model"],
            "dense with zeros": after["model"],
            "packed": rest + after["packed"],
        },
    }
    alt = "; ".join(
        f"{what} {name} {format_size(value)}" for what, group in groups.items() for name, value in group.items()
    )
    mib = {what: {name: value / 2**20 for name, value in group.items()} for what, group in groups.items()}
    section.show("bytes", f"Bytes: {alt}", partial(figures.bars, mib, label="MiB"))
    stored = format_size(checkpoint.stored_bytes)
    section.say(
        f"The weight files of this folder hold {stored}, {_FORMS[checkpoint.packed]}. Packed: the kept values and one "
        "bit for every weight, computed from the pattern; without an n:m pattern, a weight counts as dense."
    )
    return section


def _budget(findings: Findings) -> Section | None:
    checkpoint = findings.checkpoint
    budget = None if checkpoint is None else (checkpoint.run or {}).get("budget")
    if budget is None:
        return None
    plan = budget[budget["kept"]]
    section = Section("How the bytes were spent")
    dense = budget["dense"]
    summary = budget["summary"][0].upper() + budget["summary"][1:]
    unmet = "" if budget["met"] else "; no choice that takes more of it was estimated to lose less"
    section.say(
        f"The packed experts may take {budget['target'] / dense:.4f} of their dense bytes, and take "
        f"{plan['bytes'] / dense:.4f}{unmet}. {plan['keep']} of {budget['experts']} experts stay in every block, with "
        f"the patterns below, chosen among {', '.join(budget['choices'])}. {summary}."
    )
    layers = [layer_of(block) for block in plan["patterns"]]
    matrices = list(next(iter(plan["patterns"].values())))
    cells = [[patterns[name] for name in matrices] for patterns in plan["patterns"].values()]
    losses = {
        "removed experts": [plan["drop_loss"][block] for block in plan["patterns"]],
        "patterns": [plan["pattern_loss"][block] for block in plan["patterns"]],
    }
    rows = [
        [layer, *row, f"{dropped:.4f}", f"{pruned:.4f}"]
        for layer, row, dropped, pruned in zip(layers, cells, *losses.values(), strict=True)
    ]
    alt = "Pattern of each matrix and estimated loss, layer by layer; the table has the numbers"
    section.show("budget", alt, partial(figures.budget_map, cells, losses, layers, matrices))
    section.say("Losses are estimates in nats per token; what was measured is said above.")
    section.tabulate(["layer", *matrices, "loss by removal", "by patterns"], rows)
    return section


def _removal(findings: Findings) -> Section | str | None:
    checkpoint = findings.checkpoint
    if checkpoint is None:
        return None
    removal, kept = checkpoint.removal, checkpoint.kept
    if removal is None and kept is None:
        return None if checkpoint.recipe is None else "No expert was removed: every block has all of its experts."
    section = Section("What was removed, and why")
    if removal is None:
        assert kept is not None
        section.say(
            "Experts were removed in an earlier run, of which this folder keeps the index map (position = new id, "
            "number = id in the dense model) but no scores."
        )
        rows = [[layer_of(name), str(len(ids)), ranges(ids)] for name, ids in kept.items()]
        section.tabulate(["layer", "left", "ids in the dense model"], rows)
        return section
    blocks = removal["blocks"]
    names = [layer_of(block["name"]) for block in blocks]
    scores = removal.get("scores")
    refined = {done["name"]: done for done in removal.get("refine") or ()}
    position = "Position in the list of kept ids is the id in this checkpoint."
    if "plan" in (checkpoint.recipe or {}):
        section.say(f"The experts that stay were named by a plan, made by {removal['criterion']} before. {position}")
    else:
        swapped = ", then experts were swapped while the block came out closer" if refined else ""
        scored_on = "its weights" if removal["criterion"] == WEIGHT_CRITERION else "the calibration text"
        went = f"were merged into others by {removal['method']}" if "method" in removal else "went"
        ranked = (checkpoint.recipe or {}).get("expert_budget") == "global"
        among = "all blocks, each block's scores divided by their sum," if ranked else "each block"
        section.say(
            f"Every expert was scored by {removal['criterion']} on {scored_on} (larger means keep); the lowest of "
            f"{among} {went}{swapped}. {position}"
        )
    if scores is not None:
        values = torch.tensor([[math.nan if v is None else float(v) for v in row] for row in scores])
        values = values.float() / values.nan_to_num(0.0).amax(1, keepdim=True).clamp_min(1e-30)
        gone = [block["removed"] for block in blocks]
        alt = f"Scores by {removal['criterion']}, layer by expert, removed experts crossed; the table has the numbers"
        label = f"{removal['criterion']}, share of the layer's largest"
        section.show("scores", alt, partial(figures.heat_map, values, names, label=label, removed=gone, top=1.0))
    else:
        section.say("The scores were not kept with this folder.")
    fits = {fit["name"]: fit for fit in removal.get("refit") or ()}
    header = ["layer", "kept (old ids)", "merged into others (score)" if "method" in removal else "removed (score)"]
    header += ["swapped (gone → kept instead)"] if refined else []
    header += ["output error before → after refit"] if fits else []
    rows = []
    for number, block in enumerate(blocks):
        why = []
        for expert in block["removed"]:
            if expert in removal["dead"][number]:
                why.append(f"{expert} (no tokens)")
            elif scores is not None:
                why.append(f"{expert} ({scores[number][expert]:.3g})")
            else:
                why.append(str(expert))
        row = [names[number], ranges(block["kept"]), ", ".join(why)]
        if refined:
            swaps = refined.get(block["name"], {}).get("swaps", ())
            row.append(", ".join(f"{gone} → {stays}" for gone, stays in swaps) or "none")
        if fits:
            fit = fits.get(block["name"])
            row.append("" if fit is None else f"{fit['before']:.1%} → {fit['after']:.1%}")
        rows.append(row)
    section.tabulate(header, rows, numeric=False)
    if fits:
        section.say(
            "Output error: how far the block's output lies from the dense block's on the calibration tokens, before "
            "and after the kept down projections were solved again."
        )
    return section


def _routing(findings: Findings) -> Section | str:
    found = _tokens(findings)
    if found is None:
        return "Where the tokens went: neither statistics nor a run's report with token counts is at hand."
    tokens, names, removed, source = found
    section = Section("Routing, layer by expert")
    shares = even_shares(tokens)
    section.say(f"{source} 1 is an even share of the layer's tokens, {tokens.shape[1]} would be all of them.")
    alt = "Share of tokens per layer and expert; the table below sums it up"
    draw = partial(figures.heat_map, shares.float(), names, label="even shares", removed=removed)
    section.show("routing", alt, draw)
    effective = torch.exp2(_entropy(shares / tokens.shape[1]))
    header = ["layer", "tokens routed", "busiest expert", "experts in effect", "without tokens"]
    rows = [
        [
            name,
            f"{int(row.sum()):,}",
            f"{int(row.argmax())} ({float(share.max()):.2f})",
            f"{float(count):.1f}",
            ranges((row == 0).nonzero().flatten().tolist()) or "none",
        ]
        for name, row, share, count in zip(names, tokens, shares, effective, strict=True)
    ]
    section.tabulate(header, rows)
    section.say("Experts in effect: 2 to the entropy of the shares, the number of evenly used experts as concentrated.")
    return section


def _tokens(findings: Findings) -> tuple[Tensor, list[str], list[list[int]] | None, str] | None:
    """Token counts [layers, E], labels of the layers, removed experts, and where the counts come from."""
    checkpoint, routing = findings.checkpoint, findings.routing
    removal = None if checkpoint is None else checkpoint.removal
    if routing is not None:
        tokens, names = routing.total, list(routing.blocks)
        texts = ", ".join(f"{name} ({count:,} tokens)" for name, count in routing.texts.items())
        kept = None if checkpoint is None else checkpoint.kept
        gone = None
        if kept is not None:
            gone = [sorted(set(range(tokens.shape[1])) - set(kept.get(name, range(tokens.shape[1])))) for name in names]
        source = f"The dense model on {texts}."
    elif removal is not None and "tokens" in removal:
        tokens = torch.tensor(removal["tokens"])
        names = [block["name"] for block in removal["blocks"]]
        gone = [block["removed"] for block in removal["blocks"]]
        source = "The model before the run, on its calibration text."
    else:
        blocks = [] if checkpoint is None or checkpoint.run is None else checkpoint.run["blocks"]
        if not blocks or any(block["tokens_per_expert"] is None for block in blocks):
            return None
        tokens, names, gone = torch.tensor([b["tokens_per_expert"] for b in blocks]), [b["name"] for b in blocks], None
        source = "The model on the calibration text of the run, the blocks before each already pruned."
    return tokens, [layer_of(name) for name in names], gone, source


def _specialisation(findings: Findings) -> Section | str:
    routing = findings.routing
    if routing is None or len(routing.domains) < 2:
        return (
            "Specialisation needs statistics of two domains or more, one file each: moesparse calibrate MODEL "
            "law.stats --calibration law.jsonl, and so on."
        )
    names, rows = list(routing.domains), [layer_of(name) for name in routing.blocks]
    shares = {name: even_shares(tokens) for name, tokens in routing.domains.items()}
    E = routing.total.shape[1]
    pairs = jensen_shannon(torch.stack(list(shares.values())) / E)
    first, second = torch.triu_indices(len(names), len(names), 1)
    between = pairs[:, first, second]
    section = Section("Specialisation per domain")
    floor = max(
        chance_divergence(routing.domains[names[a]], routing.domains[names[b]])
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    )
    section.say(
        "Jensen-Shannon divergence between the routing of every two domains, in bits: 0 is the same routing, 1 no "
        f"expert in common. Samples of this size show about {floor:.4f} bits by chance alone."
    )
    mean = between.mean(1)
    words = ", ".join(f"layer {row} {float(value):.3f}" for row, value in zip(rows, mean, strict=True))
    section.show("specialisation", f"Mean divergence in bits: {words}", partial(figures.divergence, pairs, names, rows))
    maps = {name: values.float() for name, values in shares.items()}
    section.show("domains", "Routing of each domain, layer by expert", partial(figures.domain_maps, maps, rows))
    lines = []
    for number, row in enumerate(rows):
        least, most = int(between[number].argmin()), int(between[number].argmax())
        told = [
            f"{float(between[number, at]):.3f} ({names[int(first[at])]}, {names[int(second[at])]})"
            for at in (least, most)
        ]
        lines.append([row, f"{float(mean[number]):.3f}", *told])
    section.tabulate(["layer", "mean", "least", "most"], lines)
    return section


def _weights(findings: Findings) -> Section | str | None:
    checkpoint = findings.checkpoint
    if checkpoint is None:
        return None
    section = Section("Zeros per tensor")
    if checkpoint.run is not None:
        blocks = checkpoint.run["blocks"]
        if not blocks:
            return "Zeros per tensor: the run removed experts and left the weights of the others as they were."
        section.say(
            "As the run counted them in the weights it wrote. Error: how far the matrix's output lies from the dense "
            "one's on the calibration tokens, mean over experts, with the mask alone and after the weight rule."
        )
    elif findings.tensors is not None:
        blocks = findings.tensors["blocks"]
        section.say(f"Counted in the weights now: the folder has no {REPORT_FILE}. Errors are not known.")
    else:
        return f"Zeros per tensor: the folder has no {REPORT_FILE} and its weights were not read."
    rows = []
    for block in blocks:
        for tensor in block["tensors"]:
            errors = [tensor.get("error_before"), tensor.get("error_after")]
            told = "" if None in errors else " → ".join(f"{sum(e) / len(e):.1%}" for e in errors if e)
            fallbacks = tensor.get("fallbacks") or []
            shape = " × ".join(map(str, tensor["shape"]))
            note = f"masked by magnitude: {ranges(fallbacks)}" if fallbacks else ""
            rows.append(
                [
                    layer_of(block["name"]),
                    tensor["name"],
                    shape,
                    tensor["pattern"],
                    f"{tensor['sparsity']:.2%}",
                    told,
                    note,
                ]
            )
    header = ["layer", "tensor", "experts × out × in", "pattern", "zeros", "error", "experts without tokens"]
    empty = [at for at in range(len(header)) if all(not row[at] for row in rows)]
    rows = [[cell for at, cell in enumerate(row) if at not in empty] for row in rows]
    section.tabulate([name for at, name in enumerate(header) if at not in empty], rows)
    return section


def _recipe(findings: Findings) -> Section | str | None:
    checkpoint = findings.checkpoint
    if checkpoint is None:
        return None
    if checkpoint.recipe is None:
        return "No recipe: config.json does not say that this folder was pruned by moesparse."
    section = Section("Recipe")
    section.say(recipe_in_words(checkpoint.recipe))
    rows = [[key, _shown(value)] for key, value in checkpoint.recipe.items()]
    if checkpoint.run is not None:
        rows += [[f"calibration {key}", _shown(value)] for key, value in checkpoint.run["calibration"].items()]
        rows += [["seconds", f"{checkpoint.run['seconds']:.1f}"], ["moesparse", checkpoint.run["version"]]]
    section.tabulate(["", ""], rows, numeric=False)
    for number, recipe in enumerate(checkpoint.earlier, start=1):
        section.say(f"Step {number} before that: {recipe_in_words(recipe)}")
        section.tabulate(["", ""], [[key, _shown(value)] for key, value in recipe.items()], numeric=False)
    return section


def _shown(value: Any) -> str:
    """A value of the recipe or of the calibration in words; patterns by layer stand elsewhere on the page."""
    if isinstance(value, dict):
        return _source(value) if "source" in value else "by layer and matrix, see above"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _source(read: dict[str, Any]) -> str:
    """A text that was read, as a report has it."""
    count = read.get("documents")
    chats = f", {read['chats']:,} of them chats" if read.get("chats") else ""
    return f"{read['source']}" + (f" ({count:,} document{'s' if count != 1 else ''}{chats})" if count else "")
