"""FP4 experts of DeepSeek-V4, in a checkpoint that is FP8 else."""

from __future__ import annotations

from moesparse.models.formats.base import CODES, SCALE
from moesparse.models.formats.fp4 import Fp4

__all__ = ["Fp4DeepSeek"]


class Fp4DeepSeek(Fp4):
    """Two E2M1 codes a byte, I8 [out, in / 2], and E8M0 scales [out, in / 32].

    Args:
        own, scale: the end of the key, and that of the scale's name in its place.
    """

    name = "fp4_deepseek"
    dtypes = {CODES: ("I8",), SCALE: ("F8_E8M0", "U8")}  # noqa: RUF012
    group = 32

    def __init__(self, own: str = ".weight", scale: str = ".scale") -> None:
        self.own = own
        self.tensors = {CODES: own, SCALE: scale}
