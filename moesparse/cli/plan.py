"""What a run layer by layer will take, said before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from moesparse.cli.console import console, print_json
from moesparse.cli.job import count
from moesparse.cli.show import show_plan
from moesparse.cli.voice import voice

if TYPE_CHECKING:
    from moesparse.calibration.plan import Plan
    from moesparse.cli.text import TextOptions
    from moesparse.pruning.recipe import Recipe

__all__ = ["planned_windows", "tell_plan"]


def planned_windows(network: Any, text: TextOptions) -> dict[str, int]:
    """What a plan is to know of the text, of which nothing was read: windows of at most the model's context."""
    from moesparse.models.meta import context_length

    length = min(text.length, context_length(network))
    return {"windows": text.samples, "length": length, "batch_size": text.batch_size, "processes": count()}


def tell_plan(plan: Plan, device: Any, recipe: Recipe | None, *, dry_run: bool, as_json: bool) -> bool:
    """Show what a run will take; whether that was all that was asked for, and the plan is the result, on stdout.

    Args:
        plan: of the run.
        device: it is to run on.
        recipe: whose rules it will go by; None prunes nothing.
        dry_run: the plan is all that was asked for.
        as_json: print one JSON object, and nothing without dry_run.
    """
    if as_json and not dry_run:
        return False
    rules = recipe if recipe is not None and recipe.prunes_weights else None
    values = recipe if recipe is not None and recipe.values is not None else None
    facts = _with_time(plan, device) | {name: getattr(rules, name, None) for name in ("saliency", "update")}
    facts |= {name: getattr(values, name, None) for name in ("values", "value_rule", "fake_quantised")}
    voice.planned = facts["seconds"]
    if as_json:
        print_json("plan", facts)
    else:
        show_plan(facts, Console() if dry_run else console)
    return dry_run


def _with_time(plan: Plan, device: Any) -> dict[str, Any]:
    """The plan for JSON, with the time at the speed of this machine now, and what this process takes beside the run."""
    import torch

    from moesparse.system.memory import resident_memory
    from moesparse.system.processes import device_at_work
    from moesparse.system.speed import speed_here

    place = device_at_work(device)
    half = plan.weights < 3 * plan.parameters
    speed = speed_here(place, torch.bfloat16 if half else torch.float32)
    rate, forward = speed.rates
    return {
        **plan.to_dict(),
        "process": 0 if place is not None and place.type == "cuda" else resident_memory(),
        "flops_per_second": rate,
        "forward_flops_per_second": forward,
        "seconds": plan.seconds(rate, forward),
        "load": speed.load,
        "cpus": speed.cpus,
        "seconds_without_load": None if speed.idle is None else plan.seconds(*speed.idle),
        "measured_without_load": speed.measured,
    }
