"""Texts that one forward pass continues together, each with a length of its own; any may come or go between two passes.

A prompt goes through the model alone, without padding: nothing of it depends on its neighbours. Its keys and values
then become a row of the batch. Rows end at the right; a shorter row is padded on the left, the padding is masked, and
positions count from the row's own start. Sliding windows see distances only, and states of linear attention have no
length, so both are rows like any other. What else a cache may hold (compressed keys, the keys of an index) is not cut
into rows here: such a model continues one text at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import cache_utils

from moesparse.system.cpu_products import fast_products

__all__ = ["Batch"]

# by name, since not every release that is supported has all of them
_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
_STATES = ("LinearAttentionLayer",)
_BOTH = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
_EMPTY = ("DummyLayer",)


class Batch:
    """The rows that a model continues, and their cache.

    Args:
        model: a transformers causal language model in eval mode, on one device.

    Attributes:
        lengths: tokens that each row holds.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._cuts_logits = "logits_to_keep" in accepted
        self._cache: Any = None
        self.lengths: list[int] = []

    @torch.inference_mode()
    def joinable(self) -> bool:
        """Whether the model's cache can hold several rows; asked with a prompt of two tokens."""
        cache = self._forward(torch.zeros(1, 2, dtype=torch.int64), None, None, whole=False).past_key_values
        config = self._model.config.get_text_config()
        chunked = getattr(config, "attention_chunk_size", None) is not None
        kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
        plain = type(cache) is cache_utils.DynamicCache
        return plain and not chunked and bool(kinds) and kinds <= {*_GROWING, *_STATES, *_BOTH, *_EMPTY}

    @torch.inference_mode()
    def add(self, prompt: Sequence[int], copies: int = 1, *, whole: bool = False) -> Tensor:
        """Send a prompt through the model and append it as `copies` rows; none only scores it.

        Args:
            prompt: at least one token id.
            copies: rows that go on from it.
            whole: every token's logits instead of the last one's.

        Returns:
            Logits of the prompt's tokens [len(prompt), vocabulary], or of its last one [1, vocabulary], as the model
            gives them.
        """
        output = self._forward(torch.tensor([list(prompt)]), None, None, whole=whole)
        if copies:
            try:
                self._append(_Rows(output.past_key_values, [len(prompt)]), copies)
            except Exception:
                # half joined, and of no use
                self.keep(())
                raise
        return output.logits[0] if whole else output.logits[0, -1:]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row.

        Returns:
            Logits of what comes next [rows, vocabulary], as the model gives them.
        """
        ids = torch.tensor(tokens)[:, None]
        lengths = torch.tensor(self.lengths)
        width = max(self.lengths) + 1
        # no mask where nothing is padded: attention without one is quicker, and what a text alone gets
        mask = None
        if min(self.lengths) + 1 < width:
            mask = (torch.arange(width)[None] >= (width - 1 - lengths)[:, None]).long()
        output = self._forward(ids, mask, lengths[:, None], whole=False)
        self._cache = output.past_key_values
        self.lengths = [length + 1 for length in self.lengths]
        return output.logits[:, -1]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and let the others go."""
        if not rows:
            self._cache, self.lengths = None, []
        elif list(rows) != list(range(len(self.lengths))):
            left = _Rows(self._cache, self.lengths)
            left.select(rows)
            left.set_width(max(left.lengths))
            self.lengths = left.lengths

    def _append(self, rows: _Rows, copies: int) -> None:
        if copies > 1:
            rows.select([0] * copies)
        if self.lengths:
            rows = _joined(_Rows(self._cache, self.lengths), rows)
        self._cache, self.lengths = rows.cache, rows.lengths

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, *, whole: bool) -> Any:
        more: dict[str, Any] = {}
        if mask is not None:
            more["attention_mask"] = mask.to(self._device)
        if positions is not None:
            more["past_key_values"] = self._cache
            if self._takes_positions:
                more["position_ids"] = positions.to(self._device)
        if self._cuts_logits:
            more["logits_to_keep"] = 0 if whole else 1
        with fast_products(self._model):
            return self._model(input_ids=ids.to(self._device), use_cache=True, **more)


class _Rows:
    """A cache as rows of these lengths; `width` is the longest, and what every layer that grows is padded to."""

    def __init__(self, cache: Any, lengths: Sequence[int]) -> None:
        self.cache = cache
        self.lengths = list(lengths)
        self.width = max(lengths)

    def select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(list(rows))
        for layer in self.cache.layers:
            for holder, name in _tensors(layer):
                tensor = _get(holder, name)
                _set(holder, name, tensor.index_select(0, index.to(tensor.device)))
        self.lengths = [self.lengths[row] for row in rows]

    def set_width(self, width: int) -> None:
        """Pad on the left, or cut what is padding in every row."""
        for layer in self.cache.layers:
            if type(layer).__name__ not in (*_GROWING, *_BOTH) or layer.keys is None:
                continue
            window = getattr(layer, "sliding_window", None)
            held = width if window is None else min(width, window - 1)
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                setattr(layer, name, F.pad(tensor, (0, 0, held - tensor.shape[-2], 0)))
            if window is not None:
                layer.cumulative_length = width
        self.width = width


def _joined(above: _Rows, below: _Rows) -> _Rows:
    """Rows of two caches in one, which is the first one's."""
    width = max(above.width, below.width)
    for rows in (above, below):
        if rows.width < width:
            rows.set_width(width)
    for ours, theirs in zip(above.cache.layers, below.cache.layers, strict=True):
        for (holder, name), (other, _) in zip(_tensors(ours), _tensors(theirs), strict=True):
            _set(holder, name, torch.cat([_get(holder, name), _get(other, name)]))
    return _Rows(above.cache, above.lengths + below.lengths)


def _tensors(layer: Any) -> list[tuple[Any, Any]]:
    """(holder, name) of every tensor of a layer whose first dim is the batch."""
    found: list[tuple[Any, Any]] = []
    kind = type(layer).__name__
    if kind in (*_GROWING, *_BOTH) and layer.keys is not None:
        found += [(layer, "keys"), (layer, "values")]
    if kind in (*_STATES, *_BOTH):
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name)
            # one tensor, or several by number
            places = [(layer, name)] if isinstance(states, Tensor) else [(states, key) for key in states or {}]
            found += [place for place in places if _get(*place) is not None]
    return found


def _get(holder: Any, name: Any) -> Tensor:
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def _set(holder: Any, name: Any, value: Tensor) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)
