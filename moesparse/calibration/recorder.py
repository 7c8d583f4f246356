"""The recorder of one block: per expert, the sums every later step scores with.

It is an experts function: transformers hands it the tokens, the chosen experts and the weights the model really
combines them with, whatever the router did. It computes the experts as the model's own loop would, and sums on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from moesparse.calibration.statistics import ExpertStatistics, input_sizes
from moesparse.errors import CalibrationError, UsageError
from moesparse.models.blocks import MoEBlock
from moesparse.models.experts_function import experts_run_by
from moesparse.system.processes import Processes
from moesparse_kernels import column_energies
from moesparse_kernels.ops import use_triton

__all__ = ["ROW_SUMS", "CrossMoment", "Recorder", "record", "window_sums"]

Observer = Callable[[Tensor, list[int], Tensor, Tensor], None]
"""Called after a block has run with the rows recorded, sorted by expert: token of each row [R], rows per expert, g|f|
of each row [R] float64, and the block's output [T, H]."""

RowObserver = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with every expert that has rows: its number, and of its recorded rows the inputs [n, H], the activations
[n, I] and the gates [n]."""

ROW_SUMS = ("gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "gated_norm_sq_sum")
"""Sums over routed rows that a batch adds to ExpertStatistics, in the order of their columns."""


class Recorder:
    """Records the statistics of one block while it is entered as a context manager.

    Only this block runs the recording function; its siblings, the model and the shared config are not touched, and
    leaving the context, also by an exception, leaves nothing behind. The block's output is that of the model's own
    `experts_implementation="eager"`, and has no gradient: bit for bit in float32, and in bfloat16 too unless the
    family's loop adds up in float32 (nemotron_h). With a token mask rows are reordered, which may change a rounding.
    Per call, one host synchronisation finds the rows of each expert and one checks that the sums are finite.

    Attributes:
        block: the block recorded.
        statistics: the sums so far, on `device`.
        token_mask: [T] bool, True for tokens to record, T = batch * length flattened; None records all. Set before
            every call of the model, or leave None when there is no padding.
        first_window, window_length: where the batch lies in the text, to name the window in an error.
        calls: how often the block has run.
        observer: called after every run with what was recorded, for sums that need more than the block sees.
        row_observer: called expert by expert during a run, for sums over rows that are not kept.
        window_sums: None, or an empty dict to fill: name of a sum -> [windows, E] float64, every window by itself, of
            "tokens", ROW_SUMS and what observers add. Needs first_window and window_length.
    """

    def __init__(
        self,
        block: MoEBlock,
        moments: str = "none",
        *,
        outputs: bool = True,
        device: torch.device | str | None = None,
        moments_device: torch.device | str | None = None,
    ) -> None:
        """Allocate the sums; nothing is installed yet.

        Args:
            block: the block to record.
            moments: second moments to collect: "none", "plain", "gated" or "both"; see `memory_needed`.
            outputs: False for a run whose output nobody reads: the last matrix, a third of the work, is left out, the
                block's output is zeros, and so are the sums over outputs.
            device: where the sums live; the block's when None.
            moments_device: where the second moments live; `device` when None.
        """
        self.block = block
        self._outputs = outputs
        self.token_mask: Tensor | None = None
        self.first_window = 0
        self.window_length: int | None = None
        self.calls = 0
        self.observer: Observer | None = None
        self.row_observer: RowObserver | None = None
        self.window_sums: dict[str, Tensor] | None = None
        self._dispatch = ExitStack()
        device = device or block.matrices[0].parameter.device
        # a recorder made inside inference mode must stay usable outside of it
        with torch.inference_mode(False):
            self.statistics = ExpertStatistics.zeros(
                block.num_experts, input_sizes(block), moments, device=device, moments_device=moments_device
            )

    def __enter__(self) -> Recorder:
        self._dispatch.enter_context(experts_run_by(self.block, self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._dispatch.close()

    def aim(self, token_mask: Tensor | None, first_window: int, window_length: int) -> None:
        """Say which tokens of the text the next call of the model sees; see the attributes of these names."""
        self.token_mask, self.first_window, self.window_length = token_mask, first_window, window_length

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts function.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K] expert ids; E and above mark slots whose expert lives elsewhere, and are skipped.
            top_k_weights: [T, K], the gates.

        Returns:
            [T, H], dtype of `hidden_states`.
        """
        assert self._outputs or (self.observer is None and self.window_sums is None)
        self.calls += 1
        E = self.block.num_experts
        tokens, gates, bounds = self._sorted_rows(hidden_states.shape[0], top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        batch = _BatchSums(self.statistics, hidden_states)
        for expert in range(E):
            start, split, stop = bounds[2 * expert : 2 * expert + 3]
            if start == stop:
                continue
            token = tokens[start:stop]
            x = hidden_states[token]
            if self._outputs:
                activation = self.block.activation_of(expert, x)
                f = self.block.output_of(expert, activation)
                out.index_add_(0, token, (f * gates[start:stop, None]).to(out.dtype))
            else:
                activation, f = self.block.activation_of(expert, x), x.new_zeros(len(x), 1)
            n = split - start
            batch.add(expert, {"hidden": x[:n], "activation": activation[:n]}, f[:n], gates[start:split])
            if self.row_observer is not None:
                self.row_observer(expert, x[:n], activation[:n], gates[start:split])
        recorded = [slice(start, split) for start, split in zip(bounds[:-1:2], bounds[1::2], strict=True)]
        batch.add_energies(hidden_states, torch.cat([tokens[rows] for rows in recorded]))
        if not batch.commit():
            raise self._non_finite(hidden_states, tokens, gates, bounds)
        if self.observer is not None or self.window_sums is not None:
            rows = torch.cat([tokens[each] for each in recorded])
            if self.window_sums is not None:
                columns = batch.columns()
                self.add_by_window("tokens", rows, batch.counts, torch.ones_like(columns[:, 0]))
                for name, column in zip(ROW_SUMS, columns.unbind(1), strict=True):
                    self.add_by_window(name, rows, batch.counts, column)
            if self.observer is not None:
                self.observer(rows, batch.counts, batch.gated_norms(), out)
        return out

    def add_by_window(self, name: str, tokens: Tensor, counts: list[int], values: Tensor) -> None:
        """Add a value per recorded row to `window_sums`.

        Args:
            name: of the sum.
            tokens: [R], token of the batch of each row, rows sorted by expert.
            counts: rows of each expert.
            values: [R] float64.
        """
        assert self.window_sums is not None
        assert self.window_length is not None
        E = self.block.num_experts
        expert = torch.repeat_interleave(
            torch.arange(E, device=tokens.device), torch.tensor(counts, device=tokens.device)
        )
        window = self.first_window + tokens // self.window_length
        held = self.window_sums.get(name, values.new_zeros(0, E, device="cpu"))
        missing = int(window.max()) + 1 - len(held) if len(window) else 0
        if missing > 0:
            held = torch.cat((held, held.new_zeros(missing, E)))
        held.index_put_((window.cpu(), expert.cpu()), values.cpu(), accumulate=True)
        self.window_sums[name] = held

    def combine(self, processes: Processes, windows: int) -> None:
        """Give every process the `window_sums` that each has recorded of its own windows.

        Args:
            processes: all of which have recorded this block.
            windows: how many there are in all.
        """
        if processes.count == 1 or self.window_sums is None:
            return
        E, held = self.block.num_experts, self.window_sums
        named = [set(names) for names in processes.gather(list(held)) if names]
        whole = {name: torch.zeros(windows, E, dtype=torch.float64) for name in sorted(set.intersection(*named))}
        for name, sums in whole.items():
            if name in held:
                sums[: len(held[name])] = held[name]
        processes.add_up(list(whole.values()))
        self.window_sums = whole

    def _sorted_rows(self, T: int, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Token and gate of every (slot, token) pair, sorted by expert, the rows to record before the padding.

        Returns:
            tokens [R] and gates [R], R = T * K, and 2E + 1 bounds: expert e has rows bounds[2e] to bounds[2e + 2], of
            which those before bounds[2e + 1] are recorded.
        """
        E = self.block.num_experts
        K = top_k_index.shape[1]
        # slot 0 of all tokens, then slot 1: the order in which the model's own loop visits an expert's rows
        key = 2 * top_k_index.T.reshape(-1).clamp(max=E)
        if self.token_mask is not None:
            if self.token_mask.shape != (T,):
                raise UsageError(
                    f"token_mask must be [{T}], one entry per token of the batch, got {list(self.token_mask.shape)}"
                )
            key = key + (~self.token_mask.to(key.device, torch.bool)).repeat(K)
        key, order = key.sort(stable=True)
        bounds = torch.searchsorted(key, torch.arange(2 * E + 1, device=key.device, dtype=key.dtype)).tolist()
        return order % T, top_k_weights.T.reshape(-1)[order], bounds

    def _non_finite(self, hidden_states: Tensor, tokens: Tensor, gates: Tensor, bounds: list[int]) -> CalibrationError:
        """Run the experts again to find the first value that is not finite; only ever called on the way out."""
        for expert in range(self.block.num_experts):
            start, split = bounds[2 * expert : 2 * expert + 2]
            x = hidden_states[tokens[start:split]]
            activation = self.block.activation_of(expert, x)
            f = self.block.output_of(expert, activation)
            rows = {"input": x, "gate": gates[start:split, None], "activation": activation, "output": f}
            for what, values in rows.items():
                # a value whose square overflows is as useless to the sums as an infinite one
                bad = (~values.to(_sum_dtype(values)).square().sum(1).isfinite()).nonzero()
                if len(bad):
                    row = int(bad[0])
                    return CalibrationError(
                        f"activations and their squares must be finite, got {values[row].abs().max().item()} in the "
                        f"{what} of {self.block.name}, expert {expert}, {self._where(int(tokens[start + row]))}: look "
                        "for non-finite weights here and in the layers before, or load the model in bfloat16 or float32"
                    )
        return CalibrationError(
            f"activations must be small enough to square and add up in float32, got an overflow in {self.block.name}: "
            "calibrate with a smaller batch_size"
        )

    def _where(self, token: int) -> str:
        if self.window_length is None:
            return f"token {token} of the batch"
        window, position = divmod(token, self.window_length)
        return f"window {self.first_window + window} (token {position})"


class _BatchSums:
    """The float32 sums of one call of one block, added to the float64 statistics at once.

    On a GPU the column sums of all experts come from one pass of a kernel over the rows (`column_energies`), for which
    the activations wait until all experts have run; elsewhere each expert's are added up as it comes.
    """

    def __init__(self, statistics: ExpertStatistics, hidden_states: Tensor) -> None:
        self.total = statistics
        E = statistics.num_experts
        dtype, device = _sum_dtype(hidden_states), hidden_states.device
        sizes = {name: energy.shape[1] for name, energy in statistics.energy.items()}
        self.in_one_pass = use_triton(hidden_states) and dtype == torch.float32
        self.energy = {name: torch.zeros(E, size, dtype=dtype, device=device) for name, size in sizes.items()}
        self.gated_energy = {name: torch.zeros(E, size, dtype=dtype, device=device) for name, size in sizes.items()}
        self.counts = [0] * E
        self.largest = torch.zeros(E, dtype=dtype, device=device)
        self.norms = [torch.zeros(0, dtype=dtype, device=device)]
        self.gates = [torch.zeros(0, dtype=dtype, device=device)]
        self.activations: list[Tensor] = []

    def add(self, expert: int, inputs: dict[str, Tensor], f: Tensor, gates: Tensor) -> None:
        """Add the rows of one expert; experts come in ascending order, each at most once.

        Args:
            expert: its number.
            inputs: {"hidden": [n, H], "activation": [n, I]}.
            f: [n, H], output before the combine.
            gates: [n], of the same rows.
        """
        self.counts[expert] = f.shape[0]
        if not f.shape[0]:
            return
        dtype = _sum_dtype(f)
        gates = gates.to(dtype)
        self.gates.append(gates)
        self.norms.append(torch.linalg.vector_norm(f, dim=1, dtype=dtype))
        self.largest[expert] = f.abs().amax()
        if self.in_one_pass:
            self.activations.append(inputs["activation"])
        wants_moments = self.total.moment or self.total.gated_moment
        for name, rows in inputs.items() if wants_moments or not self.in_one_pass else ():
            X = rows.to(dtype)
            if not self.in_one_pass:
                squares = X.square()
                self.energy[name][expert] = squares.sum(0)
                self.gated_energy[name][expert] = gates.square() @ squares
            if self.total.moment:
                _add_gram(self.total.moment[name][expert], X)
            if self.total.gated_moment:
                _add_gram(self.total.gated_moment[name][expert], X * gates[:, None])

    def add_energies(self, hidden_states: Tensor, rows: Tensor) -> None:
        """The column sums of all experts, where they are made in one pass.

        Args:
            hidden_states: [T, H], what the experts were called with.
            rows: [R], token of each row added, sorted by expert.
        """
        if not self.in_one_pass or not len(rows):
            return
        counts = torch.tensor([0, *self.counts], device=rows.device)
        offsets, gates = counts.cumsum(0), torch.cat(self.gates)
        activations = torch.cat(self.activations)
        self.activations.clear()
        for name, (x, order) in {"hidden": (hidden_states, rows), "activation": (activations, None)}.items():
            if name in self.energy:
                self.energy[name], self.gated_energy[name] = column_energies(x, offsets, gates, order).unbind()

    def gated_norms(self) -> Tensor:
        """[R] float64, g|f| of every row added, in the order of adding."""
        return torch.cat(self.gates).double() * torch.cat(self.norms).double()

    def columns(self) -> Tensor:
        """[R, 5] float64, one column per sum over rows (ROW_SUMS); a further criterion is one more column."""
        g, norm = torch.cat(self.gates).double(), torch.cat(self.norms).double()
        gated = g * norm
        return torch.stack((g, norm, norm.square(), gated, gated.square()), dim=1)

    def commit(self) -> bool:
        """Add everything to the statistics; False, and nothing added but second moments, when a sum is not finite."""
        columns = self.columns()
        per_expert = torch.stack([rows.sum(0) for rows in columns.split(self.counts)])
        sums = [per_expert, *self.energy.values(), *self.gated_energy.values()]
        if not torch.stack([each.isfinite().all() for each in sums]).all():
            return False
        total = self.total
        total.tokens += torch.tensor(self.counts, device=total.tokens.device)
        for name, column in zip(ROW_SUMS, per_expert.unbind(1), strict=True):
            vector = getattr(total, name)
            vector += column.to(vector.device)
        largest = total.maxima["output"]
        torch.maximum(largest, self.largest.to(largest), out=largest)
        for name in self.energy:
            total.energy[name] += self.energy[name].to(total.energy[name].device)
            total.gated_energy[name] += self.gated_energy[name].to(total.gated_energy[name].device)
        return True


@contextmanager
def record(
    blocks: Iterable[MoEBlock],
    moments: str = "none",
    *,
    outputs: bool = True,
    moments_device: torch.device | str | None = None,
) -> Iterator[list[Recorder]]:
    """Record `blocks` while the body runs the model; all other blocks run as they always do.

    Args:
        blocks: the blocks to record, any selection of the model's.
        moments: second moments to collect: "none", "plain", "gated" or "both".
        outputs: False leaves out what only the blocks' outputs need, as in `Recorder`.
        moments_device: where the second moments live; each block's own device when None.

    Yields:
        One Recorder per block, in order; read their `statistics` in or after the body.
    """
    recorders = [Recorder(block, moments, outputs=outputs, moments_device=moments_device) for block in blocks]
    with ExitStack() as stack:
        yield [stack.enter_context(recorder) for recorder in recorders]


class CrossMoment:
    """A row observer that sums C = sum_t g_t^2 h_t h'_t^T: h' of the block as it is, h of its gate and up before.

    Attributes:
        total: [E, I, I] float64; 8 * E * I^2 bytes.
    """

    def __init__(self, block: MoEBlock, up_before: Tensor) -> None:
        """Args:
        block: recorded with its pruned gate and up.
        up_before: [E, out, H], the same matrix before it was pruned.
        """
        self.block, self.up_before = block, up_before
        E, I = block.num_experts, block.intermediate_size
        self.total = torch.zeros(E, I, I, dtype=torch.float64, device=up_before.device)

    def __call__(self, expert: int, x: Tensor, activation: Tensor, gates: Tensor) -> None:
        before = self.block.activation(self.block.matrices[0].project(expert, x, self.up_before))
        dtype = _sum_dtype(x)
        weighted = before.to(dtype) * gates.to(dtype).square()[:, None]
        self.total[expert] += weighted.T @ activation.to(dtype)


def window_sums(held: Sequence[Mapping[str, Tensor]], windows: int) -> dict[str, Tensor]:
    """The `Recorder.window_sums` of all blocks together.

    Args:
        held: of every block, [n, E] each, n up to the last window in which it had a token.
        windows: how many there are.

    Returns:
        name of a sum -> [windows, blocks, E] float64, of sums that all blocks have; {} where blocks differ in E, of
        which no experts are chosen.
    """
    counts = sorted({sums["tokens"].shape[1] for sums in held})
    if len(counts) != 1:
        return {}
    everywhere = [name for name in held[0] if all(name in sums for sums in held)]

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor.new_zeros(windows - len(tensor), counts[0])))

    return {name: torch.stack([padded(sums[name]) for sums in held], dim=1) for name in everywhere}


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for a model in float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _add_gram(total: Tensor, X: Tensor) -> None:
    """total [size, size] += X^T X for X [n, size], wherever the total lives."""
    total += (X.T @ X).to(total.device)
