"""Starts tests/kernels/interpreter under TRITON_INTERPRET=1."""

import os

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="collected directly")
def test_kernels_in_the_interpreter():
    from _subrun import run_folder

    run_folder("interpreter", {"TRITON_INTERPRET": "1", "MOESPARSE_AOT": None}, "--durations=5")
