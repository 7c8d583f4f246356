"""What the library says, in the words of the command line: there `keep_experts=4` is `--keep-experts 4`.

The library names parameters of Python, and by one grammar: "NAME must ...", "must come with NAME", "NAME=VALUE". Names
with an underscore are known wherever they stand, but in quotes and before a colon; names that are plain words only
where that grammar has a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["in_options", "options_of"]

# parameters of the library that another parameter of a command stands for
_STANDS_FOR = {
    "protect_experts": "protect_super_experts",
    "expert_mix": "mix",
    "expert_budget": "budget",
    "keep": "keep_experts",
    "remove": "experts",
    "criterion": "expert_saliency",
}
_VALUE = r"'[^']*'|\"[^\"]*\"|[\w.:+%/-]*[\w%]"
_BEFORE = r"^|only one of |come with |left out with |left out and "
_BEHIND = r" must\b| may\b| and [\w-]| or [\w-]|,|:|$"


@dataclass(frozen=True)
class _Option:
    """How an option is given.

    Attributes:
        on: its name, as "--allow-pruned".
        off: what turns a flag off; None where it is no flag.
    """

    on: str
    off: str | None

    def given(self, value: str) -> str:
        """The option with a value that the library names."""
        value = value.strip("'\"")
        if self.off is not None and value in ("True", "False"):
            return self.on if value == "True" else self.off
        return f"{self.on} {'none' if value == 'None' else value}"


def options_of(commands: Mapping[str, Any], command: str | None) -> dict[str, _Option]:
    """Options by the names that the library has for them.

    Args:
        commands: of click, by name.
        command: that runs; what it does not have is named as another command has it.
    """
    order = sorted(commands, key=lambda name: name == command)
    found: dict[str, _Option] = {}
    for each in (each for name in order for each in commands[name].params if each.param_type_name == "option"):
        off = next(iter(each.secondary_opts), f"no {each.opts[0]}") if each.is_flag else None
        found[each.name] = _Option(max(each.opts, key=len), off)
    return found | {name: found[option] for name, option in _STANDS_FOR.items() if option in found}


def in_options(text: str, options: Mapping[str, _Option]) -> str:
    """A message of the library with options in the place of parameters; what is none stays as it is."""
    names = "|".join(sorted(options, key=len, reverse=True))
    told = "|".join(name for name in sorted(options, key=len, reverse=True) if "_" in name)
    text = re.sub(rf"(?<![\w./-])({names})=({_VALUE})", lambda found: options[found[1]].given(found[2]), text)
    text = re.sub(rf"(?<![\w./'-])({told})(?![\w=(/-]|\.\w|: )", lambda found: options[found[1]].on, text)
    # twice: of "with experts or keep_experts" and "with plan or scores" the second name follows the first
    for before in (_BEFORE, r"(?:with|of) --[\w-]+ (?:and|or) "):
        text = re.sub(rf"({before})({names})(?={_BEHIND})", lambda found: found[1] + options[found[2]].on, text)
    return text
