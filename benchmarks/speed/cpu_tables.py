"""The tables of the CPU's results, as README and docs show them, and what was aimed at beside what was reached.

    python -m benchmarks.speed.cpu_tables             # print them
    python -m benchmarks.speed.cpu_tables --write     # put them into README.md and docs/
    python -m benchmarks.speed.cpu_tables --floors    # what was aimed at, and whether it holds

A page has `<!-- table: NAME -->` where a table begins and `<!-- end -->` behind it. Quotients are of rows that were
measured together; what was not measured is a dash.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS

__all__ = ["PAGES", "TABLES", "floors", "main", "written"]

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/performance.md", "docs/serving.md")

DEFAULT = ("transformers grouped_mm", "transformers eager")
TORCH = (*DEFAULT, "eager, oneDNN off")
SHAPES = ("Mixtral-8x7B", "Qwen3-30B-A3B", "OLMoE-1B-7B", "DeepSeek-V2-Lite")

_NOTHING = "(not measured)"

Row = dict[str, Any]
Rows = Sequence[Row]


def _rows(results: Path, name: str) -> list[Row]:
    path = results / "cpu" / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


class Together:
    """Times of rows that were measured together, by contender."""

    def __init__(self, rows: Iterable[Row], key: str) -> None:
        rows = list(rows)
        # later runs may have measured some contenders again: the packed layer's run is the one that is told
        run = next((row.get("run") for row in rows if row["contender"] == "packed"), None)
        self._times = {row["contender"]: float(row[key]) for row in rows if row.get("run") == run}

    def time(self, *names: str) -> float | None:
        """Of the fastest that there is."""
        return min((self._times[name] for name in names if name in self._times), default=None)

    def ratio(self, others: Sequence[str], name: str = "packed") -> float | None:
        """How many times as fast a contender is as the fastest of others."""
        other, own = self.time(*others), self.time(name)
        return None if other is None or own is None else other / own


def _select(rows: Rows, **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def layers(results: Path) -> str:
    """The packed layer of every shape beside dense ones, by best times."""
    rows = _rows(results, "bench_cpu")
    if not rows:
        return _NOTHING
    tokens = sorted({row["tokens"] for row in rows})
    columns: tuple[Callable[[Together], float | None], ...] = (
        lambda found: _milliseconds(found.time("packed")),
        lambda found: found.ratio(DEFAULT),
        lambda found: found.ratio(TORCH),
        lambda found: found.ratio(["dense native"]),
        lambda found: found.ratio(["read"]),
        lambda found: found.ratio(["packed"], "packed int8"),
    )
    head = [
        f"a whole layer, {' / '.join(map(str, tokens))} tokens",
        "threads",
        "routing",
        "packed, ms",
        "times the fastest default dense",
        "times the fastest dense, oneDNN off too",
        "times our own dense",
        "share of a plain read's rate",
        "2:4 int8, times bf16",
    ]
    lines = []
    for shape, threads, law in dict.fromkeys((row["shape"], row["threads"], row["routing"]) for row in rows):
        found = [
            Together(_select(rows, shape=shape, threads=threads, routing=law, tokens=count), "best_us")
            for count in tokens
        ]
        cells = [" / ".join(_number(column(each)) for each in found) for column in columns]
        lines.append([shape, str(threads), law, *cells])
    return _table(head, lines)


def _milliseconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds / 1e3


def other_paths(results: Path) -> str:
    """Instruction paths that were measured although the CPU has a better one, for one token."""
    lines = []
    for file in sorted((results / "cpu").glob("bench_cpu_*.json")):
        rows = _select(_rows(results, file.stem), tokens=1, routing="uniform")
        for shape, threads in dict.fromkeys((row["shape"], row["threads"]) for row in rows):
            found = Together(_select(rows, shape=shape, threads=threads), "best_us")
            ratios = (found.ratio(DEFAULT), found.ratio(TORCH), found.ratio(["dense native"]), found.ratio(["read"]))
            cells = (_milliseconds(found.time("packed")), *ratios)
            lines.append([file.stem.removeprefix("bench_cpu_"), shape, str(threads), *map(_number, cells)])
    head = ["path", "a whole layer, 1 token", "threads", "packed, ms", "times the fastest default dense"]
    more = ["times the fastest dense, oneDNN off too", "times our own dense", "share of a plain read's rate"]
    return _table([*head, *more], lines) if lines else _NOTHING


def unpacked(results: Path) -> str:
    """One matrix from packed to dense."""
    lines = []
    rows = _rows(results, "unpack")
    for key in dict.fromkeys((row["shape"], row["dtype"], row["op"], row["threads"]) for row in rows):
        same = _select(rows, **dict(zip(("shape", "dtype", "op", "threads"), key, strict=True)))
        times = {row["contender"]: row["best_us"] / 1e3 for row in same}
        cells = (times.get("native"), times.get("torch"), times["torch"] / times["native"] if len(times) == 2 else None)
        lines.append([key[0], key[1], key[2], str(key[3]), *map(_number, cells)])
    head = ["matrix", "dtype", "pattern", "threads", "compiled kernels, ms", "torch, ms", "times"]
    return _table(head, lines) if lines else _NOTHING


_SPOKEN = {
    "transformers grouped_mm": "transformers, its default",
    "transformers eager": "transformers, eager",
    "eager, oneDNN off": "the same with oneDNN off",
    "dense native": "dense bf16, our kernels",
    "packed": "**packed 2:4 bf16**",
    "dense int8": "dense int8, our kernels",
    "packed int8": "**packed 2:4 int8**",
    "packed int4": "**packed 2:4 int4**",
}
_LLAMA = ("llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0")
_ORDER = (*TORCH, *_LLAMA, "dense native", "dense int8", "packed", "packed int8", "packed int4")


def llama(results: Path, most_threads: int = 10**9) -> str:
    """One layer by everything there is, in milliseconds, and what of the gain is what."""
    rows = [row for row in _rows(results, "llama") if row["threads"] <= most_threads]
    parts = []
    for shape, threads in dict.fromkeys((row["shape"], row["threads"]) for row in rows):
        same = _select(rows, shape=shape, threads=threads)
        tokens = sorted({row["tokens"] for row in same})
        found = [Together(_select(same, tokens=count), "us") for count in tokens]
        names = [name for name in _ORDER if any(each.time(name) for each in found)]
        lines = [
            [_SPOKEN.get(name, name), *(_number(_milliseconds(each.time(name))) for each in found)] for name in names
        ]
        quotients: tuple[tuple[str, Callable[[Together], float | None]], ...] = (
            ("packed bf16, times the fastest default dense", lambda each: each.ratio(DEFAULT)),
            ("- of it a better dense product", lambda each: each.ratio(DEFAULT, "dense native")),
            ("- of it sparsity", lambda each: each.ratio(["dense native"])),
            ("packed bf16, times the fastest dense of torch", lambda each: each.ratio(TORCH)),
            ("packed bf16, times llama.cpp BF16", lambda each: each.ratio(["llama.cpp BF16"])),
            ("packed int8, times our dense int8", lambda each: each.ratio(["dense int8"], "packed int8")),
            ("packed int8, times llama.cpp Q8_0", lambda each: each.ratio(["llama.cpp Q8_0"], "packed int8")),
            ("packed int8, times llama.cpp Q4_0", lambda each: each.ratio(["llama.cpp Q4_0"], "packed int8")),
        )
        for name, of in quotients:
            values = [of(each) for each in found]
            if any(value is not None for value in values):
                lines.append([name, *map(_number, values)])
        head = [
            f"a layer of {shape}, {threads} thread{'s' if threads > 1 else ''}, ms",
            *(_tokens(count) for count in tokens),
        ]
        parts.append(_table(head, lines))
    return "\n\n".join(parts) or _NOTHING


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count > 1 else ''}"


def generate(results: Path) -> str:
    """Tokens a second of whole models."""
    rows = _rows(results, "generate_cpu")
    if not rows:
        return _NOTHING
    order = (*DEFAULT, "transformers eager, oneDNN off", "dense native", "packed", "packed, oneDNN off", *_LLAMA)
    names = [name for name in order if _select(rows, contender=name)]
    lines = []
    for key in dict.fromkeys((row["shape"], row["threads"], row["tokens"]) for row in rows):
        same = _select(rows, **dict(zip(("shape", "threads", "tokens"), key, strict=True)))
        rates = {row["contender"]: row["tokens_per_second"] for row in same}
        best = max((rates[name] for name in DEFAULT if name in rates), default=None)
        gain = rates["packed"] / best if best and "packed" in rates else None
        lines.append([str(part) for part in key] + [_number(rates.get(name)) for name in names] + [_number(gain)])
    for model in dict.fromkeys(row["shape"] for row in rows):
        held = {row["contender"]: row["weight_bytes"] / 1e9 for row in _select(rows, shape=model)}
        lines.append([f"{model}, GB of weights", "", "", *(_number(held.get(name)) for name in names), ""])
    spoken = {
        "transformers eager, oneDNN off": "eager, oneDNN off",
        "dense native": "dense, our kernels",
        "packed": "packed 2:4",
        "packed, oneDNN off": "packed 2:4, oneDNN off",
    }
    head = ["tokens/s", "threads", "batch", *(spoken.get(name, name) for name in names), "packed / transformers"]
    return _table(head, lines)


def serve(results: Path) -> str:
    """`moesparse serve` under eight clients."""
    rows = _rows(results, "serve_cpu")
    if not rows:
        return _NOTHING
    lines = []
    for shape, threads, mode in dict.fromkeys((row["shape"], row["threads"], row["part"]) for row in rows):
        same = {row["contender"]: row for row in _select(rows, shape=shape, threads=threads, part=mode)}
        rate = {form: row["tokens_per_second"] for form, row in same.items()}
        peak = {form: (row["peak_bytes"] or 0) / 1e9 or None for form, row in same.items()}
        gain = rate["packed"] / rate["dense"] if rate.keys() >= {"packed", "dense"} else None
        forms = ("dense", "packed")
        lines.append(
            [shape, str(threads), mode, *(_number(rate.get(form)) for form in forms), _number(gain)]
            + [_number(peak.get(form)) for form in forms]
        )
    head = ["model", "threads", "requests", "dense, tokens/s", "packed, tokens/s", "packed / dense"]
    return _table([*head, "dense, peak GB", "packed, peak GB"], lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "layers": layers,
    "other_paths": other_paths,
    "unpack": unpacked,
    "llama": llama,
    "llama_one_thread": lambda results: llama(results, 1),
    "generate": generate,
    "serve": serve,
}
"""Name in a page -> what makes it of the results' folder."""


def floors(results: Path) -> list[tuple[str, float, float | None]]:
    """(what, the least that was aimed at, what was reached or None) of one thread, uniform routing, and of two."""
    rows, beside = _rows(results, "bench_cpu"), _rows(results, "llama")
    found: list[tuple[str, float, float | None]] = []
    own = (*TORCH, "dense native")
    for shape in SHAPES:
        for tokens, others, least in (
            (1, DEFAULT, 3.0),
            (4, DEFAULT, 2.8),
            (16, DEFAULT, 2.2),
            (1, own, 1.5),
            (1, ("read",), 0.8),
            (64, DEFAULT, 1.25),
            (512, DEFAULT, 0.95),
        ):
            same = _select(rows, shape=shape, threads=1, routing="uniform", tokens=tokens)
            name = {DEFAULT: "default dense", own: "any dense", ("read",): "plain read"}[others]
            found.append((f"{shape}, {_tokens(tokens)}, times {name}", least, Together(same, "best_us").ratio(others)))
        for tokens in sorted({row["tokens"] for row in rows}):
            same = _select(rows, shape=shape, threads=2, routing="uniform", tokens=tokens)
            reached = Together(same, "best_us").ratio(DEFAULT)
            found.append((f"{shape}, {_tokens(tokens)}, 2 threads, times default dense", 1.0, reached))
    for shape in SHAPES:
        same = _select(_rows(results, "bench_cpu_avx2"), shape=shape, threads=1, routing="uniform", tokens=1)
        reached = Together(same, "best_us").ratio(DEFAULT)
        found.append((f"{shape}, {_tokens(1)}, AVX2, times default dense", 2.2, reached))
    for tokens in sorted({row["tokens"] for row in beside}):
        each = Together(_select(beside, threads=1, tokens=tokens), "us")
        name = _tokens(tokens)
        found.append((f"{name}, times llama.cpp BF16", 1.35 if tokens == 1 else 1.1, each.ratio(["llama.cpp BF16"])))
        for kind, least in (("Q8_0", 1.8), ("Q4_0", 1.0)):
            reached = each.ratio([f"llama.cpp {kind}"], "packed int8")
            found.append((f"{name}, int8, times llama.cpp {kind}", least, reached))
    return found


def written(page: str, results: Path) -> str:
    """The text of a page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write", action="store_true", help="into the pages")
    options.add_argument("--floors", action="store_true", help="what was aimed at instead")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    chosen = options.parse_args(arguments)
    if chosen.floors:
        for what, least, reached in floors(chosen.results):
            verdict = (
                "not measured" if reached is None else f"{reached:5.2f} {'holds' if reached >= least else 'MISSED'}"
            )
            print(f"{what:<58} at least {least:4.2f}: {verdict}")
    elif chosen.write:
        for name in PAGES:
            page = ROOT / name
            page.write_text(written(page.read_text(), chosen.results))
    else:
        for name, make in TABLES.items():
            print(f"{name}\n\n{make(chosen.results)}\n")


if __name__ == "__main__":
    main()
