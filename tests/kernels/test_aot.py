"""Starts tests/kernels/aot, which compiles the kernels for GPUs that are not there, and prints its table."""

import os

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("MOESPARSE_AOT") == "1", reason="collected directly")
def test_machine_code(capsys):
    from _subrun import run_folder

    output = run_folder("aot", {"TRITON_INTERPRET": None, "MOESPARSE_AOT": "1"}, "-s", "--durations=5")
    with capsys.disabled():
        print("\n", output[output.find("= machine code") :].partition("\n\n")[0], sep="")
