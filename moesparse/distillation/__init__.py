"""Recovery after pruning: the pruned experts learn from the dense ones, zeros held. `moesparse.distill` is the door."""

from moesparse.distillation.log import DistillWarning
from moesparse.distillation.report import DistillReport
from moesparse.distillation.run import distill, distill_checkpoint
from moesparse.distillation.settings import MODES, PRESETS, Settings

__all__ = ["MODES", "PRESETS", "DistillReport", "DistillWarning", "Settings", "distill", "distill_checkpoint"]
