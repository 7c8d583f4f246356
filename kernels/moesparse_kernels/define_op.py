"""Torch ops of this package that cost a call of a decode step little."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["define_op"]


def define_op(name: str) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a typed function as torch.ops.moesparse.<name>.

    As `torch.library.custom_op` does, but without its Python wrapper around every call: a decode step makes one call a
    layer and waits for it.
    """

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        # a layout is a constant of the weight, no size that a graph could leave open
        schema = torch.library.infer_schema(function, mutates_args=()).replace("SymInt[]", "int[]")
        torch.library.define(f"moesparse::{name}", schema)
        torch.library.impl(f"moesparse::{name}", "default", function)
        return function

    return register
