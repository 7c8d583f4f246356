"""vLLM's whole engine on packed folders: the greedy tokens that transformers gives on the masked dense model, in fp32.

Each mode is a process of its own (generate.py) that answers for several folders, since starting vLLM is what costs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed; make test-vllm runs this in its own environments")
if find_spec("vllm._C") is None:
    pytest.skip("this vLLM was built without its compiled code", allow_module_level=True)

import torch
from openai import APIConnectionError, OpenAI
from torch import nn
from transformers import AutoModelForCausalLM

import moesparse
from moesparse.checkpoints.pretrained import save_pretrained
from moesparse.experts.surgery import remove_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.testing import prune_by_magnitude, tiny_model
from moesparse.weights.patterns import Pattern, mask_from_score
from moesparse_kernels.native_library import library

HERE = Path(__file__).parent
TOKENS = 12
PROMPTS = [[5, 9, 40, 100, 33, 7], [11, 12, 13]]
# heads of 32, the smallest that vLLM's attention takes on a CPU
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "vocab_size": 256,
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

Tokens = list[list[int]]


def greedy(model: nn.Module) -> Tokens:
    answers = []
    for prompt in PROMPTS:
        given = torch.tensor([prompt])
        settings = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "pad_token_id": 0}
        answers.append(model.generate(given, **settings)[0, len(prompt) :].tolist())
    return answers


def mixed(model: nn.Module) -> nn.Module:
    """The first block dense; the second with a pattern in each matrix."""
    for matrix, pattern in zip(find_moe_blocks(model)[1].matrices, ("4:8", "1:4"), strict=True):
        matrix.weight.data.mul_(mask_from_score(matrix.weight.abs(), Pattern.parse(pattern)))
    return model


def without_experts(model: nn.Module) -> nn.Module:
    remove_experts(model, [[0, 2, 3, 5, 7]] * len(find_moe_blocks(model)))
    return model


MODELS = {
    "mixtral": lambda: prune_by_magnitude(tiny_model("mixtral", **SIZES)),
    # 7 experts: two ranks get different numbers of them
    "qwen3_moe": lambda: prune_by_magnitude(tiny_model("qwen3_moe", num_experts=7, **SIZES)),
    # a shared expert beside the routed ones
    "qwen2_moe": lambda: prune_by_magnitude(tiny_model("qwen2_moe", **SIZES)),
    # a sigmoid router with a bias that selects only
    "glm4_moe": lambda: prune_by_magnitude(tiny_model("glm4_moe", **SIZES)),
    "olmoe": lambda: prune_by_magnitude(tiny_model("olmoe", **SIZES)),
    "mixed": lambda: mixed(tiny_model("qwen3_moe", seed=1, **SIZES)),
    "removed": lambda: without_experts(tiny_model("mixtral", seed=2, **SIZES)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for name, make in MODELS.items():
        # experts that are gone are so in an ordinary dense folder
        save_pretrained(make(), root / name, packed=name != "removed")
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tokens]:
    return {name: greedy(make()) for name, make in MODELS.items()}


def generate(folders: list[Path], environment: dict[str, str] | None = None, **options) -> list[Tokens]:
    return run_engine(folders, environment, **options)[0]


def run_engine(folders: list[Path], environment: dict[str, str] | None, **options) -> tuple[list[Tokens], int]:
    """The tokens of each folder, and how many layers the compiled kernels ran in the engine's own process."""
    names = [str(folder) for folder in folders]
    request = {
        "folders": names,
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "options": {"skip_tokenizer_init": True} | options,
    }
    result = subprocess.run(
        [sys.executable, str(HERE / "generate.py"), json.dumps(request)],
        env=os.environ | ENVIRONMENT | (environment or {}),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    return [found["tokens"][name] for name in names], found["native"]


IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def test_every_kind_of_folder_gives_transformers_tokens(folders: dict[str, Path], expected: dict[str, Tokens]):
    answers = generate([folders[name] for name in MODELS], IN_PROCESS, enforce_eager=True)
    assert dict(zip(MODELS, answers, strict=True)) == expected
    # a model whose tokens repeat would hide much
    assert all(len(set(tokens)) > 5 for answer in answers for tokens in answer)


@pytest.mark.skipif(library() is None, reason="no compiled kernels for this CPU")
@pytest.mark.parametrize("turned_on", [True, False])
def test_the_compiled_kernels_run_the_layers(turned_on: bool, folders: dict[str, Path], expected: dict[str, Tokens]):
    environment = IN_PROCESS | {"MOESPARSE_NATIVE": str(int(turned_on))}
    tokens, native = run_engine([folders["mixtral"]], environment, enforce_eager=True)
    assert tokens == [expected["mixtral"]]
    layers = len(find_moe_blocks(MODELS["mixtral"]()))
    # each pass of the model, of which the first may take both prompts
    assert native >= layers * TOKENS if turned_on else native == 0


def test_compiled(folders: dict[str, Path], expected: dict[str, Tokens]):
    assert generate([folders["mixtral"]], IN_PROCESS) == [expected["mixtral"]]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("experts", [False, True], ids=["tensor", "tensor-and-expert"])
def test_two_ranks(experts: bool, folders: dict[str, Path], expected: dict[str, Tokens]):
    names = ["mixtral", "qwen3_moe"]
    options = {"tensor_parallel_size": 2, "enforce_eager": True, "enable_expert_parallel": experts}
    assert generate([folders[name] for name in names], TWO_CORES, **options) == [expected[name] for name in names]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = moesparse.demo.load()
    folder = tmp_path_factory.mktemp("demo") / "packed"
    save_pretrained(prune_by_magnitude(model), folder, packed=True, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def client(demo: Path) -> Iterator[OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--served-model-name", "demo"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo), *settings, *address],
        env=os.environ | ENVIRONMENT,
    )
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                client.models.list()
                break
            except APIConnectionError:
                assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
                time.sleep(1)
        yield client
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def test_the_embedded_model_through_the_openai_server(client: OpenAI, demo: Path):
    dense, tokenizer = moesparse.demo.load()
    packed = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    texts = {}
    for domain in moesparse.demo.DOMAINS[:3]:
        prompt = moesparse.demo.text("heldout", domain)[:120]
        given = tokenizer(prompt, return_tensors="pt")["input_ids"]
        texts[prompt] = []
        for model in (prune_by_magnitude(dense), packed):
            answer = model.generate(given, do_sample=False, max_new_tokens=24, pad_token_id=0)[0, given.shape[1] :]
            texts[prompt].append(tokenizer.decode(answer, skip_special_tokens=True))
    for prompt, (from_dense, from_packed) in texts.items():
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0)
        assert answer.choices[0].text == from_dense == from_packed
    streamed = client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == from_dense
