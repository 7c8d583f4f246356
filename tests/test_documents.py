"""What a source of text holds: gzip, byte-order marks, chat records by the tokenizer's own template, and tables."""

import csv
import gzip
import json

import pytest
import torch
from small_text import make_tokenizer, prose, run_cure, write, write_jsonl

from moesparse import text
from moesparse.documents import SourceRead
from moesparse.errors import MoESparseError, UsageError
from moesparse.text import evaluation

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if tools %}tools: {{ tools | tojson }}{% endif %}"
)
TALK = [{"role": "user", "content": "how old are owls"}, {"role": "assistant", "content": "naïve old trees 🎉"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chatty():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def stream(file, tokenizer, **options):
    """All whole windows of one token of a source, laid end to end."""
    return text.evaluation_windows(file, tokenizer, 2, 1, **options)[0]


def flat(lists):
    return [each for one in lists for each in one]


def jsonl(path, *records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


# Bytes to characters


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_gzip_and_byte_order_marks_change_no_token(tmp_path, tokenizer, suffix, codec, packed):
    documents = [prose(200, seed=1), prose(60, seed=2)]
    content = documents[0] if suffix == ".txt" else "".join(json.dumps({"text": each}) + "\n" for each in documents)
    plain = write(tmp_path / ("plain.txt" if suffix == ".txt" else "plain.jsonl"), content)
    encoded = content.encode(codec)
    file = write(
        tmp_path / f"c4{suffix}{'.gz' if packed else ''}", gzip.compress(encoded, mtime=0) if packed else encoded
    )
    found: list[SourceRead] = []
    assert torch.equal(stream(file, tokenizer, found=found), stream(plain, tokenizer))
    assert found == [SourceRead(file, 1 if suffix == ".txt" else 2)]
    drawn = [text.windows(each, tokenizer, samples=4, length=16, seed=3) for each in (file, plain)]
    assert torch.equal(*drawn)


def test_gzip_is_known_by_its_bytes_not_by_its_name(tmp_path, tokenizer):
    file = write(tmp_path / "a.txt", gzip.compress(prose(50).encode()))
    assert torch.equal(stream(file, tokenizer), stream(write(tmp_path / "b.txt", prose(50)), tokenizer))


def test_a_file_of_utf_16_in_many_blocks_is_one_document(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "MIN_PIECE_CHARS", 37)  # odd: every second block cuts a character
    file = write(tmp_path / "a.txt", prose(300).encode("utf-16"))
    assert torch.equal(stream(file, tokenizer), stream(write(tmp_path / "b.txt", prose(300)), tokenizer))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "old owls"}' * 99, mtime=0)[:-9],
            r"must be a whole gzip file, got a cut or dama",
        ),
        ("a.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\0\xff\xff\xff", "must be a whole gzip file, got a cut or damaged one"),
        ("a.zip", b"PK\x03\x04rest", "must be text, alone or in gzip, got zip data: unpack it"),
        ("a.jsonl.xz", b"\xfd7zXZ\0rest", "got xz data: unpack it"),
        ("odd.txt", "trees".encode("utf-16")[:-1], "must be UTF-16-LE text, got byte"),
        ("bare.txt", "trees".encode("utf-16-le"), "got binary data .*; UTF-16 is known by its byte-order mark"),
        ("inner.txt.gz", gzip.compress(b"\x7fELF\0\0", mtime=0), "must be text, got binary data"),
        ("a.json", '[\n{"text": "a"}]', "must have one JSON object a line, got an array; this writes it so: python -c"),
        ("b.json", '{\n"text": "a"}', r"b\.json line 1 must be a JSON object, got \{"),
    ],
)
def test_bytes_that_are_no_text(tmp_path, tokenizer, name, content, match):
    file = write(tmp_path / name, content)
    with pytest.raises(MoESparseError, match=match):
        text.windows(file, tokenizer, samples=1, length=1)
    with pytest.raises(MoESparseError, match=match):
        text.evaluation_windows(file, tokenizer, 2)


@pytest.mark.parametrize(
    ("name", "columns", "codec"),
    [
        ("t.csv", ["text"], "utf-8"),
        ("my $t.csv.gz", ["id", "text"], "utf-8-sig"),
        ('t "1".tsv', ["id", "the $body"], "utf-16"),
    ],
)
def test_a_table_is_refused_with_a_command_that_writes_what_is_read(tmp_path, tokenizer, name, columns, codec):
    documents = [prose(40, seed=1) + ', "quoted"', prose(40, seed=2)]
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt", encoding=codec, newline="") as file:
        table = csv.writer(file, delimiter="\t" if ".tsv" in name else ",")
        table.writerow(columns)
        table.writerows([*map(str, range(len(columns) - 1)), document] for document in documents)
    with pytest.raises(UsageError, match=r"must be \.txt, \.jsonl or \.parquet, got a table of the columns") as refused:
        text.windows(tmp_path / name, tokenizer)
    assert f"the column {columns[-1]!r}" in str(refused.value)
    run_cure(str(refused.value))
    made = tmp_path / (name.removesuffix(".gz").rpartition(".")[0] + ".jsonl")
    assert torch.equal(stream(made, tokenizer), stream(write_jsonl(tmp_path / "all.jsonl", documents), tokenizer))


def test_an_array_is_refused_with_a_command_that_writes_what_is_read(tmp_path, tokenizer):
    documents = [prose(40, seed=1), prose(40, seed=2)]
    file = write(tmp_path / "a.json", json.dumps([{"text": each} for each in documents], indent=1))
    with pytest.raises(MoESparseError, match="got an array") as refused:
        text.windows(file, tokenizer)
    run_cure(str(refused.value))
    wanted = stream(write_jsonl(tmp_path / "all.jsonl", documents), tokenizer)
    assert torch.equal(stream(tmp_path / "a.jsonl", tokenizer), wanted)


@pytest.mark.parametrize(
    ("argument", "domain"), [("data/law.jsonl.gz", "law"), ("law.txt", "law"), ("c4.en.json.GZ", "c4.en")]
)
def test_a_domain_is_the_name_without_its_ending(argument, domain):
    assert text.parse_source(argument) == text.TextSource(argument, domain)


# Chat records


def test_chat_records_have_the_tokens_that_transformers_gives_them(tmp_path, chatty):
    shared = [{"from": "system", "value": "be old"}, {"from": "human", "value": "owls"}, {"from": "gpt", "value": "no"}]
    as_roles = [("system", "be old"), ("user", "owls"), ("assistant", "no")]
    tools = [{"type": "function", "function": {"name": "fly", "parameters": {}}}]
    records = [
        {"messages": TALK, "source": "web"},
        {"conversations": shared},
        {"conversations": shared[1:], "system": "be old"},
        {"messages": TALK, "tools": tools},
    ]
    spoken = [{"role": role, "content": content} for role, content in as_roles]
    talks = [(TALK, None), (spoken, None), (spoken, None), (TALK, tools)]
    wanted = [chatty.apply_chat_template(talk, tools=given, tokenize=True, return_dict=False) for talk, given in talks]
    file = jsonl(tmp_path / "chat.jsonl", *records)
    found: list[SourceRead] = []
    got = stream(file, chatty, chat=True, found=found)
    # no BOS and no EOS but those of the template
    assert [*got[:, 0].tolist(), int(got[-1, 1])] == flat(wanted)
    assert (found[0].documents, found[0].chats) == (4, 4)
    assert found[0].chat_template is not None and len(found[0].chat_template) == 64
    drawn = text.windows(file, chatty, samples=len(flat(wanted)), length=1, chat=True)
    assert sorted(drawn[:, 0].tolist()) == sorted(flat(wanted))


def test_text_and_chats_may_stand_in_one_file(tmp_path, chatty):
    file = jsonl(tmp_path / "a.jsonl", {"text": "old"}, {"messages": TALK}, {"text": "owls"})
    bos, eos = [chatty.bos_token_id], [chatty.eos_token_id]
    plain = [chatty(each, add_special_tokens=False)["input_ids"] for each in ("old", "owls")]
    talk = chatty.apply_chat_template(TALK, tokenize=True, return_dict=False)
    got = stream(file, chatty, chat=True)
    assert [*got[:, 0].tolist(), int(got[-1, 1])] == bos + plain[0] + eos + talk + bos + plain[1]


def test_parquet_and_datasets_hold_chats_too(tmp_path, chatty, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    wanted = stream(jsonl(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": TALK[:1]}), chatty, chat=True)
    # a table gives every message every key
    rows = [[{**each, "name": None} for each in TALK], [{**TALK[0], "name": None}]]
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "a.parquet")
    assert torch.equal(stream(tmp_path / "a.parquet", chatty, chat=True), wanted)
    with pytest.raises(MoESparseError, match=r"a\.parquet row 1 is a chat record .*give chat=True"):
        stream(tmp_path / "a.parquet", chatty)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict({"messages": rows}))
    assert torch.equal(stream("talks:train", chatty, chat=True), wanted)
    with pytest.raises(MoESparseError, match=r"a row of dataset talks:train is a chat record .*give chat=True"):
        stream("talks:train", chatty)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"messages": []}, 'line 1 must have messages in "messages", got an empty list'),
        ({"messages": ["hello"]}, 'line 1 must have messages with "role" and "content", got hello'),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "must have messages from human, gpt, .*got 'narrator'",
        ),
        ({"messages": TALK, "tools": "fly"}, 'must have a list of "tools" or none, got a str'),
        ({"prompt": "x"}, 'must have a string "text", or a list of "messages", got'),
        (
            {"messages": [{"role": "stranger", "content": ""}]},
            "must be a chat that the tokenizer's template takes: who",
        ),
    ],
)
def test_a_record_that_is_no_chat(tmp_path, record, match):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'stranger' %}{{ raise_exception('who is that?') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(MoESparseError, match=match):
        text.windows(jsonl(tmp_path / "a.jsonl", record), tokenizer, samples=1, length=1, chat=True)


def test_chats_are_read_when_asked_for_and_where_there_are_some(tmp_path, tokenizer, chatty):
    file = jsonl(tmp_path / "chat.jsonl", {"messages": TALK})
    with pytest.raises(MoESparseError, match=r'line 1 is a chat record \("messages"\), .*give chat=True'):
        text.windows(file, chatty, samples=1, length=1)
    with pytest.raises(MoESparseError, match=r"need a tokenizer with a chat template, got .* without one: put"):
        text.windows(file, tokenizer, samples=1, length=1, chat=True)
    plain = write(tmp_path / "a.txt", prose(9))
    with pytest.raises(
        MoESparseError, match=r'is for records with "messages" or "conversations", got none in .*a\.txt'
    ):
        text.windows(plain, chatty, samples=1, length=1, chat=True)
    assert text.windows([plain, file], chatty, samples=2, length=1, chat=True).shape == (2, 1)
    with pytest.raises(UsageError, match="join must be left out with chat records"):
        text.evaluation_windows(file, chatty, 2, join="\n\n", chat=True)


def test_bytes_of_a_chat_are_those_of_its_layout(tmp_path, chatty):
    said = chatty.apply_chat_template(TALK, tokenize=False)
    length = len(chatty(said, add_special_tokens=False)["input_ids"])
    _, count = text.evaluation_windows(jsonl(tmp_path / "a.jsonl", {"messages": TALK}), chatty, length, chat=True)
    # all but BOS, whose characters nobody predicts
    assert count == len(said.encode()) - len("<s>")
