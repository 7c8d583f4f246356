"""The plan of the house: few files at the door, no circle of imports, every name taken from its home.

`make lint` holds the rooms apart (pyproject.toml, import-linter); here is what it does not see: circles inside a room,
also those hidden by an import inside a function or for type checking only, and names that are handed on.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"moesparse": ROOT, "moesparse_kernels": ROOT / "kernels"}
# what users import from, by the names in their __all__
FRONTS = {
    "moesparse",
    "moesparse.evaluate",
    "moesparse.text",
    "moesparse.distillation",
    "moesparse.benchmarking",
    "moesparse_kernels",
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for package, folder in SOURCES.items():
        for file in sorted((folder / package).rglob("*.py")):
            name = ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(file.read_text())
    return found


MODULES = modules()
PACKAGES = {name.rpartition(".")[0] for name in MODULES}


def imported(name: str) -> Iterator[tuple[str, str | None, ast.ImportFrom | ast.Import]]:
    """(module, name in it or None) of every import of ours in a module, wherever it stands."""
    package = name if name in PACKAGES else name.rpartition(".")[0]
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, None, node
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            home = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                inside = f"{home}.{alias.name}"
                if inside in MODULES:
                    yield inside, None, node
                elif home in MODULES:
                    yield home, alias.name, node


def defined(tree: ast.Module) -> set[str]:
    """Names that a module makes itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_no_circle_of_imports():
    graph = {name: {module for module, _, _ in imported(name)} - {name} for name in MODULES}
    # its names are loaded when they are first used: only the type checker follows them
    graph["moesparse"] = {"moesparse._register", "moesparse._version"}
    assert sum(map(len, graph.values())) > 500
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_at_most_a_dozen_files_at_the_door():
    files = [file.name for file in (ROOT / "moesparse").iterdir() if file.is_file()]
    assert len(files) <= 12, sorted(files)


def test_a_name_is_imported_from_its_home():
    wrong = []
    for name in MODULES:
        for home, wanted, node in imported(name):
            if wanted is not None and home not in FRONTS and wanted not in defined(MODULES[home]):
                wrong.append(f"{name}:{node.lineno} takes {wanted} from {home}, which does not define it")
    assert not wrong, "\n".join(wrong)


def test_every_file_has_a_place_in_the_contract():
    # import-linter is exhaustive; this says so also where it is not installed
    stated = (ROOT / "pyproject.toml").read_text().split('name = "the rooms"')[1]
    rooms = {word for line in stated.splitlines() if line.startswith("    ") for word in line.strip(' ",').split(" | ")}
    children = {name.split(".")[1] for name in MODULES if name.startswith("moesparse.")}
    assert children == rooms
    assert "exhaustive = true" in stated
    assert "ignore_imports" not in stated


def test_no_module_is_called_as_a_public_function_is():
    # importing a module sets an attribute of its package, and would cover the function
    for front in FRONTS:
        for node in ast.walk(MODULES[front]):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "__all__"
            ):
                for name in ast.literal_eval(node.value):
                    covered = f"{front}.{name}" in MODULES
                    assert not covered or name in {"demo", "evaluate", "text"}, f"{front}.{name}"


def test_the_map_names_what_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = page + (ROOT / "CONTRIBUTING.md").read_text()
    for room in sorted({name.split(".")[1] for name in PACKAGES if name.startswith("moesparse.")}):
        assert f"`{room}/`" in page, f"docs/architecture.md does not tell of {room}/"
    files = re.findall(r"`((?:moesparse|kernels|tests|benchmarks)/[\w/]+\.py)`", told)
    files += [f"moesparse/{file}" for file in re.findall(r"`((?:\w+)/\w+\.py)[`:]", told) if "/" in file]
    rooms = [file for file in files if (ROOT / file).parent.is_dir() and "NAME" not in file]
    assert len(rooms) > 30
    for file in rooms:
        assert (ROOT / file).is_file(), file
    way = page.split("## From `moesparse prune MODEL OUT` to a shard")[1]
    assert re.findall(r"^(\d+)\. `moesparse/", way, re.MULTILINE) == [str(number) for number in range(1, 11)]


def test_the_longest_functions_are_looked_at_twice():
    # what is longer, and why it is not cut
    known = {
        "_grouped_nm_kernel": "one loop of one kernel",
        "_grouped_dense_kernel": "one loop of one kernel",
        "distill": "the signature of a public function, and of a command",
    }
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in known:
                assert node.end_lineno - node.lineno < 90, f"{name}.{node.name}"


def test_an_import_inside_a_function_loads_what_the_file_must_do_without():
    """The commands load their libraries when they run; elsewhere only transformers, triton and the like wait."""
    heavy = {"moesparse.packed.quantizer", "moesparse.packed.conversions", "moesparse.packed.vllm_experts"}
    allowed = heavy | {f"moesparse_kernels.{name}" for name in KERNELS_WITH_TRITON}
    for name, tree in MODULES.items():
        if name.startswith(("moesparse.cli", "moesparse.__main__")) or name in FRONTS:
            continue
        top = {id(node) for node in ast.walk(tree) if isinstance(node, ast.If) for node in node.body}
        top |= {id(node) for node in tree.body}
        for module, wanted, node in imported(name):
            if id(node) not in top:
                assert module in allowed, f"{name}:{node.lineno} imports {wanted or module} inside a function"


KERNELS_WITH_TRITON = {
    name.removeprefix("moesparse_kernels.")
    for name, tree in MODULES.items()
    if name.startswith("moesparse_kernels.")
    and any(isinstance(node, ast.Import) and node.names[0].name.startswith("triton") for node in tree.body)
} | {"moe_gpu", "unpack_fragment", "cuda.grouped"}
