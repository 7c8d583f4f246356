"""Layer by layer is the same model: the stream's hidden states are the ones inside an ordinary forward."""

import pytest
import torch
from image_data import record
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.models.blocks import decoder_layers, find_moe_blocks
from moesparse.models.stream import LayerCall, LayerStream
from moesparse.testing import WRAPPERS, tiny_model

# plain; shared experts with dense first layers; masks by layer type; state-space layers between; rotary per layer type
FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "nemotron_h", "qwen3_next", "minimax"]


def outputs_inside(model, layers, ids, mask=None):
    seen = []
    handles = [
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def stream_of(model, ids, mask=None, batch_size=2):
    layers, _ = decoder_layers(model, find_moe_blocks(model))
    return LayerStream(model, layers, ids, mask, batch_size), layers


def tokens(n, length, seed=0):
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_gives_what_the_model_gives(family):
    model = tiny_model(family)
    ids = tokens(5, 12)  # 5 windows in batches of 2: the last batch is smaller
    stream, layers = stream_of(model, ids)
    for position in range(len(layers)):
        counted = sum(stream.run(position, keep=True))
        assert counted == ids.numel()
        for number in range(len(stream)):
            want = outputs_inside(model, layers, ids[2 * number : 2 * number + 2])[position]
            assert torch.equal(stream.hidden[number], want)


def test_padding_reaches_the_attention_and_the_token_masks():
    model = tiny_model("mixtral")
    ids, mask = tokens(4, 10), torch.ones(4, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    mask[3, :4] = 0
    stream, layers = stream_of(model, ids, mask)
    assert torch.equal(torch.cat(stream.token_masks), mask.bool().flatten())
    for position in range(len(layers)):
        list(stream.run(position, keep=True))
    want = torch.cat([outputs_inside(model, layers, ids[i : i + 2], mask[i : i + 2])[-1] for i in (0, 2)])
    # the first batch is padded behind and needs no mask, which is another order of adding up
    torch.testing.assert_close(torch.cat(list(stream.hidden))[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-5)
    assert torch.equal(stream.hidden[1][mask[2:].bool()], want[2:][mask[2:].bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_is_as_if_the_window_ended_there(family):
    """It needs no mask of the attention: real tokens get what they get in a window of their own length."""
    model = tiny_model(family)
    ids, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.bool)
    ends = (12, 7, 3, 1)
    for row, end in enumerate(ends):
        mask[row, end:] = False
    stream, layers = stream_of(model, ids, mask)
    for position in range(len(layers)):
        list(stream.run(position, keep=True))
        hidden = torch.cat(list(stream.hidden))
        for row, end in enumerate(ends):
            want = outputs_inside(model, layers, ids[row : row + 1, :end])[position][0]
            # another length is another order of adding up
            torch.testing.assert_close(hidden[row, :end], want, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has which is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor) and "view" not in str(function) and "expand" not in str(function):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.element_size())
        return found


@pytest.mark.parametrize("padded", [False, True])
def test_long_windows_take_memory_by_their_length_not_its_square(padded):
    """What is made on the way, and what is held, is twice as much for windows twice as long or twice as many."""
    model = tiny_model("mixtral", max_position_embeddings=8192, sliding_window=None)
    largest, held = {}, {}
    for n, length in ((2, 2048), (2, 4096), (4, 2048)):
        ids, mask = tokens(n, length), torch.ones(n, length, dtype=torch.bool)
        mask[0, length // 2 :] = not padded
        with Largest() as seen:
            stream, layers = stream_of(model, ids, mask if padded else None, batch_size=1)
            for position in range(len(layers)):
                list(stream.run(position, keep=True))
        largest[n, length] = seen.numbers
        held[n, length] = held_bytes(stream)
    assert largest[2, 4096] <= 2 * largest[2, 2048] < 2048**2
    assert largest[4, 2048] == largest[2, 2048]
    assert max(held[2, 4096], held[4, 2048]) <= 2 * held[2, 2048]


def test_a_mask_by_layer_type_is_held_once_for_all_windows():
    """Attention in a sliding window has a mask of [t, t], which no kernel of sdpa does without."""
    model, length = tiny_model("mixtral"), 512
    assert model.config.sliding_window < length
    held = []
    for n in (2, 6):
        mask = torch.ones(n, length, dtype=torch.bool)
        mask[:, length // 2 :] = torch.arange(n)[:, None] % 2 == 0
        held.append(held_bytes(stream_of(model, tokens(n, length), mask, batch_size=1)[0]))
    hidden = length * model.config.hidden_size * 4 + length
    assert length**2 < held[0] and held[1] - held[0] == 4 * hidden


def held_bytes(stream):
    """Of all tensors that a stream holds, each once."""
    found = {}

    def look(value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)
        elif isinstance(value, LayerCall):
            look([value.args, value.kwargs])

    look([list(stream.hidden), stream._calls, stream.token_masks])
    return sum(found.values())


class Told:
    """Where the batches that it was told of lie in the text."""

    def __init__(self):
        self.seen = []

    def aim(self, token_mask, first_window, window_length):
        self.seen.append((token_mask, first_window, window_length))


def test_running_without_keeping_changes_nothing():
    model = tiny_model("mixtral")
    stream, _ = stream_of(model, tokens(3, 8))
    before = [hidden.clone() for hidden in stream.hidden]
    told = Told()
    list(stream.run(0, keep=False, recorders=[told]))
    assert told.seen == [(None, 0, 8), (None, 2, 8)]
    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))


def test_the_model_is_left_as_it_was():
    model = tiny_model("mixtral")
    ids = tokens(2, 8)
    before = model(ids).logits
    stream, layers = stream_of(model, ids)
    list(stream.run(0, keep=True))
    assert all("forward" not in layer.__dict__ for layer in layers)
    assert torch.equal(model(ids).logits, before)


def test_a_model_whose_layers_talk_behind_the_scenes_is_refused():
    model = tiny_model("mixtral")
    layers, _ = decoder_layers(model, find_moe_blocks(model))
    memory = {}

    class Whispering(nn.Module):
        """Passes a state to the next layer outside of the hidden states, as value residuals do."""

        def __init__(self, inner, first):
            super().__init__()
            self.inner, self.first = inner, first

        def forward(self, hidden, *args, **kwargs):
            out = self.inner(hidden, *args, **kwargs)
            if self.first:
                memory["count"] = memory.get("count", 0) + 1
            return out + memory["count"]

    for position in range(len(layers)):
        layers[position] = Whispering(layers[position], position == 0)
    with pytest.raises(UnsupportedModelError, match="cannot be run layer by layer: layer 0"):
        LayerStream(model, layers, tokens(2, 8))


@pytest.mark.parametrize("family", sorted(WRAPPERS))
def test_images_reach_every_layer_as_inside_the_model(family):
    """Records of different lengths, padded; one without an image; batches of two, the last of one."""
    kinds = {"layer_types": ["linear_attention", "full_attention", "full_attention"]} if family == "qwen3_5_moe" else {}
    model = tiny_model(family, num_hidden_layers=3, **kinds)
    lengths = (24, 19, 24, 21, 24)
    ids, seen = map(list, zip(*(record(model, seed) for seed in range(5)), strict=True))
    ids[2] = tokens(1, 24)[0]
    seen[2] = {"mm_token_type_ids": torch.zeros(1, 24, dtype=torch.int64)}
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    layers, _ = decoder_layers(model, find_moe_blocks(model))
    stream = LayerStream(model, layers, torch.stack(ids) * mask, mask, 2, inputs=seen)
    got = []
    for position in range(len(layers)):
        list(stream.run(position, keep=True))
        got.append(torch.cat(list(stream.hidden)))
    for number, length in enumerate(lengths):
        inputs = seen[number] | {"mm_token_type_ids": seen[number]["mm_token_type_ids"][:, :length]}
        with torch.no_grad():
            want = hidden_inside(model, layers, ids[number][None, :length], inputs)
        for position, states in enumerate(want):
            # two orders of summation over 24 tokens and 32 channels in float32
            torch.testing.assert_close(got[position][number, :length], states[0], rtol=1e-4, atol=1e-4)
    if family == "qwen3_vl_moe":
        (first, second) = (stream._calls[0][position].added for position in (1, 2))
        assert first[0].tolist() == second[0].tolist() == [*range(3, 7), *range(24 + 4, 24 + 8)]
        assert stream._calls[1][1].added[0].tolist() == [*range(24 + 6, 24 + 10)]


def hidden_inside(model, layers, ids, inputs):
    seen = []
    handles = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in layers]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs)
    for handle in handles:
        handle.remove()
    return [each[0] if isinstance(each, tuple) else each for each in seen]


def test_records_that_do_not_join_are_refused_with_the_cure():
    model = tiny_model("gemma4")
    ids, seen = map(list, zip(*(record(model, seed) for seed in range(2)), strict=True))
    seen[1]["pixel_values"] = torch.rand(1, 20, 48)
    with pytest.raises(
        UsageError, match=r"must be of one form to run together, got others in windows \[0, 1\]: give batch_size=1"
    ):
        LayerStream(model, decoder_layers(model, find_moe_blocks(model))[0], torch.stack(ids), None, 2, inputs=seen)
