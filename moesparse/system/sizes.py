"""Bytes and seconds as people write them."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "format_seconds", "parse_size"]

_LETTERS = tuple(enumerate("KMGT", start=1))
# a letter alone is decimal: the smaller of what it may mean, which keeps within any limit
_UNITS = {"B": 1} | {f"{letter}{end}": 1000**power for power, letter in _LETTERS for end in ("B", "")}
_UNITS |= {f"{letter}I{end}": 1024**power for power, letter in _LETTERS for end in ("B", "")}


def parse_size(text: str) -> int:
    """Bytes of a number with a unit: "3.2GB" and "3.2G" (10^9), "3 GiB" and "3Gi" (2^30), "500000000B".

    Raises:
        ValueError: no number, no unit or an unknown one, or less than a byte.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"no size: {text!r}")
    count = round(float(found[1]) * _UNITS[found[2].upper()])
    if count < 1:
        raise ValueError(f"less than a byte: {text!r}")
    return count


def format_bytes(count: int) -> str:
    """12.3 GiB, 4.0 MiB: three digits and a binary unit."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """45 s, 12.3 min, 2.0 h, 3.1 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
