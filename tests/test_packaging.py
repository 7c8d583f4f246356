"""What a user gets: the wheel is built, installed into an empty environment and imported from somewhere else.

Needs `build` and `setuptools>=77` beside pytest (the `test` extra); nothing is downloaded.
"""

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"moesparse", "moesparse_kernels"}


def run(command: list[str], folder: Path) -> str:
    """Run outside the source tree, with nothing of it on the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def build_leftovers() -> set[Path]:
    folders = (ROOT, ROOT / "kernels")
    return {path for folder in folders for name in ("build", "dist", "*.egg-info") for path in folder.glob(name)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build/ and no *.egg-info is left in the source tree."""
    before = build_leftovers()
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("moesparse", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)], out)
    assert build_leftovers() == before
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> tuple[Path, Path]:
    """(scripts, site-packages) of an empty environment that holds the wheel alone.

    The dependencies are lent to it from this environment by a path file. What is in its own site-packages comes first,
    and an editable install of this project does not follow, because path files in a lent folder are not read.
    """
    home = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", str(home)], home)
    paths = {"base": str(home), "platbase": str(home)}
    scripts, site = (Path(sysconfig.get_path(key, "venv", vars=paths)) for key in ("scripts", "purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], home)
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts, site


def imported_by(installed: tuple[Path, Path], module: str, folder: Path) -> dict:
    """Import `module` in a fresh interpreter and tell where it came from and which modules came with it."""
    python = installed[0] / "python"
    code = f"import json, sys, {module} as m; print(json.dumps([list(m.__path__), sorted(sys.modules)]))"
    path, modules = json.loads(run([str(python), "-c", code], folder))
    return {"path": path, "modules": set(modules)}


def test_the_wheel_ships_two_packages_and_no_kernels(names):
    # a top-level `kernels` would shadow the package of that name that transformers loads kernels with
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == SHIPPED
    assert not [name for name in names if "test" in name.lower().split("/")[0]]


def test_every_file_of_the_packages_is_in_the_wheel(names):
    # modules, the kernels' configs, and the embedded model with its texts
    for folder, prefix in ((ROOT, "moesparse"), (ROOT / "kernels", "moesparse_kernels")):
        files = {path.relative_to(folder).as_posix() for path in (folder / prefix).rglob("*") if path.is_file()}
        missing = {name for name in files if "__pycache__" not in name} - names
        assert not missing, f"not shipped: {sorted(missing)}"


def test_the_licences_are_in_the_wheel(names):
    licences = {name.split(".dist-info/licenses/")[1] for name in names if ".dist-info/licenses/" in name}
    assert "LICENSE" in licences
    if (ROOT / "moesparse/demo/NOTICE").exists():
        assert {"moesparse/demo/NOTICE"} <= licences & names


def test_the_entry_points_are_declared(wheel, names):
    (declared,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(zipfile.ZipFile(wheel).read(declared).decode())
    assert points["console_scripts"]["moesparse"] == "moesparse.cli:main"
    assert points["vllm.general_plugins"]["moesparse"] == "moesparse.packed.vllm:register"


@pytest.mark.skipif(find_spec("moesparse.cli") is None, reason="the command line is not in this tree")
def test_the_console_script_runs(installed, tmp_path):
    assert "prune" in run([str(installed[0] / "moesparse"), "--help"], tmp_path)


def test_moesparse_imports_from_anywhere_and_lightly(installed, tmp_path):
    got = imported_by(installed, "moesparse", tmp_path)
    assert got["path"] == [str(installed[1] / "moesparse")]
    heavy = {"triton", "transformers", "datasets", "pyarrow", "matplotlib"} & got["modules"]
    assert not heavy, f"importing moesparse imports {sorted(heavy)}"


def test_moesparse_kernels_imports_without_the_layer_above(installed, tmp_path):
    got = imported_by(installed, "moesparse_kernels", tmp_path)
    assert got["path"] == [str(installed[1] / "moesparse_kernels")]
    above = {"moesparse", "transformers", "safetensors"} & got["modules"]
    assert not above, f"importing moesparse_kernels imports {sorted(above)}"
