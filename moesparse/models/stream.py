"""Run a transformers decoder one layer at a time over a whole calibration set.

Pruning block by block needs every calibration window at layer i before layer i + 1 is touched. The hidden states
between layers wait in CPU memory (windows * length * hidden * bytes per element); one layer is on the device.

What a layer is called with besides its hidden states (masks, rotary tables) is learned from the model itself: its
forward runs once per batch with every layer replaced by a stub that notes the call and hands its input on. That works
for any model whose layers pass on nothing but hidden states, and a short probe proves it before anything is changed.
With images some models add features to the hidden states between layers too (the deepstack of Qwen3-VL): where the
probe needs it, the stubs hand on zeros, and what arrives at the next one is what was added.

Where a layer lives while it does not work is not decided here: in the model, or in a checkpoint (on_disk.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from moesparse.errors import CalibrationError, UnsupportedModelError
from moesparse.models.hidden_states import HiddenStates
from moesparse.models.inputs import attention_mask_of, forward_inputs
from moesparse.models.modes import let_experts_run, placed, replaced_forwards
from moesparse.models.next_token import Behind
from moesparse.system.cpu_products import fast_products
from moesparse.system.processes import Processes

PROBE_TOKENS = 16

Hold = Callable[[int, torch.device | None], AbstractContextManager[Any]]
"""Have a layer in memory, on a device (None: where it is or is loaded to), for the body of the context."""


class Aimed(Protocol):
    """What watches a layer at work and must know which tokens of the text it sees."""

    def aim(self, token_mask: torch.Tensor | None, first_window: int, window_length: int) -> None:
        """Before a batch: [T] bool, True for tokens that are no padding, or None; and where it lies in the text."""
        ...


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with, less the hidden states.

    Attributes:
        added: what the model adds to the hidden states before the layer: numbers of rows [r] and values [r, H].
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: tuple[torch.Tensor, torch.Tensor] | None = None

    def fed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's input, from the output of the layer before it."""
        if self.added is None:
            return hidden
        return hidden.flatten(0, 1).index_add(0, *self.added).view_as(hidden)


class _Stop(Exception):
    """Leaves the model's forward once its last layer has been called."""


class LayerStream:
    """A set of windows on its way through the decoder layers of a model.

    Args:
        model: a transformers causal language model; its forward is run, its weights are not changed.
        layers: the decoder layers in the order of the forward.
        windows: (n, t) int64 token ids.
        attention_mask: (n, t), nonzero where a token is real, or None.
        batch_size: windows in one forward.
        device: where the layer at work is moved to; None leaves it where it is.
        hold: how a layer comes into memory; None for a model that is there.
        inspect: called once for each layer, in order, while it is held for the probe: to refuse it before any work.
        spill: a folder for the hidden states that wait; None keeps them in memory.
        processes: that share the windows, batch by batch: a stream holds and runs the batches of its own process.
        behind: the last of `layers` predicts a further token; the model's own forward does not run it.
        inputs: of each window, what the model is called with beside the ids; joined along their first dim. Padding lies
            behind then, and the mask only says which tokens count.

    Attributes:
        first_window: of every batch that this process runs.
        windows, tokens: of all processes, padding included.

    Raises:
        UnsupportedModelError: running the layers one by one does not give what the model's own forward gives; or images
            for a layer that predicts a further token.
        CalibrationError: a layer gives NaN or infinity for the first tokens; names the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        windows: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        batch_size: int = 8,
        device: torch.device | None = None,
        hold: Hold | None = None,
        inspect: Callable[[int], None] | None = None,
        spill: Path | None = None,
        processes: Processes | None = None,
        behind: Behind | None = None,
        inputs: Sequence[Mapping[str, torch.Tensor]] | None = None,
    ):
        self.layers = list(layers)
        self._behind = behind
        self._trunk = self.layers if behind is None else self.layers[:-1]
        self.device = device
        self.processes = processes or Processes()
        self._model = model
        self._hold = hold or (lambda position, device: placed(self.layers[position], device))
        self._tuple_length: list[int | None] = [None] * len(self._trunk)
        if behind is not None and inputs is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the layer that predicts a further token is run on text alone, got images: "
                "leave it out with mtp='drop', or as it is with mtp='keep'"
            )
        let_experts_run(model)
        self._inputs, self._adds = inputs, False
        self._probe(windows, inspect)
        self.length = windows.shape[1]
        self.windows, self.tokens = len(windows), windows.numel()
        self.first_window = self.processes.share(range(0, len(windows), batch_size))
        self._windows, self._mask, self._batch_size, self._spill = windows, attention_mask, batch_size, spill
        self.restart()

    def restart(self) -> None:
        """Back to the input of the first layer."""
        self.hidden = HiddenStates(self._spill)
        self._ids: list[torch.Tensor] = []
        self.token_masks: list[torch.Tensor | None] = []
        self._calls: list[list[LayerCall]] = []
        bare: dict[torch.Size, list[LayerCall]] = {}
        for start in self.first_window:
            batch = self._windows[start : start + self._batch_size]
            mask = None if self._mask is None else self._mask[start : start + self._batch_size]
            hidden, calls = self._trace(batch, mask, start)
            if attention_mask_of(mask) is None and self._inputs is None:
                # equal shapes without padding in front: equal masks and rotary tables
                calls = bare.setdefault(hidden.shape, calls)
            self.hidden.append(hidden)
            self._ids.append(batch)
            self.token_masks.append(None if mask is None else mask.bool().flatten())
            self._calls.append(calls)

    def __len__(self) -> int:
        """Number of batches that this process runs."""
        return len(self.hidden)

    @property
    def forms(self) -> list[int | None]:
        """What each layer that the model's own forward runs gives: the length of its tuple, or None for a tensor."""
        return list(self._tuple_length)

    def token_mask(self, number: int, position: int) -> torch.Tensor | None:
        """[T] bool of a batch at a layer, True for tokens that are no padding, and have a next one if it takes that."""
        mask = self.token_masks[number]
        if self._behind is None or position < len(self._trunk):
            return mask
        return self._behind.token_mask(self._ids[number], mask)

    def on_device(self, position: int) -> AbstractContextManager[Any]:
        """Hold one layer on the device while the block runs."""
        return self._hold(position, self.device)

    @torch.no_grad()
    def run(
        self,
        position: int,
        *,
        keep: bool = False,
        outputs: HiddenStates | None = None,
        recorders: Sequence[Aimed] = (),
    ) -> Iterator[int]:
        """Run one layer over all batches; yields the number of tokens of each batch once it is done.

        Args:
            position: which layer.
            keep: True replaces the waiting hidden states by the layer's output, batch by batch.
            outputs: where to put the layer's outputs while the hidden states stay for another run of the layer; the
                caller assigns them to `hidden` in the end.
            recorders: told of each batch before it runs.
        """
        layer = self.layers[position]
        device = next(layer.parameters()).device
        for number, hidden in enumerate(self.hidden):
            for recorder in recorders:
                recorder.aim(self.token_mask(number, position), self.first_window[number], self.length)
            given, call = self._given(position, hidden, self._ids[number], self._calls[number])
            call = _to_device(call, device)
            with fast_products(layer):
                out = layer(call.fed(given.to(device)), *call.args, **call.kwargs)
            if keep:
                self.hidden[number] = _hidden_of(out)
            elif outputs is not None:
                outputs.append(_hidden_of(out).to(hidden.device))
            yield hidden.shape[0] * hidden.shape[1]

    def _given(
        self, position: int, hidden: torch.Tensor, ids: torch.Tensor, calls: list[LayerCall]
    ) -> tuple[torch.Tensor, LayerCall]:
        """Hidden states and the other arguments that a layer is called with, from those of the layers."""
        if self._behind is None or position < len(self._trunk):
            return hidden, calls[position]
        call = calls[self._behind.template]
        return self._behind.norm(hidden), LayerCall(
            call.args, {**call.kwargs, "next_embeddings": self._behind.shifted(ids)}
        )

    @torch.no_grad()
    def _trace(self, ids: torch.Tensor, mask: torch.Tensor | None, start: int) -> tuple[torch.Tensor, list[LayerCall]]:
        """Run the forward with stubs for layers: the first layer's input, and every layer's other arguments.

        Args:
            ids: [b, t].
            mask: [b, t], or None.
            start: number of the first window.
        """
        calls: dict[int, LayerCall] = {}
        first: list[torch.Tensor] = []

        def stub_for(position: int) -> Callable[..., Any]:
            def stub(*args: Any, **kwargs: Any) -> Any:
                args, kwargs, hidden = _take_hidden(args, kwargs)
                calls[position] = LayerCall(args, kwargs, _nonzero_rows(hidden) if self._adds and first else None)
                if not first:
                    first.append(hidden)
                if position == len(self._trunk) - 1:
                    raise _Stop
                length = self._tuple_length[position]
                hidden = torch.zeros_like(hidden) if self._adds else hidden
                return hidden if length is None else (hidden, *[None] * (length - 1))

            return stub

        with replaced_forwards(self._trunk, stub_for), contextlib.suppress(_Stop):
            self._forward(ids, mask, start)
        missing = [position for position in range(len(self._trunk)) if position not in calls]
        if missing:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} does not call its decoder layers {missing} in a plain forward, "
                "so it cannot be pruned layer by layer"
            )
        return first[0], [calls[position] for position in range(len(self._trunk))]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None, start: int) -> Any:
        # the model without its head where there is one: logits are not needed
        base = getattr(self._model, "base_model", self._model)
        device = next(parameter.device for parameter in base.parameters() if not parameter.is_meta)
        mask = None if mask is None else mask.to(device)
        return base(**forward_inputs(base, ids.to(device), mask, self._inputs, range(start, start + len(ids))))

    def _probe(self, windows: torch.Tensor, inspect: Callable[[int], None] | None) -> None:
        """Learn the length of each layer's output tuple (None: a tensor), and prove that layer by layer is the model.

        Every layer is held once, twice where one gives a tuple: that is seen only when it has run; and again where the
        model adds to the hidden states of a record with images. Such a record is taken whole.
        """
        start, ids, traced = 0, windows[:1, :PROBE_TOKENS], None
        if self._inputs is not None:
            start = _first_with_images(self._inputs)
            ids = windows[start : start + 1]
        # a model that unpacks the tuple that a stub does not give yet
        with contextlib.suppress(Exception):
            traced = self._trace(ids, None, start)
        if self._compare(ids, traced, inspect, start) is not None:
            position = self._compare(ids, self._trace(ids, None, start), None, start)
            if position is not None and self._inputs is not None:
                self._adds = True
                position = self._compare(ids, self._trace(ids, None, start), None, start)
            if position is not None:
                raise UnsupportedModelError(
                    f"{type(self._model).__name__} cannot be run layer by layer: layer {position} alone gives another "
                    "output than inside the model. Calibrate the whole model with moesparse.calibrate(model, windows) "
                    "and pass the statistics to prune instead of the windows"
                )
        if self._behind is not None:
            self._probe_behind(ids, inspect)

    @torch.no_grad()
    def _probe_behind(self, ids: torch.Tensor, inspect: Callable[[int], None] | None) -> None:
        """Prove that the model's input and output are what a layer behind the last takes them for, and run it."""
        assert self._behind is not None
        embedded, calls = self._trace(ids, None, 0)
        last, normed = self._ends
        want = self._behind.embedding(ids.to(embedded.device)), self._behind.norm(last)
        for what, got, known in zip(("embedding", "final norm"), (embedded, normed), want, strict=True):
            if got.shape != known.shape or not torch.allclose(got.float(), known.float(), rtol=1e-3, atol=1e-3):
                raise UnsupportedModelError(
                    f"{type(self._model).__name__} does more than its {what}, and whether the layer that predicts a "
                    "further token is given that is not known: leave it out with mtp='drop', or as it is with 'keep'"
                )
        position, layer = len(self._trunk), self._behind.layer
        with self._hold(position, None), fast_products(layer):
            if inspect is not None:
                inspect(position)
            given, call = self._given(position, last, ids, calls)
            if not _hidden_of(layer(given, *call.args, **call.kwargs)).isfinite().all():
                raise _not_finite(layer, position, (given,), {})

    @torch.no_grad()
    def _compare(
        self,
        ids: torch.Tensor,
        traced: tuple[torch.Tensor, list[LayerCall]] | None,
        inspect: Callable[[int], None] | None,
        start: int,
    ) -> int | None:
        """Run each layer alone while the model runs it; the first that gives another output, or None.

        The lengths of the output tuples are noted on the way.
        """
        hidden, calls = traced or (None, [])
        differs: list[int] = []
        ends: list[torch.Tensor] = []

        def beside(position: int) -> Callable[..., Any]:
            layer = self.layers[position]
            inside = layer.forward

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal hidden
                with self._hold(position, None), fast_products(layer):
                    if inspect is not None:
                        inspect(position)
                    output = inside(*args, **kwargs)
                    self._tuple_length[position] = len(output) if isinstance(output, tuple) else None
                    want = _hidden_of(output)
                    ends[:] = [want]
                    if not want.isfinite().all():
                        raise _not_finite(layer, position, args, kwargs)
                    if hidden is not None:
                        call = calls[position]
                        hidden = _hidden_of(inside(call.fed(hidden), *call.args, **call.kwargs))
                        close = hidden.shape == want.shape and torch.allclose(
                            hidden.float(), want.float(), rtol=1e-3, atol=1e-3 * float(want.abs().max())
                        )
                    if hidden is None or not close:
                        differs.append(position)
                        hidden = None
                return output

            return run

        def passed(*args: Any, **kwargs: Any) -> Any:
            # a model may run all layers of its list
            hidden, length = _take_hidden(args, kwargs)[2], self._tuple_length[-1]
            return hidden if length is None else (hidden, *[None] * (length - 1))

        with replaced_forwards(self.layers, lambda at: beside(at) if at < len(self._trunk) else passed):
            output = self._forward(ids, None, start)
        if self._behind is not None:
            self._ends = ends[-1], output[0]
        return differs[0] if differs else None


@torch.no_grad()
def logits_behind(
    model: nn.Module, layers: Sequence[nn.Module], forms: Sequence[int | None], ids: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """What the model makes of the hidden states behind its last layer: its own forward, in which no layer runs.

    Norm and head of whatever form, with what follows them, since nothing of them is taken apart. All of it works on one
    token at a time, so that a part of a window may be given by itself.

    Args:
        model: a transformers causal language model; what lies outside of its layers is in memory.
        layers: its decoder layers in the order of the forward.
        forms: as `LayerStream.forms` has them.
        ids: [b, t], tokens of the hidden states, on the device of the model.
        hidden: [b, t, ...], the output of the last layer.

    Returns:
        [b, t, vocabulary], in the dtype that the model gives.
    """

    def passing(position: int) -> Callable[..., Any]:
        def passed(*args: Any, **kwargs: Any) -> Any:
            out = hidden if position == len(layers) - 1 else _take_hidden(args, kwargs)[2]
            length = forms[position]
            return out if length is None else (out, *[None] * (length - 1))

        return passed

    with replaced_forwards(layers, passing), fast_products(model):
        return model(**forward_inputs(model, ids, None)).logits


def _nonzero_rows(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Numbers and values of the rows of [b, t, H] that are not zero; None where all are."""
    rows = hidden.flatten(0, 1)
    numbers = rows.any(dim=1).nonzero().flatten()
    return (numbers, rows[numbers]) if len(numbers) else None


def _first_with_images(inputs: Sequence[Mapping[str, torch.Tensor]]) -> int:
    """Number of the first window with pixels; 0 where none has."""
    pixels = (any(tensor.is_floating_point() for tensor in each.values()) for each in inputs)
    return next((number for number, found in enumerate(pixels) if found), 0)


def _take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    if args:
        return args[1:], dict(kwargs), args[0]
    kwargs = dict(kwargs)
    return (), kwargs, kwargs.pop("hidden_states")


def _not_finite(layer: nn.Module, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CalibrationError:
    """What is wrong with a layer whose output is not finite."""
    spoiled = [name for name, tensor in layer.state_dict().items() if not tensor.isfinite().all()]
    if not _take_hidden(args, kwargs)[2].isfinite().all():
        where = "its input is not: look for NaN or infinity in the weights before it"
    elif spoiled:
        where = f"NaN or infinity in its {', '.join(spoiled[:3])}: repair the checkpoint"
    else:
        where = "its weights are finite: load the model in bfloat16 or float32"
    return CalibrationError(f"decoder layer {position} must give finite hidden states, got others; {where}")


def _hidden_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a call; containers are rebuilt, anything else is passed on."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, LayerCall):
        return LayerCall(*(_to_device(part, device) for part in (value.args, value.kwargs, value.added)))
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_device(item, device) for item in value)
    return value
