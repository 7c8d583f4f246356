"""`moesparse prune MODEL.gguf OUT.gguf` and `moesparse inspect MODEL.gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moesparse.cli.console import console, print_json
from moesparse.cli.job import refuse_several, saying_what_is_left
from moesparse.cli.voice import shown_progress
from moesparse.errors import UsageError
from moesparse.system.sizes import format_bytes

if TYPE_CHECKING:
    from moesparse.pruning.gguf import GGUFModel, GGUFReport

__all__ = ["inspect_gguf", "prune_gguf_file"]

TAKEN = (
    "model",
    "out",
    "plan",
    "scores",
    "experts",
    "keep_experts",
    "divisible_by",
    "expert_saliency",
    "report",
    "as_json",
)
"""Parameters of `moesparse prune` that a GGUF model has a use for."""


def prune_gguf_file(
    model: str,
    out: Path,
    *,
    plan: Path | None,
    scores: Path | None,
    experts: float | None,
    keep_experts: int | None,
    divisible_by: int | None,
    expert_saliency: str,
    as_json: bool,
) -> GGUFReport:
    """Remove experts from a GGUF model by a plan, or by scores from a file.

    Args:
        model, out: files.
        plan, scores: files, one of them.
        experts, keep_experts, expert_saliency: beside scores.
        divisible_by: what the experts that stay in a layer must be a multiple of.
        as_json: print the report as JSON.
    """
    from moesparse.checkpoints.gguf import GGUFFiles, output_files
    from moesparse.cli.options import check_input_file, load_scores
    from moesparse.experts.plan_file import ExpertPlan
    from moesparse.pruning.gguf import GGUFModel, plan_from_scores, prune_gguf
    from moesparse.pruning.recipe_checks import check_removal

    refuse_several("MODEL.gguf")
    for option, file in (("--plan", plan), ("--scores", scores)):
        if file is not None:
            check_input_file(option, file)
    chosen = experts is not None or keep_experts is not None
    if (plan is None) == (scores is None) or (plan is not None and (chosen or expert_saliency)):
        raise UsageError(
            "either --plan, or --scores with --experts or --keep-experts, must be given for a GGUF model: every "
            "criterion of --experts alone reads text, which is not run through GGUF files"
        )
    if scores is not None and not chosen:
        raise UsageError("--scores must come with --experts or --keep-experts, for which they choose, got neither")
    check_removal(experts, keep_experts)
    files = GGUFFiles(model)
    output_files(files, out)
    source = GGUFModel(files)
    if plan is not None:
        kept = ExpertPlan.load(plan)
        kept.check_divisible(divisible_by)
    else:
        held, name = load_scores(scores, expert_saliency)
        count: dict[str, Any] = {"keep": keep_experts, "remove": experts, "divisible_by": divisible_by}
        kept = plan_from_scores(source, held, name, **count)
    with saying_what_is_left(lambda: ""), shown_progress() as progress:
        found = prune_gguf(source, out, kept, progress=progress)
    if as_json:
        print_json("prune.gguf", found.to_dict())
    else:
        _show_pruned(found)
    return found


def _show_pruned(found: GGUFReport) -> None:
    if found.dropped:
        console.print(
            f"{found.dropped[0]} and what else belongs to layers that predict further tokens ({len(found.dropped)} "
            "tensors): dropped, for llama.cpp has one count of experts for all layers and the plan does not name them",
            highlight=False,
            soft_wrap=True,
        )
    if found.routers != "compared":
        what = "the plan has none" if found.routers == "not compared" else "they are quantised, so only roughly"
        console.print(f"routers {found.routers.split(',')[0]} with those of the plan: {what}", highlight=False)
    more = f" to {found.files[-1]}" if len(found.files) > 1 else ""
    console.print(
        f"{found.kept} of {found.experts} experts kept in each of {len(found.layers)} layers, chosen by "
        f"{found.criterion}; {', '.join(found.types)} as they were\n"
        f"wrote {found.files[0]}{more}: {format_bytes(found.bytes_before)} > {format_bytes(found.bytes_after)}",
        highlight=False,
        soft_wrap=True,
    )


def inspect_gguf(source: str, *, as_json: bool) -> None:
    """Show the experts of a GGUF model: layers, counts, types, bytes, and what was removed."""
    from moesparse.checkpoints.gguf import GGUFFiles
    from moesparse.pruning.gguf import GGUFModel, removal_noted

    model = GGUFModel(GGUFFiles(source))
    facts = _facts(model) | {"removed": removal_noted(model)}
    if as_json:
        print_json("inspect.gguf", facts)
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    for column in ("layer\n  tensor", "shape", "type", "bytes"):
        table.add_column(column, justify="left" if column[0] == "l" else "right", no_wrap=True, vertical="bottom")
    for layer in facts["layers"]:
        table.add_row(f"blk.{layer['layer']}", f"{facts['experts']} experts")
        for name, tensor in layer["tensors"].items():
            table.add_row(
                f"  {name}", "x".join(map(str, tensor["shape"])), tensor["type"], format_bytes(tensor["bytes"])
            )
    out = Console()
    out.print(table)
    out.print(
        f"{facts['architecture']}: {facts['used']} of {facts['experts']} experts for a token; expert bytes "
        f"{format_bytes(facts['expert_bytes'])}, others {format_bytes(facts['bytes'] - facts['expert_bytes'])}",
        soft_wrap=True,
    )
    if facts["removed"]:
        out.print(
            f"experts removed by {facts['removed']['criterion']}, of {facts['removed']['experts']}", soft_wrap=True
        )


def _facts(model: GGUFModel) -> dict[str, Any]:
    layers = [*model.layers, *(layer for layer in model.ahead if model.names(layer))]

    def fact(name: str) -> dict[str, Any]:
        tensor = model.files.tensors[name]
        return {"shape": tensor.shape.tolist()[::-1], "type": tensor.tensor_type.name, "bytes": tensor.n_bytes}

    names = [name for each in layers for name in model.names(each) if "_exps." in name]
    expert_bytes = sum(model.files.tensors[name].n_bytes for name in names)
    return {
        "architecture": model.files.architecture,
        "experts": model.experts,
        "used": model.used,
        "layers": [
            {"layer": layer, "tensors": {name.split(".", 2)[2]: fact(name) for name in model.names(layer)}}
            for layer in layers
        ],
        "expert_bytes": expert_bytes,
        "bytes": model.files.nbytes,
    }
