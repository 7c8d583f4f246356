"""Recovery after pruning: the pruned experts learn from the dense ones, zeros held. `moesparse.distill` is the door."""

from moesparse.distillation.journal import DistillWarning
from moesparse.distillation.run import DistillReport, distill
from moesparse.distillation.settings import MODES, PRESETS, Settings

__all__ = ["MODES", "PRESETS", "DistillReport", "DistillWarning", "Settings", "distill"]
