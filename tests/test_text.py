"""Text to token windows: packing, sampling, byte counts and every way a source can be wrong."""

import hashlib
import struct

import pytest
import torch
from small_text import make_tokenizer, prose, write, write_jsonl

from moesparse import text
from moesparse.errors import CalibrationError, MoESparseError, UsageError
from moesparse.text import encoding, evaluation, packing


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def as_stream(windows: torch.Tensor, stream: list[int]) -> list[int]:
    """The place of every window in a token stream, sorted."""
    length = windows.shape[1]
    places = {tuple(stream[i : i + length]): i for i in range(0, len(stream) - length + 1, length)}
    assert len(places) == len(stream) // length, "the text repeats itself: a window has two places"
    return sorted(places[tuple(row.tolist())] for row in windows)


# Packing


def test_all_windows_of_a_file_are_its_documents_end_to_end(tmp_path, tokenizer):
    documents = [prose(40, seed=i) for i in range(5)]
    stream = [i for d in documents for i in [0, *tokenizer(d, add_special_tokens=False)["input_ids"], 1]]
    count = len(stream) // 32
    got = text.windows(write_jsonl(tmp_path / "a.jsonl", documents), tokenizer, samples=count, length=32)
    assert got.shape == (count, 32)
    assert got.dtype == torch.int64
    assert as_stream(got, stream) == [32 * i for i in range(count)]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_special_tokens_stand_where_the_tokenizer_has_them(tmp_path, bos, eos):
    tok = make_tokenizer(bos, eos)
    body = tok("fox", add_special_tokens=False)["input_ids"]
    wanted = ([0] if bos else []) + body + ([1] if eos else [])
    got = text.windows(write_jsonl(tmp_path / "a.jsonl", ["fox"]), tok, samples=1, length=len(wanted))
    assert got.tolist() == [wanted]
    assert text.adds_bos(tok) is bos


def test_a_file_read_in_many_blocks_gives_the_tokens_of_the_whole(tmp_path, tokenizer, monkeypatch):
    # blocks of 64 bytes end inside words and inside the four bytes of 🎉
    monkeypatch.setattr(packing, "MIN_PIECE_CHARS", 64)
    monkeypatch.setattr(evaluation, "MIN_PIECE_CHARS", 64)
    monkeypatch.setattr(packing, "CHARS_PER_TOKEN", 4)
    content = prose(300)
    stream = [0, *tokenizer(content, add_special_tokens=False)["input_ids"], 1]
    count = len(stream) // 16
    got = text.windows(write(tmp_path / "a.txt", content), tokenizer, samples=count, length=16)
    assert as_stream(got, stream) == [16 * i for i in range(count)]


def test_the_three_formats_hold_the_same_text(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    content = prose(400)
    parquet.write_table(pyarrow.table({"id": [0, 1], "text": [content, None]}), tmp_path / "a.parquet")
    files = [
        write(tmp_path / "a.txt", content),
        write(tmp_path / "bom.txt", b"\xef\xbb\xbf" + content.encode()),
        write_jsonl(tmp_path / "a.jsonl", [content, ""]),
        str(tmp_path / "a.parquet"),
    ]
    got = [text.windows(file, tokenizer, samples=5, length=16, seed=3) for file in files]
    assert all(torch.equal(one, got[0]) for one in got)


# Sampling


def test_sampling_is_seeded_and_never_draws_a_window_twice(tmp_path, tokenizer):
    file = write(tmp_path / "a.txt", prose(2000))
    one, again, other = (text.windows(file, tokenizer, samples=20, length=16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(row.tolist()) for row in one}) == 20
    assert text.text_hash(one) == text.text_hash(again) != text.text_hash(other)


def test_windows_are_spread_over_the_file(tmp_path, tokenizer):
    content = prose(4000)
    stream = [0, *tokenizer(content, add_special_tokens=False)["input_ids"], 1]
    got = text.windows(write(tmp_path / "a.txt", content), tokenizer, samples=8, length=32)
    places = as_stream(got, stream)
    eighth = len(stream) // 32 * 32 / 8
    # one window starts in each eighth of the file
    assert [int(place // eighth) for place in places] == list(range(8))


def test_files_give_equal_shares_and_a_short_one_is_made_up_for(tmp_path, tokenizer):
    files = [write(tmp_path / f"{name}.txt", name * 3000) for name in "xyz"]
    short = write(tmp_path / "short.txt", "w" * 40)
    got = text.windows([*files, short], tokenizer, samples=14, length=16)
    letters = [tokenizer.decode(row.tolist(), skip_special_tokens=True)[-1] for row in got]
    # 2 windows of 16 are all that 42 tokens give; the other 12 are shared by three
    assert {letter: letters.count(letter) for letter in "wxyz"} == {"w": 2, "x": 4, "y": 4, "z": 4}


def test_a_large_source_is_sampled_before_it_is_tokenized(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "MIN_PIECE_CHARS", 256)
    encode, seen = text.encode_document, []
    monkeypatch.setattr(
        encoding, "encode_document", lambda tok, part, **flags: seen.append(len(part)) or encode(tok, part, **flags)
    )
    # every line is numbered, so a place in the text can be told from a window
    content = "".join(f"{i} {word}\n" for i, word in enumerate(prose(20000).encode("ascii", "ignore").decode().split()))
    file = write(tmp_path / "a.txt", content)
    places = []
    for seed in range(8):
        seen.clear()
        got = text.windows(file, tokenizer, samples=4, length=16, seed=seed)
        # 16 characters a token, and no more than a block of slack on each of the 4 pieces
        assert sum(seen) <= 2 * 16 * 4 * 16
        assert torch.equal(got, text.windows(file, tokenizer, samples=4, length=16, seed=seed))
        # -1 would be a window over a seam: pieces from two places of the text must not meet in one
        places += [content.find(tokenizer.decode(row.tolist())) for row in got]
    assert min(places) >= 0, "a window is no stretch of the text, or holds a BOS from within it"
    assert len(set(places)) > 28
    assert min(places) < len(content) / 4
    assert max(places) > len(content) * 3 / 4


def test_length_is_bounded_by_the_context(tmp_path):
    file = write(tmp_path / "a.txt", prose(500))
    assert text.windows(file, make_tokenizer(context=24), samples=2).shape == (2, 24)
    assert text.windows(file, make_tokenizer(), samples=2, max_length=12).shape == (2, 12)


def test_text_hash_knows_shape_and_ids_but_not_the_integer_type():
    ids = torch.arange(12).view(3, 4)
    assert text.text_hash(ids) == text.text_hash(ids.int()) == text.text_hash(ids.t().contiguous().t())
    assert text.text_hash(ids) != text.text_hash(ids.view(4, 3))
    # spelled out, because files of statistics carry it from one machine to another
    assert text.text_hash(ids) == hashlib.sha256(b"3x4:" + struct.pack("<12q", *range(12))).hexdigest()


# Evaluation windows


def test_evaluation_windows_are_consecutive_and_drop_the_rest(tmp_path, tokenizer):
    content = prose(100)
    stream = [0, *tokenizer(content, add_special_tokens=False)["input_ids"]]
    got, _ = text.evaluation_windows(write(tmp_path / "a.txt", content), tokenizer, 16)
    assert got.flatten().tolist() == stream[: len(stream) // 16 * 16]


@pytest.mark.parametrize("stride", [16, 5, 1])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_bytes_are_those_of_the_scored_tokens(tmp_path, stride, trim_offsets):
    # ASCII under a byte-level tokenizer: a token's bytes are its characters, so each can be counted by hand
    tok = make_tokenizer(trim_offsets=trim_offsets)
    content = prose(150).encode("ascii", "ignore").decode()
    windows, count = text.evaluation_windows(write(tmp_path / "a.txt", content), tok, 16, stride)
    by_hand = sum(
        len(tok.decode([token], skip_special_tokens=True))
        for i, row in enumerate(windows.tolist())
        for token in (row[1:] if i == 0 else row[max(1, 16 - stride) :])
    )
    assert count == by_hand


def test_bytes_of_split_characters_add_up(tmp_path, tokenizer):
    # one window over everything scores all but the first token, which is BOS and stands for no bytes
    content = "🎉 naïve Straße 🎉🎉\n語"
    ids = tokenizer(content)["input_ids"]
    windows, count = text.evaluation_windows(write(tmp_path / "a.txt", content), tokenizer, len(ids))
    assert windows.tolist() == [ids]
    assert count == len(content.encode())


def test_documents_are_kept_apart_or_joined(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", ["fox dog", "owl"])
    first, second = (tokenizer(d, add_special_tokens=False)["input_ids"] for d in ("fox dog", "owl"))
    apart = [0, *first, 1, 0, *second]
    windows, count = text.evaluation_windows(file, tokenizer, len(apart))
    assert (windows.tolist(), count) == ([apart], len("fox dogowl"))
    joined = tokenizer("fox dog\n\nowl")["input_ids"]
    windows, count = text.evaluation_windows(file, tokenizer, len(joined), join="\n\n")
    assert (windows.tolist(), count) == ([joined], len("fox dog\n\nowl"))


def test_bytes_are_unknown_without_offsets(tmp_path, tokenizer):
    class Slow:
        """A tokenizer in plain Python: no offsets."""

        is_fast = False
        bos_token_id, eos_token_id, model_max_length = 0, 1, 64

        def __call__(self, *args, return_offsets_mapping=False, **keywords):
            assert not return_offsets_mapping
            return tokenizer(*args, **keywords)

    windows, count = text.evaluation_windows(write(tmp_path / "a.txt", prose(50)), Slow(), 16)
    assert windows.shape[1] == 16
    assert count is None


# Sources


def test_parse_source(tmp_path):
    assert text.parse_source("books/novel.txt=prose") == text.TextSource("books/novel.txt", "prose")
    assert text.parse_source("books/novel.txt") == text.TextSource("books/novel.txt", "novel")
    assert text.parse_source("org/wiki:raw-v1:test") == text.TextSource("org/wiki:raw-v1:test", "wiki")
    odd = write(tmp_path / "a=b.txt", "x")
    assert text.parse_source(odd) == text.TextSource(odd, "a=b")


@pytest.mark.parametrize("argument", ["", "=novel", "novel.txt="])
def test_parse_source_refuses_empty_parts(argument):
    with pytest.raises(UsageError, match="must be FILE, FILE=DOMAIN or FILE=DOMAIN:SHARE"):
        text.parse_source(argument)


def test_a_datasets_name(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **keywords):
        calls.append((args, keywords))
        return datasets.Dataset.from_dict({"text": [prose(100), "", prose(100, seed=1)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert text.windows("org/wiki:raw-v1:train", tokenizer, samples=3, length=16).shape == (3, 16)
    text.windows("wiki:train", tokenizer, samples=3, length=16)
    assert calls == [
        (("org/wiki", "raw-v1"), {"split": "train", "streaming": True}),
        (("wiki",), {"split": "train", "streaming": True}),
    ]


def test_an_endless_dataset_is_not_read_to_its_end(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(packing, "MIN_PIECE_CHARS", 256)

    def endless():
        while True:
            yield {"text": prose(50)}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keywords: endless())
    assert text.windows("crawl:train", tokenizer, samples=2, length=16).shape == (2, 16)


@pytest.mark.parametrize(
    ("failure", "match"),
    [
        (ConnectionError("no route to host\nsecond line"), r"wiki:train could not be read: no route to host; without"),
        (ValueError("Unknown split"), "Unknown split"),
    ],
)
def test_a_dataset_that_cannot_be_had(monkeypatch, tokenizer, failure, match):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **keywords):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(MoESparseError, match=match):
        text.windows("wiki:train", tokenizer)


def test_a_dataset_without_text(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"sentence": "x", "label": 1}])
    with pytest.raises(MoESparseError, match='must have a string column "text", got sentence, label'):
        text.windows("wiki:train", tokenizer)


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", r"a\.txt must hold text, got none"),
        ("blank.txt", " \n\n ", r"blank\.txt must hold text, got none"),
        ("a.jsonl", "\n\n", r"a\.jsonl must hold text, got none"),
        ("a.bin", b"\x7fELF\0\0", r"a\.bin must be text, got binary data"),
        ("latin.txt", "na\u00efve".encode("latin-1"), r"latin\.txt must be UTF-8 text, got byte 0xef"),
        # the last character is cut in half: only the end of the file tells
        ("cut.txt", "tree 🎉".encode()[:-2], r"cut\.txt must be UTF-8 text, got byte 0xf0"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xef"}\n', r"latin\.jsonl must be UTF-8 text, got byte 0xef"),
        ("a.json", "{}", r'a\.json line 1 must have a string "text", got \{\}'),
        ("b.jsonl", '{"text": "a"}\n\n{"text": "b"', r'b\.jsonl line 3 must be a JSON object, got \{"text": "b"'),
        ("c.jsonl", '{"text": "a"}\n{"body": "b"}\n', r'c\.jsonl line 2 must have a string "text", got \{"body"'),
        ("d.jsonl", '{"text": 3}', r'd\.jsonl line 1 must have a string "text"'),
        ("e.jsonl", '["text"]', r'e\.jsonl line 1 must have a string "text"'),
        ("f.jsonl", '{"text": "\\ud800"}', r"f\.jsonl line 1 must be Unicode text, got half of a surrogate pair"),
        ("a.parquet", "no parquet", r"a\.parquet must be a parquet file, got something else"),
        ("b.parquet", "", r"b\.parquet must be a parquet file, got something else"),
    ],
)
def test_a_source_that_is_no_text(tmp_path, tokenizer, name, content, match):
    file = write(tmp_path / name, content)
    with pytest.raises(MoESparseError, match=match):
        text.windows(file, tokenizer, samples=1, length=1)
    with pytest.raises(MoESparseError, match=match):
        text.evaluation_windows(file, tokenizer, 2)


def test_a_parquet_without_a_text_column_of_strings(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(MoESparseError, match='must have a column "text", got body, id'):
        text.windows(tmp_path / "a.parquet", tokenizer)
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(MoESparseError, match=r'column "text" of .*b\.parquet must hold strings, got int'):
        text.windows(tmp_path / "b.parquet", tokenizer)


def test_a_source_that_is_not_there(tmp_path, tokenizer):
    with pytest.raises(MoESparseError, match=r"novel\.txt must be a file or a datasets name \(NAME:SPLIT\), got neith"):
        text.windows(tmp_path / "novel.txt", tokenizer)
    with pytest.raises(MoESparseError, match="must be a file, got a folder"):
        text.windows(tmp_path, tokenizer)


def test_too_little_text_says_what_would_fit(tmp_path, tokenizer):
    file = write(tmp_path / "a.txt", "x" * 98)  # 100 tokens with BOS and EOS
    match = (
        r"a\.txt must hold 8 windows of 16 tokens \(128 tokens\), got 6 \(100 tokens\); "
        r"give more text \(2 times as much\) or samples=6 or length=12$"
    )
    with pytest.raises(CalibrationError, match=match):
        text.windows(file, tokenizer, samples=8, length=16)
    assert text.windows(file, tokenizer, samples=6, length=16).shape == (6, 16)
    assert text.windows(file, tokenizer, samples=8, length=12).shape == (8, 12)
    with pytest.raises(CalibrationError, match=r"got 0 .*or length=100$"):
        text.windows(file, tokenizer, samples=1, length=128)
    with pytest.raises(CalibrationError, match=r"give more text \(130 times as much\)$"):
        text.windows(file, tokenizer, samples=101, length=128)
    # windows of 2 tokens instead of 32 calibrate nothing
    with pytest.raises(CalibrationError, match=r"got 3 .*; give more text \(16 times as much\) or samples=3$"):
        text.windows(file, tokenizer, samples=50, length=32)


def test_evaluation_text_shorter_than_a_window(tmp_path, tokenizer):
    file = write(tmp_path / "a.txt", "x" * 98)
    with pytest.raises(MoESparseError, match=r"a window of 128 tokens, got 99; give a longer text or length=99$"):
        text.evaluation_windows(file, tokenizer, 128)
    with pytest.raises(MoESparseError, match=r"got 99; give a longer text$"):
        text.evaluation_windows(file, tokenizer, 400)
    assert text.evaluation_windows(file, tokenizer, 99)[0].shape == (1, 99)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range(tmp_path, tokenizer, arguments, match):
    with pytest.raises(UsageError, match=match):
        text.windows(write(tmp_path / "a.txt", "x"), tokenizer, **arguments)


def test_no_source(tokenizer):
    with pytest.raises(UsageError, match="got an empty list"):
        text.windows([], tokenizer)


@pytest.mark.parametrize(
    ("length", "stride", "match"),
    [(1, None, "length must be at least 2"), (16, 0, r"stride must lie in 1\.\.16"), (16, 17, "got 17")],
)
def test_evaluation_numbers_out_of_range(tmp_path, tokenizer, length, stride, match):
    with pytest.raises(UsageError, match=match):
        text.evaluation_windows(write(tmp_path / "a.txt", prose(50)), tokenizer, length, stride)
