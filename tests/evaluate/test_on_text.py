"""Perplexity against fp64 by hand, on models whose head is the last step and on models where it is not."""

import copy
import math

import pytest
import torch
from small_text import make_tokenizer, prose, write, write_jsonl
from torch import nn

from moesparse import evaluate
from moesparse.errors import MoESparseError, UsageError
from moesparse.evaluate import Perplexity, on_text

VOCABULARY = 300


class Uniform(nn.Module):
    """Every token is as likely as the next; no transformers model, its logits are a plain tensor."""

    def __init__(self, vocabulary: int = 50):
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, ids, attention_mask=None):
        return torch.zeros(*ids.shape, self.vocabulary)


def tiny(architecture: str = "Mixtral", **options) -> nn.Module:
    """A random MoE with 2 layers; weights large enough that the losses of tokens differ by several nats."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        **options,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def some_windows(n: int = 5, t: int = 16) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (n, t), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def losses_by_hand(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """[n, t - 1] fp64, one window a pass, in the model's own arithmetic up to the logits."""
    rows = []
    for window in windows:
        log_p = model(window[None]).logits[0].double().log_softmax(-1)
        rows.append(torch.stack([-log_p[i - 1, window[i]] for i in range(1, len(window))]))
    return torch.stack(rows)


# Perplexity


def test_perplexity_is_that_of_fp64_log_softmax(model):
    windows = some_windows()
    losses = losses_by_hand(model, windows)
    got = evaluate.perplexity(model, windows, batch_size=2)
    assert got.tokens == 5 * 15
    # fp32 logits of size 10 carry an error of 1e-6 each
    assert got.nll == pytest.approx(float(losses.sum()), rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    assert losses.std() > 1, "the test model must tell tokens apart"


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_change_nothing(model, batch_size):
    windows = some_windows()
    wanted = evaluate.perplexity(model, windows, batch_size=5).nll
    assert evaluate.perplexity(model, windows, batch_size=batch_size).nll == pytest.approx(wanted, rel=1e-6)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    got = evaluate.perplexity(Uniform(), torch.randint(0, 50, (3, 7)))
    assert got.perplexity == pytest.approx(50, rel=1e-6)
    assert got.tokens == 3 * 6
    assert got.bits_per_byte is None


def test_bits_per_byte_by_hand():
    # 18 tokens of log2(50) bits each, on 40 bytes
    got = evaluate.perplexity(Uniform(), torch.randint(0, 50, (3, 7)), byte_count=40)
    assert got.bits_per_byte == pytest.approx(18 * math.log2(50) / 40, rel=1e-6)


def test_the_shortest_windows(model):
    # two tokens: one is scored
    windows = some_windows(1, 2)
    got = evaluate.perplexity(model, windows)
    assert got.tokens == 1
    assert got.nll == pytest.approx(float(losses_by_hand(model, windows)), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_padding_is_neither_scored_nor_a_context(model, side, as_tuple):
    windows = some_windows(3, 10)
    mask = torch.ones_like(windows)
    padded, alone = windows.clone(), []
    for row, pad in enumerate([0, 3, 6]):
        gone = slice(0, pad) if side == "left" else slice(10 - pad, 10)
        mask[row, gone] = 0
        padded[row, gone] = 7
        alone.append(windows[row][mask[row].bool()])
    wanted = sum(float(losses_by_hand(model, window[None]).sum()) for window in alone)
    got = evaluate.perplexity(model, (padded, mask)) if as_tuple else None
    got = got or evaluate.perplexity(model, padded, attention_mask=mask)
    assert got.tokens == 9 + 6 + 3
    assert got.nll == pytest.approx(wanted, rel=1e-5)


def test_overlapping_windows_score_every_token_once(model):
    stream = some_windows(1, 40)[0]
    windows = stream.unfold(0, 16, 4)
    by_hand = losses_by_hand(model, windows)
    wanted = float(by_hand[0].sum() + by_hand[1:, 11:].sum())
    got = evaluate.perplexity(model, windows, batch_size=3, context=12)
    assert got.tokens == 39
    assert got.nll == pytest.approx(wanted, rel=1e-6)


# The head


def big_logit_tensors(monkeypatch, model, windows, rows: int) -> tuple[int, Perplexity]:
    """The most logits rows that one call of the head makes when chunks hold `rows`."""
    monkeypatch.setattr(on_text, "_CHUNK_LOGITS", rows * VOCABULARY)
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, output: seen.append(output.numel() // VOCABULARY)
    )
    result = evaluate.perplexity(model, windows)
    handle.remove()
    return max(seen), result


def test_the_head_is_applied_to_a_few_rows_at_a_time(monkeypatch, model):
    windows = some_windows(4, 16)
    wanted = float(losses_by_hand(model, windows).sum())
    most, got = big_logit_tensors(monkeypatch, model, windows, rows=6)
    assert most == 6
    assert got.nll == pytest.approx(wanted, rel=1e-6)


def test_logits_that_are_scaled_after_the_head_are_respected(monkeypatch):
    # granitemoe divides its logits by a constant: a head applied by itself would miss it
    model = tiny("GraniteMoe", logits_scaling=3.0)
    windows = some_windows()
    got = evaluate.perplexity(model, windows)
    assert got.nll == pytest.approx(float(losses_by_hand(model, windows).sum()), rel=1e-6)
    # where the model makes all logits itself, fewer windows go in at a time
    monkeypatch.setattr(on_text, "_BATCH_LOGITS", 2 * 16 * VOCABULARY)
    calls = []
    evaluate.perplexity(model, windows, batch_size=5, progress=lambda event: calls.append(event.done))
    assert calls == [0, 2, 4, 5]


def test_a_half_precision_model_is_scored_from_widened_logits(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    windows = some_windows()
    got = evaluate.perplexity(half, windows)
    # the logits are bf16 on both sides; a sum or softmax in bf16 would be off by 1e-3 and more
    assert got.nll == pytest.approx(float(losses_by_hand(half, windows).sum()), rel=1e-4)


# What is left behind


def test_the_model_is_left_as_it_was(model):
    model = copy.deepcopy(model)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    evaluate.perplexity(model, some_windows())
    assert [module.training for module in model.modules()] == before
    assert not model.get_output_embeddings()._forward_hooks
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off(model):
    dropping = tiny(attention_dropout=0.9).train()
    assert evaluate.perplexity(dropping, some_windows()) == evaluate.perplexity(model, some_windows())


def test_progress_counts_windows(model):
    events = []
    evaluate.perplexity(model, some_windows(), batch_size=2, progress=events.append)
    assert [(e.done, e.total, e.unit, e.tokens) for e in events] == [
        (0, 5, "window", 0),
        (2, 5, "window", 2 * 16),
        (4, 5, "window", 4 * 16),
        (5, 5, "window", 5 * 16),
    ]


# Files


def test_files_are_scored_each_and_all_together(tmp_path, model, tokenizer):
    files = [write(tmp_path / "a.txt", prose(60)), write_jsonl(tmp_path / "b.jsonl", [prose(50), prose(30, seed=1)])]
    events = []
    got = evaluate.perplexity_of_files(model, tokenizer, files, 16, progress=events.append)
    assert list(got.files) == files
    one, two = got.files.values()
    assert got.overall.nll == one.nll + two.nll
    assert got.overall.tokens == one.tokens + two.tokens
    assert got.overall.byte_count == one.byte_count + two.byte_count
    assert str(got.protocol) == "windows of 16 tokens, stride 16, scored independently, BOS once a document"
    assert {(event.stage, event.name) for event in events} == {("score a.txt", files[0]), ("score b.jsonl", files[1])}
    shown = got.as_dict()
    assert shown["perplexity"] == got.overall.perplexity
    read = {"documents": 2, "chats": 0, "chat_template": None, "left_out": 0}
    assert shown["files"][1] == {"file": files[1], **two.as_dict(), **read}
    assert shown["protocol"] == {"window": 16, "stride": 16, "bos": True}


def test_a_whole_file_in_bits_per_byte(tmp_path, tokenizer):
    # a uniform model spends log2(300) bits on every token of the file but BOS
    content = "über" * 11
    ids = tokenizer(content)["input_ids"]
    file = write(tmp_path / "a.txt", content)
    got = evaluate.perplexity_of_files(Uniform(300), tokenizer, [file], len(ids))
    by_hand = (len(ids) - 1) * math.log2(300) / len(content.encode())
    assert got.overall.bits_per_byte == pytest.approx(by_hand, rel=1e-6)


def test_a_stride_gives_context_and_scores_once(tmp_path, model, tokenizer):
    content = prose(60)
    stream = torch.tensor(tokenizer(content)["input_ids"])
    got = evaluate.perplexity_of_files(model, tokenizer, [write(tmp_path / "a.txt", content)], 16, 8)
    windows = stream.unfold(0, 16, 8)
    by_hand = losses_by_hand(model, windows)
    assert got.overall.nll == pytest.approx(float(by_hand[0].sum() + by_hand[1:, 7:].sum()), rel=1e-6)
    assert got.overall.tokens == 15 + 8 * (len(windows) - 1)
    assert got.protocol.stride == 8


def test_windows_are_bounded_by_the_models_context(tmp_path, model, tokenizer):
    got = evaluate.perplexity_of_files(model, tokenizer, [write(tmp_path / "a.txt", prose(200))])
    assert got.protocol.window == 64


def test_figures_without_bytes_have_none_together():
    assert (Perplexity(1.0, 2, 3) + Perplexity(1.0, 2)).bits_per_byte is None
    assert Perplexity(1.0, 2, 3) + Perplexity(2.0, 5, 4) == Perplexity(3.0, 7, 7)
    # a mean of 1000 nats is past what exp can give
    assert Perplexity(1000.0, 1).perplexity == math.inf


# Generation


def test_generation_is_the_models_own_greedy_choice(model, tokenizer):
    prompts = ["the quick", "fox"]
    got = evaluate.generate(model, tokenizer, prompts, max_new_tokens=6)
    for prompt, text in zip(prompts, got, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        added = []
        while len(added) < 6 and 1 not in added:
            added.append(int(model(torch.tensor([ids + added])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(added, skip_special_tokens=True)


def test_generation_ignores_a_config_that_samples(model, tokenizer):
    sampling = copy.deepcopy(model)
    sampling.generation_config.update(do_sample=True, temperature=5.0, top_k=0)
    assert evaluate.generate(sampling, tokenizer, ["fox"]) == evaluate.generate(model, tokenizer, ["fox"])


# Bad input


class Poisoned(Uniform):
    """Knows no next token after token 7."""

    def forward(self, ids, attention_mask=None):
        return torch.where((ids == 7)[..., None], torch.nan, super().forward(ids))


def test_a_loss_that_is_not_finite_names_window_and_token(tmp_path, tokenizer):
    windows = torch.zeros(6, 10, dtype=torch.int64)
    windows[3, 4] = 7
    # nobody asks what follows the last token
    windows[1, 9] = 7
    with pytest.raises(MoESparseError, match="must give a finite loss, got nan at token 5 of window 3"):
        evaluate.perplexity(Poisoned(), windows, batch_size=2)
    file = write(tmp_path / "a.txt", tokenizer.convert_ids_to_tokens(7) * 30)
    with pytest.raises(MoESparseError, match=r"a\.txt: the model must give a finite loss, got nan at token"):
        evaluate.perplexity_of_files(Poisoned(300), tokenizer, [file], 16)


def test_a_model_with_nan_weights(model):
    broken = copy.deepcopy(model)
    windows = some_windows() % 200
    windows[3, 4] = 250
    broken.get_input_embeddings().weight.data[250] = torch.nan
    with pytest.raises(MoESparseError, match=r"got nan at token \d+ of window 3"):
        evaluate.perplexity(broken, windows, batch_size=2)


@pytest.mark.parametrize(
    ("windows", "options", "match"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, r"windows must be integers \[n >= 1, t >= 2\], got torch.int64 \[3\]"),
        (torch.zeros(0, 4, dtype=torch.int64), {}, r"got torch.int64 \[0, 4\]"),
        (torch.zeros(2, 1, dtype=torch.int64), {}, r"got torch.int64 \[2, 1\]"),
        (torch.zeros(2, 4), {}, r"got torch.float32 \[2, 4\]"),
        (torch.full((1, 4), VOCABULARY), {}, r"token ids in 0\.\.299, got 300; the tokenizer is not this model's"),
        (torch.full((1, 4), -1), {}, r"token ids in 0\.\.299, got -1"),
        (some_windows(), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            some_windows(),
            {"attention_mask": torch.ones(5, 3)},
            r"must have the shape \[5, 16\] of windows, got \[5, 3\]",
        ),
        (some_windows(), {"attention_mask": torch.zeros(5, 16)}, "must leave a token to score, got none"),
        # not one of the two in silence
        ((some_windows(), None), {"attention_mask": torch.ones(5, 16)}, "attention_mask must be left out .* got both"),
    ],
)
def test_windows_that_cannot_be_scored(model, windows, options, match):
    with pytest.raises(UsageError, match=match):
        evaluate.perplexity(model, windows, **options)


def test_ids_beyond_a_plain_models_logits():
    with pytest.raises(UsageError, match=r"token ids in 0\.\.49, got 50"):
        evaluate.perplexity(Uniform(50), torch.full((1, 4), 50))


def test_bad_arguments_of_files_and_generation(model, tokenizer):
    with pytest.raises(UsageError, match="files must name at least one text, got none"):
        evaluate.perplexity_of_files(model, tokenizer, [])
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1, got 0"):
        evaluate.generate(model, tokenizer, ["fox"], max_new_tokens=0)
    with pytest.raises(UsageError, match="a prompt must hold at least one token, got ''"):
        evaluate.generate(model, make_tokenizer(bos=False), [""])
