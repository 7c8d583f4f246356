"""What a run layer by layer will take, said before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesparse.cli.console import print_json
from moesparse.cli.job import count
from moesparse.cli.show import show_plan

if TYPE_CHECKING:
    from moesparse.calibration.plan import Plan
    from moesparse.cli.text import TextOptions

__all__ = ["planned_windows", "tell_plan"]


def planned_windows(network: Any, text: TextOptions) -> dict[str, int]:
    """What a plan is to know of the text, of which nothing was read: windows of at most the model's context."""
    from moesparse.models.meta import context_length

    length = min(text.length, context_length(network))
    return {"windows": text.samples, "length": length, "batch_size": text.batch_size, "processes": count()}


def tell_plan(plan: Plan, device: Any, *, dry_run: bool, as_json: bool) -> bool:
    """Show what a run will take; whether that was all that was asked for."""
    if as_json and not dry_run:
        return False
    facts = _with_time(plan, device)
    if as_json:
        print_json(facts)
    else:
        show_plan(facts)
    return dry_run


def _with_time(plan: Plan, device: Any) -> dict[str, Any]:
    """The plan for JSON, with an estimate of the time at the speed of this machine."""
    import torch

    from moesparse.calibration.plan import gemm_rate

    rate = gemm_rate(device)
    half = plan.weights < 3 * plan.parameters
    forward = gemm_rate(device, torch.bfloat16) if half else rate
    rates = {"flops_per_second": rate, "forward_flops_per_second": forward}
    return {**plan.to_dict(), **rates, "seconds": plan.seconds(rate, forward)}
