"""A comparison as a run that can be stopped: each model is passed through once, and every token compared."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesparse.calibration.plan import plan_pass, spills
from moesparse.calibration.windows import Windows, check_windows
from moesparse.errors import UsageError
from moesparse.evaluate.compared import Comparison
from moesparse.evaluate.continuations import Prompts, compare_written, write
from moesparse.evaluate.divergence import Changed, Figures, most_changed, token_figures
from moesparse.evaluate.final_states import Chosen, FinalStates, drop_states, find_part, pass_through
from moesparse.evaluate.routing import agreement, original_ids
from moesparse.evaluate.scripts import token_scripts
from moesparse.models.blocks import MoEBlock
from moesparse.models.layers import RunOptions
from moesparse.models.meta import kept_experts
from moesparse.models.on_disk import LayersOnDisk
from moesparse.progress import ProgressEvent
from moesparse.system.run_folder import RunFolder
from moesparse.system.shard_writer import MAX_SHARD_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ComparedText", "Job"]

# tokens that are shown in context, how far they lie apart in a window, and how much stands before and behind them
_SHOWN, _APART, _BEFORE, _BEHIND = 20, 16, 24, 8
# scripts of fewer tokens say nothing
_FEWEST_OF_SCRIPT = 100
# continuations that are shown side by side
_EXAMPLES = 8


@dataclass(frozen=True, eq=False)
class ComparedText:
    """Windows to compare on.

    Attributes:
        ids, mask: [n, t]; the mask may be None.
        domains: of each window.
        languages: names among them.
    """

    ids: Tensor
    mask: Tensor | None
    domains: list[str]
    languages: frozenset[str]

    @classmethod
    def of(
        cls, windows: Windows, domains: Sequence[str] | None, languages: Collection[str], vocabulary: int | None
    ) -> ComparedText:
        ids, mask = check_windows(windows, vocabulary)
        if ids.shape[1] < 2:
            raise UsageError(f"windows must hold at least 2 tokens, got {list(ids.shape)}")
        names = ["all"] * len(ids) if domains is None else list(domains)
        if len(names) != len(ids):
            raise UsageError(f"domains must name that of each of {len(ids)} windows, got {len(names)}")
        if not set(names) - set(languages):
            raise UsageError("windows must hold text besides that of languages, got none")
        return cls(ids, mask, names, frozenset(languages))

    @property
    def scored(self) -> Tensor:
        """[n, t - 1] bool, True where token i + 1 is real and has a real one before it."""
        if self.mask is None:
            return torch.ones(len(self.ids), self.ids.shape[1] - 1, dtype=torch.bool)
        return self.mask[:, 1:] & self.mask[:, :-1]

    @property
    def counted(self) -> Tensor | None:
        """[n, t] bool, True for tokens that are no padding and of no language that is reported by itself; None: all."""
        if self.mask is None and not self.languages:
            return None
        own = torch.tensor([name not in self.languages for name in self.domains])[:, None]
        return own & (torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask)

    def per_window(self, wanted: Callable[[str], bool]) -> Tensor:
        """[scored tokens] bool, True in windows of some domains."""
        rows = torch.tensor([wanted(name) for name in self.domains])
        return rows[self.scored.nonzero()[:, 0]]


@dataclass(frozen=True, eq=False)
class Job:
    """One run over all models."""

    folder: RunFolder
    text: ComparedText
    options: RunOptions
    tokenizer: PreTrainedTokenizerBase | None
    keeps_layers: bool

    def named(self, dense: LayersOnDisk, others: Sequence[LayersOnDisk]) -> list[tuple[str, LayersOnDisk]]:
        """Every model with its name within the run."""
        return [("dense", dense), *((f"pruned-{number}", each) for number, each in enumerate(others))]

    def run(self, dense: LayersOnDisk, others: Sequence[LayersOnDisk]) -> list[Comparison]:
        """Compare all on the text."""
        (_, *names) = self.named(dense, others)
        states: FinalStates | None = None
        if any(find_part(self.folder, f"{name}-tokens") is None for name, _ in names):
            states = self._pass("dense", dense, self._keep_chosen)
        return [self._comparison(name, dense, each, states) for name, each in names]

    def _pass(self, name: str, layers: LayersOnDisk, note: Callable[..., Any]) -> FinalStates:
        n, length = self.text.ids.shape
        sizes = {"windows": n, "length": length, "batch_size": self.options.batch_size}
        spill = spills(plan_pass(layers.model, layers.blocks, "none", **sizes), self.options, layers.processes)
        how: dict[str, Any] = {"every_layer": self.keeps_layers, "spill": spill, "counted": self.text.counted}
        text, options = (self.text.ids, self.text.mask), self.options
        return pass_through(self.folder, name, layers, *text, options, note, **how)

    def _keep_chosen(self, position: int, _blocks: Sequence[MoEBlock], chosen: Chosen) -> None:
        """Keep what the dense routers of a layer chose."""
        name = _chosen_part(position)
        if chosen and find_part(self.folder, name) is None:
            self.folder.write(name, chosen, None, max_shard_bytes=MAX_SHARD_BYTES, aside=True)

    def _comparison(
        self, name: str, dense: LayersOnDisk, pruned: LayersOnDisk, states: FinalStates | None
    ) -> Comparison:
        part = find_part(self.folder, f"{name}-tokens")
        if part is None:
            assert states is not None
            part = self._compare_tokens(name, dense, pruned, states)
        shards = self.folder.read(part)
        tokens = {key: shards.read(key) for key in shards.tensors}
        drop_states(self.folder, name)
        text, languages = self.text, self.text.languages
        own = text.per_window(lambda domain: domain not in languages)
        named = {domain: Figures.of(tokens, text.per_window(domain.__eq__)) for domain in dict.fromkeys(text.domains)}
        return Comparison(
            dense=str(dense.folder),
            pruned=str(pruned.folder),
            overall=Figures.of(tokens, own),
            domains={domain: found for domain, found in named.items() if domain not in languages},
            languages={domain: found for domain, found in named.items() if domain in languages},
            positions=self._positions(tokens, own),
            scripts=self._scripts(tokens, own),
            layers=[layer for layers in part.note["layers"] for layer in layers],
            changed=[self._shown(Changed(**each)) for each in part.note["changed"]],
            window=text.ids.shape[1],
        )

    def _compare_tokens(self, name: str, dense: LayersOnDisk, pruned: LayersOnDisk, states: FinalStates) -> Any:
        """Run the pruned model and compare every token; the part of the run that holds what came of it."""
        theirs = self._pass(name, pruned, functools.partial(self._routing, dense, pruned))
        for layers in (dense, pruned):
            layers.outside_to(self.options.device)
        ids, scored, size = self.text.ids, self.text.scored, self.options.batch_size

        def told(done: int) -> None:
            self.options.progress(ProgressEvent(f"compare {name}", done, len(ids), "window", done * ids.shape[1]))

        tokens = token_figures(states, theirs, ids, scored, size, told)
        own = self.text.per_window(lambda domain: domain not in self.text.languages)
        here = scored.masked_scatter(scored, own)
        changed = most_changed(states, theirs, ids, here, tokens["kl"][own], size, _SHOWN, _APART)
        note = {"layers": theirs.notes, "changed": [asdict(each) for each in changed]}
        return self.folder.write(f"{name}-tokens", tokens, note, max_shard_bytes=MAX_SHARD_BYTES, aside=True)

    def _routing(
        self, dense: LayersOnDisk, pruned: LayersOnDisk, position: int, blocks: Sequence[MoEBlock], chosen: Chosen
    ) -> list[dict[str, Any]]:
        """How the routers of a layer agree with the dense ones."""
        part = find_part(self.folder, _chosen_part(position))
        held = None if part is None else self.folder.read(part)
        sizes = {block.name: block.num_experts for block in dense.blocks}
        kept = kept_experts(dense.model), kept_experts(pruned.model)
        rows = []
        for block in blocks:
            row: dict[str, Any] = {"layer": position, "block": block.name}
            ids = None
            if held is not None and block.name in held.tensors and block.name in chosen:
                of_each = [each.get(block.name) for each in kept]
                ids = original_ids(sizes[block.name], of_each[0], block.num_experts, of_each[1])
            if held is None or ids is None:
                rows.append(row | dict.fromkeys(("chosen", "kept", "gone", "taken_over")))
                continue
            rows.append(row | agreement(held.read(block.name), chosen[block.name], ids))
        return rows

    def _positions(self, tokens: dict[str, Tensor], own: Tensor) -> list[tuple[int, int, Figures]]:
        """Figures by position in the window: sixteen tokens, then twice as many each time."""
        place = self.text.scored.nonzero()[:, 1] + 1
        length = self.text.ids.shape[1]
        edges = [1]
        while edges[-1] < length:
            edges.append(min(length, max(16, 2 * edges[-1])))
        spans = [(low, high - 1, own & (place >= low) & (place < high)) for low, high in pairwise(edges)]
        return [(low, high, Figures.of(tokens, where)) for low, high, where in spans if bool(where.any())]

    def _scripts(self, tokens: dict[str, Tensor], own: Tensor) -> dict[str, Figures]:
        """Figures by script of the token that is predicted."""
        if self.tokenizer is None:
            return {}
        decode = self.tokenizer.decode
        text = functools.cache(lambda ids: str(decode(list(ids))))
        found = [token_scripts(row, lambda ids: text(tuple(ids))) for row in self.text.ids.tolist()]
        names = list(dict.fromkeys(name for row in found for name in row))
        numbers = {name: number for number, name in enumerate(names)}
        of_tokens = torch.tensor([[numbers[name] for name in row[1:]] for row in found])[self.text.scored]
        places = [(name, own & (of_tokens == number)) for name, number in numbers.items()]
        places.sort(key=lambda each: -int(each[1].sum()))
        return {name: Figures.of(tokens, at) for name, at in places if int(at.sum()) >= _FEWEST_OF_SCRIPT}

    def _shown(self, changed: Changed) -> dict[str, Any]:
        """A token that changed, with text around it where there is a tokenizer."""
        row = self.text.ids[changed.window].tolist()
        real = None if self.text.mask is None else self.text.mask[changed.window].tolist()
        at = changed.position
        span = [
            place for place in range(max(0, at - _BEFORE), min(len(row), at + 1 + _BEHIND)) if not real or real[place]
        ]
        parts = {
            "before": [row[place] for place in span if place < at],
            "token": [row[at]],
            "after": [row[place] for place in span if place > at],
        }
        return {
            "domain": self.text.domains[changed.window],
            "window": changed.window,
            "position": at,
            "kl": changed.kl,
            **{name: self._decoded(ids) for name, ids in parts.items()},
            "dense": [[self._decoded([each]), p] for each, p in changed.dense],
            "pruned": [[self._decoded([each]), p] for each, p in changed.pruned],
        }

    def _decoded(self, ids: list[int]) -> Any:
        return ids if self.tokenizer is None else str(self.tokenizer.decode(ids))

    def written(
        self, name: str, layers: LayersOnDisk, prompts: Prompts, load: Callable[[Path], Any]
    ) -> dict[str, Tensor]:
        """What a model writes after the prompts; loaded for that, and dropped."""
        part = find_part(self.folder, f"{name}-written")
        if part is None:
            self.options.progress(ProgressEvent(f"load {name}", 0, 1))
            model = load(layers.folder)
            found = write(model, prompts, self.options.device, self.options.progress)
            del model
            gc.collect()
            part = self.folder.write(f"{name}-written", found, None, max_shard_bytes=MAX_SHARD_BYTES, aside=True)
        shards = self.folder.read(part)
        return {key: shards.read(key) for key in shards.tensors}

    def generation(
        self, prompts: Prompts, dense: dict[str, Tensor], pruned: dict[str, Tensor], ends: Sequence[int]
    ) -> dict[str, Any]:
        """What two models wrote: figures, and examples, loops of the pruned one first, then those that part soonest."""
        figures, rows = compare_written(dense, pruned, ends)
        numbered = [(kind, number, row) for kind in rows for number, row in enumerate(rows[kind])]
        numbered.sort(key=lambda each: (not each[2]["pruned"]["loops"], each[0], each[2]["first_divergence"]))
        examples = [
            {
                "kind": kind,
                "domain": prompts.domains[number],
                "prompt": self._decoded(prompts.ids[number].tolist()),
                "first_divergence": row["first_divergence"],
                **{side: self._decoded(row[side]["tokens"]) for side in ("dense", "pruned")},
                "loops": {side: row[side]["loops"] for side in ("dense", "pruned")},
            }
            for kind, number, row in numbered[:_EXAMPLES]
        ]
        return {**prompts.describe(), **figures, "examples": examples}


def _chosen_part(position: int) -> str:
    return f"dense-chosen-{position:05d}"
