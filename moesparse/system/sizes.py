"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_size"]

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
