"""`moesparse serve` as a client meets it: real processes on loopback, the `openai` client, transformers beside."""

import http.client
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from processes import start_command
from transformers import AutoModelForCausalLM

import moesparse
from moesparse import demo
from moesparse.evaluate import generate
from moesparse.serving.app import MOST_BYTES
from moesparse.serving.server import GRACE_SECONDS

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

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
CONTEXT = 200_000
KEY = "open-sesame"
TEMPLATE = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}{{ prefix | default('It is') }}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The embedded model at 2:4, dense with zeros and packed."""
    model, tokenizer = demo.load()
    moesparse.prune(model, None, moesparse.Recipe(weights="2:4", saliency="magnitude", update="none"))
    root = tmp_path_factory.mktemp("served")
    moesparse.save_pretrained(model, root / "dense", tokenizer=tokenizer)
    moesparse.save_pretrained(model, root / "packed", tokenizer=tokenizer, packed=True)
    for folder in root.iterdir():
        # its positions are rotated, so that it runs at any: a generation of minutes for Ctrl-C
        for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
            values = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(values | {key: CONTEXT}))
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


class Answer(NamedTuple):
    status: int
    kind: str
    text: str

    def json(self):
        return json.loads(self.text)


class Served:
    """A server process; `client` talks to it."""

    def __init__(self, model, *options):
        self.process = start_command("serve", model, "--port", "0", "--dtype", "float32", *options)
        self.model = str(model)
        address = self.wait_for(r"at (http://127.0.0.1:\d+/v1)")
        self.client = openai.OpenAI(base_url=address, api_key=KEY, timeout=60, max_retries=0)
        self.wait_for("Application startup complete")

    def said(self):
        return "".join(self.process.said())

    def wait_for(self, pattern, seconds=120):
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            found = re.search(pattern, self.said())
            if found:
                return found[found.re.groups]
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in\n{self.said()}")

    def raw(self, method, path, content=b""):
        """The answer as it is on the wire."""
        connection = http.client.HTTPConnection(self.client.base_url.host, self.client.base_url.port, timeout=60)
        try:
            connection.request(method, path, content, {"Authorization": f"Bearer {KEY}"})
            response = connection.getresponse()
            return Answer(response.status, response.headers["content-type"], response.read().decode())
        finally:
            connection.close()

    def post(self, path, body):
        return self.raw("POST", path, json.dumps({"model": self.model} | body).encode())

    def health(self):
        return self.raw("GET", "/health").json()

    def until(self, holds, seconds=60):
        until = time.monotonic() + seconds
        while not holds(self.health()):
            assert time.monotonic() < until, self.health()
            time.sleep(0.02)

    def complete(self, prompt, **options):
        options = {"max_tokens": TOKENS, "temperature": 0} | options
        return self.client.completions.create(model=self.model, prompt=prompt, **options)

    def chat(self, *texts, **options):
        messages = [{"role": "user", "content": text} for text in texts]
        options = {"max_tokens": TOKENS, "temperature": 0} | options
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def end_by_ctrl_c_while_generating(self):
        """Seconds from SIGINT to the end, the exit code, and what a client is told in a generation of minutes."""
        stream = self.complete(PROMPTS[0], max_tokens=150_000, logit_bias={0: -100}, stream=True)
        next(stream)
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        seconds = time.monotonic() - began
        with pytest.raises(openai.APIError) as told:
            list(stream)
        return seconds, self.process.returncode, told.value.message

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def packed(folders):
    served = Served(folders["packed"], "--chat-template", "plain")
    yield served
    served.kill()


@pytest.fixture(scope="module")
def dense(folders, tmp_path_factory):
    template = tmp_path_factory.mktemp("chat") / "template"
    template.write_text(TEMPLATE)
    served = Served(folders["dense"], "--api-key", KEY, "--max-batch", "8", "--chat-template", template)
    yield served
    served.kill()


@pytest.fixture(params=["packed", "dense"])
def served(request):
    """Packed, with the plain template; dense with zeros, with a key and a template of its own."""
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


# What OpenAI's API reference (platform.openai.com/docs/api-reference: completions/object, chat/object, chat/streaming)
# says of objects, written out by hand: their keys with the types of the values.
NUMBER, WHOLE, TEXT = (int, float), int, str
USAGE = {"prompt_tokens": WHOLE, "completion_tokens": WHOLE, "total_tokens": WHOLE}
LEGACY_LOGPROBS = {
    "tokens": [TEXT],
    "token_logprobs": [NUMBER],
    "top_logprobs": [dict],
    "text_offset": [WHOLE],
}
TOP = {"token": TEXT, "logprob": NUMBER, "bytes": [WHOLE]}
LOGPROBS = {"content": [TOP | {"top_logprobs": [TOP]}], "refusal": None}
HEAD = {"id": TEXT, "created": WHOLE, "model": TEXT}
COMPLETION_CHOICE = {"text": TEXT, "index": WHOLE, "finish_reason": TEXT, "logprobs": LEGACY_LOGPROBS}
COMPLETION = HEAD | {"object": "text_completion", "choices": [COMPLETION_CHOICE], "usage": USAGE}
MESSAGE = {"role": "assistant", "content": TEXT, "refusal": None}
CHAT_CHOICE = {"index": WHOLE, "message": MESSAGE, "finish_reason": TEXT, "logprobs": LOGPROBS}
CHAT = HEAD | {"object": "chat.completion", "choices": [CHAT_CHOICE], "usage": USAGE}
ERROR = {"error": {"message": TEXT, "type": TEXT, "param": object, "code": object}}


def check_form(found, wanted, where="body"):
    if isinstance(wanted, dict):
        assert isinstance(found, dict) and found.keys() == wanted.keys(), where
        for name, form in wanted.items():
            check_form(found[name], form, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert isinstance(found, list) and found, where
        for place, each in enumerate(found):
            check_form(each, wanted[0], f"{where}[{place}]")
    elif isinstance(wanted, type | tuple):
        assert isinstance(found, wanted) and not (isinstance(found, bool) and wanted is WHOLE), (where, found)
    else:
        assert found == wanted, where


def test_objects_have_the_keys_of_the_reference(packed):
    completion = packed.post("/v1/completions", {"prompt": "a small", "logprobs": 2, "max_tokens": 3}).json()
    check_form(completion, COMPLETION)
    body = {"messages": [{"role": "user", "content": "a small"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 1}
    chat = packed.post("/v1/chat/completions", body).json()
    check_form(chat, CHAT)
    assert abs(chat["created"] - time.time()) < 3600
    for answer, prefix in ((completion, "cmpl-"), (chat, "chatcmpl-")):
        assert answer["id"].startswith(prefix) and answer["model"] == packed.model
        assert answer["usage"]["total_tokens"] == sum(answer["usage"].values()) / 2
        assert answer["choices"][0]["finish_reason"] == "length"


def events(response):
    """Bodies of server-sent events, as their standard says: lines "data: ..." that blank lines part."""
    assert response.kind.startswith("text/event-stream")
    *blocks, rest = response.text.split("\n\n")
    assert rest == "" and all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def test_streams_have_the_chunks_of_the_reference(packed, expected):
    ask = {"max_tokens": TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    *texts, usage, done = events(packed.post("/v1/completions", {"prompt": PROMPTS[3]} | ask))
    assert done == "[DONE]"
    chunks = [json.loads(each) for each in texts]
    for chunk in chunks:
        check_form(chunk, HEAD | {"object": "text_completion", "choices": [dict], "usage": None})
        assert chunk["choices"][0].keys() == {"text", "index", "finish_reason", "logprobs"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected[PROMPTS[3]]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    usage = json.loads(usage)
    check_form(usage, HEAD | {"object": "text_completion", "choices": list, "usage": USAGE})
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == TOKENS
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}

    ask["messages"] = [{"role": "user", "content": PROMPTS[3]}]
    *texts, usage, done = events(packed.post("/v1/chat/completions", ask))
    assert done == "[DONE]" and json.loads(usage)["usage"]["completion_tokens"] == TOKENS
    chunks = [json.loads(each) for each in texts]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all(choice.keys() == {"index", "delta", "finish_reason", "logprobs"} for choice in choices)
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == expected[PROMPTS[3]]
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "length"
    # without include_usage no chunk speaks of it
    plain = events(packed.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": True}))
    assert plain[-1] == "[DONE]" and all("usage" not in json.loads(each) for each in plain[:-1])


def test_logprobs_are_those_of_the_model(served, expected, folders):
    text = PROMPTS[1] + expected[PROMPTS[1]]
    _, tokenizer = demo.load()
    model = AutoModelForCausalLM.from_pretrained(folders["dense"], dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    answer = served.complete(PROMPTS[1], logprobs=2, echo=True).choices[0]
    assert answer.text == text
    found = answer.logprobs
    assert "".join(found.tokens) == text and found.text_offset == [
        len("".join(found.tokens[:place])) for place in range(len(ids))
    ]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for place, token in enumerate(ids[1:], 1):
        assert found.token_logprobs[place] == pytest.approx(float(wanted[place - 1, token]), abs=2e-4)
        best = wanted[place - 1].topk(2)
        names = [tokenizer.decode([each]) for each in best.indices]
        top = found.top_logprobs[place]
        assert {*names, found.tokens[place]} == {*top}
        assert [top[name] for name in names] == pytest.approx(best.values.tolist(), abs=2e-4)


def test_logprobs_of_chat_are_those_of_its_completion(packed):
    completion = packed.complete(PROMPTS[4], logprobs=5, max_tokens=6).choices[0].logprobs
    chat = packed.chat(PROMPTS[4], logprobs=True, top_logprobs=5, max_tokens=6).choices[0].logprobs.content
    assert [each.token for each in chat] == completion.tokens
    assert [each.logprob for each in chat] == pytest.approx(completion.token_logprobs, abs=2e-4)
    for each, token in zip(chat, completion.tokens, strict=True):
        assert bytes(each.bytes).decode() == token and len(each.top_logprobs) == 5
    assert packed.chat(PROMPTS[4], max_tokens=2).choices[0].logprobs is None


def test_a_prompt_alone_is_scored_without_a_token_more(packed):
    answer = packed.complete(PROMPTS[0], max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == PROMPTS[0] and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens


def test_sampling_is_by_temperature_and_seed(served):
    """The folder's generation config has no do_sample: it is the request that says."""
    hot = {"temperature": 1.5, "max_tokens": 12}
    drawn = [served.complete(PROMPTS[0], seed=seed, **hot).choices[0].text for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    # left out it is 1: not greedy, and not always the same
    default = {
        served.client.completions.create(model=served.model, prompt=PROMPTS[0]).choices[0].text for _ in range(5)
    }
    assert len(default) > 1
    greedy = served.complete(PROMPTS[0], max_tokens=12).choices[0].text
    assert served.complete(PROMPTS[0], extra_body={"top_k": 1}, **hot).choices[0].text == greedy
    assert served.complete(PROMPTS[0], top_p=0.0, **hot).choices[0].text == greedy


def test_n_texts_of_each_prompt_come_in_order(served, expected):
    answer = served.complete([PROMPTS[0], PROMPTS[1]], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [expected[PROMPTS[place]] for place in (0, 0, 1, 1)]
    assert answer.usage.completion_tokens == 4 * TOKENS
    drawn = served.complete(PROMPTS[0], n=3, temperature=1.5, seed=5)
    assert len({choice.text for choice in drawn.choices}) == 3
    parts = dict.fromkeys(range(3), "")
    for chunk in served.complete(PROMPTS[0], n=3, temperature=1.5, seed=5, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(parts.values()) == [choice.text for choice in drawn.choices]


def test_prompts_may_be_token_ids(served, expected):
    _, tokenizer = demo.load()
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS[:2]]
    assert served.complete(ids[0]).choices[0].text == expected[PROMPTS[0]]
    assert [choice.text for choice in served.complete(ids).choices] == [expected[prompt] for prompt in PROMPTS[:2]]
    assert served.complete(ids[0], echo=True, max_tokens=0).choices[0].text == PROMPTS[0]


def test_a_text_ends_before_a_stop_sequence(served, expected):
    whole = expected[PROMPTS[0]]
    stop = whole[20:24]
    cut = whole[: whole.index(stop)]
    answer = served.complete(PROMPTS[0], stop=[stop, "never this"]).choices[0]
    assert (answer.text, answer.finish_reason) == (cut, "stop")
    parts = list(served.complete(PROMPTS[0], stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in parts) == cut
    assert parts[-1].choices[0].finish_reason == "stop"
    noted = served.complete(PROMPTS[0], stop=stop, logprobs=0).choices[0].logprobs
    assert all(offset < len(cut) for offset in noted.text_offset)


def test_penalties_and_bias_change_what_comes(served):
    _, tokenizer = demo.load()
    first = served.complete(PROMPTS[0], max_tokens=1).choices[0].text
    [token] = tokenizer(first, add_special_tokens=False)["input_ids"]
    assert served.complete(PROMPTS[0], max_tokens=1, logit_bias={token: -100}).choices[0].text != first
    always = served.complete(PROMPTS[0], max_tokens=4, logit_bias={token: 100}).choices[0].text
    assert always == first * 4
    eased = served.complete(PROMPTS[0], max_tokens=8, logit_bias={token: 15}, frequency_penalty=2, presence_penalty=2)
    assert 0 < eased.choices[0].text.count(first) < 8


def test_max_tokens_left_out_is_what_the_reference_says(packed):
    no_end = {"logit_bias": {0: -100}, "temperature": 0}
    answer = packed.client.completions.create(model=packed.model, prompt="a small", **no_end)
    assert answer.usage.completion_tokens == 16
    both = packed.chat("a small", max_tokens=3, max_completion_tokens=3)
    assert both.usage.completion_tokens == 3


def test_chat_goes_by_a_template_that_is_no_chatml(dense):
    """The answer begins behind the prompt; parts of text are joined; developer is system."""
    rendered = "system> Be brief.\nuser> one two\nIt is"
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    ask = {"model": dense.model, "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = dense.client.chat.completions.create(**ask)
    wanted = dense.complete(rendered, max_tokens=8)
    assert answer.choices[0].message.content == wanted.choices[0].text
    assert answer.usage == wanted.usage
    more = dense.client.chat.completions.create(**ask, extra_body={"chat_template_kwargs": {"prefix": "He"}})
    wanted = dense.complete(rendered.removesuffix("It is") + "He", max_tokens=8)
    assert more.choices[0].message.content == wanted.choices[0].text


USER = {"role": "user", "content": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
# body, status, param, code, and words of the message
REFUSED = {
    "completions": [
        ({"model": "gpt-9"}, 404, "model", "model_not_found", "got 'gpt-9'"),
        ({"model": None}, 400, "model", "missing_required_parameter", "model must be given"),
        ({"prompt": None}, 400, "prompt", "missing_required_parameter", "prompt must be given"),
        ({"prompt": ""}, 400, "prompt", None, "prompt must hold at least one token, got none"),
        ({"prompt": []}, 400, "prompt", None, "prompt must hold at least one token, got none"),
        ({"prompt": [[1], ["a"]]}, 400, "prompt", "invalid_value", "prompt must be a string, an array"),
        ({"prompt": [1, 2048]}, 400, "prompt", None, "token ids in 0..2047"),
        ({"prompt": "\ud800"}, 400, "prompt", None, "half a surrogate pair"),
        (
            {"prompt": [5] * (CONTEXT + 1)},
            400,
            "prompt",
            "context_length_exceeded",
            "200000 tokens, got 200001 in prompt",
        ),
        ({"max_tokens": CONTEXT}, 400, "prompt", "context_length_exceeded", "got 1 in prompt and 200000 to generate"),
        ({"max_tokens": "many"}, 400, "max_tokens", "invalid_value", "an integer of 0 or more"),
        ({"max_tokens": -1}, 400, "max_tokens", "invalid_value", "got -1"),
        ({"max_tokens": True}, 400, "max_tokens", "invalid_value", "got true"),
        ({"temperature": 2.5}, 400, "temperature", "invalid_value", "a number in 0..2, got 2.5"),
        ({"temperature": "hot"}, 400, "temperature", "invalid_value", 'got "hot"'),
        ({"top_p": -0.1}, 400, "top_p", "invalid_value", "a number in 0..1"),
        ({"top_k": -2}, 400, "top_k", "invalid_value", "an integer of -1 or more"),
        ({"n": 0}, 400, "n", "invalid_value", "an integer in 1..128"),
        ({"n": 1.5}, 400, "n", "invalid_value", "got 1.5"),
        ({"n": 100, "prompt": ["a", "b"]}, 400, "prompt", None, "at most 128 texts, got 2 times 100"),
        ({"best_of": 3}, 400, "best_of", "unsupported_value", "equal to n = 1, got 3"),
        ({"logprobs": 6}, 400, "logprobs", "invalid_value", "an integer in 0..5"),
        ({"logprobs": True}, 400, "logprobs", "invalid_value", "got true"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "invalid_value", "at most 4 strings"),
        ({"stop": [""]}, 400, "stop", "invalid_value", "none of them empty"),
        ({"seed": 1 << 63}, 400, "seed", "invalid_value", "an integer in"),
        ({"presence_penalty": 3}, 400, "presence_penalty", "invalid_value", "a number in -2..2"),
        ({"frequency_penalty": []}, 400, "frequency_penalty", "invalid_value", "a number in -2..2"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", None, 'token ids in 0..2047, got "x"'),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_value", "a number in -100..100"),
        ({"echo": "yes"}, 400, "echo", "invalid_value", "true or false"),
        ({"suffix": "end"}, 400, "suffix", "unsupported_parameter", "suffix must be left out"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", None, "with stream = true"),
        (
            {"messages": [USER]},
            400,
            "messages",
            "unknown_parameter",
            "unrecognized request argument supplied: messages",
        ),
        ({"colour": "red"}, 400, "colour", "unknown_parameter", "unrecognized request argument supplied: colour"),
    ],
    "chat/completions": [
        ({"messages": None}, 400, "messages", "missing_required_parameter", "messages must be given"),
        ({"messages": []}, 400, "messages", "invalid_value", "at least one message"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "invalid_value", "messages[0].content must be a string"),
        ({"messages": [USER, {"role": "tool", "content": "a"}]}, 400, "messages", None, "messages[1].role must be"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            400,
            "messages",
            "unsupported_value",
            'of type "image_url"',
        ),
        (
            {"messages": [USER | {"tool_calls": [{}]}]},
            400,
            "messages",
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value", "an integer of 1 or more"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_completion_tokens", None, "must not differ"),
        ({"max_completion_tokens": CONTEXT}, 400, "messages", "context_length_exceeded", "200000 to generate"),
        ({"logprobs": 3}, 400, "logprobs", "invalid_value", "true or false"),
        ({"top_logprobs": 2}, 400, "top_logprobs", None, "with logprobs = true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value", "an integer in 0..20"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter", "tools must be left out"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter", "left out"),
        ({"reasoning_effort": "low"}, 400, "reasoning_effort", "unsupported_parameter", "left out"),
        ({"chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs", None, "leave out tokenize"),
        ({"prompt": "a"}, 400, "prompt", "unknown_parameter", "unrecognized request argument supplied: prompt"),
    ],
}


@pytest.mark.parametrize("path", REFUSED)
def test_a_parameter_is_refused_by_name_and_the_server_lives(packed, expected, path):
    for body, status, param, code, words in REFUSED[path]:
        start = {"prompt": "a"} if path == "completions" else {"messages": [USER]}
        answer = packed.post(f"/v1/{path}", start | body)
        check_form(answer.json(), ERROR)
        error = answer.json()["error"]
        assert (answer.status, error["param"], error["code"]) == (status, param, code), (body, error)
        assert error["type"] == "invalid_request_error" and words in error["message"], error
    assert packed.complete(PROMPTS[0]).choices[0].text == expected[PROMPTS[0]]


def test_what_asks_for_nothing_is_accepted(packed):
    nothing = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": False,
        "n": 1,
        "stop": None,
        "user": "me",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "functions": None,
    }
    body = {"messages": [USER], "max_tokens": 1}
    assert packed.post("/v1/chat/completions", body | nothing).status == 200
    assert packed.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "best_of": 1, "suffix": None}).status == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "the body must be JSON"),
        (b"", "the body must be JSON"),
        (b"[1]", "the body must be a JSON object, got an array"),
        (b'{"temperature": NaN}', "NaN is no number of JSON"),
        (b"\xff", "the body must be JSON"),
        (b"[" * 100_000, "the body must be JSON"),
    ],
)
def test_a_body_that_is_no_request_is_refused(packed, content, words):
    answer = packed.raw("POST", "/v1/completions", content)
    check_form(answer.json(), ERROR)
    assert answer.status == 400 and words in answer.json()["error"]["message"]


def test_other_places_and_larger_bodies_are_refused_in_the_same_form(packed):
    for method, path, status in (
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models/gpt-9", 404),
    ):
        answer = packed.raw(method, path)
        check_form(answer.json(), ERROR)
        assert answer.status == status
    answer = packed.raw("POST", "/v1/completions", b" " * (MOST_BYTES + 1))
    assert answer.status == 413 and str(MOST_BYTES) in answer.json()["error"]["message"]


def test_a_key_is_asked_for_where_one_is_set(dense, packed):
    other = openai.OpenAI(base_url=dense.client.base_url, api_key="guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Authorization") as refused:
        other.models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        other.completions.create(model=dense.model, prompt="a")
    assert dense.raw("GET", "/health").status == 200
    assert [model.id for model in packed.client.with_options(api_key="any").models.list()] == [packed.model]


def test_the_template_may_refuse(packed):
    with pytest.raises(openai.BadRequestError, match="messages must hold text"):
        packed.chat(" ")


def test_the_model_goes_by_the_name_it_was_served_under(served):
    [model] = served.client.models.list()
    assert (model.id, model.object) == (served.model, "model")
    assert served.client.models.retrieve(served.model).id == served.model
    assert served.health()["status"] == "ok"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(served, stream):
    """Eight rows are held by generations of minutes until their clients go."""
    body = {"model": served.model, "prompt": PROMPTS[0], "max_tokens": 150_000, "n": 8, "stream": stream}
    body |= {"logit_bias": {"0": -100}}
    content = json.dumps(body).encode()
    with socket.create_connection((served.client.base_url.host, served.client.base_url.port)) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n"
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        served.until(lambda health: health["texts"] == 8)
    served.until(lambda health: health["texts"] == health["waiting"] == 0)


def test_where_it_is_and_how_to_try_it_are_told(served, dense):
    log = served.said()
    [command] = re.findall(r"^try: (curl .*)$", log, re.MULTILINE)
    assert ("Bearer KEY" in command) == (served is dense)
    words = [word.replace("Bearer KEY", f"Bearer {KEY}") for word in shlex.split(command)]
    if shutil.which("curl"):
        done = subprocess.run([*words, "--silent", "--noproxy", "*"], capture_output=True, check=True)
        check_form(json.loads(done.stdout)["usage"], USAGE)


# the last test of each server
def test_ctrl_c_ends_it_while_a_generation_of_minutes_runs_and_frees_the_port(served):
    seconds, code, told = served.end_by_ctrl_c_while_generating()
    log = served.said()
    assert code == 0, log
    assert told == "the server ends"
    assert GRACE_SECONDS < 5
    assert seconds < 30  # 5 when nothing else runs: this leaves room for a busy machine, and none for the generation
    assert "the server has ended" in log
    assert "Traceback" not in log
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(re.search(r"127.0.0.1:(\d+)/v1", log)[1])))
