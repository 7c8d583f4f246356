"""What is measured: expert layers of real models, and a small one of each kind for a dry run."""

from __future__ import annotations

from moesparse.benchmarking import SHAPES, Shape

__all__ = ["DECODE_TOKENS", "DRY_SHAPES", "DRY_TOKENS", "PREFILL_TOKENS", "SHAPES", "TUNE_TOKENS", "choose_shapes"]

DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
# every second batch: the dispatcher takes the nearest that was tuned
TUNE_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DRY_TOKENS = {"tune": (5,), "decode": (1, 5), "prefill": (40,)}

# 128: the tile of a packed weight; 160: no multiple of it, so that padding is seen; two experts stay empty at one token
DRY_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 4, 2, 128, 160, source="dry run"),
        Shape("tiny-gpt-oss", 4, 2, 160, 128, activation="gpt_oss", bias=True, source="dry run"),
    )
}


def choose_shapes(names: list[str] | None, dry: bool) -> list[Shape]:
    """Shapes by name, all of them when none is named.

    Raises:
        SystemExit: a name is not known; lists those that are.
    """
    known = DRY_SHAPES if dry else SHAPES
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SystemExit(f"--shapes must be among {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name] for name in names] if names else list(known.values())
