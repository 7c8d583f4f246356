"""The peers' own environments: .venv-peers-<name>, made from benchmarks/peers/<name>/requirements.txt when missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["ROOT", "python_of"]

ROOT = Path(__file__).parents[2]


def python_of(peer: str | None) -> str:
    """The interpreter that runs a peer; None is the one at work.

    Raises:
        SystemExit: pip cannot install what the peer needs.
    """
    if peer is None:
        return sys.executable
    folder = ROOT / f".venv-peers-{peer}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    requirements = Path(__file__).with_name(peer.replace("-", "_")) / "requirements.txt"
    if stamp.is_file() and stamp.read_text() == requirements.read_text():
        return str(python)
    print(f"installing {peer} into {folder.name}", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(requirements)]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        # torch by itself: what it brings along must not be chosen by the peer's looser wishes
        [*pip, "torch"],
        [*pip, "--requirement", str(requirements)],
    ):
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{peer} cannot be installed from {requirements}: {' '.join(command)} failed")
    stamp.write_text(requirements.read_text())
    return str(python)
