"""The sums one dense pass leaves behind: everything a saliency needs, without the model or the text.

Notation: E experts, H hidden, I intermediate. For expert j, T_j are the tokens routed to it, g_jt the weight the model
combines it with, f_jt its output before that weight, and X the input of the matrix at hand: "hidden" (x_t, read by gate
and up) or "activation" (act(gate) * up, read by down). Sums, never means: a mean of batch means is wrong when batches
differ in size, and sums of two parts of the text simply add up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moesparse.calibration.windows import add_hashes
from moesparse.errors import CalibrationError, UsageError
from moesparse.models.fingerprint import model_fingerprint
from moesparse.system.processes import Processes

if TYPE_CHECKING:
    from moesparse.models.blocks import MoEBlock

ANGLED_NORM_SUM = "angled_norm_sum"
"""Name in ExpertStatistics.extra of the sum that easy-ep needs."""

SCHEMA_VERSION = 2
FORMAT = "moesparse-statistics"
MOMENT_KINDS = {"none": 0, "plain": 1, "gated": 1, "both": 2}
"""What can be asked for of second moments -> how many are then kept of every input."""

MOMENTS = tuple(MOMENT_KINDS)

_VECTORS = ("tokens", "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "gated_norm_sq_sum")
_ENERGIES = ("energy", "gated_energy")
_MOMENTS = ("moment", "gated_moment")
_NAMED = (*_ENERGIES, *_MOMENTS, "extra")
_MAXIMA = "maxima"


def check_moments(moments: str) -> None:
    """Raise UsageError unless `moments` is one of MOMENTS."""
    if moments not in MOMENTS:
        raise UsageError(f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")


def input_sizes(block: MoEBlock) -> dict[str, int]:
    """Width of every input the block's matrices read: {"hidden": H, "activation": I}."""
    return {matrix.input: matrix.weight.shape[2] for matrix in block.matrices}


def memory_needed(blocks: Iterable[MoEBlock], moments: str) -> int:
    """Bytes the second moments of `blocks` take, while collected and after: E * (H^2 + I^2) float64 for each kind.

    The other sums are not counted: together they are as large as a few rows of the weights.

    Args:
        blocks: the blocks recorded at the same time.
        moments: "none", "plain", "gated" or "both".
    """
    check_moments(moments)
    kinds = MOMENT_KINDS[moments]
    return sum(8 * kinds * block.num_experts * size**2 for block in blocks for size in input_sizes(block).values())


@dataclass(eq=False)
class ExpertStatistics:
    """Sums over the routed tokens of one MoE block, per expert. Padding is not in them.

    float64 unless said otherwise. Each batch is summed in float32 and added here in float64, so merging parts that were
    cut between batches equals the whole to float64 rounding (cut inside a batch, to float32 rounding).

    Attributes:
        tokens: [E] int64, N_j, tokens routed to the expert.
        gate_sum: [E], sum g.
        norm_sum: [E], sum |f|, the Euclidean norm over H.
        norm_sq_sum: [E], sum |f|^2.
        gated_norm_sum: [E], sum g|f|.
        gated_norm_sq_sum: [E], sum g^2|f|^2.
        energy: {"hidden": [E, H], "activation": [E, I]}, sum_t X^2 per column.
        gated_energy: same keys and shapes, sum_t (g X)^2.
        moment: {"hidden": [E, H, H], "activation": [E, I, I]}, X^T X; empty unless asked for.
        gated_moment: same, (gX)^T (gX); empty unless asked for.
        extra: further sums by name, [E] each, for criteria that need one more; saved, merged and reduced like the rest.
        maxima: {"output": [E]}, the largest |f| of a single output over tokens and columns: an expert that is extreme
            for a few tokens is lost in every sum. Merged by the larger one, so no part of `tensors`.
    """

    tokens: Tensor
    gate_sum: Tensor
    norm_sum: Tensor
    norm_sq_sum: Tensor
    gated_norm_sum: Tensor
    gated_norm_sq_sum: Tensor
    energy: dict[str, Tensor]
    gated_energy: dict[str, Tensor]
    moment: dict[str, Tensor] = field(default_factory=dict)
    gated_moment: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(
        cls,
        num_experts: int,
        sizes: Mapping[str, int],
        moments: str = "none",
        *,
        device: torch.device | str = "cpu",
        moments_device: torch.device | str | None = None,
    ) -> ExpertStatistics:
        """Statistics of no tokens.

        Args:
            num_experts: E.
            sizes: {"hidden": H, "activation": I}.
            moments: which second moments to make room for.
            device: where the sums live.
            moments_device: where the second moments live; `device` when None.
        """
        check_moments(moments)

        def per_expert(*shape: int, on: torch.device | str | None = None) -> Tensor:
            return torch.zeros(num_experts, *shape, dtype=torch.float64, device=on or device)

        def second_moments(*wanted_by: str) -> dict[str, Tensor]:
            if moments not in wanted_by:
                return {}
            return {name: per_expert(size, size, on=moments_device) for name, size in sizes.items()}

        return cls(
            tokens=torch.zeros(num_experts, dtype=torch.int64, device=device),
            gate_sum=per_expert(),
            norm_sum=per_expert(),
            norm_sq_sum=per_expert(),
            gated_norm_sum=per_expert(),
            gated_norm_sq_sum=per_expert(),
            energy={name: per_expert(size) for name, size in sizes.items()},
            gated_energy={name: per_expert(size) for name, size in sizes.items()},
            moment=second_moments("plain", "both"),
            gated_moment=second_moments("gated", "both"),
            maxima={"output": per_expert()},
        )

    @property
    def num_experts(self) -> int:
        return self.tokens.shape[0]

    @property
    def moments(self) -> str:
        """Which second moments are here: "none", "plain", "gated" or "both"."""
        return {(False, False): "none", (True, False): "plain", (False, True): "gated", (True, True): "both"}[
            bool(self.moment), bool(self.gated_moment)
        ]

    def named_tensors(self) -> dict[str, Tensor]:
        """Every sum by name ("tokens", "energy.hidden", "extra.<name>"), in an order that depends on the names only."""
        named = {name: getattr(self, name) for name in _VECTORS}
        for name in _NAMED:
            group = getattr(self, name)
            named |= {f"{name}.{key}": group[key] for key in sorted(group)}
        return named

    def tensors(self) -> list[Tensor]:
        """Every sum, not copied, in the order of `named_tensors`: an all-reduce in place changes this object."""
        return list(self.named_tensors().values())

    def named_maxima(self) -> dict[str, Tensor]:
        """Every maximum by name ("maxima.output"): to be reduced by the larger one, never added."""
        return {f"{_MAXIMA}.{key}": self.maxima[key] for key in sorted(self.maxima)}

    @classmethod
    def from_named(cls, named: Mapping[str, Tensor], *, by_column: bool = True) -> ExpertStatistics:
        """The inverse of `named_tensors` and `named_maxima` together; a missing, unknown or misshapen one is a
        CalibrationError. Without `by_column` the energies may be missing."""
        vectors: dict[str, Any] = {}
        groups: dict[str, Any] = {name: {} for name in (*_NAMED, _MAXIMA)}
        for name, tensor in named.items():
            group, _, key = name.partition(".")
            if name in _VECTORS:
                vectors[name] = tensor
            elif group in groups and key:
                groups[group][key] = tensor
            else:
                raise CalibrationError(f"statistics hold a sum this version does not know: {name!r}")
        missing = [name for name in _VECTORS if name not in vectors]
        missing += [name for name in _ENERGIES if by_column and not groups[name]]
        if missing:
            raise CalibrationError(f"statistics must hold every sum, missing {', '.join(missing)}")
        num_experts = vectors["tokens"].shape[0]
        for name, tensor in named.items():
            wanted = torch.int64 if name == "tokens" else torch.float64
            if tensor.dtype != wanted or tensor.shape[0] != num_experts:
                raise CalibrationError(
                    f"sum {name!r} must be {wanted} with {num_experts} rows, got {tensor.dtype} {tuple(tensor.shape)}"
                )
        return cls(**vectors, **groups)

    def to(self, device: torch.device | str) -> ExpertStatistics:
        """The same sums on `device`, second moments included; tensors already there are shared, not copied."""
        everything = self.named_tensors() | self.named_maxima()
        return self.from_named({name: tensor.to(device) for name, tensor in everything.items()})

    def combine(self, processes: Processes, *, to_first: bool = False) -> ExpertStatistics:
        """Add up what the processes have recorded, each of its own batches.

        Afterwards this object holds the sums of all, in every process, but second moments no more: each expert's are
        added up in one process alone, one matrix travelling at a time. With one process nothing changes.

        Args:
            processes: all of which have recorded the same block.
            to_first: the first process gets all second moments.

        Returns:
            The sums of this process's experts (`Processes.own` of E) with their second moments; with `to_first` those
            of all experts, with second moments in the first process only.
        """
        if processes.count == 1:
            return self
        E = self.num_experts
        # a process without batches has no sum that an observer adds
        named = [set(names) for names in processes.gather(list(self.extra)) if names]
        names = sorted(set.intersection(*named)) if named else []
        self.extra = {name: self.extra.get(name, torch.zeros_like(self.gate_sum)) for name in names}
        parts = [slice(0, E if rank == 0 else 0) for rank in range(processes.count)] if to_first else None
        moments = {}
        for group in _MOMENTS:
            held = getattr(self, group)
            for key in sorted(held):
                reduced = processes.reduce(held.pop(key), parts)
                if len(reduced) or not to_first:
                    moments[f"{group}.{key}"] = reduced
        processes.add_up(self.tensors())
        processes.largest(list(self.named_maxima().values()))
        mine = slice(0, E) if to_first else processes.own(E)
        sums = {name: tensor[mine] for name, tensor in (self.named_tensors() | self.named_maxima()).items()}
        return self.from_named(sums | moments)

    def __add__(self, other: ExpertStatistics) -> ExpertStatistics:
        """The statistics of both texts together: every sum added, of every maximum the larger one.

        Both must hold the same of the same shapes.
        """
        if not isinstance(other, ExpertStatistics):
            return NotImplemented
        maxima = self.named_maxima()
        mine, others = self.named_tensors() | maxima, other.named_tensors() | other.named_maxima()
        if differing := sorted(mine.keys() ^ others.keys()):
            raise CalibrationError(f"statistics to merge must hold the same sums, only one has {', '.join(differing)}")
        for name, tensor in mine.items():
            if tensor.shape != others[name].shape:
                raise CalibrationError(
                    f"statistics to merge must have the same shapes, got {tuple(tensor.shape)} and "
                    f"{tuple(others[name].shape)} for {name}"
                )
        return self.from_named(
            {
                name: (torch.maximum if name in maxima else torch.add)(tensor, others[name].to(tensor.device))
                for name, tensor in mine.items()
            }
        )


@dataclass(eq=False)
class ModelStatistics:
    """Statistics of every MoE block of one model over one text.

    Attributes:
        blocks: by `MoEBlock.name`, in forward order.
        fingerprint: `model_fingerprint` of the model they were taken from.
        text_hash: `windows_hash` of the tokens; the hash of merged statistics is that of all their windows.
        seed: the seed the windows were drawn with; None for merged statistics whose parts differ.
        tokens: tokens seen, padding left out.
        schema_version: of the file format; `load` refuses every other.
    """

    blocks: dict[str, ExpertStatistics]
    fingerprint: str
    text_hash: str
    seed: int | None
    tokens: int
    schema_version: int = SCHEMA_VERSION

    def tensors(self) -> list[Tensor]:
        """Every sum of every block, not copied: for an all-reduce, which has to add up `tokens` beside them."""
        return [tensor for block in self.blocks.values() for tensor in block.tensors()]

    def check_model(self, model: nn.Module) -> None:
        """Raise CalibrationError unless the statistics were taken from this very model (see `model_fingerprint`)."""
        self.check_fingerprint(model_fingerprint(model))

    def check_fingerprint(self, found: str) -> None:
        """`check_model` for a model whose fingerprint is known."""
        if found != self.fingerprint:
            raise CalibrationError(
                f"statistics must come from this model ({found}), got those of {self.fingerprint}: another model, "
                "other weights, or this model before it was pruned. Calibrate this one."
            )

    def __add__(self, other: ModelStatistics) -> ModelStatistics:
        """The statistics of both texts together; both must come from the same model and hold the same sums."""
        if not isinstance(other, ModelStatistics):
            return NotImplemented
        if self.fingerprint != other.fingerprint:
            raise CalibrationError(
                f"statistics to merge must come from one model, got {self.fingerprint} and {other.fingerprint}"
            )
        if self.blocks.keys() != other.blocks.keys():
            raise CalibrationError(
                f"statistics to merge must cover the same blocks, got {len(self.blocks)} and {len(other.blocks)}, "
                f"differing in {', '.join(sorted(self.blocks.keys() ^ other.blocks.keys()))}"
            )
        return ModelStatistics(
            blocks={name: block + other.blocks[name] for name, block in self.blocks.items()},
            fingerprint=self.fingerprint,
            text_hash=add_hashes([self.text_hash, other.text_hash]),
            seed=self.seed if self.seed == other.seed else None,
            tokens=self.tokens + other.tokens,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        A tensor is named "<sum>/<block>", as in "energy.hidden/model.layers.0.mlp.experts"; the metadata hold the
        format, the schema version, fingerprint, text hash, seed, tokens and the order of the blocks.

        Raises:
            CalibrationError: the file cannot be written; a file that was there before is then untouched.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {
            f"{name}/{block}": tensor.cpu().contiguous()
            for block, statistics in self.blocks.items()
            for name, tensor in (statistics.named_tensors() | statistics.named_maxima()).items()
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, self.metadata())
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot write statistics to {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def metadata(self) -> dict[str, str]:
        """What a file says of the statistics in it."""
        return {
            "format": FORMAT,
            "schema_version": str(self.schema_version),
            "fingerprint": self.fingerprint,
            "text_hash": self.text_hash,
            "seed": json.dumps(self.seed),
            "tokens": str(self.tokens),
            "blocks": json.dumps(list(self.blocks)),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelStatistics:
        """Read what `save` wrote, bit for bit; follow with `check_model` before using it with a model.

        Raises:
            CalibrationError: the file is missing, damaged, no statistics, or of another schema version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CalibrationError(f"{path} must be a file of statistics, got another kind of safetensors file")
                if metadata.get("schema_version") != str(SCHEMA_VERSION):
                    raise CalibrationError(
                        f"{path} must have schema version {SCHEMA_VERSION}, got {metadata.get('schema_version')}: "
                        "calibrate again with this version of moesparse"
                    )
                names = json.loads(metadata["blocks"])
                found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    name, _, block = key.partition("/")
                    found[block][name] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot read statistics from {path}: {error}") from error
        except (KeyError, json.JSONDecodeError) as error:
            raise CalibrationError(f"{path} is damaged: no or unreadable entry {error}") from error
        return cls(
            blocks={name: ExpertStatistics.from_named(named) for name, named in found.items()},
            fingerprint=metadata["fingerprint"],
            text_hash=metadata["text_hash"],
            seed=json.loads(metadata["seed"]),
            tokens=int(metadata["tokens"]),
        )
