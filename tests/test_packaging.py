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

from moesparse_kernels import native_sources

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"moesparse", "moesparse_kernels"}
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler here")


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run outside the source tree, with nothing of it on the path; what was printed, errors too."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def build_leftovers() -> set[Path]:
    folders = (ROOT, ROOT / "kernels")
    return {path for folder in folders for name in ("build", "dist", "*.egg-info") for path in folder.glob(name)}


def copy_sources(copy: Path) -> Path:
    """What a build reads of this source tree, without what a build leaves."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("moesparse", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_native.so"))
    return copy


def build_wheel(copy: Path, out: Path, *options: str, **variables: str) -> tuple[Path, str]:
    """The wheel of this source tree and what building it printed; from a copy, so that nothing is left in the tree."""
    before = build_leftovers()
    command = [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", str(out), str(copy_sources(copy))]
    said = run(command, out, **variables)
    assert build_leftovers() == before
    (built,) = out.glob("*.whl")
    return built, said


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # by way of the sdist, as `python -m build` does; a quick compilation: what the code does is tested elsewhere
    return build_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"), CFLAGS="-O0")[0]


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory) -> tuple[Path, str]:
    """A wheel built where the compiler fails, and what was printed."""
    folders = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    return build_wheel(*folders, "--wheel", CC="/bin/false")


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def lend_environment(home: Path) -> tuple[Path, Path]:
    """(scripts, site-packages) of an empty environment to which the dependencies are lent by a path file.

    What is in its own site-packages comes first, and an editable install of this project in the lent ones does not
    follow, because path files in a lent folder are not read.
    """
    run([sys.executable, "-m", "venv", "--without-pip", str(home)], home.parent)
    paths = {"base": str(home), "platbase": str(home)}
    scripts, site = (Path(sysconfig.get_path(key, "venv", vars=paths)) for key in ("scripts", "purelib"))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts, site


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> tuple[Path, Path]:
    """(scripts, site-packages) of an environment that holds the wheel alone."""
    home = tmp_path_factory.mktemp("venv")
    scripts, site = lend_environment(home)
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)], home)
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
        missing = {name for name in files if "__pycache__" not in name and not name.endswith("_native.so")} - names
        assert not missing, f"not shipped: {sorted(missing)}"


@needs_compiler
def test_the_compiled_kernels_are_in_a_wheel_for_every_python(wheel, names, installed, tmp_path):
    assert "moesparse_kernels/_native.so" in names
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    code = "import moesparse_kernels.native_library as n; print(n.library() is not None or n.reason_without())"
    said = run([str(installed[0] / "python"), "-W", "error", "-c", code], tmp_path).strip()
    assert said in ("True", "this CPU has none of its instruction paths")


def test_a_compiler_that_fails_leaves_the_pure_wheel(pure_wheel):
    built, said = pure_wheel
    assert built.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(built).namelist()
    assert "moesparse_kernels/native_library.py" in names and "moesparse_kernels/_native.so" not in names
    told = [line for line in said.splitlines() if line.startswith("moesparse: ")]
    wanted = "moesparse: its CPU kernels were not compiled, packed experts will run in plain torch there ("
    assert [line[: len(wanted)] for line in told] == [wanted]


@needs_compiler
def test_an_editable_install_builds_the_kernels(tmp_path):
    copy, home = tmp_path / "source", tmp_path / "venv"
    copy.mkdir()
    scripts, _ = lend_environment(home)
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "--disable-pip-version-check"]
    how = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run([*pip, "install", *how, "--editable", str(copy_sources(copy))], tmp_path, CFLAGS="-O0")
    library = copy / "kernels" / "moesparse_kernels" / "_native.so"
    assert library.is_file()
    code = "import moesparse; native = moesparse.info().native; print(native.file, native.sources)"
    file, sources = run([str(scripts / "python"), "-c", code], tmp_path).split()
    assert (file, sources) == (str(library), native_sources.source_digest())


def check(*wheels: Path) -> tuple[int, str]:
    """Exit code and words of the check that a release must pass."""
    command = [sys.executable, str(ROOT / ".ci" / "check_wheel.py"), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


def changed(wheel: Path, folder: Path, name: str, change) -> Path:
    """A copy under another name, with the content of every file as `change(name, content)` gives it; None drops it."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(folder / name, "w") as target:
        for each in source.namelist():
            content = change(each, source.read(each))
            if content is not None:
                target.writestr(each, content)
    return folder / name


@needs_compiler
def test_the_check_of_a_release_sees_what_a_wheel_lacks(wheel, pure_wheel, tmp_path):
    pure = pure_wheel[0]
    code, said = check(wheel, pure)
    assert (code, said.count("as its name says"), "not loaded" in said) == (0, 2, False), said

    def refused(changed_wheel, reason):
        code, said = check(wheel, changed_wheel)
        assert code == 1 and f"{changed_wheel}: {reason}" in said, said

    def replaced(end, content):
        return lambda name, before: content(before) if name.endswith(end) else before

    digest = native_sources.source_digest().encode()
    any_name, tagged = "moesparse-0.1.0-py3-none-any.whl", wheel.name.replace("py3-none", "cp311-cp311")
    for name, end, content, reason in (
        (wheel.name, ".so", lambda _: None, "it must hold one library, moesparse_kernels/_native.so, got none"),
        (any_name, " ", lambda before: before, "a wheel for any platform must hold no library, got moesparse_k"),
        (tagged, " ", lambda before: before, "its tag must be py3-none-PLATFORM, got cp311-cp311-"),
        (
            wheel.name,
            "native/api.c",
            lambda before: before + b"//",
            "moesparse_kernels/_native.so must be built from the",
        ),
        (wheel.name, ".so", lambda _: digest, "moesparse_kernels/_native.so must load: "),
    ):
        refused(changed(wheel, tmp_path, name, replaced(end, content)), reason)
    assert check()[0] == 1


def test_the_licences_are_in_the_wheel(names):
    licences = {name.split(".dist-info/licenses/")[1] for name in names if ".dist-info/licenses/" in name}
    assert "LICENSE" in licences
    if (ROOT / "moesparse/demo/NOTICE").exists():
        assert {"moesparse/demo/NOTICE", "moesparse/evaluate/NOTICE"} <= licences & names


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
