"""What goes wrong on a user's side: one clear sentence each, never a traceback in the command line."""

_LONGEST_REASON = 300


class MoESparseError(ValueError):
    """Something the user can mend: a model that does not fit, text that is too short, a folder that is not empty."""


class UsageError(MoESparseError):
    """An argument that can never be right (an unknown rule, a ratio of 1.2): the command line exits with 2."""


class UnsupportedModelError(MoESparseError):
    """The model has no experts, or experts that do not fit; names the module and what is missing."""


class CalibrationError(MoESparseError):
    """The calibration data or the statistics from it cannot be used."""


class CheckpointError(MoESparseError):
    """A folder cannot be read or written as a checkpoint; names the file."""


class MissingFileError(UsageError, CheckpointError):
    """A file or folder that an argument names is not there."""


class ResultError(MoESparseError):
    """A result that is not its source with the changes that were meant: a defect, or the source changed meanwhile."""


class ProcessError(MoESparseError):
    """Another process that shares the work has ended or cannot be reached."""


class NotInPiecesError(UnsupportedModelError, CheckpointError):
    """A checkpoint that cannot be read layer by layer: its tensors are not those that transformers would save."""


def reason_of(error: BaseException) -> str:
    """The first line of what a library says, or its kind where it says nothing; for the end of a sentence of ours."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."
