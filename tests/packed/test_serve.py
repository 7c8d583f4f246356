"""`moesparse serve` as a client meets it: real processes on loopback, the `openai` client, transformers beside."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesparse
from moesparse import demo
from moesparse.cli import main
from moesparse.evaluate import generate
from moesparse.packed.server import GRACE_SECONDS

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

PROMPTS = (
    "The king said unto",
    "It is a truth universally acknowledged",
    "def __init__(self",
    "CREATE TABLE",
    "Enter the King and",
    "a small",
    "And the LORD",
    "She was",
)
TOKENS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The embedded model at 2:4, dense with zeros and packed."""
    model, tokenizer = demo.load()
    moesparse.prune(model, None, moesparse.Recipe(weights="2:4", saliency="magnitude", update="none"))
    root = tmp_path_factory.mktemp("served")
    moesparse.save_pretrained(model, root / "dense", tokenizer=tokenizer)
    moesparse.save_pretrained(model, root / "packed", tokenizer=tokenizer, packed=True)
    return {"dense": root / "dense", "packed": root / "packed"}


@pytest.fixture(scope="module")
def expected(folders):
    """What transformers itself gives, greedily; the same from both folders."""
    _, tokenizer = demo.load()
    texts = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        texts[name] = generate(model, tokenizer, PROMPTS, max_new_tokens=TOKENS)
    assert texts["dense"] == texts["packed"]
    assert len(set(texts["dense"])) == len(PROMPTS)
    return dict(zip(PROMPTS, texts["dense"], strict=True))


class Served:
    """A server process; `client` talks to it."""

    def __init__(self, log, model, *options):
        command = [
            sys.executable,
            "-m",
            "moesparse",
            "serve",
            str(model),
            "--port",
            "0",
            "--dtype",
            "float32",
            *options,
        ]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                # a test run in the background inherits it ignored
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.model = str(model)
        self.log = log
        address = self.wait_for(r"at (http://127.0.0.1:\d+/v1)")
        self.client = openai.OpenAI(base_url=address, api_key="none", timeout=60, max_retries=0)
        self.wait_for("Application startup complete")

    def wait_for(self, pattern, seconds=120):
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            found = re.search(pattern, self.log.read_text())
            if found:
                return found[found.re.groups]
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in\n{self.log.read_text()}")

    def complete(self, prompt, **options):
        options = {"max_tokens": TOKENS, "temperature": 0} | options
        return self.client.completions.create(model=self.model, prompt=prompt, **options)

    def chat(self, *texts, **options):
        messages = [{"role": "user", "content": text} for text in texts]
        options = {"max_tokens": TOKENS, "temperature": 0} | options
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def end_by_ctrl_c_while_generating(self):
        """Seconds from SIGINT to the end, and the exit code, with a generation of minutes under way."""
        stream = self.complete(PROMPTS[0], max_tokens=100_000, stream=True)
        next(iter(stream))
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=60)
        return time.monotonic() - began, code

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("log") / "packed", folders["packed"], "--chat-template", "plain")
    yield served
    served.kill()


@pytest.fixture(scope="module")
def batching(folders, tmp_path_factory):
    # left to itself, the cache takes most of the machine's memory
    options = (
        "--continuous-batching",
        "--cb-block-size",
        "32",
        "--cb-num-blocks",
        "64",
        "--cb-max-batch-tokens",
        "256",
    )
    served = Served(tmp_path_factory.mktemp("log") / "batching", folders["dense"], *options)
    yield served
    served.kill()


@pytest.fixture(params=["packed", "batching"])
def served(request):
    """Packed and one request after the other; dense with zeros and continuous batching."""
    return request.getfixturevalue(request.param)


def test_completions_are_what_transformers_gives(served, expected):
    answer = served.complete(PROMPTS[0])
    assert answer.choices[0].text == expected[PROMPTS[0]]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == TOKENS


def test_streaming_gives_the_same_text_in_parts(served, expected):
    parts = [chunk.choices[0].text for chunk in served.complete(PROMPTS[1], stream=True)]
    assert "".join(parts) == expected[PROMPTS[1]]
    assert len([part for part in parts if part]) > 3


def test_eight_clients_at_once_get_what_each_gets_alone(served, expected):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: served.complete(prompt).choices[0].text, PROMPTS))
    assert answers == [expected[prompt] for prompt in PROMPTS]


def test_chat_by_the_plain_template_goes_on_from_the_last_message(packed, expected):
    answer = packed.chat(PROMPTS[2])
    assert answer.choices[0].message.content.strip() == expected[PROMPTS[2]].strip()
    stream = packed.chat(PROMPTS[2], stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts).strip() == expected[PROMPTS[2]].strip()
    assert len([part for part in parts if part]) > 3
    _, tokenizer = demo.load()
    joined = tokenizer(f"{PROMPTS[0]}\n{PROMPTS[2]}")["input_ids"]
    assert packed.chat(PROMPTS[0], PROMPTS[2]).usage.prompt_tokens == len(joined)


def test_the_model_goes_by_the_name_it_was_served_under(served):
    assert [model.id for model in served.client.models.list()] == [served.model]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/completions", {"prompt": "a", "model": "gpt-9"}, "Server is pinned to"),
        ("/completions", {"prompt": ["a", "b"]}, "prompt must be a string"),
        ("/completions", {"prompt": ""}, "prompt must hold at least one token"),
        ("/completions", {"prompt": "a", "max_tokens": "many"}, "invalid literal for int"),
        ("/completions", {"prompt": "a", "colour": "red"}, "Unexpected fields in the request"),
        ("/chat/completions", {}, "the request must have the field 'messages'"),
        ("/chat/completions", {"messages": [{"role": "user", "content": " "}]}, None),
    ],
)
def test_a_bad_request_gets_a_reason_and_the_server_lives(served, expected, path, body, message):
    with pytest.raises(openai.APIStatusError) as refused:
        served.client.post(path, body={"model": served.model} | body, cast_to=object)
    assert refused.value.status_code in (400, 422)
    if message is None:
        message = "messages must hold text" if "packed" in served.model else "this model has no chat template"
    assert message in json.dumps(refused.value.body, ensure_ascii=False)
    assert served.complete(PROMPTS[0]).choices[0].text == expected[PROMPTS[0]]


# the last test of each server
def test_ctrl_c_ends_it_while_a_generation_of_minutes_runs_and_frees_the_port(served):
    seconds, code = served.end_by_ctrl_c_while_generating()
    log = served.log.read_text()
    assert code == 0, log
    assert GRACE_SECONDS < 5
    assert seconds < 30  # 5 when nothing else runs: this leaves room for a busy machine, and none for the generation
    assert "the server has ended" in log
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(re.search(r"127.0.0.1:(\d+)/v1", log)[1])))


def in_process(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moesparse", "serve", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, " ".join(out.split()), " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["EMPTY"], 1, "MODEL must be a folder with a config.json"),
        ([__file__], 2, "MODEL must be a folder or a hub id, got the file"),
        (["AT"], 2, "MODEL must be a folder whose path has no '@'"),
        (["demo", "--port", "99999"], 2, "--port must be between 0 and 65535, got 99999"),
        (["demo", "--host", "nowhere.invalid"], 2, "--host must be a name or address of this machine"),
        (["demo", "--chat-template", "nofile"], 2, "--chat-template must be 'plain' or a file"),
        (["demo", "--dtype", "float33", "--port", "0"], 1, "Unsupported dtype: 'float33'"),
        (["demo", "--log-level", "loud", "--port", "0"], 1, "unknown value 'loud'"),
        (["demo", "--frobnicate"], 2, "No such option: --frobnicate"),
        ([], 2, "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "a@b").mkdir()
    places = {"EMPTY": tmp_path, "AT": tmp_path / "a@b"}
    found, _, err = in_process(monkeypatch, capsys, *(places.get(word, word) for word in arguments))
    assert found == code, err
    assert message in err
    assert "Traceback" not in err


def test_a_port_in_use_is_named_before_the_model_is_loaded(monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = in_process(monkeypatch, capsys, "demo", "--port", port)
    assert code == 1
    assert f"--port must be one that can be bound, got {port} on localhost: Address already in use" in err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    code, _, err = in_process(monkeypatch, capsys, "demo")
    assert code == 1
    assert "pip install 'moesparse[serve]'" in err


def test_help_lists_the_options_of_transformers(monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "--help")
    assert code == 0
    for option in ("--continuous-batching", "--attn-implementation", "--dtype", "--port", "--chat-template"):
        assert option in out
    assert "force" not in out
