"""How far the experts of a block turn the residual stream: the token term of EASY-EP (arXiv 2504.06792).

For every token s = max(0, 1 - cos(h, h + r)), with h the residual before the experts and r what the routed experts add
to it. The experts never see h. It is found without knowing the architecture: h is the input of the module (a norm)
whose output is what the MoE module is called with; and that it is the right tensor is checked on every batch: the
layer's output must be h plus the MoE module's output. Where it is not (a norm or a scale after the experts, parallel
branches), nothing is recorded and the criterion is refused by name later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesparse.calibration.statistics import ANGLED_NORM_SUM

if TYPE_CHECKING:
    from moesparse.calibration.recorder import Recorder


@contextmanager
def measure_angles(model: nn.Module, recorders: Sequence[Recorder]) -> Iterator[None]:
    """While the body runs whole layers, add sum g|f|s, [E] float64, to `extra` of every recorder's statistics.

    All blocks have the sum in the end, or none: a criterion compares the blocks of a model alike. Holds, of one layer
    at a time, the hidden states and one number per routed row.
    """
    angles = [_Angle(model, recorder) for recorder in recorders]
    with ExitStack() as stack:
        for angle in angles:
            stack.enter_context(angle)
        yield
    if all(angle.holds for angle in angles):
        for angle in angles:
            angle.recorder.statistics.extra[ANGLED_NORM_SUM] = angle.total
    else:
        for angle in angles:
            if angle.recorder.window_sums is not None:
                angle.recorder.window_sums.pop(ANGLED_NORM_SUM, None)


class _Angle:
    """The hooks on one layer, and the sum of its block."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.recorder = recorder
        block = recorder.block
        self.layer = model.get_submodule(block.layer)
        self.moe = block.moe
        # made under inference mode it could not be changed in place outside of it, as the other sums can
        with torch.inference_mode(False):
            self.total = torch.zeros_like(recorder.statistics.gate_sum)
        # gemma4's layer is its own MoE module, and a latent MoE adds another vector than its experts give
        self.holds = self.moe is not self.layer
        self._made_from: dict[int, tuple[Tensor, Tensor]] = {}
        self._residual: Tensor | None = None
        self._added: Tensor | None = None
        self._rows: tuple[Tensor, list[int], Tensor, Tensor] | None = None

    def __enter__(self) -> None:
        inside = {id(module) for module in self.moe.modules()}
        self._handles = [
            module.register_forward_hook(self._note_module)
            for module in self.layer.modules()
            if module is not self.layer and id(module) not in inside
        ]
        self._handles.append(self.moe.register_forward_pre_hook(self._note_input, with_kwargs=True))
        self._handles.append(self.moe.register_forward_hook(self._note_output))
        self._handles.append(self.layer.register_forward_hook(self._finish))
        self.recorder.observer = self._note_rows

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.recorder.observer = None

    def _note_module(self, _module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and inputs[0].shape == output.shape:
            # the output is held too: its address must not be used again while it is a key
            self._made_from[output.data_ptr()] = (inputs[0], output)

    def _note_input(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        value = args[0] if args else kwargs.get("hidden_states")
        found = self._made_from.get(value.data_ptr()) if isinstance(value, Tensor) else None
        self._residual = None if found is None else found[0]

    def _note_output(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._added = output[0] if isinstance(output, tuple) else output

    def _note_rows(self, tokens: Tensor, counts: list[int], gated_norms: Tensor, routed: Tensor) -> None:
        self._rows = (tokens, counts, gated_norms, routed)

    def _finish(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        h, added, rows = self._residual, self._added, self._rows
        self._made_from.clear()
        self._residual = self._added = self._rows = None
        if not self.holds:
            return
        if h is None or added is None or rows is None or not _adds_up(h, added, output):
            self.holds = False
            return
        tokens, counts, gated_norms, routed = rows
        h = h.reshape(-1, h.shape[-1])
        if h.shape != routed.shape:
            self.holds = False
            return
        dtype = torch.promote_types(h.dtype, torch.float32)
        cosine = F.cosine_similarity(h.to(dtype), h.to(dtype) + routed.to(dtype), dim=-1)
        weighted = gated_norms * (1 - cosine).clamp_min(0).double()[tokens]
        self.total += torch.stack([part.sum() for part in weighted.split(counts)]).to(self.total.device)
        if self.recorder.window_sums is not None:
            self.recorder.add_by_window(ANGLED_NORM_SUM, tokens, counts, weighted)


def _adds_up(h: Tensor, added: Tensor, output: Any) -> bool:
    """Whether the layer's output is h + added, to the rounding of its dtype."""
    if not isinstance(output, Tensor) or h.shape != output.shape or added.numel() != output.numel():
        return False
    tolerance = 4 * torch.finfo(output.dtype).eps * float(output.abs().max())
    return bool((h + added.reshape(h.shape) - output).abs().max() <= tolerance)
