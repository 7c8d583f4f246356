"""Makes Triton's interpreter several times faster on kernels that call other jit functions.

The interpreter patches `triton.language` at every call of a device function, tl.sum and tl.max among them, which costs
milliseconds each time. Inside one launch the second patch of the same module changes nothing, so it is left out.
"""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Patch each language module once per launch. Call once, before the first kernel runs."""
    patch_lang = interpreter._patch_lang
    patched: set[str] = set()

    def patch_once(fn):
        languages = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages and languages <= patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        if not patched:
            # the first of a launch is the one that the launch undoes at its end
            undo = scope.restore

            def restore():
                patched.clear()
                undo()

            scope.restore = restore
        patched.update(languages)
        return scope

    interpreter._patch_lang = patch_once
