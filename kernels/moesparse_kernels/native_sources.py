"""The C sources of the compiled CPU kernels, and the digest by which a library and its sources know each other.

Without imports beyond Python's own: setup.py runs this file before anything is installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["FOLDER", "headers", "source_digest", "sources"]

FOLDER = Path(__file__).with_name("native")


def sources() -> list[Path]:
    """The files to compile."""
    return sorted(FOLDER.glob("*.c"))


def headers() -> list[Path]:
    """The files that they include."""
    return sorted(FOLDER.glob("*.h"))


def source_digest() -> str | None:
    """16 hexadecimal digits of all sources, None where they were not installed."""
    digest = hashlib.sha256()
    files = sources() + headers()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16] if files else None
