"""Starts tests/kernels/aot, which compiles the kernels for GPUs that are not there."""

import os

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("MOESPARSE_AOT") == "1", reason="collected directly")
def test_machine_code():
    from _subrun import run_folder

    run_folder("aot", {"TRITON_INTERPRET": None, "MOESPARSE_AOT": "1"}, "-s", "--durations=5")
