"""Text that grows token by token against the same tokens decoded at once, and stop sequences against str.find."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moesparse import demo
from moesparse.serving.words import Writer, token_bytes, token_text

DEMO = demo.load()[1]
TEXTS = st.text(alphabet="ab eé漢😀\n�", max_size=24)


def sentencepiece():
    """A tokenizer in the way of Llama 2: U+2581 for spaces, bytes as <0xNN>; decoding strips a leading space."""
    words = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "e", "▁e", "\n"]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "e")]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


PIECES = sentencepiece()


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def written(tokenizer, tokens, before=(), stop=()):
    """The writer after all tokens, and its text after each."""
    writer, grown = Writer(tokenizer, before, stop), []
    for token in tokens:
        writer.add(token)
        grown.append(writer.text)
        if writer.stopped:
            return writer, grown
    writer.end()
    return writer, grown


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, tokenizer=st.sampled_from([DEMO, PIECES]))
def test_a_text_grows_to_what_its_tokens_say_together(text, tokenizer):
    tokens = encoded(tokenizer, text)
    writer, grown = written(tokenizer, tokens)
    assert writer.text == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert tokenizer is PIECES or writer.text == text
    for before, after in zip(grown, [*grown[1:], writer.text], strict=True) if grown else ():
        assert after.startswith(before)
    assert len(writer.offsets) == len(tokens) and writer.offsets == sorted(writer.offsets)


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, stop=st.lists(st.text(alphabet="ab e漢", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_where_the_first_stop_sequence_begins(text, stop):
    writer, grown = written(DEMO, encoded(DEMO, text), stop=stop)
    # the place at which a reader of one character at a time first sees a whole stop sequence
    whole = [text[:length] for length in range(len(text) + 1) if any(text[:length].endswith(s) for s in stop)]
    assert writer.stopped == bool(whole)
    if not whole:
        assert writer.text == text
        return
    # tokens hold several characters, so a longer sequence that began earlier may be whole in the same one
    cuts = {text.find(s) for s in stop if s in text}
    assert writer.text in {text[:cut] for cut in cuts}
    assert not any(s in writer.text for s in stop)
    assert all(writer.text.startswith(each) for each in grown)


def test_what_may_become_a_stop_sequence_is_held_back():
    tokens = [encoded(DEMO, letter)[0] for letter in "xabaY"]
    _, grown = written(DEMO, tokens, stop=["abab"])
    assert grown == ["x", "x", "x", "x", "xabaY"]


def test_broken_bytes_come_out_in_the_end_and_do_not_wait_for_ever():
    half = encoded(DEMO, "é")[:1]
    assert DEMO.decode(half) == "�"
    writer, grown = written(DEMO, half)
    assert grown == [""] and writer.text == "�"
    writer, grown = written(DEMO, half * 40)
    assert writer.text == "�" * 40 and len(grown[-1]) > 20


def test_the_space_behind_a_prompt_belongs_to_a_completion():
    first, second = encoded(PIECES, "a"), encoded(PIECES, "a b")[1:]
    assert PIECES.decode(second) == "b"
    assert written(PIECES, second, before=first)[0].text == " b"
    assert written(PIECES, second)[0].text == "b"


@pytest.mark.parametrize("tokenizer", [DEMO, PIECES], ids=["byte-level", "pieces"])
def test_bytes_of_tokens_are_those_of_the_text(tokenizer):
    text = "ab é漢😀 b"
    tokens, found = encoded(tokenizer, text), []
    for place, token in enumerate(tokens):
        named = token_text(tokenizer, token, tokens[max(0, place - 1) : place])
        found += token_bytes(tokenizer, token, named)
    assert bytes(found) == text.encode()


def test_a_special_token_goes_by_its_name():
    assert token_text(PIECES, 0) == "<s>"
    assert token_bytes(PIECES, 0, "<s>") == list(b"<s>")
