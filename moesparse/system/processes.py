"""Several processes that do one piece of work together: which part is whose, and how the parts come together.

All of them call the same functions in the same order. Where one has ended, the others get a ProcessError as soon as
they wait for it. Started by torchrun or by hand; gloo moves tensors of a GPU through the CPU.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moesparse.errors import MoESparseError, ProcessError

__all__ = ["Batch", "Processes", "device_at_work", "join"]

T = TypeVar("T")

Batch = tuple[Tensor, ...]
"""What was noted of one batch."""

# a process that ends is noticed at once; this is for one that cannot be reached, and longer than any step takes
_PATIENCE = datetime.timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """The processes of a piece of work; by default this one alone, and then nothing is copied or sent.

    Attributes:
        rank: of this one.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Self:
        """Those of torch.distributed's default group, or this one alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    @property
    def here(self) -> int:
        """How many of them share this machine, as far as torchrun says."""
        return min(self.count, int(os.environ.get("LOCAL_WORLD_SIZE", self.count)))

    def device(self) -> torch.device:
        """Where this process works unless told otherwise."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", _local_gpu()) if self.count > 1 else torch.device("cuda")

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's of items that are dealt out one by one."""
        return list(items[self.rank :: self.count])

    def parts(self, length: int) -> list[slice]:
        """The range of every process when `length` things are cut into contiguous ranges; some are empty if need be."""
        bounds = [length * rank // self.count for rank in range(self.count + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def own(self, length: int) -> slice:
        """This process's of the `parts`."""
        return self.parts(length)[self.rank]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes of a small float64 tensor on the CPU."""
        if self.count == 1:
            return values
        total = values.clone()
        self.add_up([total])
        return total / self.count

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Make every tensor the sum over processes, in place; they travel together, so they should be small."""
        self._reduce_all(tensors, dist.ReduceOp.SUM)

    def largest(self, tensors: Sequence[Tensor]) -> None:
        """Make every element the largest over processes, in place."""
        self._reduce_all(tensors, dist.ReduceOp.MAX)

    def reduce(self, tensor: Tensor, parts: Sequence[slice] | None = None) -> Tensor:
        """The sum over processes of a large tensor, every part where it belongs. The tensor itself is used up.

        Args:
            tensor: [n, ...], the same n everywhere; n pieces travel one after the other, each to one process.
            parts: range of n that each process gets; `self.parts(n)` when None.

        Returns:
            [own range, ...].
        """
        if self.count == 1:
            return tensor
        parts = self.parts(len(tensor)) if parts is None else parts
        for owner, part in enumerate(parts):
            for piece in tensor[part]:
                with _reaching_others(), self._moved(piece) as moved:
                    dist.reduce(moved, dst=owner)
        mine = tensor[parts[self.rank]]
        return mine if len(mine) == len(tensor) else mine.clone()

    def collect(self, tensor: Tensor) -> None:
        """Fill in the ranges of the others: [n, ...] of which every process has its own of the `parts` right."""
        if self.count > 1:
            for owner, part in enumerate(self.parts(len(tensor))):
                self._broadcast(tensor[part], owner)

    def spread(self, tensor: Tensor) -> None:
        """Make a tensor that of the first process, in place."""
        if self.count > 1:
            self._broadcast(tensor, 0)

    def gather(self, value: T) -> list[T]:
        """A small value of every process, in every process, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _reaching_others():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, small enough to be pickled; the others do not do it.

        Raises:
            MoESparseError: in all of them what it raises in the first.
        """
        if self.count == 1:
            return work()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                told[0] = work()
            except Exception as error:
                failure = error
                told[1] = error if isinstance(error, MoESparseError) else ProcessError(f"rank 0 failed: {error}")
        with _reaching_others():
            dist.broadcast_object_list(told, src=0)
        if failure is not None or told[1] is not None:
            raise failure or told[1]
        return told[0]

    def to_first(self, mine: Sequence[Batch]) -> list[Batch]:
        """What every process has of the batches of its `share`, in the order of all batches: in the first one alone.

        Args:
            mine: of each own batch some tensors of any shapes.
        """
        if self.count == 1:
            return list(mine)
        forms = self.gather([[(tensor.shape, tensor.dtype) for tensor in batch] for batch in mine])
        if not self.first:
            for batch in mine:
                for tensor in batch:
                    with _reaching_others():
                        dist.send(_as_bytes(tensor.to(self._place(tensor)).contiguous()), dst=0)
            return []
        held: list[list[Batch]] = [list(mine)]
        for rank in range(1, self.count):
            held.append(
                [tuple(self._receive(form, rank, mine[0][0].device) for form in batch) for batch in forms[rank]]
            )
        return [held[number % self.count][number // self.count] for number in range(sum(map(len, forms)))]

    def to_all(self, mine: Sequence[Batch]) -> list[Batch]:
        """`to_first` for every process: what all of them have, in the order of all batches."""
        if self.count == 1:
            return list(mine)
        forms = self.gather([[(tensor.shape, tensor.dtype) for tensor in batch] for batch in mine])
        device = mine[0][0].device if mine else torch.device("cpu")
        found = []
        for number in range(sum(map(len, forms))):
            owner, place = number % self.count, number // self.count
            batch = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms[owner][place])
            batch = mine[place] if owner == self.rank else batch
            for tensor in batch:
                self._broadcast(tensor, owner)
            found.append(batch)
        return found

    def _receive(self, form: tuple[torch.Size, torch.dtype], rank: int, device: torch.device) -> Tensor:
        like = torch.empty(0, device=device)
        tensor = torch.empty(form[0], dtype=form[1], device=self._place(like))
        with _reaching_others():
            dist.recv(_as_bytes(tensor), src=rank)
        return tensor.to(device)

    def _reduce_all(self, tensors: Sequence[Tensor], operation: Any) -> None:
        if self.count == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            together = torch.cat([tensor.reshape(-1).to(self._place(tensor)) for tensor in same])
            with _reaching_others():
                dist.all_reduce(together, operation)
            for tensor, part in zip(same, together.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _broadcast(self, tensor: Tensor, owner: int) -> None:
        if tensor.numel():
            with _reaching_others(), self._moved(tensor) as moved:
                dist.broadcast(_as_bytes(moved), src=owner)

    @contextlib.contextmanager
    def _moved(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor where it can travel; it has what became of that afterwards."""
        moved = tensor.to(self._place(tensor)).contiguous()
        yield moved
        if moved.data_ptr() != tensor.data_ptr():
            tensor.copy_(moved)

    def _place(self, tensor: Tensor) -> torch.device:
        if dist.get_backend() == "gloo":
            return torch.device("cpu")
        return tensor.device if tensor.is_cuda else self.device()


def join(device: torch.device | None = None) -> Any:
    """Under torchrun: start the process group of the job.

    Args:
        device: where this process works; None is a GPU of its own where there is one.

    Returns:
        The store that the processes share, of torchrun's agent where it keeps one; None where this process is alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpu:
        torch.cuda.set_device(_local_gpu())
    # several processes on one GPU are beyond nccl
    backend = "nccl" if on_gpu and here <= torch.cuda.device_count() else "gloo"
    store, rank, count = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    return store


def _local_gpu() -> int:
    return int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()


def _as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as what every backend can send."""
    return tensor.view(-1).view(torch.uint8)


@contextlib.contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0]
        raise ProcessError(f"another process of this run has ended or cannot be reached ({reason})") from error


def device_at_work(device: torch.device | str | None) -> torch.device | None:
    """Where a layer goes to work: what a caller named, else the GPU of this process; None leaves it where it is."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda") if torch.cuda.is_available() else None
