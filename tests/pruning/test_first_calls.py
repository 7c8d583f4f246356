"""What is called first, from memory: a pattern for a recipe, text for windows, a name for a model."""

import pytest
import torch
from small_text import make_tokenizer, prose

import moesparse
from moesparse import demo
from moesparse.errors import MoESparseError, UsageError
from moesparse.testing import tiny_model

TEXTS = [demo.text("calibration", domain)[:6000] for domain in ("novel", "play")]
FAST = {"saliency": "wanda", "update": "none"}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("given", "pattern"), [("4:8", "4:8"), (0.25, "0.25"), ("0.25", "0.25")])
def test_a_pattern_stands_for_the_recipe_of_it(given, pattern):
    found = moesparse.Recipe.of(given)
    assert found == moesparse.Recipe(weights=pattern)
    model, other = tiny_model("mixtral"), tiny_model("mixtral")
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    assert moesparse.prune(model, ids, given).recipe == moesparse.prune(other, ids, found).recipe
    assert same(weights(model), weights(other))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "2:4"}, r'recipe must be a moesparse\.Recipe or a pattern such as "2:4" or 0\.5, got dict'),
        (True, "recipe must be a moesparse.Recipe or a pattern .*, got bool"),
        ("two of four", "pattern must be n:m such as \"2:4\" or a ratio such as 0.5, got 'two of four'"),
        (1.5, "pattern ratio must be between 0 and 1"),
    ],
)
def test_what_is_no_recipe(given, message):
    with pytest.raises(UsageError, match=message):
        moesparse.prune(tiny_model("mixtral"), torch.ones(1, 4, dtype=torch.int64), given)


@pytest.mark.parametrize(("given", "got"), [("demo", "'demo'"), ((1, 2), "tuple"), (None, "NoneType")])
def test_what_is_no_model_is_told_what_loads_one(given, got):
    message = rf"model must be a model of transformers in memory, got {got}: model, tokenizer = moesparse\.load_pretr"
    for call in (moesparse.prune, moesparse.calibrate, lambda model, _: moesparse.find_moe_blocks(model)):
        with pytest.raises(UsageError, match=message):
            call(given, torch.ones(1, 4, dtype=torch.int64))


def test_the_embedded_model_is_called_demo(tmp_path, monkeypatch):
    model, tokenizer = moesparse.load_pretrained("demo", dtype=torch.float32)
    assert same(weights(model), weights(demo.load()[0]))
    assert len(tokenizer) == model.config.vocab_size
    recipe = moesparse.Recipe(saliency="magnitude", update="none")
    report = moesparse.prune_checkpoint("demo", tmp_path / "out", None, recipe)
    assert report.sparsity == 0.5
    # a folder of that name goes before
    monkeypatch.chdir(tmp_path)
    tiny_model("mixtral").save_pretrained("demo")
    assert moesparse.load_pretrained("demo")[0].config.vocab_size != model.config.vocab_size


def test_text_is_calibrated_on_as_the_windows_of_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    model, tokenizer = demo.load()
    context = moesparse.evaluate.context_length(model)
    windows = moesparse.text.document_windows(TEXTS, tokenizer, max_length=context)
    assert windows.shape[1] == context and len(windows) > 4
    wanted = moesparse.calibrate(model, windows)
    rows = datasets.Dataset.from_dict({"text": TEXTS, "source": ["a", "b"]})
    for given in (TEXTS, tuple(TEXTS), ({"text": each} for each in TEXTS), rows, rows.to_iterable_dataset()):
        # the tokenizer is at hand in the folder that the model was loaded from
        found = moesparse.calibrate(model, given)
        assert (found.text_hash, found.tokens) == (wanted.text_hash, windows.numel())
    stored = moesparse.calibrate_checkpoint("demo", tmp_path / "stats", TEXTS)
    assert stored.text_hash == wanted.text_hash
    recipe = moesparse.Recipe(**FAST)
    report = moesparse.prune_checkpoint("demo", tmp_path / "out", TEXTS, recipe)
    again = moesparse.prune(model, TEXTS, recipe)
    assert report.calibration == again.calibration
    assert again.calibration["tokens"] == windows.numel()


def test_a_model_without_a_folder_takes_the_tokenizer_that_is_given():
    texts = [prose(60, seed=seed) for seed in range(3)]
    model, tokenizer = tiny_model("mixtral", vocab_size=320), make_tokenizer()
    with pytest.raises(UsageError, match=r"tokenizer must come with calibration as text, got none, and MixtralForC"):
        moesparse.prune(model, texts, moesparse.Recipe(**FAST))
    with pytest.raises(UsageError, match=r"tokenizer must come with windows as text, got none, and MixtralForCausalL"):
        moesparse.calibrate(model, texts)
    context = moesparse.evaluate.context_length(model)
    windows = moesparse.text.document_windows(texts, tokenizer, max_length=context)
    report = moesparse.prune(model, texts, moesparse.Recipe(**FAST), tokenizer=tokenizer)
    assert report.calibration["tokens"] == windows.numel()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("c4.jsonl", r"must be token windows or a list of texts, got the string 'c4.jsonl': for a file give moesparse"),
        ([], r"windows must be a LongTensor \[n, t\] with at least one token, got list"),
        ([[1, 2, 3]], r"windows must be a LongTensor \[n, t\] with at least one token, got list"),
        (["", " "], "text source calibration must hold text, got none"),
        (["a", 3], 'record 2 of calibration must have a string "text", got int'),
        ([{"body": "a"}], 'record 1 of calibration must have a string "text", got body'),
        ({"train": ["a"]}, "must be token windows, text, or statistics by domain, got a dict of train: of a dataset"),
    ],
)
def test_what_is_no_calibration(given, message):
    model, _ = demo.load()
    before = weights(model)
    with pytest.raises(MoESparseError, match=message):
        moesparse.prune(model, given, moesparse.Recipe(**FAST))
    assert same(weights(model), before)


def test_little_text_is_one_window_of_its_own_length():
    tokenizer = make_tokenizer()
    (window,) = moesparse.text.document_windows(["the quick", "brown fox"], tokenizer, length=512)
    stream = [i for text in ("the quick", "brown fox") for i in moesparse.text.encode_document(tokenizer, text)]
    assert window.tolist() == stream
    with pytest.raises(UsageError, match="samples must be at least 1, got 0"):
        moesparse.text.document_windows(["a"], tokenizer, samples=0)


def test_much_text_gives_as_many_windows_as_are_asked_for():
    tokenizer = make_tokenizer()
    texts = [prose(80, seed=seed) for seed in range(20)]
    stream = [i for text in texts for i in moesparse.text.encode_document(tokenizer, text)]
    windows = moesparse.text.document_windows(iter(texts), tokenizer, samples=6, length=32)
    assert windows.shape == (6, 32)
    places = {tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)}
    assert {tuple(row) for row in windows.tolist()} <= places
    other = moesparse.text.document_windows(iter(texts), tokenizer, samples=6, length=32, seed=1)
    assert not torch.equal(windows, other)
