"""Remove experts from a checkpoint that need not fit in memory: folder in, folder out, layer by layer, resumable.

Three walks over the layers: one to check them, one to record what the choice of experts reads, one to cut, refit and
write. What is chosen, and every bit that is written, is what `prune` and `save_pretrained` give for the model as a
whole. Where weights are to be pruned too, the smaller model lies beside the output as a checkpoint of its own, and
`prune_checkpoint` goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesparse._version import __version__
from moesparse.calibration.layers import read_sums, record_layers
from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.windows import Windows, check_windows, ordered_hash
from moesparse.checkpoints.pretrained import REPORT_FILE
from moesparse.errors import CheckpointError, UsageError
from moesparse.experts.choice import (
    ONE_DOMAIN,
    Choice,
    check_budget,
    check_sums_suffice,
    choose_from_domains,
    choose_from_windows,
)
from moesparse.experts.refit import RefitReport, check_refit, remove_and_refit_block
from moesparse.experts.surgery import RemovalPlan, SurgeryReport, plan_removal
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.look import Inspection
from moesparse.models.on_disk import StreamedModel
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.pruning.plan import any_choice, plan_run, without_experts
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.report import Report, describe_calibration, expert_sizes
from moesparse.pruning.streamed import assemble_checkpoint, prune_checkpoint, spills, write_layer, write_outside
from moesparse.system.folders import check_output_folder
from moesparse.system.processes import Processes, default_device
from moesparse.system.run_folder import JOURNAL_FILE, RunFolder, check_inputs, what_is_kept
from moesparse.system.shards import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["experts_folder", "remove_experts_of_checkpoint", "what_is_left"]

Calibration = Windows | ModelStatistics | Mapping[str, ModelStatistics]


def remove_experts_of_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Calibration,
    recipe: Recipe,
    *,
    domains: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: Callable[[Report], str] | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    resume: bool = False,
    allow_pruned: bool = False,
    max_memory: int | None = None,
    progress: Progress = silent,
) -> Report:
    """`prune_checkpoint` for recipes that remove experts, and prune the weights of those that stay or not.

    Holds besides what that holds a few numbers of every expert and window, and while a block is refitted
    `memory_for_refit`. With weights to prune, a folder of the output's name with ".experts" behind it holds the smaller
    model until the output is whole.

    Args:
        calibration: windows as for `prune_checkpoint`; to remove experts without a refit also saved statistics of the
            model, or of its domains by name.
        domains: of each window, for the choice of experts; None is one domain.

    The other arguments, the result and the errors are those of `prune_checkpoint`.

    Raises:
        UsageError: swaps of experts are asked for (`refine_experts`), which need the whole model.
    """
    if recipe.refine_experts:
        raise UsageError(
            "refine_experts must be False to run layer by layer, got True: swaps are tried on the whole model; load it "
            "and call moesparse.prune"
        )
    out, processes = Path(out), Processes.current()
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}
    options |= {"resume": resume, "allow_pruned": allow_pruned, "max_memory": max_memory}
    if not recipe.prunes_weights:
        run = _Removal(source, calibration, recipe, recipe, domains, **options)
        return run.into(out, tokenizer, card)
    if isinstance(calibration, ModelStatistics | Mapping):
        check_sums_suffice(refit=True, refine=False, domains=None)
    between = experts_folder(out)

    def clear() -> None:
        if (out / "config.json").exists() and not (out / JOURNAL_FILE).exists():
            shutil.rmtree(between, ignore_errors=True)  # killed behind its last step but one
        if not (out / JOURNAL_FILE).exists():
            check_output_folder(out)

    processes.from_first(clear)
    first = _Removal(source, calibration, recipe, dataclasses.replace(recipe, weights=None), domains, **options)
    removed = first.between(between)

    def whole(report: Report) -> Report:
        return dataclasses.replace(
            report,
            recipe=recipe.to_dict(),
            seconds=report.seconds + removed["seconds"],
            experts=removed["experts"],
            fingerprint=removed["fingerprint"],
            sizes={"before": removed["sizes"]["before"], "after": report.sizes["after"]},
        )

    report = prune_checkpoint(
        between,
        out,
        calibration,  # type: ignore[arg-type]
        without_experts(recipe),
        tokenizer=tokenizer,
        card=card,
        complete=whole,
        **options,
    )
    processes.from_first(lambda: shutil.rmtree(between))
    return report


def experts_folder(out: Path) -> Path:
    """Where the smaller model lies while its weights are pruned into `out`."""
    return out.with_name(f"{out.name}.experts")


def what_is_left(out: Path) -> str:
    """What a stopped run has left for going on, in a sentence; "" when nothing."""
    between = experts_folder(out)
    whole = f"the smaller model is kept in {between}" if (between / "config.json").exists() else ""
    return what_is_kept(out) or what_is_kept(between) or whole


class _Removal:
    """A run that removes experts and no more.

    Args:
        source, calibration, domains: see `remove_experts_of_checkpoint`; so are the options.
        whole: the recipe that the memory must do for.
        recipe: of the experts alone.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        calibration: Calibration,
        whole: Recipe,
        recipe: Recipe,
        domains: Sequence[str] | None,
        *,
        batch_size: int,
        device: torch.device | str | None,
        resume: bool,
        allow_pruned: bool,
        max_memory: int | None,
        progress: Progress,
    ) -> None:
        self.recipe, self.domains, self.progress = recipe, domains, progress
        self.batch_size, self.resume, self.allow_pruned = batch_size, resume, allow_pruned
        self.streamed = streamed = StreamedModel(source)
        check_budget(streamed.model, recipe.expert_budget, recipe.expert_floor)
        plan_removal(streamed.model, any_choice(streamed.blocks, recipe))  # refuses what cannot be placed
        if recipe.refits_experts:
            check_refit(streamed.blocks, ridge=1.0)
        for block in streamed.blocks:
            for matrix in block.matrices:
                pattern = whole.pattern_of(block.name, matrix.name)
                if pattern is not None:
                    pattern.check_matrix(f"{block.name}.{matrix.name}", matrix.weight.shape[-1])
        self.home = torch.device(device) if device is not None else default_device()
        self.parts: Mapping[str, ModelStatistics] | None = None
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        if isinstance(calibration, ModelStatistics | Mapping):
            check_sums_suffice(recipe.refits_experts, recipe.refine_experts, domains)
            named = {ONE_DOMAIN: calibration} if isinstance(calibration, ModelStatistics) else calibration
            self.parts = named
            text: Any = {name: [part.text_hash, part.seed, part.fingerprint] for name, part in named.items()}
            windows, length = 0, 1
        else:
            embedding: Any = streamed.model.get_input_embeddings()
            self.ids, self.mask = check_windows(calibration, embedding.weight.shape[0])
            text = ordered_hash(self.ids, self.mask)
            windows, length = self.ids.shape
        self.described = describe_calibration(calibration)
        self.processes = Processes.current()
        plan = plan_run(
            streamed.model,
            streamed.blocks,
            whole,
            windows=windows,
            length=length,
            batch_size=batch_size,
            processes=self.processes.count,
        )
        self.spill = spills(plan, max_memory, self.processes, on_gpu=self.home is not None and self.home.type != "cpu")
        self.inputs = {
            "source": streamed.signature(),
            "windows": text,
            "domains": None if domains is None else hashlib.sha256(json.dumps(list(domains)).encode()).hexdigest()[:32],
            "recipe": recipe.to_dict(),
            "batch size": batch_size,
            "release": __version__,
        }

    def between(self, folder: Path) -> dict[str, Any]:
        """The report of the smaller model in a folder beside the output; it is made where it is not whole yet."""
        if (folder / "config.json").exists() and not (folder / JOURNAL_FILE).exists():
            held = read_json(folder / REPORT_FILE, "a report")
            if "inputs" not in held:
                raise CheckpointError(f"{folder} must be free for the smaller model, got another checkpoint; move it")
            done = f"an unfinished run left the smaller model in {folder}"
            check_inputs(done, held["inputs"], self.inputs, resume=self.resume)
            return held
        return self.into(folder, None, None, extra={"inputs": self.inputs}).to_dict()

    def into(
        self,
        out: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        card: Callable[[Report], str] | None,
        extra: Mapping[str, Any] | None = None,
    ) -> Report:
        """Write the smaller model.

        Args:
            out: a new or empty folder, or with `resume` an unfinished run's.
            tokenizer: saved beside the weights.
            card: gives the text of README.md.
            extra: written with the report.
        """
        started = time.perf_counter()
        streamed, model = self.streamed, self.streamed.model
        with RunFolder.open(out, self.inputs, resume=self.resume, processes=self.processes) as run:
            if run.redone:
                self.progress(ProgressEvent(f"redo {run.redone[0]} and what follows: it was damaged", 0, 1, "layer"))
            inspection = Inspection(streamed, self.allow_pruned, self.progress)
            stream = self._stream(run, inspection)
            fingerprint, before = inspection.fingerprint, expert_sizes(model, streamed.blocks)
            choice = self._choose(run, stream, fingerprint)
            surgery, fits = self._remove(run, stream, plan_removal(model, choice.kept))
            blocks = find_moe_blocks(model)
            if len(run.parts) == len(streamed.layers):
                write_outside(run, streamed)
            report = Report(
                recipe=self.recipe.to_dict(),
                version=__version__,
                blocks=[],
                calibration=self.described,
                seconds=time.perf_counter() - started,
                experts=choice.report(surgery, fits).to_dict(),
                fingerprint=fingerprint,
                sizes={"before": before, "after": expert_sizes(model, blocks)},
            )
            text = None if card is None else card(report)
            noted = {**report.to_dict(), **(extra or {})}
            assemble_checkpoint(run, streamed, report.recipe, tokenizer=tokenizer, card=text, report=noted)
        return report

    def _stream(self, run: RunFolder, inspection: Inspection) -> LayerStream | None:
        """Every layer was looked at when this returns; None where no text is to go through them."""
        if self.ids is None:
            inspection.look_at_all()
            return None
        return self.streamed.stream(
            self.ids,
            self.mask,
            self.batch_size,
            self.home,
            inspect=inspection,
            spill=run.path if self.spill else None,
            processes=self.processes,
        )

    def _choose(self, run: RunFolder, stream: LayerStream | None, fingerprint: str) -> Choice:
        recipe, blocks = self.recipe, self.streamed.blocks
        rule: dict[str, Any] = {
            "keep": recipe.keep_experts,
            "remove": recipe.experts,
            "mix": recipe.expert_mix,
            "protect_super": recipe.protect_experts,
            "seed": recipe.seed,
        }
        if stream is None:
            assert self.parts is not None
            return choose_from_domains(blocks, fingerprint, self.parts, recipe.expert_saliency, **rule)
        assert self.ids is not None
        record_layers(run, self.streamed, stream, self.progress)
        sums, by_window = read_sums(run, len(self.ids))
        statistics = ModelStatistics(sums, fingerprint, "", None, self.ids.numel())
        return choose_from_windows(blocks, statistics, by_window, recipe.expert_saliency, domains=self.domains, **rule)

    def _remove(
        self, run: RunFolder, stream: LayerStream | None, plan: RemovalPlan
    ) -> tuple[SurgeryReport, list[RefitReport]]:
        """Cut, refit and write layer by layer; what is written already is cut again, for its shapes, and read."""
        streamed, done = self.streamed, run.parts
        refits = self.recipe.refits_experts and stream is not None
        if stream is not None and refits:
            stream.restart()
        fits = []
        for position in range(len(streamed.layers)):
            here = [plan.blocks.index(block) for block in plan.blocks if streamed.position(block.layer) == position]
            self.progress(ProgressEvent("remove experts", position, len(streamed.layers), "layer"))
            with streamed.hold(position, self.home if refits else None):
                finished = position < len(done)
                notes = done[position].note if finished else []
                for number in here:
                    if finished or not refits:
                        plan.apply_block(number)
                    else:
                        assert stream is not None
                        notes.append(remove_and_refit_block(stream, position, plan, number).to_dict())
                if refits and stream is not None and len(done) < len(streamed.layers):
                    if finished:
                        streamed.refill(position, self.home, run.read(done[position]))
                    for _ in stream.run(position, keep=True):
                        pass
                if not finished:
                    write_layer(run, streamed, position, notes)
                fits += [RefitReport(**note) for note in notes]
        return plan.finish(), fits
