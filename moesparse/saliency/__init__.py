"""From weights and calibration sums to masks (`weights`) and to the weights under them (`updates`)."""

from moesparse.weights.mask_rules import MASK_RULES, MaskChoice, choose_masks, moments_needed, obs_gate, prune_in_place
from moesparse.weights.weight_rules import (
    UPDATE_RULES,
    PrunedInputs,
    Update,
    asymmetric_target,
    match_output,
    output_energy,
    rescale_factor,
    update_weights,
)

__all__ = [
    "MASK_RULES",
    "UPDATE_RULES",
    "MaskChoice",
    "PrunedInputs",
    "Update",
    "asymmetric_target",
    "choose_masks",
    "match_output",
    "moments_needed",
    "obs_gate",
    "output_energy",
    "prune_in_place",
    "rescale_factor",
    "update_weights",
]
