"""What to prune and how: the one object that says all of it, checked when it is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.choice import Rule
from moesparse.experts.criteria import WEIGHT_CRITERION, check_criterion
from moesparse.experts.domains import DEFAULT_MIX, check_mix
from moesparse.experts.merging import MERGED_BY, METHODS
from moesparse.experts.plan_file import ExpertPlan
from moesparse.experts.scores_file import ExpertScores
from moesparse.experts.selection import BUDGETS, check_divisor
from moesparse.models.blocks import MoEBlock
from moesparse.pruning.budget import DEFAULT_CHOICES, DENSE, DROP, check_choices, check_target
from moesparse.pruning.recipe_checks import check_layers_alike, check_patterns, check_removal
from moesparse.pruning.recipe_file import PUBLISHED, find_recipe, read_fields, write_fields
from moesparse.weights.mask_rules import check_rules, moments_needed
from moesparse.weights.patterns import Pattern
from moesparse.weights.value_formats import ValueFormat
from moesparse.weights.value_rules import value_moment
from moesparse.weights.weight_rules import parse_update

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_EXPERT_SALIENCY",
    "DEFAULT_SALIENCY",
    "DEFAULT_UPDATE",
    "DEFAULT_VALUE_RULE",
    "DEFAULT_WEIGHTS",
    "EXPERT_SALIENCY_OF_TEXT",
    "MTP_CHOICES",
    "OUTPUT_DTYPES",
    "Recipe",
    "recipe_fields",
]

DEFAULT_WEIGHTS = "2:4"
DEFAULT_SALIENCY = "auto"
DEFAULT_UPDATE = "auto"
DEFAULT_VALUE_RULE = "auto"
DEFAULT_EXPERT_SALIENCY = "auto"
MTP_CHOICES = ("prune", "keep", "drop")
OUTPUT_DTYPES = ("bfloat16", "float16", "float32")
# fields that are files of their own
_FILES = ("plan", "scores")

# what "auto" is: admm's products with the second moment take a CPU three times as long as all the rest of a run
_SALIENCY_ON_CPU, _SALIENCY_ELSEWHERE = "gated-sparsegpt", "gated-admm"
# the first needs the tokens themselves, at the layer that is pruned
_UPDATE_FROM_TEXT, _UPDATE_FROM_SUMS = "asymmetric+tune", "least-squares+rescale"
# the second reads the weights alone
_VALUE_RULE_OF_SUMS, _VALUE_RULE_ELSEWHERE = "gated-gptq", "rtn-mse"
# what "auto" is for experts, where there is text or sums of one
EXPERT_SALIENCY_OF_TEXT = "reap"


@dataclass(frozen=True)
class Recipe:
    """What to prune and how. Checked when made; written into the pruned checkpoint's config.

    Attributes:
        weights: "n:m" (n of every m consecutive inputs of an output row stay), or the share removed from every output
            row, in (0, 1); None leaves the weights of the experts that stay as they are.
        saliency: the mask rule, one of moesparse.weights.mask_rules.MASK_RULES, or "auto": gated-admm on a GPU, and on
            a CPU gated-sparsegpt, which takes a third of its time and is a little worse. Reports name the rule itself.
        update: the weight rule, one of moesparse.weights.weight_rules.UPDATE_RULES, or "auto": asymmetric+tune where
            text goes through the layers, least-squares+rescale from saved sums and where experts alone are removed.
            "none" is the papers' own.
        propagate: the next block is calibrated on what the pruned blocks before it give (False: on the dense model).
        seed: of the "random" mask rule and expert criterion; every other rule is deterministic.
        experts: share of the experts removed from every block before the weights are pruned, in (0, 1), or
        keep_experts: how many stay. With a weight rule that holds "least-squares" the kept ones are refitted.
        expert_saliency: the criterion, one of moesparse.experts.criteria.NAMED_CRITERIA, or "auto": reap, and aimer
            where experts are chosen without calibration. Reports name the criterion itself.
        expert_method: what becomes of the others, one of moesparse.experts.merging.METHODS: "remove", or they are
            merged into those that stay by "ream", "m-smoe" or "hc-smoe". Then "auto" in expert_saliency is the
            criterion of that paper, reap or frequency, which says too what each weighs; text is needed in any case.
        refine_experts: swap experts after the first choice while the block's output error falls.
        expert_mix: how the domains of the calibration text become one choice, one of moesparse.experts.domains.MIXES.
        expert_budget: "per-layer", or "global": the experts of all layers are ranked together, and layers keep
            different numbers of them, `experts` and `keep_experts` on average. Takes `allow_non_uniform`.
        expert_floor: fewest experts of a block under the global budget; top_k when None.
        protect_experts: super-experts, of extreme activations, stay whatever their score.
        patterns: instead of weights, block name -> matrix name -> a pattern as above, or "dense"; names every block.
        target_bytes: instead of weights and a share of experts, what the packed experts may take: a share of the dense
            experts' bytes, 0.4, or bytes, "3.2GB". `prune` then searches for patterns and a count, see
            moesparse.pruning.budget, and meets it to within 1% where the choices can.
        choices: of that search, "drop", "dense" and patterns n:m.
        mtp: what becomes of layers of a checkpoint that predict further tokens (MTP): "prune" does with them what is
            done with the others, by sums of their own; "keep" carries them over; "drop" leaves them out and sets their
            count to 0. None keeps them, but where experts are removed and the config has one count for all drops them.
        compare_uniform: prune a copy of the model to the best uniform choice at those bytes too, measure both on text
            kept aside, and keep the better; takes twice the time, and the memory of the copy.
        plan: instead of a share of experts, which ones stay: a choice that was made before, on this model or on a copy
            of it in another dtype. Text is then for a refit and for weights only.
        scores: of the experts, from a file, in the place of a pass over text; expert_saliency is one of theirs.
        divisible_by: the experts that stay in a block are a multiple of it, such as the size of an expert-parallel
            group: `experts` is rounded so that fewer go, of `target_bytes` no other count is tried, and what
            `keep_experts` or `plan` would leave is refused where it is none.
        allow_non_uniform: the layers may keep different numbers of experts, by the global budget or by `plan`:
            config.json says them as `per_layer_config`, which few programs read; who does here, the refusal says.
        output_dtype: of a quantised checkpoint, make a plain one: "bfloat16", "float16" or "float32" for every
            quantised weight and for what is in the model's own dtype. None leaves its weights quantised.
        values: a format of moesparse.weights.value_formats, such as "int4:64", to which the weights that stay are
            rounded; `prune_checkpoint` stores their codes and scales. None leaves them as they are.
        fake_quantised: the checkpoint holds the rounded values in its own dtype instead of their codes; so does every
            model in memory.
        value_rule: how, one of moesparse.weights.value_rules.VALUE_RULES, or "auto": gated-gptq, and rtn-mse where
            there is no calibration.

    Raises:
        UsageError: a pattern, rule or combination that cannot be.
    """

    weights: str | float | None = DEFAULT_WEIGHTS
    saliency: str = DEFAULT_SALIENCY
    update: str = DEFAULT_UPDATE
    propagate: bool = True
    seed: int = 0
    experts: float | None = None
    keep_experts: int | None = None
    expert_saliency: str = DEFAULT_EXPERT_SALIENCY
    refine_experts: bool = False
    expert_mix: str = DEFAULT_MIX
    expert_budget: str = "per-layer"
    expert_floor: int | None = None
    protect_experts: bool = False
    patterns: Mapping[str, Mapping[str, str]] | None = None
    target_bytes: float | str | None = None
    choices: Sequence[str] = DEFAULT_CHOICES
    compare_uniform: bool = True
    mtp: str | None = None
    plan: ExpertPlan | None = None
    scores: ExpertScores | None = None
    divisible_by: int | None = None
    output_dtype: str | None = None
    expert_method: str = "remove"
    allow_non_uniform: bool = False
    values: str | None = None
    value_rule: str = DEFAULT_VALUE_RULE
    fake_quantised: bool = False

    @classmethod
    def of(cls, given: Recipe | str | float | None) -> Recipe:
        """A recipe as a caller says it: itself, its pattern ("2:4", 0.5), a file or published name; None is default.

        Raises:
            UsageError: it is none of these.
        """
        if isinstance(given, cls):
            return given
        if given is None:
            return cls()
        if isinstance(given, str) and (given in PUBLISHED or given.endswith((".yaml", ".yml"))):
            return cls.load(given)
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise UsageError(
                f'recipe must be a moesparse.Recipe or a pattern such as "2:4" or 0.5, got {type(given).__name__}'
            )
        return cls(weights=given)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Recipe:
        """A recipe from a YAML file of its fields, or a published one: cpu, default, paper, reap-25.

        Raises:
            UsageError: no such file, an unknown field, or what a recipe cannot be.
        """
        return cls(**recipe_fields(file))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write all fields to a YAML file, from which `load` makes this recipe again.

        Raises:
            UsageError: it holds a plan or scores, which are files of their own. CheckpointError: it cannot be written.
        """
        for name in _FILES:
            if getattr(self, name) is not None:
                raise UsageError(f"{name} must be left out of a recipe that is saved: {name}.save writes its own file")
        write_fields(file, self.to_dict())

    def __post_init__(self) -> None:
        if self.target_bytes is not None:
            self._check_target()
        if self.patterns is not None:
            self._check_patterns()
        if self.weights is not None:
            self._check_weights()
        elif not (self.changes_weights or self.removes_experts or self.target_bytes is not None):
            raise UsageError(
                "a recipe must prune weights, round them to values or remove experts, got weights=None and none of the "
                "others"
            )
        check_removal(self.experts, self.keep_experts)
        check_rules(_SALIENCY_ELSEWHERE if self.saliency == DEFAULT_SALIENCY else self.saliency, self._update())
        check_divisor(self.divisible_by)
        self._check_files()
        self._check_values()
        check_mix(self.expert_mix, "expert_mix")
        self._check_method()
        check_layers_alike(self)
        if self.mtp is not None and self.mtp not in MTP_CHOICES:
            raise UsageError(f"mtp must be one of {', '.join(MTP_CHOICES)}, got {self.mtp!r}")
        if self.output_dtype is not None and self.output_dtype not in OUTPUT_DTYPES:
            raise UsageError(f"output_dtype must be one of {', '.join(OUTPUT_DTYPES)}, got {self.output_dtype!r}")
        if not self.removes_experts and self.target_bytes is None:
            for name in ("refine_experts", "protect_experts", "expert_budget", "divisible_by", "expert_method"):
                if getattr(self, name) not in (None, False, METHODS[0], BUDGETS[0]):
                    raise UsageError(f"{name} must come with experts or keep_experts, got neither")

    def _check_weights(self) -> None:
        try:
            object.__setattr__(self, "weights", str(Pattern.parse(self.weights)))  # type: ignore[arg-type]
        except UsageError as error:
            raise UsageError(f"weights must be a pattern, got {self.weights!r}: {error}") from error

    def _check_values(self) -> None:
        if self.values is None:
            if self.value_rule != DEFAULT_VALUE_RULE:
                raise UsageError(f"value_rule must come with values, got {self.value_rule!r} alone")
            if self.fake_quantised:
                raise UsageError("fake_quantised must come with values, got it alone")
            return
        object.__setattr__(self, "values", str(ValueFormat.parse(self.values)))
        if self.value_rule != DEFAULT_VALUE_RULE:
            value_moment(self.value_rule)
        if self.target_bytes is not None:
            raise UsageError(
                f"values must be left out with target_bytes, which counts bytes of plain values, got {self.values!r}"
            )

    def _check_target(self) -> None:
        check_target(self.target_bytes)  # type: ignore[arg-type]
        object.__setattr__(self, "choices", check_choices(self.choices))
        if self.divisible_by is not None and DROP not in self.choices:
            raise UsageError(f"divisible_by must come with {DROP} among choices, got {', '.join(self.choices)}")
        weights = None if self.weights == DEFAULT_WEIGHTS else self.weights
        given: dict[str, Any] = {"experts": self.experts, "keep_experts": self.keep_experts}
        given |= {"patterns": self.patterns, "weights": weights}
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name} must be left out with target_bytes, which chooses it, got {value!r}")
        object.__setattr__(self, "weights", None)

    def _check_files(self) -> None:
        """A plan or scores beside what they decide, or what takes text."""
        if self.plan is None and self.scores is None:
            if self.expert_saliency != DEFAULT_EXPERT_SALIENCY:
                check_criterion(self.expert_saliency, "expert_saliency")
            if self.expert_saliency == WEIGHT_CRITERION:
                self._check_weights_alone()
            return
        if self.expert_saliency == DEFAULT_EXPERT_SALIENCY:
            object.__setattr__(self, "expert_saliency", self.on(None).expert_saliency)
        name = "scores" if self.plan is None else "plan"
        others = ["target_bytes", "refine_experts", "protect_experts", "expert_floor"]
        others += ["experts", "keep_experts", "scores"] if self.plan is not None else []
        for other in others:
            value = getattr(self, other)
            if value not in (None, False):
                got = "some" if other == "scores" else repr(value)
                raise UsageError(f"{other} must be left out with {name}, got {got}")
        if self.plan is not None:
            self.plan.check_divisible(self.divisible_by)
        if self.scores is not None:
            if not self.removes_experts:
                raise UsageError("scores must come with experts or keep_experts, got neither")
            self.scores.by(self.expert_saliency)

    def _check_method(self) -> None:
        if self.expert_method not in METHODS:
            raise UsageError(f"expert_method must be one of {', '.join(METHODS)}, got {self.expert_method!r}")
        if self.expert_method == METHODS[0]:
            return
        for name in ("target_bytes", "refine_experts", "protect_experts", "plan"):
            value = getattr(self, name)
            if value not in (None, False):
                got = "one" if name == "plan" else repr(value)
                raise UsageError(f"{name} must be left out with expert_method={self.expert_method!r}, got {got}")

    def _check_weights_alone(self) -> None:
        """What only a criterion that reads text has."""
        for name in ("target_bytes", "protect_experts", "expert_mix"):
            value = getattr(self, name)
            if value not in (None, False, DEFAULT_MIX):
                raise UsageError(
                    f"{name} must be left out with expert_saliency={WEIGHT_CRITERION!r}, which reads no text, got "
                    f"{value!r}"
                )

    def _check_patterns(self) -> None:
        assert self.patterns is not None
        if self.weights not in (None, DEFAULT_WEIGHTS):
            raise UsageError(f"weights must be left out with patterns, got {self.weights!r}")
        object.__setattr__(self, "weights", None)
        for matrices in self.patterns.values():
            for pattern in matrices.values():
                if pattern != DENSE:
                    Pattern.parse(pattern)

    def on(self, device: torch.device | None, *, calibrated: bool = True, from_sums: bool = False) -> Recipe:
        """The recipe as it is carried out: with rules in the place of "auto".

        Args:
            device: that does it; None is a CPU.
            calibrated: there is text, or statistics of one.
            from_sums: it is statistics.
        """
        on_cpu = device is None or device.type == "cpu"
        found = {}
        if self.saliency == DEFAULT_SALIENCY:
            found["saliency"] = _SALIENCY_ON_CPU if on_cpu else _SALIENCY_ELSEWHERE
        if self.expert_saliency == DEFAULT_EXPERT_SALIENCY:
            alone = not calibrated and self.chooses_experts
            of_text = MERGED_BY.get(self.expert_method, EXPERT_SALIENCY_OF_TEXT)
            found["expert_saliency"] = WEIGHT_CRITERION if alone else of_text
        if self.update == DEFAULT_UPDATE:
            found["update"] = self._update(from_sums)
        if self.values is not None and self.value_rule == DEFAULT_VALUE_RULE:
            found["value_rule"] = _VALUE_RULE_OF_SUMS if calibrated else _VALUE_RULE_ELSEWHERE
        return dataclasses.replace(self, **found) if found else self  # type: ignore[arg-type]

    def _update(self, from_sums: bool = False) -> str:
        if self.update != DEFAULT_UPDATE:
            return self.update
        trains = (self.prunes_weights or self.target_bytes is not None) and not from_sums
        return _UPDATE_FROM_TEXT if trains else _UPDATE_FROM_SUMS

    @property
    def pattern(self) -> Pattern:
        """The one pattern of all matrices."""
        assert self.weights is not None
        return Pattern.parse(self.weights)

    @property
    def prunes_weights(self) -> bool:
        return self.weights is not None or self.patterns is not None

    @property
    def value_format(self) -> ValueFormat | None:
        """Of all matrices."""
        return None if self.values is None else ValueFormat.parse(self.values)

    @property
    def stores_codes(self) -> bool:
        """Whether a checkpoint holds codes and scales of the experts' weights."""
        found = self.value_format
        return found is not None and found.scale_dtype is not None and not self.fake_quantised

    @property
    def changes_weights(self) -> bool:
        """Whether there is work on the weights of the experts that stay: pruned, rounded, or both."""
        return self.prunes_weights or self.values is not None

    @property
    def moments(self) -> str:
        """Second moments that work on weights takes: "none", "plain", "gated" or "both"."""
        found = {moments_needed(self.saliency, self.update)} if self.prunes_weights else {"none"}
        if self.values is not None:
            found.add(value_moment(self.on(None).value_rule) or "none")
        found.discard("none")
        return "both" if len(found) > 1 else next(iter(found), "none")

    def pattern_of(self, block: str, matrix: str) -> Pattern | None:
        """Of one matrix; None where its weights stay as they are.

        Raises:
            UsageError: `patterns` does not name it.
        """
        if self.patterns is None:
            return None if self.weights is None else self.pattern
        found = self.patterns.get(block, {}).get(matrix)
        if found is None:
            raise UsageError(f"patterns must name {block}.{matrix}, got {', '.join(self.patterns) or 'no block'}")
        return None if found == DENSE else Pattern.parse(found)

    @property
    def removes_experts(self) -> bool:
        return self.experts is not None or self.keep_experts is not None or self.plan is not None

    @property
    def chooses_experts(self) -> bool:
        """Whether the experts that stay are chosen from calibration data, and not from a file or the weights alone."""
        return self.removes_experts and self.chooses_without_text is None

    @property
    def chooses_without_text(self) -> str | None:
        """What says who stays where no calibration data does, in words; None where it does, or all stay."""
        if self.plan is not None:
            return "a plan"
        if self.scores is not None:
            return "scores"
        return f"expert_saliency={WEIGHT_CRITERION!r}" if self.scores_weights else None

    @property
    def scores_weights(self) -> bool:
        """Whether the experts that stay are chosen by their weights alone, which are all read."""
        counted = self.experts is not None or self.keep_experts is not None
        return counted and self.scores is None and self.expert_saliency == WEIGHT_CRITERION

    @property
    def reads_weights_alone(self) -> bool:
        """Whether it needs no calibration text."""
        by_magnitude = self.saliency == "magnitude" or not self.prunes_weights
        rounds_only = not (self.prunes_weights or self.removes_experts or self.target_bytes is not None)
        solves = self.update != "none" and not rounds_only
        rounds_alone = self.values is None or self.value_rule in ("rtn", "rtn-mse")
        return not (self.chooses_experts or self.forms_groups or solves) and by_magnitude and rounds_alone

    @property
    def forms_groups(self) -> bool:
        """Whether experts are merged in groups that are yet to be formed, which takes text."""
        return self.expert_method != METHODS[0]

    @property
    def merges_experts(self) -> bool:
        """Whether experts are merged, also by a plan: then weights change."""
        return self.forms_groups or (self.plan is not None and bool(self.plan.merged))

    @property
    def refits_experts(self) -> bool:
        return self.removes_experts and parse_update(self._update())[0] in ("least-squares", "asymmetric")

    def without_experts(self) -> Recipe:
        """What is left to do once the experts are removed."""
        removal: dict[str, Any] = {
            "experts": None,
            "keep_experts": None,
            "refine_experts": False,
            "protect_experts": False,
            "divisible_by": None,
            "expert_method": METHODS[0],
            "expert_budget": BUDGETS[0],
            "expert_floor": None,
            "allow_non_uniform": False,
        }
        removal |= {"plan": None, "scores": None, "expert_saliency": EXPERT_SALIENCY_OF_TEXT}
        return dataclasses.replace(self, **removal)  # type: ignore[arg-type]

    def without_weights(self) -> Recipe:
        """The removal of experts alone."""
        values: dict[str, Any] = {"values": None, "value_rule": DEFAULT_VALUE_RULE, "fake_quantised": False}
        return dataclasses.replace(self, weights=None, patterns=None, **values)

    def check_blocks(self, blocks: Sequence[MoEBlock]) -> None:
        """Refuse a pattern or groups of values that do not divide a matrix, before anything is changed.

        Raises:
            UsageError: names the matrix.
        """
        check_patterns(blocks, self.pattern_of)
        if (values := self.value_format) is not None:
            for block in blocks:
                for matrix in block.matrices:
                    values.check_matrix(f"{block.name}.{matrix.name}", matrix.weight.shape[-1])

    def check_needs_no_data(self) -> None:
        """Refuse to go without calibration where more than the weights is looked at.

        Raises:
            CalibrationError: names the rules.
        """
        if self.reads_weights_alone:
            return
        rules, free = f"saliency={self.saliency!r}, update={self.update!r}", "magnitude without an update needs"
        if self.values is not None:
            rules = (f"{rules}, " if self.prunes_weights else "") + f"value_rule={self.value_rule!r}"
            free = "magnitude without an update, and values by rtn or rtn-mse, need"
        raise CalibrationError(f"calibration must be windows or statistics for {rules}, got None; only {free} no data")

    @property
    def expert_rule(self) -> Rule:
        """How experts are judged and how many stay."""
        return Rule(
            criterion=self.on(None).expert_saliency,
            keep=self.keep_experts,
            remove=self.experts,
            mix=self.expert_mix,
            protect_super=self.protect_experts,
            seed=self.seed,
            divisible_by=self.divisible_by,
            budget=self.expert_budget,
            floor=self.expert_floor,
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; what belongs to patterns, a target or a file is left out where there are none."""
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        found |= {"choices": list(self.choices)}
        if self.plan is not None:
            found["expert_saliency"] = self.plan.criterion
        for name in ("plan", "scores"):
            held = found.pop(name)
            if held is not None:
                found[name] = held.identity()
        unused = [] if self.target_bytes is not None else ["target_bytes", "choices", "compare_uniform"]
        unused += [name for name in ("patterns", "mtp", "divisible_by", "output_dtype") if getattr(self, name) is None]
        unused += ["expert_method"] * (self.expert_method == METHODS[0])
        unused += ["allow_non_uniform"] * (not self.allow_non_uniform)
        unused += ["values", "value_rule"] * (self.values is None)
        unused += ["fake_quantised"] * (not self.fake_quantised)
        return {name: value for name, value in found.items() if name not in unused}


def recipe_fields(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields that the file of a recipe names, or a published recipe; see `Recipe.load`.

    Raises:
        UsageError: as there, but for what fields cannot be together.
    """
    kinds = get_type_hints(Recipe)
    return read_fields(find_recipe(file), kinds, beside=_FILES)
