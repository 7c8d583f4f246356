"""Result files: rows that survive an interrupted run, one JSON object a line inside one JSON document."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "ResultFile", "device_folder"]

RESULTS = Path(__file__).with_name("results")

# what makes a row another measurement: a second run at the same commit skips it, any other replaces it
KEY = ("part", "shape", "op", "dtype", "tokens", "routing", "seed", "threads", "contender")


def device_folder(results: Path, device: torch.device) -> Path:
    """results/<gpu>, the GPU's name with underscores; results/cpu without one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return results / name.replace(" ", "_").replace("/", "_")


class ResultFile:
    """Rows of one benchmark on one device; every row holds the record of the machine that made it.

    Where a row and the record have a key in common, such as `threads`, the row's value stands.
    """

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path = path
        self._environment = environment
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def has(self, *, contenders: Sequence[str], **key: Any) -> bool:
        """Whether this commit has measured all the contenders of one call already."""
        wanted = key | {"commit": self._environment["commit"]}
        found = {row["contender"] for row in self.rows if all(row.get(name) == wanted[name] for name in wanted)}
        return found.issuperset(contenders)

    def passed(self, **key: Any) -> bool:
        """Whether this commit has a row of such a key that is "ok"."""
        wanted = key | {"commit": self._environment["commit"], "status": "ok"}
        return any(all(row.get(name) == wanted[name] for name in wanted) for row in self.rows)

    def lost(self, **key: Any) -> dict[str, str]:
        """Contenders that lost the device on this commit -> what the device said."""
        wanted = key | {"commit": self._environment["commit"], "status": "lost"}
        found = [row for row in self.rows if all(row.get(name) == wanted[name] for name in wanted)]
        return {row["contender"]: row["reason"] for row in found}

    def put(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows in place of those with the same key, and write the file, whole or not at all."""
        fresh = [{**self._environment, **row} for row in rows]
        keys = {self._key(row) for row in fresh}
        self.rows = [row for row in self.rows if self._key(row) not in keys] + fresh
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(f'{{"benchmark": "{self.path.stem}", "rows": [\n{lines}\n]}}\n')
        os.replace(temporary, self.path)

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in KEY)
