"""What the vLLM plug-in does where vLLM is not, or is another one. With vLLM itself: tests/vllm_plugin."""

import logging
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from moesparse.packed.vllm import register

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed; tests/vllm_plugin is for it")


def test_a_vllm_of_another_make_is_left_alone_and_told_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    old = ModuleType("vllm")
    old.__version__ = "0.9.2"
    old.__path__ = []
    monkeypatch.setitem(sys.modules, "vllm", old)
    with caplog.at_level(logging.ERROR):
        register()
    assert caplog.messages == [
        "moesparse cannot serve packed folders through vLLM 0.9.2: No module named 'vllm.model_executor'. "
        "It is tested with vLLM 0.32.0 and 0.33.0"
    ]


def test_importing_moesparse_does_not_import_vllm():
    code = """
import sys
from importlib.abc import MetaPathFinder
class Watch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "vllm"
sys.meta_path.insert(0, Watch())
import moesparse.packed.quantizer, moesparse.packed.vllm, moesparse.cli
"""
    subprocess.run([sys.executable, "-c", code], check=True)
