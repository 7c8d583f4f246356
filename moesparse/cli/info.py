"""`moesparse info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moesparse.cli.console import print_json

if TYPE_CHECKING:
    from moesparse.system.installation import Info
    from moesparse_kernels.dispatch import Auto


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what is installed here, and which code runs expert layers on this machine and why.

    Versions, devices and threads; the compiled CPU kernels: the file, the instructions they use, or why they are not
    used; what packed and dense experts run by, for each dtype; the extras that are installed.

    Examples:

      moesparse info

      MOESPARSE_NATIVE=0 moesparse info --json
    """
    from moesparse.system.installation import info, kernels_in_words

    found = info()
    if as_json:
        print_json("info", found.as_dict())
    else:
        _show(found, kernels_in_words())


def _show(found: Info, kernels: str) -> None:
    versions = (f"{name} {version or '(not installed)'}" for name, version in found.versions.items())
    print(", ".join((*versions, f"Python {found.python}, {found.machine}")))
    print(f"devices: {', '.join(found.devices)}; {found.threads} threads")
    print(kernels)
    if found.native.sources is not None:
        print(f"  {found.native.file}, interface {found.native.interface}, sources {found.native.sources}")
    for device, entries in found.auto.items():
        print(f"expert layers on {device}:")
        for auto in entries:
            print(f"  {auto.op:<14}{str(auto.dtype).removeprefix('torch.'):<9} {_choice(auto)}")
    for said, wanted in (("extras", True), ("extras not installed", False)):
        names = [name for name, installed in found.extras.items() if installed == wanted]
        if names:
            print(f"{said}: {', '.join(names)}")


def _choice(auto: Auto) -> str:
    if auto.rows is None:
        return f"{auto.backend} ({auto.reason})"
    return f"{auto.backend} up to {auto.rows} rows per expert, then {auto.beyond} ({auto.reason})"
