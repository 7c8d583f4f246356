"""Sections of a report about what a pruned model has lost beside the dense one: what `moesparse compare` found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from moesparse.evaluate.divergence import format_perplexity
from moesparse.report import figures
from moesparse.report.findings import Findings
from moesparse.report.page import Section

__all__ = ["what_was_lost"]

# layers whose takers are named, and tokens and characters of text that are shown
_LAYERS, _TOKENS, _BEFORE = 12, 12, 90


def what_was_lost(findings: Findings) -> list[Section] | str | None:
    """The sections, or what would supply them; None where the folder is no pruned one."""
    found, checkpoint = findings.comparison, findings.checkpoint
    if found is None:
        if checkpoint is None or checkpoint.recipe is None:
            return None
        return (
            "What was lost beside the dense model, by domain, layer and token: moesparse compare DENSE "
            f"{checkpoint.folder.name} -o lost.json measures it, and --comparison lost.json puts it here."
        )
    sections = [_by_text(found), _routers(found), _changed(found), _continuations(found)]
    return [section for section in sections if section is not None]


def _by_text(found: Mapping[str, Any]) -> Section:
    section = Section("What was lost")
    perplexity = found["perplexity"]
    tiles = [
        (
            f"{found['kl']['mean']:.3f}",
            f"nats of KL(dense || pruned) a token; 99th percentile {found['kl']['p99']:.2f}",
        ),
        (f"{found['agreement']['top1']:.1%}", "of the tokens have the same likeliest next token"),
        (
            f"× {perplexity['ratio']:.3f}",
            f"perplexity, from {format_perplexity(perplexity['dense'])} to {format_perplexity(perplexity['pruned'])}",
        ),
    ]
    if found["loops"] is not None:
        tiles.append(
            (f"{found['loops']['pruned']:.0%}", f"of the continuations loop, {found['loops']['dense']:.0%} before")
        )
    section.tile(tiles)
    if found["warnings"]:
        section.warn(found["warnings"])
    else:
        section.say("No warning sign: no domain, script or language stands out, and loops are no more than before.")
    section.say(
        f"{found['dense']} and {found['pruned']} on the same {found['tokens']:,} tokens, windows of {found['window']}. "
        "KL of 0 is the same model; top-5 is the share of the five likeliest next tokens that both have."
    )
    named = {**found["domains"], "all": found}
    _draw(section, "lost", "KL by domain", named)
    rows = [[name, *_cells(row)] for name, row in named.items()]
    rows += [[f"script {name}", *_cells(row)] for name, row in found["scripts"].items() if len(found["scripts"]) > 1]
    section.tabulate(["text", *_COLUMNS], rows)
    spans = [f"{row['from']}-{row['to']}" for row in found["positions"]]
    values = [row["kl"]["mean"] for row in found["positions"]]
    alt = "KL by position in the window: " + "; ".join(f"{at} {kl:.3f}" for at, kl in zip(spans, values, strict=True))
    how: dict[str, Any] = {"across": "position in the window", "label": "KL, nats a token"}
    section.show("lost-positions", alt, partial(figures.lines, {"KL": values}, spans, **how))
    if found["languages"]:
        section.say(
            "By language, on the beginning of the Universal Declaration of Human Rights, no part of the figures above. "
            "A perplexity of thousands says that the dense model does not know the language either."
        )
        _draw(section, "lost-languages", "KL by language", found["languages"])
        section.tabulate(["language", *_COLUMNS], [[name, *_cells(row)] for name, row in found["languages"].items()])
    return section


_COLUMNS = ("KL", "p99", "top-1", "top-5", "perplexity dense", "pruned", "ratio", "tokens")


def _draw(section: Section, name: str, what: str, rows: Mapping[str, Any]) -> None:
    groups = {key: {"KL": row["kl"]["mean"]} for key, row in rows.items()}
    alt = f"{what}: " + "; ".join(f"{key} {row['kl']['mean']:.3f}" for key, row in rows.items())
    section.show(name, alt, partial(figures.bars, groups, label="KL, nats a token", digits="{:.3f}"))


def _cells(row: Mapping[str, Any]) -> list[str]:
    kl, agreement, perplexity = row["kl"], row["agreement"], row["perplexity"]
    shares = [f"{agreement[name]:.1%}" for name in ("top1", "top5")]
    values = [*(format_perplexity(perplexity[side]) for side in ("dense", "pruned")), f"{perplexity['ratio']:.3f}"]
    return [f"{kl['mean']:.4f}", f"{kl['p99']:.3f}", *shares, *values, f"{row['tokens']:,}"]


def _routers(found: Mapping[str, Any]) -> Section:
    section = Section("Whom the routers choose instead")
    known = [row for row in found["layers"] if row["chosen"] is not None]
    if not known:
        section.say("Nothing in config.json says which experts are left, so that the routers cannot be compared.")
        return section
    section.say(
        "Of the experts that the dense router chose for a token, the share that the pruned one chose as well; the same "
        "of those that are still there, which falls where the hidden states have moved; and the share that is gone."
    )
    names = [str(row["layer"]) for row in known]
    series = {
        "same experts": [row["chosen"] for row in known],
        "of those still there": [math.nan if row["kept"] is None else row["kept"] for row in known],
        "gone": [row["gone"] for row in known],
    }
    alt = "Router agreement by layer: " + "; ".join(f"layer {row['layer']} {row['chosen']:.1%}" for row in known)
    section.show("routers", alt, partial(figures.lines, series, names, across="layer", label="share of choices"))
    taken = sorted((row for row in known if row["taken_over"]), key=lambda row: -row["gone"])[:_LAYERS]
    if taken:
        rows = [
            [str(row["layer"]), f"{row['gone']:.1%}", _takers(row)] for row in sorted(taken, key=lambda r: r["layer"])
        ]
        header = ["layer", "choices gone", "whose tokens went most to whom (ids of the dense model)"]
        section.tabulate(header, rows, numeric=False)
    if len(taken) == _LAYERS:
        section.say(f"The {_LAYERS} layers that lost most; the data of this page has all.")
    return section


def _takers(row: Mapping[str, Any]) -> str:
    """Of the experts with the most tokens, who took most of them."""
    most = sorted((each for each in row["taken_over"] if each["by"]), key=lambda each: -each["tokens"])[:6]
    return ", ".join(f"{each['expert']} → {each['by'][0][0]} ({each['by'][0][1]:.0%})" for each in most)


def _changed(found: Mapping[str, Any]) -> Section | None:
    if not found["changed"]:
        return None
    section = Section("The tokens that changed most")
    section.say("The token of the text, what each model expected there, and what stands before it.")
    rows = [
        [
            f"{each['kl']:.2f}",
            _text(each["token"]),
            *(_expected(each[side]) for side in ("dense", "pruned")),
            f"…{_text(each['before'])[-_BEFORE:]}",
            each["domain"],
        ]
        for each in found["changed"][:_TOKENS]
    ]
    section.tabulate(["KL", "token", "dense expects", "pruned expects", "after", "domain"], rows, numeric=False)
    return section


def _text(shown: Any) -> str:
    """Text, or ids where no tokenizer was there; the ends of lines are marked."""
    return str(shown).replace("\n", "⏎")


def _expected(tops: list[list[Any]]) -> str:
    return ", ".join(f"{_text(token)!r} {p:.0%}" for token, p in tops[:2])


def _continuations(found: Mapping[str, Any]) -> Section | None:
    written = found["generation"]
    if written is None:
        return None
    section = Section("What both write")
    section.say(
        f"{written['prompts']} prompts of {written['prompt_tokens']} tokens, continued by at most "
        f"{written['new_tokens']} tokens, greedily and drawn at temperature {written['temperature']:g}. A continuation "
        "ends in a loop where its last tokens are the same stretch at least four times in a row, together 64 tokens or "
        f"more. Half of the greedy ones part within {written['greedy']['first_divergence']} tokens."
    )
    header = ["", "end in a loop", "distinct 4-grams", "tokens", "stopped"]
    rows = []
    for kind in ("greedy", "sampled"):
        for side in ("dense", "pruned"):
            row = written[kind][side]
            shares = [f"{row['loops']:.1%}", f"{row['distinct']:.1%}", f"{row['length']:.0f}", f"{row['stopped']:.1%}"]
            rows.append([f"{kind}, {side}", *shares])
    section.tabulate(header, rows)
    if written["examples"]:
        section.say("Side by side, loops of the pruned model first; what both write alike is set back.")
    for each in written["examples"]:
        sides = [(f"{side}, loops" if each["loops"][side] else side, str(each[side])) for side in ("dense", "pruned")]
        section.put_side_by_side(f"{each['domain']}, {each['kind']}:", str(each["prompt"]), *sides)
    return section
