"""What others build on does not change by accident: public names, signatures, commands and their options.

tests/contract.json holds them as they are meant to be. Where a change is meant, `python tests/test_contract.py` writes
the file again, and the difference is read in review.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

FILE = Path(__file__).with_name("contract.json")
FRONTS = ("moesparse", "moesparse.demo", "moesparse.evaluate", "moesparse.text", "moesparse.errors")
LISTED = ("moesparse", "moesparse.distillation", "moesparse.benchmarking", "moesparse_kernels")
# handed on by moesparse.evaluate from the file beside it
TASKS = ("PAPER_TASKS", "TaskResult", "TaskSet", "TasksReport", "load_tasks", "tasks")
LIGHT = ("transformers", "triton", "matplotlib", "datasets", "lm_eval")


def plain(value: Any) -> Any:
    """A default as JSON says it."""
    return value if isinstance(value, str | int | float | bool | None) else repr(value).split(" at 0x")[0]


def signature(thing: Any) -> list[list[Any]] | str:
    """[name, kind, default] of every parameter: annotations may be spelled in another way."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return "no signature"
    empty = inspect.Parameter.empty
    return [
        [each.name, each.kind.description, *([] if each.default is empty else [plain(each.default)])]
        for each in parameters
    ]


def public(module: Any) -> list[str]:
    """Names without an underscore that the module means to have: its __all__, or what is defined in it or below."""
    names = getattr(module, "__all__", None)
    more = [name for name in TASKS if module.__name__ == "moesparse.evaluate" and hasattr(module, name)]
    if names is None:
        home = module.__name__
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "").startswith(home)
        ]
    return sorted({*names, *more})


def commands() -> dict[str, Any]:
    """Of every command its parameters, as they are declared: typer's own objects differ from release to release."""
    from moesparse.cli import app

    found = {}
    for command in app.registered_commands:
        assert command.callback is not None
        parameters = inspect.signature(command.callback, eval_str=True).parameters.values()
        name = command.name or command.callback.__name__
        found[name] = {each.name: declared(each) for each in parameters}
    return found


def declared(parameter: inspect.Parameter) -> dict[str, Any] | str:
    """One argument or option of a command."""
    if get_origin(parameter.annotation) is not Annotated:
        return str(parameter.annotation)
    kind, info = get_args(parameter.annotation)
    empty = parameter.default is inspect.Parameter.empty
    return {
        "option": type(info).__name__ == "OptionInfo",
        "given as": list(info.param_decls or ()),
        # where pathlib keeps its classes is the affair of a release of Python
        "type": (kind.__name__ if isinstance(kind, type) else str(kind)).replace("pathlib._local.", "pathlib."),
        "default": "required" if empty else plain(parameter.default),
        "least": info.min,
    }


def contract() -> dict[str, Any]:
    import importlib

    modules = {name: importlib.import_module(name) for name in (*FRONTS, *LISTED)}
    names = {name: public(module) for name, module in modules.items()}
    calls = {}
    for home in FRONTS:
        for name in names[home]:
            thing = getattr(modules[home], name)
            if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, BaseException)):
                calls[f"{home}.{name}"] = signature(thing)
    return {"names": names, "signatures": calls, "commands": commands()}


def test_names_signatures_and_commands_are_those_of_the_contract():
    wanted, found = json.loads(FILE.read_text()), json.loads(json.dumps(contract()))
    for part in wanted:
        assert found[part].keys() == wanted[part].keys(), part
        for name, value in wanted[part].items():
            assert found[part][name] == value, f"{part}: {name}"


def test_importing_moesparse_stays_light():
    code = "import sys, moesparse; print([name for name in sys.argv[1:] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    FILE.write_text(json.dumps(contract(), indent=1) + "\n")
