"""Whether wheels hold what their names say: python .ci/check_wheel.py dist/*.whl

A wheel for a platform has the compiled CPU kernels, built from the sources beside them; where the platform is this
machine's they are loaded and asked. A wheel for any platform has none. A compiler that failed leaves a wheel that
installs and runs, so nothing but this would see it. Needs Python alone; ends with 1 and a line for each fault.
"""

from __future__ import annotations

import ctypes
import platform
import runpy
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "moesparse_kernels"
LIBRARY = f"{PACKAGE}/_native.so"


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel, a line for each."""
    tag = wheel.stem.split("-")[-3:]
    if tag[:2] != ["py3", "none"]:
        return [f"its tag must be py3-none-PLATFORM, got {'-'.join(tag)}"]
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        libraries = [name for name in names if name.endswith((".so", ".dylib", ".pyd"))]
        if tag[2] == "any":
            return [f"a wheel for any platform must hold no library, got {name}" for name in libraries]
        if libraries != [LIBRARY]:
            return [f"it must hold one library, {LIBRARY}, got {', '.join(libraries) or 'none'}"]
        archive.extractall(folder, [name for name in names if name.startswith(f"{PACKAGE}/nat") or name == LIBRARY])
        return _faults_of_library(Path(folder), tag[2])


def _faults_of_library(folder: Path, target: str) -> list[str]:
    wanted = runpy.run_path(str(folder / PACKAGE / "native_sources.py"))["source_digest"]()
    file = folder / LIBRARY
    if wanted.encode() not in file.read_bytes():
        return [f"{LIBRARY} must be built from the sources beside it, {wanted}, got others"]
    # macosx_11_0_arm64, manylinux_2_28_x86_64, and several of them joined by dots
    system = {"Linux": "linux", "Darwin": "macosx"}.get(platform.system(), "")
    if system not in target or not target.endswith(platform.machine()):
        print(f"  not loaded: made for {target}")
        return []
    try:
        library = ctypes.CDLL(str(file))
        library.moesparse_sources.restype = ctypes.c_char_p
        sources = library.moesparse_sources().decode()
    except (OSError, AttributeError) as error:
        return [f"{LIBRARY} must load: {error}"]
    return [] if sources == wanted else [f"{LIBRARY} must say it was built from {wanted}, got {sources}"]


def main(wheels: list[str]) -> int:
    if not wheels:
        print("no wheels were named", file=sys.stderr)
        return 1
    found = {wheel: faults(Path(wheel)) for wheel in wheels}
    for wheel, lines in found.items():
        print(f"{wheel}: {'; '.join(lines) or 'as its name says'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
