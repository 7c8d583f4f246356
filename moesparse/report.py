"""One page about one pruned model: what was routed where, what went and why, what it cost, what it saved.

The page is drawn from what is at hand: a pruned folder (with the moesparse_report.json that `moesparse prune` leaves in
it, or without), files of statistics, measured perplexities. What none of them tells is named as missing at the end,
with what would supply it. The HTML is one file: inline style, embedded SVG, no script, nothing fetched.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesparse import figures
from moesparse._version import __version__
from moesparse.checkpoint import CONFIG_KEY, REPORT_FILE
from moesparse.errors import CalibrationError, CheckpointError, UsageError
from moesparse.statistics import ModelStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


@dataclass(eq=False)
class Findings:
    """All a page can show; every part may be missing.

    Attributes:
        title: of the page.
        checkpoint: the pruned (or dense) folder.
        routing: from files of statistics.
        tensors: `moesparse.cli.inspect.describe` of the loaded weights, for folders without moesparse_report.json.
        before, after: perplexities of the dense and of the pruned model, as `moesparse eval --json` prints them.
    """

    title: str
    checkpoint: Checkpoint | None = None
    routing: Routing | None = None
    tensors: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.routing is not None:
            _check_same_model(self.checkpoint, self.routing)
        if self.before is not None and self.after is not None:
            _check_same_texts(self.before, self.after)


_FORMS = {True: "packed", False: "dense with zeros, so that any program reads them"}


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the small files of a checkpoint; no weight is loaded.

    Raises:
        CheckpointError: there is no config.json, or a file is no JSON.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"SOURCE must be a folder with a config.json, got {path} without one")
    config = _read_json(path / "config.json")
    run = _read_json(path / REPORT_FILE) if (path / REPORT_FILE).is_file() else None
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
    first, second = ([(_row_name(row), row.get("tokens")) for row in side["files"]] for side in (before, after))
    if first != second:
        raise UsageError(f"perplexities before and after must be of the same texts, got {first} and {second}")


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


@dataclass
class _Section:
    """One part of the page: sentences and tables (HTML), figures by file name with what a blind reader hears."""

    title: str
    parts: list[str] = field(default_factory=list)
    figures: list[tuple[str, str, Figure]] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def show(self, name: str, alt: str, figure: Figure) -> None:
        self.parts.append(f"<!--figure:{name}-->")
        self.figures.append((name, alt, figure))


@dataclass
class Page:
    """A finished page.

    Attributes:
        title: of the page.
        sections: in reading order.
        missing: sentences on what the page cannot show and what would supply it.
    """

    title: str
    sections: list[_Section]
    missing: list[str]

    def to_html(self) -> str:
        """One self-contained HTML document; equal pages give equal text."""
        body = []
        for section in self.sections:
            images = {name: (alt, figures.to_svg(figure)) for name, alt, figure in section.figures}
            content = "\n".join(section.parts)
            for name, (alt, svg) in images.items():
                data = base64.b64encode(svg).decode()
                image = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
                content = content.replace(f"<!--figure:{name}-->", f"<figure>{image}</figure>")
            body.append(f"<section>\n<h2>{html.escape(section.title)}</h2>\n{content}\n</section>")
        if self.missing:
            items = "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.missing)
            body.append(f"<section>\n<h2>Not on this page</h2>\n<ul>\n{items}\n</ul>\n</section>")
        return _DOCUMENT.format(title=html.escape(self.title), style=_STYLE, body="\n".join(body), version=__version__)

    def pngs(self) -> dict[str, bytes]:
        """Every figure by name."""
        return {name: figures.to_png(figure) for section in self.sections for name, _, figure in section.figures}


def build(findings: Findings) -> Page:
    """Draw a page from what is known.

    Raises:
        UsageError: matplotlib is missing.
    """
    figures.new_figure(1.0)  # a missing matplotlib is said before any work
    sections: list[_Section] = []
    missing: list[str] = []
    for part in (_summary, _perplexity, _sizes, _removal, _routing, _specialisation, _weights, _recipe):
        made = part(findings)
        if isinstance(made, str):
            missing.append(made)
        elif made is not None:
            sections.append(made)
    return Page(findings.title, sections, missing)


def _summary(findings: Findings) -> _Section | str | None:
    checkpoint = findings.checkpoint
    section = _Section("In short")
    tiles: list[tuple[str, str]] = []
    if findings.before is not None and findings.after is not None:
        before, after = geometric_mean(findings.before), geometric_mean(findings.after)
        tiles.append((f"{before:.2f} → {after:.2f}", "perplexity, geometric mean of the texts"))
    if checkpoint is not None and checkpoint.run is not None and (sizes := checkpoint.run.get("sizes")):
        share = sizes["after"]["packed"] / sizes["before"]["experts"]
        tiles.append((f"{share:.1%}", "of the experts' bytes are left once packed"))
    if checkpoint is not None and (removal := checkpoint.removal):
        kept = {(len(block["kept"]), block["before"]) for block in removal["blocks"]}
        for count, total in sorted(kept):
            tiles.append((f"{count} of {total}", f"experts stay in every block, chosen by {removal['criterion']}"))
    if checkpoint is not None and checkpoint.recipe and checkpoint.recipe.get("weights"):
        recipe = checkpoint.recipe
        tiles.append((recipe["weights"], f"expert weights by {recipe['saliency']} + {recipe['update']}"))
    if findings.routing is not None:
        layers, experts = findings.routing.total.shape
        tiles.append((f"{layers} × {experts}", "layers × experts in the dense model"))
        tiles.append((f"{sum(findings.routing.texts.values()):,}", "tokens in the statistics"))
    if not tiles:
        return None
    cells = "".join(f"<li><b>{html.escape(value)}</b>{html.escape(what)}</li>" for value, what in tiles)
    section.parts.append(f'<ul class="tiles">{cells}</ul>')
    return section


def geometric_mean(results: dict[str, Any]) -> float:
    """Of the files' perplexities in what `moesparse eval --json` prints."""
    values = [row["perplexity"] for row in results["files"]]
    return math.exp(sum(map(math.log, values)) / len(values))


def _row_name(row: dict[str, Any]) -> str:
    return str(row.get("name") or Path(row["file"]).stem)


def _perplexity(findings: Findings) -> _Section | str:
    if findings.after is None and findings.before is None:
        return (
            "Perplexity was neither measured nor read from a file. Add --evaluate for the embedded texts, or --text "
            "FILE, and --dense MODEL for the figures before pruning."
        )
    sides = {name: side for name, side in (("before", findings.before), ("after", findings.after)) if side is not None}
    some = next(iter(sides.values()))
    groups = {
        _row_name(row): {name: side["files"][position]["perplexity"] for name, side in sides.items()}
        for position, row in enumerate(some["files"])
    }
    if len(groups) > 1:
        groups["geometric mean"] = {name: geometric_mean(side) for name, side in sides.items()}
    section = _Section("Perplexity per text" if len(sides) == 1 else "Perplexity before and after")
    if findings.before is None:
        section.say("Of this model; the figures before pruning are not known: name the dense model with --dense.")
    if findings.after is None:
        section.say("Of the model before pruning; the figures after are not known.")
    words = "; ".join(
        f"{name} " + " to ".join(f"{value:.2f}" for value in group.values()) for name, group in groups.items()
    )
    section.show(
        "perplexity", f"Perplexity per text: {words}", figures.bars(groups, label="perplexity, lower is better")
    )
    header = ["text", *(f"perplexity {name}" for name in sides), *(f"bits/byte {name}" for name in sides), "tokens"]
    rows = []
    for position, row in enumerate(some["files"]):
        files = [side["files"][position] for side in sides.values()]
        bits = ["" if one.get("bits_per_byte") is None else f"{one['bits_per_byte']:.4f}" for one in files]
        rows.append([_row_name(row), *(f"{one['perplexity']:.3f}" for one in files), *bits, f"{row['tokens']:,}"])
    section.parts.append(_table(header, rows))
    protocol = some["protocol"]
    section.say(
        f"Windows of {protocol['window']} tokens, stride {protocol['stride']}, each scored on its own, the first token "
        "of a window not scored. Figures compare only at equal windows and texts."
    )
    return section


def _sizes(findings: Findings) -> _Section | str | None:
    checkpoint = findings.checkpoint
    if checkpoint is None:
        return "Sizes, recipe and what was removed: no checkpoint folder was given, only statistics."
    section = _Section("Bytes before and after")
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
    section.show("bytes", f"Bytes: {alt}", figures.bars(mib, label="MiB"))
    stored = format_size(checkpoint.stored_bytes)
    section.say(
        f"The weight files of this folder hold {stored}, {_FORMS[checkpoint.packed]}. Packed: the kept values and one "
        "bit for every weight, computed from the pattern; without an n:m pattern, a weight counts as dense."
    )
    return section


def _removal(findings: Findings) -> _Section | str | None:
    checkpoint = findings.checkpoint
    if checkpoint is None:
        return None
    removal, kept = checkpoint.removal, checkpoint.kept
    if removal is None and kept is None:
        return None if checkpoint.recipe is None else "No expert was removed: every block has all of its experts."
    section = _Section("What was removed, and why")
    if removal is None:
        assert kept is not None
        section.say(
            "Experts were removed in an earlier run, of which this folder keeps the index map (position = new id, "
            "number = id in the dense model) but no scores."
        )
        section.parts.append(
            _table(["layer", "left", "ids in the dense model"],
                   [[_layer(name), str(len(ids)), _ranges(ids)] for name, ids in kept.items()])
        )  # fmt: skip
        return section
    blocks = removal["blocks"]
    names = [_layer(block["name"]) for block in blocks]
    scores = removal.get("scores")
    refined = {done["name"]: done for done in removal.get("refine") or ()}
    section.say(
        f"Every expert was scored by {removal['criterion']} on the calibration text (larger means keep); the lowest of "
        f"each block went{', then experts were swapped while the block came out closer' if refined else ''}. Position "
        "in the list of kept ids is the id in this checkpoint."
    )
    if scores is not None:
        values = torch.tensor([[math.nan if v is None else float(v) for v in row] for row in scores])
        values = values.float() / values.nan_to_num(0.0).amax(1, keepdim=True).clamp_min(1e-30)
        gone = [block["removed"] for block in blocks]
        alt = f"Scores by {removal['criterion']}, layer by expert, removed experts crossed; the table has the numbers"
        label = f"{removal['criterion']}, share of the layer's largest"
        section.show("scores", alt, figures.heat_map(values, names, label=label, removed=gone, top=1.0))
    else:
        section.say("The scores were not kept with this folder.")
    fits = {fit["name"]: fit for fit in removal.get("refit") or ()}
    header = ["layer", "kept (old ids)", "removed (score)"]
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
        row = [names[number], _ranges(block["kept"]), ", ".join(why)]
        if refined:
            swaps = refined.get(block["name"], {}).get("swaps", ())
            row.append(", ".join(f"{gone} → {stays}" for gone, stays in swaps) or "none")
        if fits:
            fit = fits.get(block["name"])
            row.append("" if fit is None else f"{fit['before']:.1%} → {fit['after']:.1%}")
        rows.append(row)
    section.parts.append(_table(header, rows, numeric=False))
    if fits:
        section.say(
            "Output error: how far the block's output lies from the dense block's on the calibration tokens, before "
            "and after the kept down projections were solved again."
        )
    return section


def _routing(findings: Findings) -> _Section | str:
    found = _tokens(findings)
    if found is None:
        return "Where the tokens went: neither statistics nor a run's report with token counts is at hand."
    tokens, names, removed, source = found
    section = _Section("Routing, layer by expert")
    shares = even_shares(tokens)
    section.say(f"{source} 1 is an even share of the layer's tokens, {tokens.shape[1]} would be all of them.")
    alt = "Share of tokens per layer and expert; the table below sums it up"
    section.show("routing", alt, figures.heat_map(shares.float(), names, label="even shares", removed=removed))
    effective = torch.exp2(_entropy(shares / tokens.shape[1]))
    header = ["layer", "tokens routed", "busiest expert", "experts in effect", "without tokens"]
    rows = [
        [name, f"{int(row.sum()):,}", f"{int(row.argmax())} ({float(share.max()):.2f})", f"{float(count):.1f}",
         _ranges((row == 0).nonzero().flatten().tolist()) or "none"]
        for name, row, share, count in zip(names, tokens, shares, effective, strict=True)
    ]  # fmt: skip
    section.parts.append(_table(header, rows))
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
    return tokens, [_layer(name) for name in names], gone, source


def _specialisation(findings: Findings) -> _Section | str:
    routing = findings.routing
    if routing is None or len(routing.domains) < 2:
        return (
            "Specialisation needs statistics of two domains or more, one file each: moesparse calibrate MODEL "
            "law.stats --calibration law.jsonl, and so on."
        )
    names, rows = list(routing.domains), [_layer(name) for name in routing.blocks]
    shares = {name: even_shares(tokens) for name, tokens in routing.domains.items()}
    E = routing.total.shape[1]
    pairs = jensen_shannon(torch.stack(list(shares.values())) / E)
    first, second = torch.triu_indices(len(names), len(names), 1)
    between = pairs[:, first, second]
    section = _Section("Specialisation per domain")
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
    section.show("specialisation", f"Mean divergence in bits: {words}", figures.divergence(pairs, names, rows))
    maps = {name: values.float() for name, values in shares.items()}
    section.show("domains", "Routing of each domain, layer by expert", figures.domain_maps(maps, rows))
    table = []
    for number, row in enumerate(rows):
        least, most = int(between[number].argmin()), int(between[number].argmax())
        told = [
            f"{float(between[number, at]):.3f} ({names[int(first[at])]}, {names[int(second[at])]})"
            for at in (least, most)
        ]
        table.append([row, f"{float(mean[number]):.3f}", *told])
    section.parts.append(_table(["layer", "mean", "least", "most"], table))
    return section


def _weights(findings: Findings) -> _Section | str | None:
    checkpoint = findings.checkpoint
    if checkpoint is None:
        return None
    section = _Section("Zeros per tensor")
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
            note = f"masked by magnitude: {_ranges(fallbacks)}" if fallbacks else ""
            rows.append([_layer(block["name"]), tensor["name"], shape, tensor["pattern"],
                         f"{tensor['sparsity']:.2%}", told, note])  # fmt: skip
    header = ["layer", "tensor", "experts × out × in", "pattern", "zeros", "error", "experts without tokens"]
    empty = [at for at in range(len(header)) if all(not row[at] for row in rows)]
    rows = [[cell for at, cell in enumerate(row) if at not in empty] for row in rows]
    section.parts.append(_table([name for at, name in enumerate(header) if at not in empty], rows))
    return section


def _recipe(findings: Findings) -> _Section | str | None:
    checkpoint = findings.checkpoint
    if checkpoint is None:
        return None
    if checkpoint.recipe is None:
        return "No recipe: config.json does not say that this folder was pruned by moesparse."
    section = _Section("Recipe")
    rows = [[key, "none" if value is None else str(value)] for key, value in checkpoint.recipe.items()]
    if checkpoint.run is not None:
        rows += [[f"calibration {key}", str(value)] for key, value in checkpoint.run["calibration"].items()]
        rows += [["seconds", f"{checkpoint.run['seconds']:.1f}"], ["moesparse", checkpoint.run["version"]]]
    section.parts.append(_table(["", ""], rows, numeric=False))
    return section


def _layer(block: str) -> str:
    """ "model.layers.3.mlp.experts" -> "3"; the name itself when it holds no number."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", block)
    return numbers[-1] if numbers else block


def _ranges(ids: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2 5"."""
    runs: list[list[int]] = []
    for value in ids:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return " ".join(str(a) if a == b else f"{a} {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)


def format_size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: bool = True) -> str:
    """An HTML table; every column but the first is set to the right where `numeric`."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if any(header) else ""
    body = "\n".join(line(row, "td") for row in rows)
    kind = ' class="numbers"' if numeric else ""
    return f'<div class="wide"><table{kind}>{head}<tbody>\n{body}\n</tbody></table></div>'


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #999; padding-bottom: .2rem; }
p { margin: .5rem 0; max-width: 46rem; }
figure { margin: 1rem 0; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .75rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; border-bottom: 1px solid #ddd; }
th { border-bottom: 1px solid #555; font-weight: 600; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; }
.wide { overflow-x: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; padding: 0; margin: 1rem 0; }
.tiles li { border: 1px solid #999; border-radius: 4px; padding: .5rem .9rem; font-size: .875rem; max-width: 13rem; }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.3; }
footer { margin-top: 3rem; font-size: .875rem; color: #555; }
@media print { body { font-size: 10pt; max-width: none; padding: 0; } section { break-inside: auto; }
  figure, tr, .tiles { break-inside: avoid; } h2 { break-after: avoid; } .wide { overflow: visible; } }
"""

_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>Made by moesparse {version}. This page is one file: nothing is fetched when it is opened.</footer>
</body>
</html>
"""
