"""The application in this process: what is told where the model fails, all rows are taken or chat is not possible."""

import json

import pytest
from asgi import ask

from moesparse import demo

pytest.importorskip("starlette")
from moesparse.serving import app as application
from moesparse.serving.batch import Batch
from moesparse.serving.engine import Engine
from moesparse.serving.server import PLAIN_TEMPLATE


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = demo.load()
    return model.float().eval(), tokenizer


@pytest.fixture
def served(loaded):
    engine = Engine(*loaded, rows=2)
    yield application.Served("demo", engine, loaded[1], vocabulary=2048, context=256)
    assert engine.close(10)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["add", "step"])
def test_a_model_that_fails_is_told_in_the_form_of_an_error(served, monkeypatch, stream, place):
    def fails(*_args, **_more):
        raise RuntimeError("out of memory, it says")

    monkeypatch.setattr(Batch, place, fails)
    status, text = ask(served, "/v1/completions", prompt="a small", max_tokens=3, stream=stream)
    assert status == (200 if stream else 500)
    assert "[DONE]" not in text
    error = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert error["message"] == "the server failed: RuntimeError: out of memory, it says"


def test_who_comes_when_too_many_wait_is_told_so(served, monkeypatch):
    monkeypatch.setattr(application, "MOST_WAITING", 2)
    status, text = ask(served, "/v1/completions", prompt="a", n=3)
    assert status == 429
    error = json.loads(text)["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert ask(served, "/v1/completions", prompt="a", n=2, max_tokens=1)[0] == 200


def test_chat_is_refused_where_there_is_no_template(served):
    messages = [{"role": "user", "content": "a"}]
    status, text = ask(served, "/v1/chat/completions", messages=messages)
    assert status == 400
    assert json.loads(text)["error"]["message"] == (
        "this model has no chat template: use /v1/completions, or start the server with --chat-template plain or a "
        "template file"
    )


def test_an_answer_ends_with_the_context(served, loaded):
    with_template = application.Served("demo", served.engine, loaded[1], 2048, 12, PLAIN_TEMPLATE)
    messages = [{"role": "user", "content": "a small"}]
    _, text = ask(with_template, "/v1/chat/completions", messages=messages, logit_bias={"0": -100})
    usage = json.loads(text)["usage"]
    assert usage["total_tokens"] == 12 and json.loads(text)["choices"][0]["finish_reason"] == "length"
    _, text = ask(with_template, "/v1/completions", prompt="a small", logit_bias={"0": -100})
    assert json.loads(text)["usage"]["total_tokens"] == 12
    full = [5] * 12
    status, text = ask(with_template, "/v1/completions", prompt=full)
    assert status == 400 and "context holds 12 tokens, got 12 in prompt" in text
