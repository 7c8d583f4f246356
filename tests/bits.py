"""Do two versions of this code write the same bits? Every way of pruning, on the embedded model, as a list of hashes.

    python tests/bits.py before.json        # on one commit
    python tests/bits.py after.json         # on another, same machine, same libraries
    python tests/bits.py before.json after.json

One thread, so that two runs of one commit agree. What a run only measures (seconds, peak memory) is left out of the
hashes; all else that it writes is in them, file by file. A change that moves code must not change a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = ("--samples", "16", "--length", "128", "--batch-size", "4")
TRAINING = ("--samples", "8", "--length", "96", "--batch-size", "4", "--micro-batch", "2", "--epochs", "1")
BOTH = ("--weights", "2:4", "--keep-experts", "12")
OLD = ("--saliency", "wanda", "--update", "none", "--weights", "4:8")
FREE = ("--saliency", "magnitude", "--update", "none")
STATISTICS = "calibrate-moments"
MEASURED = {"seconds", "peak_bytes", "version"}

# name -> arguments behind `moesparse prune demo OUT`
PRUNED: dict[str, tuple[str, ...]] = {
    "default": SIZES,
    "default-whole": (*SIZES, "--whole"),
    "wanda": (*SIZES, *OLD),
    "wanda-whole": (*SIZES, *OLD, "--whole"),
    "magnitude": FREE,
    "magnitude-whole": (*FREE, "--whole"),
    "experts": (*SIZES, "--keep-experts", "12"),
    "experts-whole": (*SIZES, "--keep-experts", "12", "--whole"),
    "both": (*SIZES, *BOTH),
    "both-whole": (*SIZES, *BOTH, "--whole"),
    "asymmetric": (*SIZES, "--saliency", "gated-sparsegpt", "--update", "asymmetric"),
    "asymmetric-whole": (*SIZES, "--saliency", "gated-sparsegpt", "--update", "asymmetric", "--whole"),
    "sparsegpt-dense-inputs": (*SIZES, "--saliency", "sparsegpt", "--update", "obs", "--no-propagate"),
    "sparsegpt-dense-inputs-whole": (
        *(*SIZES, "--saliency", "sparsegpt", "--update", "obs", "--no-propagate", "--whole"),
    ),
    "experts-by-domain": (
        *(*SIZES, "--experts", "0.25", "--mix", "equal", "--update", "none", "--protect-super-experts"),
    ),
    "experts-from-statistics": ("--keep-experts", "12", "--update", "none", "--statistics", STATISTICS),
    "experts-from-statistics-whole": (
        *("--keep-experts", "12", "--update", "none", "--statistics", STATISTICS, "--whole"),
    ),
    "swaps": (*SIZES, "--keep-experts", "12", "--refine-experts"),
    "target-bytes": (*SIZES, "--target-bytes", "0.7", "--saliency", "moe-pruner", "--update", "least-squares"),
    "demonstrations": (*SIZES, *OLD, "--demonstrations-from-model", "16"),
}

COMMANDS: dict[str, tuple[str, ...]] = {
    STATISTICS: ("calibrate", "demo", STATISTICS, *SIZES, "--moments", "both"),
    "calibrate": ("calibrate", "demo", "calibrate", *SIZES),
    "calibrate-whole": ("calibrate", "demo", "calibrate-whole", *SIZES, "--whole"),
    **{name: ("prune", "demo", name, *options) for name, options in PRUNED.items()},
    "pack": ("pack", "wanda", "pack"),
    "unpack": ("unpack", "pack", "unpack"),
    "distill": ("distill", "default", "--teacher", "demo", "-o", "distill", *TRAINING),
    "distill-blockwise": (
        *("distill", "default", "--teacher", "demo", "-o", "distill-blockwise", *TRAINING, "--mode", "blockwise"),
    ),
    "distill-packed-blockwise": (
        *("distill", "pack", "--teacher", "demo", "-o", "distill-packed-blockwise", *TRAINING, "--mode", "blockwise"),
    ),
}

# what has no command: weights pruned from saved statistics
FROM_PYTHON = """
import moesparse, sys
from moesparse import ModelStatistics
model, tokenizer = moesparse.demo.load()
recipe = moesparse.Recipe(saliency="gated-sparsegpt", update="least-squares")
report = moesparse.prune(model, ModelStatistics.load(sys.argv[1]), recipe)
moesparse.save_pretrained(model, sys.argv[2], recipe=report.recipe, report=report.to_dict())
"""


def made(folder: Path) -> dict[str, str]:
    """Run everything in a new folder: name/file -> hash."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    found = {}
    runs = {name: ["-m", "moesparse", *arguments] for name, arguments in COMMANDS.items()}
    runs["weights-from-statistics"] = ["-c", FROM_PYTHON, STATISTICS, "weights-from-statistics"]
    for name, arguments in runs.items():
        done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} failed: {' '.join(arguments)}\n{done.stderr}", file=sys.stderr)
            found[name] = "failed"
            continue
        out = folder / name
        files = [out] if out.is_file() else sorted(file for file in out.rglob("*") if file.is_file())
        found |= {file.relative_to(folder).as_posix(): _hash(file) for file in files}
        print(f"{name}: {len(files)} files", file=sys.stderr)
    return found


def _hash(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".json":
        data = json.dumps(_lasting(json.loads(data)), sort_keys=True).encode()
    elif file.suffix in ("", ".safetensors") and data[8:9] == b"{":
        # safetensors writes its metadata in another order in every process
        end = 8 + int.from_bytes(data[:8], "little")
        data = json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    return hashlib.sha256(data).hexdigest()[:32]


def _lasting(value: Any) -> Any:
    """JSON without what is measured, and without the hashes of files that hold it."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key not in MEASURED and not key.endswith(".json")}
        return {key: _lasting(part) for key, part in kept.items()}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def main(arguments: list[str]) -> int:
    if len(arguments) == 2:
        before, after = (json.loads(Path(file).read_text()) for file in arguments)
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        for name in names:
            print(f"{name}: {before.get(name)} > {after.get(name)}")
        print(f"{len(before.keys() & after.keys())} files compared, {len(names)} differ")
        return 1 if names or not before else 0
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        Path(arguments[0]).write_text(json.dumps(made(Path(folder)), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
