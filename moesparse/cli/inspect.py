"""`moesparse inspect FOLDER`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moesparse.cli.common import model_source, print_json, quiet_libraries


def inspect(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the expert matrices of a checkpoint: shapes, share of zeros, and which n:m patterns really hold.

    The zeros are counted in the weights themselves; what the config claims is printed beside it. Ends with 1 when the
    config claims a pattern that does not hold.

    Example:

      moesparse inspect out/demo-2to4 --json
    """
    from moesparse.checkpoint import CONFIG_KEY, load_pretrained

    with quiet_libraries():
        network, _ = load_pretrained(model_source(model))
    claim = getattr(network.config, CONFIG_KEY, None)
    result = describe(network)
    result["recipe"] = None if claim is None else claim["recipe"]
    claimed = None if claim is None else claim["recipe"]["weights"]
    broken = [] if claimed is None else broken_tensors(network, claimed)
    if as_json:
        print_json(result)
    else:
        _show(result)
    for name in broken:
        typer.echo(f"error: {name} does not hold {claimed} as config.json says", err=True)
    if broken:
        raise typer.Exit(1)


def describe(network: Any) -> dict[str, Any]:
    """Blocks with their tensors (name, shape (E, out, in), sparsity, pattern), and parameter counts."""
    from moesparse.blocks import find_moe_blocks
    from moesparse.masks import detect_patterns

    blocks = []
    expert_parameters = 0
    for block in find_moe_blocks(network):
        tensors = []
        for matrix in block.matrices:
            weight = matrix.weight
            zeros = int((weight == 0).sum())
            patterns = detect_patterns(weight)
            expert_parameters += weight.numel()
            tensors.append(
                {
                    "name": matrix.name,
                    "shape": list(weight.shape),
                    "sparsity": zeros / weight.numel(),
                    "pattern": str(patterns[0]) if patterns else ("unstructured" if zeros else "dense"),
                }
            )
        blocks.append({"name": block.name, "experts": block.num_experts, "tensors": tensors})
    total = sum(parameter.numel() for parameter in network.parameters())
    return {"blocks": blocks, "expert_parameters": expert_parameters, "other_parameters": total - expert_parameters}


def broken_tensors(network: Any, weights: str) -> list[str]:
    """Names of the expert matrices in which a pattern ("2:4", "0.5") does not hold."""
    from moesparse.blocks import find_moe_blocks
    from moesparse.masks import Pattern, check_mask

    pattern = Pattern.parse(weights)
    return [
        f"{block.name}.{matrix.name}"
        for block in find_moe_blocks(network)
        for matrix in block.matrices
        if not check_mask(matrix.weight, pattern, name=f"{block.name}.{matrix.name}").holds
    ]


def _show(result: dict[str, Any]) -> None:
    table = Table()
    for column in ("block", "experts", "tensor", "shape", "zeros", "pattern"):
        table.add_column(column, justify="right" if column in ("experts", "shape", "zeros") else "left")
    for block in result["blocks"]:
        for number, tensor in enumerate(block["tensors"]):
            table.add_row(
                block["name"] if number == 0 else "",
                str(block["experts"]) if number == 0 else "",
                tensor["name"],
                " x ".join(map(str, tensor["shape"])),
                f"{100 * tensor['sparsity']:.2f}%",
                tensor["pattern"],
            )
    out = Console()
    out.print(table)
    out.print(f"expert parameters {result['expert_parameters']:,}, others {result['other_parameters']:,}")
    if result["recipe"] is not None:
        out.print("pruned by " + ", ".join(f"{key}={value}" for key, value in result["recipe"].items()))
