"""llama.cpp on this CPU: built from the source that llama-cpp-python brings, run, and its output read.

    make bench-llama ARGS=--build       # about 7 CPU minutes, once; needs cmake and a C++ compiler

One release, named by its hash. It is built for this machine's instructions with GCC's or Clang's defaults, as its own
instructions say, in build/llama.cpp or the folder that MOESPARSE_LLAMA_CPP names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RELEASE", "TYPES", "LlamaCpp", "Sample", "build", "parse_batched", "parse_bench"]

RELEASE = "llama-cpp-python 0.3.36"
_SOURCE = "llama_cpp_python-0.3.36"
_HASH = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
_OPTIONS = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP", "OPENSSL")

TYPES = ("BF16", "Q8_0", "Q4_0")
"""Of the weights; what is not BF16 is made by llama-quantize, with the types it gives to each tensor."""


@dataclass(frozen=True)
class Sample:
    """One test of llama-bench.

    Attributes:
        model: name of the file.
        tokens: that went through the model in one call; 1 where it generated.
        threads: at work.
        seconds: of one call, a number for each repetition.
    """

    model: str
    tokens: int
    threads: int
    seconds: tuple[float, ...]


def parse_bench(text: str) -> list[Sample]:
    """What `llama-bench -o json` printed."""
    found = []
    for test in json.loads(text):
        prompt, new = test["n_prompt"], test["n_gen"]
        if bool(prompt) == bool(new):
            raise ValueError(f"a test must read a prompt or generate, got n_prompt={prompt}, n_gen={new}")
        seconds = tuple(nanoseconds / 1e9 / (new or 1) for nanoseconds in test["samples_ns"])
        found.append(Sample(Path(test["model_filename"]).name, prompt or 1, test["n_threads"], seconds))
    return found


def parse_batched(text: str) -> dict[int, float]:
    """Sequences side by side -> new tokens a second of all, of what `llama-batched-bench` printed as JSON lines."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {line["pl"]: line["pl"] * line["tg"] / line["t_tg"] for line in lines}


def _folder() -> Path:
    return Path(os.environ.get("MOESPARSE_LLAMA_CPP") or Path(__file__).parents[2] / "build" / "llama.cpp")


def build() -> LlamaCpp:
    """The programs, built where they are not yet.

    Raises:
        SystemExit: there is no cmake.
    """
    folder = _folder()
    if not all((folder / "build" / "bin" / name).is_file() for name in _PROGRAMS):
        if shutil.which("cmake") is None:
            raise SystemExit("llama.cpp is built by cmake, which is not on the PATH: pip install cmake ninja")
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(folder)
        _compile(folder)
    return LlamaCpp(folder)


def _fetch(folder: Path) -> None:
    if (folder / _SOURCE).is_dir():
        return
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{RELEASE.replace(' ', '==')} --hash=sha256:{_HASH}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "--require-hashes", "--dest", folder, "-r", pinned], check=True)
    with tarfile.open(folder / f"{_SOURCE}.tar.gz") as archive:
        archive.extractall(folder, filter="data")


def _compile(folder: Path) -> None:
    source, target = folder / _SOURCE / "vendor" / "llama.cpp", folder / "build"
    switches = [f"-DLLAMA_{name}=OFF" for name in _OPTIONS]
    subprocess.run(["cmake", "-S", source, "-B", target, "-DCMAKE_BUILD_TYPE=Release", *switches], check=True)
    subprocess.run(["cmake", "--build", target, "--parallel", "--target", *_PROGRAMS], check=True)


@dataclass(frozen=True)
class LlamaCpp:
    """The built programs.

    Attributes:
        folder: that holds them, and models made for them.
    """

    folder: Path

    def _run(self, program: str, *arguments: object) -> str:
        command = [str(self.folder / "build" / "bin" / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    def quantise(self, model: Path, kind: str) -> Path:
        """The file beside a BF16 one, in another of TYPES; made once."""
        if kind == "BF16":
            return model
        target = model.with_name(f"{model.stem}-{kind}.gguf")
        if not target.is_file():
            partial = target.with_suffix(".partial")
            self._run("llama-quantize", model, partial, kind, os.cpu_count() or 1)
            os.replace(partial, target)
        return target

    def bench(self, models: Sequence[Path], tokens: Sequence[int], threads: int, repeats: int) -> list[Sample]:
        """Time calls of several numbers of tokens; one token is generation, the mean of 32 behind each other."""
        several = [count for count in tokens if count > 1]
        listed = [argument for model in models for argument in ("-m", model)]
        what = ["-p", ",".join(map(str, several)) or 0, "-n", 32 if 1 in tokens else 0]
        # read into memory of its own rather than mapped, as its weights are then laid out for its kernels
        how = ["-t", threads, "-r", repeats, "-ub", max(tokens), "-lm", "none", "-o", "json"]
        return parse_bench(self._run("llama-bench", *listed, *what, *how))

    def generate(self, model: Path, batches: Sequence[int], prompt: int, new: int, threads: int) -> dict[int, float]:
        """Sequences side by side -> new tokens a second of all of them, without the time of their prompts."""
        room = max(batches) * (prompt + new)
        what = ["-npp", prompt, "-ntg", new, "-npl", ",".join(map(str, batches)), "-c", room]
        how = ["-t", threads, "-tb", threads, "-lm", "none", "--output-format", "jsonl"]
        return parse_batched(self._run("llama-batched-bench", "-m", model, *what, *how))
