"""What is installed here, and which code runs expert layers: the answer to "why is it slow?"."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from moesparse._version import __version__
from moesparse_kernels.dispatch import Auto, auto_on
from moesparse_kernels.native_library import ABI, LIBRARY, library, reason_without

__all__ = ["Info", "NativeInfo", "extras", "info", "installed_version", "kernels_in_words"]

_SHOWN = ("moesparse", "torch", "transformers", "triton", "safetensors", "numpy")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class NativeInfo:
    """The compiled CPU kernels.

    Attributes:
        file: where the library is, or is looked for.
        interface: version of its calls that this package makes.
        sources: digest of the sources it was built from; None where it was not loaded.
        path: the instruction path in use; None where plain torch runs instead.
        paths: those this CPU has, best first.
        threads: whether torch's threads share its work.
        reason: why this path, or why none.
    """

    file: str
    interface: int
    sources: str | None
    path: str | None
    paths: tuple[str, ...]
    threads: bool
    reason: str


@dataclass(frozen=True)
class Info:
    """This installation on this machine.

    Attributes:
        versions: package -> its version, None where it is not installed.
        python: version.
        machine: system and processor architecture.
        devices: "cpu" first, then each GPU as "cuda:0 NAME".
        threads: that torch uses in one operation.
        native: the compiled CPU kernels.
        auto: what backend "auto" takes, for packed and dense experts of each dtype on the CPU and the current GPU.
        extras: name of an extra -> whether all it asks for is installed; empty where moesparse itself is not.
    """

    versions: dict[str, str | None]
    python: str
    machine: str
    devices: tuple[str, ...]
    threads: int
    native: NativeInfo
    auto: dict[str, tuple[Auto, ...]]
    extras: dict[str, bool]

    def as_dict(self) -> dict[str, Any]:
        """The same in what JSON knows; dtypes are "bfloat16" and so on."""
        plain = asdict(self)
        for entries in plain["auto"].values():
            for entry in entries:
                entry["dtype"] = str(entry["dtype"]).removeprefix("torch.")
        return plain


def installed_version(package: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _satisfied(requirement: Requirement) -> bool:
    version = installed_version(requirement.name)
    return (
        version is not None
        and requirement.specifier.contains(version, prereleases=True)
        and all(_extra_installed(requirement.name, extra) for extra in requirement.extras)
    )


def _extra_installed(package: str, extra: str) -> bool:
    asked = [Requirement(line) for line in metadata.requires(package) or ()]
    here = [one for one in asked if one.marker is not None and one.marker.evaluate({"extra": extra})]
    # what holds without the extra too is no part of it
    own = [one for one in here if one.marker is not None and not one.marker.evaluate({"extra": ""})]
    return all(_satisfied(one) for one in own)


def extras() -> dict[str, bool]:
    """Every extra of moesparse and whether all it asks for is installed."""
    if installed_version("moesparse") is None:
        return {}
    names = metadata.metadata("moesparse").get_all("Provides-Extra") or []
    return {name: _extra_installed("moesparse", name) for name in names}


def _native() -> NativeInfo:
    native = library()
    if native is None:
        return NativeInfo(str(LIBRARY), ABI, None, None, (), False, reason_without() or "")
    best = native.path == native.paths[0]
    reason = "the best that this CPU has" if best else "chosen by MOESPARSE_NATIVE_PATH"
    return NativeInfo(str(native.file), ABI, native.sources, native.path, native.paths, native.threads, reason)


def info() -> Info:
    """What is installed, which devices there are, and which code will run expert layers on them and why."""
    gpus = range(torch.cuda.device_count())
    devices = ["cpu", *(["cuda"] if gpus else [])]
    return Info(
        versions={name: installed_version(name) for name in _SHOWN} | {"moesparse": __version__},
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        devices=("cpu", *(f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in gpus)),
        threads=torch.get_num_threads(),
        native=_native(),
        auto={
            name: tuple(auto for dtype in _DTYPES for auto in auto_on(torch.device(name), dtype)) for name in devices
        },
        extras=extras(),
    )


def kernels_in_words() -> str:
    """One line: the compiled CPU kernels in use and why, or why there are none."""
    native = _native()
    if native.path is None:
        return f"no compiled CPU kernels: {native.reason}"
    alone = "" if native.threads else "; one thread, because this torch shares none"
    return f"compiled CPU kernels: {native.path}, {native.reason} ({', '.join(native.paths)}){alone}"
