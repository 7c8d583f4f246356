"""Register with transformers when transformers is used, and not before: importing moesparse stays light.

transformers has no entry points for quantizers. So a finder on sys.meta_path waits for the import of the module that
loads models, lets the usual finders find it, and imports moesparse.packed.quantizer right after it. Of transformers
nothing is changed but what moesparse.models.layer_counts says, and the finder takes itself off the list when its one
use has come.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_with_transformers"]

_LOADER_OF_MODELS = "transformers.modeling_utils"
_INTEGRATION = "moesparse.packed.quantizer"


class _Waiting(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _LOADER_OF_MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            importlib.import_module(_INTEGRATION)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """At once when transformers can load models already, else right after it can."""
    if _LOADER_OF_MODELS in sys.modules:
        importlib.import_module(_INTEGRATION)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
