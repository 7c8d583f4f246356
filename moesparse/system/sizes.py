"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_size"]

_POWERS = ("", "K", "M", "G", "T")
_UNITS = {f"{letter}B": 1000**power for power, letter in enumerate(_POWERS)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate(_POWERS) if letter}


def parse_size(text: str) -> int:
    """Bytes of a number with a unit: "3.2GB" (10^9), "3 GiB" (2^30), "500000000B".

    Raises:
        ValueError: no number, an unknown unit, or less than a byte.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"no size: {text!r}")
    count = round(float(found[1]) * _UNITS[found[2].upper()])
    if count < 1:
        raise ValueError(f"less than a byte: {text!r}")
    return count
