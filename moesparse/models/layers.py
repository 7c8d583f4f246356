"""Where the layers of a model come from: one interface for a model in memory and for a checkpoint on the disk.

Every driver walks over positions, holds one layer at a time and asks for the blocks in it; whether holding moves a
layer to a GPU and back or reads it from a shard and drops it is for `LayersInMemory` and on_disk.py to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.models.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.models.modes import placed
from moesparse.models.next_token import Behind
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, silent
from moesparse.system.processes import Processes

__all__ = ["Layers", "LayersInMemory", "RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """What is asked of a run beside its work.

    Attributes:
        batch_size: windows in one forward.
        device: where the layer at work goes; None leaves it where it is, or on the CPU when it is read.
        allow_pruned: accept a model that carries pruned experts.
        resume: go on with an unfinished run.
        max_memory: bytes of RAM to stay within; None is what is free.
        progress: called with every step.
    """

    batch_size: int = 8
    device: torch.device | None = None
    allow_pruned: bool = False
    resume: bool = False
    max_memory: int | None = None
    progress: Progress = silent


class Layers:
    """The decoder layers of a model, wherever their weights wait while they do not work.

    Attributes:
        model: parameters of a layer that is not held may be on the meta device.
        blocks: its MoE blocks, in forward order.
        whole: all of it is in memory; swaps, bytes to aim at and generation need that.
    """

    model: Any
    blocks: list[MoEBlock]
    whole: bool

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, position: int) -> str:
        """Of a layer, as in `MoEBlock.layer`."""
        raise NotImplementedError

    def hold(self, position: int, device: torch.device | None = None) -> AbstractContextManager[Any]:
        """Have one layer in memory for the body, on a device (None: where it is, or the CPU)."""
        raise NotImplementedError

    def hold_to_cut(self, position: int) -> AbstractContextManager[Any]:
        """The same for experts to be cut out: what is copied as bytes need not be there."""
        return self.hold(position)

    def in_order(self) -> Sequence[nn.Module]:
        """The decoder layers in the order of the forward, one for each position."""
        raise NotImplementedError

    @property
    def processes(self) -> Processes:
        """Those that share the work."""
        return Processes()

    @property
    def behind(self) -> Behind | None:
        """What predicts further tokens behind the layers that the model's own forward runs, and is run too."""
        return None

    def blocks_at(self, position: int) -> list[MoEBlock]:
        """The blocks of one layer; none in a dense layer."""
        return [block for block in self.blocks if block.layer == self.name(position)]

    def find_blocks(self) -> None:
        """Look for the blocks, also again when experts were removed."""
        self.blocks = find_moe_blocks(self.model)

    def stream(
        self,
        ids: Tensor,
        mask: Tensor | None,
        options: RunOptions,
        inspect: Callable[[int], None] | None = None,
        spill: Path | None = None,
        inputs: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> LayerStream:
        """Windows on their way through the layers, each held while it works.

        Args:
            ids, mask: [n, t] token ids, and nonzero where a token is real, or None.
            options: batch size and device.
            inspect: called once for each layer, in order, while it is held and before any work.
            spill: a folder for the hidden states that wait; None keeps them in memory.
            inputs: of each window, what the model is called with beside the ids.

        Raises:
            UnsupportedModelError: running the layers one by one is not what the model does.
        """
        layers, settings = self.in_order(), (options.batch_size, options.device)
        more: dict[str, Any] = {"inspect": inspect, "spill": spill, "processes": self.processes, "behind": self.behind}
        more |= {"inputs": inputs}
        return LayerStream(self.model, layers, ids, mask, *settings, hold=self.hold, **more)

    def waiting(self) -> dict[str, Tensor]:
        """Name in the state dict -> tensor, of all that is on the meta device while its layer is not held."""
        return {}

    def state(self, position: int) -> dict[str, Tensor]:
        """Those of one layer."""
        return {}


class LayersInMemory(Layers):
    """The layers of a model that is in memory; holding one moves it to the device and back.

    Until a stream is wanted a position counts the layers that hold blocks, so that what runs nothing works for models
    whose layers cannot be run one by one. The work is never shared between processes: each would have all of it.
    """

    whole = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.find_blocks()
        self._names = list(dict.fromkeys(block.layer for block in self.blocks))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, position: int) -> str:
        return self._names[position]

    def hold(self, position: int, device: torch.device | None = None) -> AbstractContextManager[Any]:
        return placed(self.model.get_submodule(self._names[position]), device)

    def in_order(self) -> Sequence[nn.Module]:
        layers, prefix = decoder_layers(self.model, self.blocks)
        self._names = [f"{prefix}.{position}" for position in range(len(layers))]
        return list(layers)
