"""What pyproject.toml cannot say: the compiled CPU kernels, one optional library for every version of Python.

    python setup.py build_ext --inplace     the library into kernels/moesparse_kernels (make native)
    MOESPARSE_PURE=1 pip install .          without it

It is no Python module: native_library.py loads it by ctypes. So the wheel's tag names the platform alone, and where the
library was not asked for, is not to be had on the platform, or did not compile, the wheel is the pure one.
"""

import os
import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = runpy.run_path(str(Path(__file__).parent / "kernels/moesparse_kernels/native_sources.py"))
LIBRARY = "moesparse_kernels._native"
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
STANDARD = ("-std=gnu11", "-g0", "-fvisibility=hidden")


def relative(file: Path) -> str:
    return file.relative_to(Path(__file__).parent.resolve()).as_posix()


class BuildLibrary(build_ext):
    """A plain shared library in the place of an extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        # no version of Python in the name
        return fullname.replace(".", os.sep) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            message = "its CPU kernels were not compiled, packed experts will run in plain torch there"
            print(f"moesparse: {message} ({error})", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM with the library in it, py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        outputs = self.get_finalized_command("build_ext").get_outputs()
        compiled = [file for file in outputs if Path(file).is_file()]
        return ("py3", "none", super().get_tag()[2] if compiled else "any")


def extensions() -> list[Extension]:
    if os.environ.get("MOESPARSE_PURE") == "1" or os.name == "nt" or platform.machine().lower() not in MACHINES:
        return []
    return [
        Extension(
            LIBRARY,
            sources=[relative(file) for file in SOURCES["sources"]()],
            depends=[relative(file) for file in SOURCES["headers"]()],
            define_macros=[("MOESPARSE_SOURCES", f'"{SOURCES["source_digest"]()}"')],
            # a level in CFLAGS stands
            extra_compile_args=[*STANDARD, *([] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"])],
            extra_link_args=[] if sys.platform == "darwin" else ["-s"],
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel})
