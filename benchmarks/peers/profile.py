"""Where the CPU seconds of `moesparse moe-pruner` go on the model of the peers' cost rows.

    python -m benchmarks.peers.profile    # benchmarks/results/cpu/peers_profile.json

One process, one thread, after a small model; Python's profiler, which adds a second or two.
"""

from __future__ import annotations

import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.peers import ours
from benchmarks.peers.__main__ import BATCH, prepare
from benchmarks.peers.clock import Clock
from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.table import OURS
from benchmarks.results import RESULTS, ResultFile
from benchmarks.speed.bench_prune import hardware
from moesparse.system.memory import bound_compiled_products

# what a function's name has in it, and whether the calls inside of it count; the first kind that fits
KINDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "matrix products": (("nn.linear", "_grouped_mm", "scaled_dot_product", "matmul"), False),
    "choosing and checking masks": (("prune_in_place", "check_mask"), True),
    "writing": (("'write' of",), False),
    "reading": (("'readinto' of",), False),
    "hashing": (("'update' of '_hashlib",), False),
}


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """CPU seconds of each kind, and of the rest."""
    found = dict.fromkeys(KINDS, 0.0)
    total = 0.0
    for (_, _, name), (_, _, own, inside, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        total += own
        for kind, (pieces, whole) in KINDS.items():
            if any(piece in name for piece in pieces):
                found[kind] += inside if whole else own
                break
    return found | {"all else": total - sum(found.values())}


def main() -> None:
    torch.set_num_threads(1)
    bound_compiled_products()
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        part = prepare("cost", Path(folder) / "cost", quick=False)
        windows = part.work / "windows.pt"
        torch.save(part.windows(0), windows)
        options = next(each.options for each in CONTENDERS if each.name == OURS)
        job = {"source": str(part.source), "windows": str(windows), "batch_size": BATCH, "options": options}
        ours.run({**job, **part.warm_up, "out": str(part.work / "small-out")}, Clock())
        profile = cProfile.Profile(time.process_time)
        profile.runcall(ours.run, {**job, "out": str(part.work / "out")}, Clock())
    seconds = shares(profile)
    row = {"part": "profile", "shape": part.shape, "contender": OURS, "cpu_seconds": sum(seconds.values())}
    ResultFile(RESULTS / "cpu" / "peers_profile.json", hardware(torch.device("cpu"))).put([row | {"shares": seconds}])
    print("\n".join(f"{kind:32}{value:6.1f} s" for kind, value in seconds.items()))


if __name__ == "__main__":
    main()
