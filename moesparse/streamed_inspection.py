"""The one look at every layer of a checkpoint before any work: finite, dense, and sampled for the fingerprint."""

from __future__ import annotations

from moesparse.blocks import MoEBlock
from moesparse.calibration import check_dense, check_finite
from moesparse.progress import Progress, ProgressEvent
from moesparse.statistics import fingerprint_sample, model_fingerprint, room_for_samples
from moesparse.streaming import StreamedModel

__all__ = ["Inspection", "blocks_of"]


class Inspection:
    """Looks at every layer of a streamed model once, while it is in memory, before any work.

    Args:
        streamed: the model.
        allow_pruned: accept experts that were pruned before.
        progress: called with every layer.

    Attributes:
        samples: `fingerprint_sample` of every tensor of the layers, once it was seen.
    """

    def __init__(self, streamed: StreamedModel, allow_pruned: bool, progress: Progress) -> None:
        self._streamed, self._allow_pruned, self._progress = streamed, allow_pruned, progress
        self.samples = room_for_samples(streamed.inside())

    def __call__(self, position: int) -> None:
        """Look at one, which is held.

        Raises:
            MoESparseError: a weight of an expert is not finite. CalibrationError: experts were pruned before.
        """
        self._progress(ProgressEvent("check", position, len(self._streamed.layers), "layer"))
        here = blocks_of(self._streamed, position)
        check_finite(here)
        if not self._allow_pruned:
            check_dense(here)
        for name, tensor in self._streamed.state(position).items():
            self.samples[name].copy_(fingerprint_sample(tensor))

    def look_at_all(self) -> None:
        """Look at every layer, where nothing else holds them one after the other."""
        for position in range(len(self._streamed.layers)):
            with self._streamed.hold(position):
                self(position)

    @property
    def fingerprint(self) -> str:
        """`model_fingerprint`, once every layer was seen."""
        return model_fingerprint(self._streamed.model, self.samples)


def blocks_of(streamed: StreamedModel, position: int) -> list[MoEBlock]:
    """The blocks of one layer."""
    return [block for block in streamed.blocks if streamed.position(block.layer) == position]
