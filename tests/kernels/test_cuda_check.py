"""What stands around the CUDA kernels: the verdict on a device, the compiler, the driver, the order of weights."""

import ctypes
import json
import re
import subprocess
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from moesparse_kernels import NMWeight, dispatch
from moesparse_kernels.cuda import check, driver, grouped, nvrtc, plan
from moesparse_kernels.dispatch import choose_nm_backend, order_on

GPU = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """As if there were an H200 with a compiler; no verdict yet."""
    monkeypatch.setenv("MOESPARSE_CUDA_CACHE", str(tmp_path))
    monkeypatch.setenv("MOESPARSE_CUDA", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(nvrtc, "find", lambda: SimpleNamespace(version=(13, 0)))
    monkeypatch.setattr(check, "driver_version", lambda: 13000)
    for cached in (check._verdict, check.reason_without_mma_sp):
        cached.cache_clear()
    yield tmp_path
    for cached in (check._verdict, check.reason_without_mma_sp):
        cached.cache_clear()


def _child(monkeypatch, status, words="", error=None):
    """The process of the comparison ends so; returns the commands it was started with."""
    started = []

    def run(command, **how):
        started.append(command)
        if error is not None:
            raise error
        return subprocess.CompletedProcess(command, status, words, "")

    monkeypatch.setattr(check.subprocess, "run", run)
    return started


def test_a_device_that_passes_is_checked_once_for_good(hopper, monkeypatch):
    started = _child(monkeypatch, 0, "right")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert order_on(GPU, torch.bfloat16) == "mma_sp"
        # another process of the same machine
        check._verdict.cache_clear()
        assert order_on(GPU, torch.float16) == "mma_sp"
    assert [command[1:] for command in started] == [["-m", "moesparse_kernels.cuda.check", "0"]]


def test_a_mismatch_turns_it_off_with_one_warning_and_is_remembered(hopper, monkeypatch):
    started = _child(monkeypatch, 3, "gate and up, torch.bfloat16, blocks of 8 tokens: an error of 99 roundings")
    for _ in range(2):
        check._verdict.cache_clear()
        check.reason_without_mma_sp.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert order_on(GPU, torch.bfloat16) == order_on(GPU, torch.float16) == "fragment"
        (warning,) = said
        assert re.search("did not pass their check on NVIDIA H200 .* 99 roundings. Please report", str(warning.message))
    assert len(started) == 1
    (verdict,) = hopper.glob("check-*.json")
    assert "99 roundings" in json.loads(verdict.read_text())["mismatch"]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (-11, None, "ended with status -11"),
        (1, None, "ended with status 1"),
        (0, subprocess.TimeoutExpired("python", 300), "took longer than 300 s"),
        (0, OSError("no python"), "did not start: no python"),
    ],
)
def test_a_check_without_a_verdict_turns_it_off_and_is_not_remembered(hopper, monkeypatch, status, error, message):
    _child(monkeypatch, status, error=error)
    with pytest.warns(UserWarning, match=message):
        assert order_on(GPU, torch.bfloat16) == "fragment"
    assert not list(hopper.glob("check-*.json"))


def test_what_cannot_run_it_says_why_and_warns_of_nothing(hopper, monkeypatch):
    started = _child(monkeypatch, 0)

    def reason(device=GPU, dtype=torch.bfloat16):
        check.reason_without_mma_sp.cache_clear()
        return check.reason_without_mma_sp(device, dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "the weight is torch.float8_e4m3fn" in reason(dtype=torch.float8_e4m3fn)
        assert "NVIDIA GPUs only and the weight is on cpu" in reason(torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        assert "needs compute capability 8.0" in reason()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        monkeypatch.setattr(nvrtc, "find", lambda: None)
        assert "there is no NVRTC" in reason()
        monkeypatch.delenv("MOESPARSE_CUDA")
        assert reason().startswith("it is run where MOESPARSE_CUDA=1 asks for it")
        assert order_on(GPU, torch.bfloat16) == "fragment" and order_on(torch.device("cpu"), torch.bfloat16) == "row"
    assert not started


def test_the_comparison_finds_plain_errors(monkeypatch):
    monkeypatch.setattr(check, "TOKENS", (8,))
    monkeypatch.setattr(check, "_CASES", [replace(check._CASES[0], N=256), *check._CASES[1:]])

    def plain(x, weight, routing, index, *, gather, bias, activation, gated, keep_splits):
        """The result of the kernels, from dense weights."""
        rows = x[routing.slot_of.long() // index.shape[1]] if gather else x
        case = SimpleNamespace(gather=False, N=weight.shape[1], activation=activation, gated=gated)
        out = check._expected(case, rows, weight.unpack(), bias, routing)
        return out[None].float() if keep_splits else out.to(x.dtype)

    def off_by(change):
        def run(*arguments, **how):
            out = plain(*arguments, **how)
            change(out)
            return out

        return check.mismatch(run, torch.device("cpu"), torch.bfloat16)

    assert off_by(lambda out: None) is None
    assert "gate and up, torch.bfloat16, blocks of 8 tokens: an error of" in off_by(
        lambda out: out[..., 3, 5].add_(0.3)
    )
    assert "an error of inf roundings" in off_by(lambda out: out[..., 0, 0].fill_(float("nan")))


# ---- the choice


def test_the_order_decides_the_kernels(hopper, monkeypatch):
    _child(monkeypatch, 0)
    on_gpu = SimpleNamespace(device=GPU, values=SimpleNamespace(device=GPU), shape=(4, 128, 128), dtype=torch.bfloat16)
    on_gpu.n, on_gpu.m = 2, 4
    for order, backend in (("mma_sp", "mma_sp"), ("fragment", "triton")):
        on_gpu.order = order
        for measured in (None, "triton", "mma_sp"):
            monkeypatch.setattr(dispatch, "backend_from_table", lambda *_, measured=measured: measured)
            assert choose_nm_backend("auto", on_gpu, 8, 128, 128) == backend
        monkeypatch.setattr(dispatch, "backend_from_table", lambda *_: "unpack")
        assert choose_nm_backend("auto", on_gpu, 8, 128, 128) == "unpack"
    with pytest.raises(ValueError, match='"mma_sp" must have packed weights in "mma_sp" order, got \'fragment\''):
        choose_nm_backend("mma_sp", on_gpu, 8, 128, 128)
    on_gpu.order = "mma_sp"
    with pytest.raises(ValueError, match='"triton" must have packed weights in "fragment" order, got \'mma_sp\''):
        choose_nm_backend("triton", on_gpu, 8, 128, 128)
    assert dispatch.auto_on(GPU, torch.bfloat16)[0].backend == "mma_sp"


def test_weights_of_a_device_that_fails_are_refused(hopper, monkeypatch):
    weight = NMWeight.pack(torch.zeros(1, 128, 128, dtype=torch.bfloat16)).to_order("mma_sp")
    for backend in ("mma_sp", "triton"):
        with pytest.raises(ValueError, match=backend):
            choose_nm_backend(backend, weight, 8, 128, 128)
    assert choose_nm_backend("auto", weight, 8, 128, 128) == "reference"


# ---- the compiler and the driver


def test_compiled_files_are_kept_by_source_architecture_and_version(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESPARSE_CUDA_CACHE", str(tmp_path / "cache"))
    asked = []

    def compiler(*version):
        def compile_(text, name, arch, defined):
            asked.append((text, arch, version, defined))
            return f"{len(asked)}".encode()

        return SimpleNamespace(version=version, compile=compile_)

    source = tmp_path / "kernel.cu"
    source.write_text("one")
    calls = [(compiler(13, 0), "sm_90a", ()), (compiler(13, 1), "sm_90a", ()), (compiler(13, 0), "sm_80", ())]
    calls.append((compiler(13, 0), "sm_80", ("FP16",)))
    made = [nvrtc.compiled(with_, source, arch, defined) for with_, arch, defined in calls]
    assert made == [nvrtc.compiled(with_, source, arch, defined) for with_, arch, defined in calls]
    source.write_text("two")
    assert nvrtc.compiled(*calls[0][:1], source, *calls[0][1:]) == b"5"
    assert len(asked) == 5 == len(list((tmp_path / "cache").iterdir()))
    # a folder that is none
    monkeypatch.setenv("MOESPARSE_CUDA_CACHE", str(source))
    assert nvrtc.compiled(*calls[0][:1], source, *calls[0][1:]) == b"6"


@pytest.mark.parametrize(("capability", "name"), [((8, 0), "sm_80"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")])
def test_architectures(capability, name):
    assert nvrtc.architecture(capability) == name


def test_a_launch_reaches_the_driver(monkeypatch):
    calls = []

    class Library:
        def __getattr__(self, name):
            def call(*arguments):
                calls.append((name, arguments))
                return 700 if name == "cuLaunchKernel" and arguments[1].value == 9 else 0

            return call

    monkeypatch.setattr(driver, "_library", Library)
    module = driver.Module(b"cubin")
    arguments = grouped.Arguments(R=3, top_k=2)
    module.launch("grouped_8", 5, 192, 1000, 77, arguments)
    module.launch("grouped_8", 5, 192, 1000, 77, arguments)
    names = [name for name, _ in calls]
    assert names == ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", *["cuLaunchKernel"] * 2]
    assert calls[2][1][1:] == (8, 1000)
    _, sent = calls[3]
    assert [number.value for number in sent[1:9]] == [5, 1, 1, 192, 1, 1, 1000, 77]
    read = ctypes.cast(sent[9][0], ctypes.POINTER(grouped.Arguments)).contents
    assert (read.R, read.top_k) == (3, 2)
    with pytest.raises(RuntimeError, match="cuLaunchKernel must succeed, got error 700"):
        module.launch("grouped_8", 9, 192, 1000, 77, arguments)


def test_shared_memory_is_asked_of_the_driver(monkeypatch):
    def attribute(size, which, device):
        assert (which, device.value) == (97, 3)
        size._obj.value = 232448
        return 0

    def current(device):
        device._obj.value = 3
        return 0

    library = SimpleNamespace(cuCtxGetDevice=current, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(driver, "_library", lambda: library)
    assert driver.shared_memory() == 232448


def test_the_structure_and_the_numbers_are_those_of_the_source():
    text = plan.SOURCE.read_text()
    body = re.sub(r"//.*", "", re.search(r"struct Arguments \{(.*?)\n\};", text, re.S)[1])
    fields = []
    for declaration in body.split(";"):
        if declaration.strip():
            type_, names = re.match(r"\s*((?:const )?\w+[ *]*)(.*)", declaration.replace("\n", " ")).groups()
            is_number = type_.strip() == "int"
            fields += [(name.strip(), ctypes.c_int if is_number else ctypes.c_void_p) for name in names.split(",")]
    assert tuple(fields) == tuple(grouped.Arguments._fields_)
    for name in ("THREADS", "MAX_STAGES", "VALUES_BYTES", "INDEX_BYTES", "X_ROW_BYTES"):
        assert int(re.search(rf"\b{name} = (\d+)", text)[1]) == getattr(plan, name)
    assert tuple(int(n) for n in re.findall(r"^KERNEL\((\d+)\)", text, re.M)) == plan.TOKENS
    named = {name: int(number) for number, name in re.findall(r"case (\d): EACH.*// (\w+)", text)}
    assert {**named, "none": 0, "gelu_tanh": 3} == plan.ACTIVATIONS
