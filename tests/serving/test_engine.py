"""The engine in this process: who joins and leaves, copies, failures; greedy texts against transformers' generate."""

import queue
import time

import pytest
import torch

from moesparse import demo
from moesparse.evaluate import generate
from moesparse.serving.batch import Batch
from moesparse.serving.engine import Ended, Engine, Text
from moesparse.serving.sampling import Sampling

GREEDY = Sampling(temperature=0)
PROMPTS = ("The king said unto", "It is a truth universally acknowledged", "a small", "And the LORD")


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = demo.load()
    return model.float().eval(), tokenizer


@pytest.fixture
def engine(loaded):
    made = Engine(*loaded, rows=3)
    yield made
    assert made.close(10)


def ids(loaded, prompt):
    return loaded[1](prompt, add_special_tokens=False)["input_ids"]


class Reader:
    """What texts gain, in the order of their ends."""

    def __init__(self, engine, *texts):
        self.deltas = queue.Queue()
        self.texts, self.finish, self.ended = [""] * len(texts), [None] * len(texts), []
        engine.submit(texts, self.deltas.put)

    def read(self):
        while len(self.ended) < len(self.texts):
            delta = self.deltas.get(timeout=60)
            self.texts[delta.index] += delta.text
            if delta.last:
                self.finish[delta.index] = delta.error or delta.finish
                self.ended.append(delta.index)
        return self.texts


def test_more_texts_than_rows_get_what_transformers_gives_each_alone(loaded, engine):
    expected = generate(*loaded, PROMPTS, max_new_tokens=12)
    texts = [Text(ids(loaded, prompt), 12, GREEDY, index=place) for place, prompt in enumerate(PROMPTS)]
    assert Reader(engine, *texts).read() == expected
    assert engine.load == (0, 0)


def test_copies_of_a_prompt_are_read_once_and_drawn_apart(loaded, engine, monkeypatch):
    added = []
    add = Batch.add
    monkeypatch.setattr(Batch, "add", lambda self, *args, **more: added.append(args) or add(self, *args, **more))
    prompt = ids(loaded, PROMPTS[0])
    sampling = Sampling(temperature=2.0, seed=3)
    both = Reader(engine, *(Text(prompt, 8, sampling, index=place) for place in range(2))).read()
    assert [(len(given[0]), given[1]) for given in added] == [(len(prompt), 2)]
    assert both[0] != both[1]
    # the same draws beside others and alone
    assert Reader(engine, Text(prompt, 8, sampling)).read() == both[:1]


def test_one_that_is_cancelled_leaves_its_row_to_who_waits(loaded, engine):
    prompt = ids(loaded, PROMPTS[0])
    long = [Text(prompt, 10_000, Sampling(logit_bias={0: -100.0}), index=place) for place in range(3)]
    held = Reader(engine, *long)
    assert held.deltas.get(timeout=60).text
    waiting = Reader(engine, Text(ids(loaded, PROMPTS[1]), 4, GREEDY))
    engine.cancel(long[:1])
    assert waiting.read() == generate(*loaded, PROMPTS[1:2], max_new_tokens=4)
    engine.cancel(long)
    until = time.monotonic() + 30
    while engine.load != (0, 0):
        assert time.monotonic() < until, engine.load
        time.sleep(0.01)


def test_one_that_is_cancelled_before_its_turn_never_has_it(loaded, engine):
    text = Text(ids(loaded, PROMPTS[0]), 4, GREEDY)
    text.cancelled = True
    reader = Reader(engine, text)
    assert Reader(engine, Text(ids(loaded, PROMPTS[1]), 1, GREEDY)).read()
    assert reader.deltas.empty() and engine.load == (0, 0)


@pytest.mark.parametrize("place", ["add", "step"])
def test_a_pass_that_fails_ends_its_texts_and_not_the_server(loaded, engine, monkeypatch, place):
    def fails(*_args, **_more):
        raise MemoryError("no memory")

    prompt = ids(loaded, PROMPTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(Batch, place, fails)
        reader = Reader(engine, Text(prompt, 4, GREEDY))
        reader.read()
        assert isinstance(reader.finish[0], MemoryError)
    assert Reader(engine, Text(prompt, 4, GREEDY)).read() == generate(*loaded, PROMPTS[:1], max_new_tokens=4)


@pytest.mark.parametrize(("place", "survives"), [("_forward", True), ("_append", False)])
def test_a_prompt_that_fails_takes_others_only_where_rows_were_being_joined(
    loaded, engine, monkeypatch, place, survives
):
    prompts = [ids(loaded, prompt) for prompt in PROMPTS]
    whole = getattr(Batch, place)

    def fails(self, first, *args, **more):
        if (place == "_append" and self.lengths) or (place == "_forward" and first.tolist() == prompts[1:2]):
            raise MemoryError("no memory")
        return whole(self, first, *args, **more)

    monkeypatch.setattr(Batch, place, fails)
    texts = [Text(prompt, 12, GREEDY, index=index) for index, prompt in enumerate(prompts[:2])]
    reader = Reader(engine, *texts)
    reader.read()
    assert isinstance(reader.finish[1], MemoryError)
    if survives:
        assert reader.texts[:1] == generate(*loaded, PROMPTS[:1], max_new_tokens=12)
    else:
        assert isinstance(reader.finish[0], MemoryError)
    monkeypatch.undo()
    assert Reader(engine, Text(prompts[2], 4, GREEDY)).read() == generate(*loaded, PROMPTS[2:3], max_new_tokens=4)


def test_rows_that_cannot_be_joined_go_one_after_the_other(loaded, monkeypatch):
    monkeypatch.setattr(Batch, "joinable", lambda self: False)
    engine = Engine(*loaded, rows=8)
    assert engine.rows == 1
    expected = generate(*loaded, PROMPTS[:2], max_new_tokens=6)
    texts = [Text(ids(loaded, prompt), 6, GREEDY, index=place) for place, prompt in enumerate(PROMPTS[:2])]
    reader = Reader(engine, *texts)
    assert reader.read() == expected and reader.ended == [0, 1]
    assert engine.close(10)


def test_a_prompt_is_scored_as_the_model_scores_it(loaded, engine):
    model, _ = loaded
    prompt = ids(loaded, PROMPTS[1])
    seen = queue.Queue()
    engine.submit([Text(prompt, 0, GREEDY, alternatives=2, score_prompt=True)], seen.put)
    delta = seen.get(timeout=60)
    assert (delta.finish, delta.text, delta.tokens) == ("length", "", 0)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    assert "".join(note.text for note in delta.prompt) == PROMPTS[1]
    assert delta.prompt[0].logprob is None
    for place, note in enumerate(delta.prompt[1:]):
        assert note.logprob == pytest.approx(float(wanted[place, prompt[place + 1]]), abs=1e-4)
        best = wanted[place].topk(2)
        assert [each.logprob for each in note.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_who_is_left_when_the_engine_ends_is_told(loaded):
    engine = Engine(*loaded, rows=1)
    endless = Sampling(logit_bias={0: -100.0})
    texts = [Text(ids(loaded, prompt), 10_000, endless, index=place) for place, prompt in enumerate(PROMPTS[:2])]
    reader = Reader(engine, *texts)
    reader.deltas.get(timeout=60)
    assert engine.close(30)
    late = Reader(engine, Text(texts[0].prompt, 1, GREEDY))
    for each in (reader, late):
        each.read()
        assert all(isinstance(finish, Ended) for finish in each.finish)
