"""Chats as they are stored: thinking, tool calls and tools reach the tokenizer's template, whose text is read."""

import json

import pytest
from small_text import make_tokenizer, write

from moesparse import text
from moesparse.documents import SourceRead
from moesparse.errors import MoESparseError

# what a template prints that knows all fields: those of a message, then its calls one by one, then the tools
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ '' + m.content }}"
    # as GLM-4.5 and Qwen3-Coder do it: a string has no items
    "{% for call in m.tool_calls %}<{{ call.function.name }}"
    "{% for name, value in call.function.arguments.items() %} {{ name }}={{ value | tojson }}{% endfor %}>{% endfor %}"
    "{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"place": "Oslo", "days": 2}'}}
TALK = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "reasoning_content": "Look it up.", "tool_calls": [CALL]},
    {"role": "tool", "content": "wet", "tool_call_id": "1"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "Wet is rain."},
]
SAID = (
    f"<tools>{json.dumps(TOOLS)}</tools>[user]Rain?[assistant]<think>Look it up.</think>"
    '<weather place="Oslo" days=2>[tool]wet[assistant]<think>Wet is rain.</think>Yes.'
)


def said(tmp_path, records, template=TEMPLATE, found=None):
    """The text that is read of the records, by a tokenizer that gives back every character."""
    tokenizer = make_tokenizer(bos=False, eos=False)
    tokenizer.chat_template = template
    file = records if isinstance(records, str) else write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    windows, _ = text.evaluation_windows(file, tokenizer, 2, 1, chat=True, found=found)
    return tokenizer.decode([*windows[:, 0].tolist(), int(windows[-1, 1])])


def test_thinking_calls_and_tools_are_what_the_template_prints(tmp_path):
    found: list[SourceRead] = []
    assert said(tmp_path, [{"messages": TALK, "tools": TOOLS}], found=found) == SAID
    assert (found[0].chats, found[0].left_out) == (1, 0)


def test_what_a_column_keeps_as_json_is_read(tmp_path):
    packed = {"messages": json.dumps(TALK), "tools": json.dumps(TOOLS)}
    assert said(tmp_path, [packed]) == SAID


def test_a_table_adds_no_keys(tmp_path):
    """In Arrow every object of a column has the keys of all: two tools of different parameters, two kinds of call."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tools = [
        {"name": "weather", "parameters": {"place": {"type": "string"}}},
        {"name": "clock", "parameters": {"zone": {"type": "integer"}}},
    ]
    calls = [{"function": {"name": "weather", "arguments": {"place": "Oslo"}}}]
    calls += [{"function": {"name": "clock", "arguments": {"zone": 1}}}]
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    parquet.write_table(pyarrow.table({"messages": [talk], "tools": [tools]}), tmp_path / "a.parquet")
    wanted = f"<tools>{json.dumps(tools)}</tools>" + '[user]?[assistant]<weather place="Oslo"><clock zone=1>'
    assert said(tmp_path, str(tmp_path / "a.parquet")) == wanted


@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_is_handed_on_under_the_name_that_the_template_reads(tmp_path, given, read):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", given: "because"}]
    template = f"{{% for m in messages %}}{{{{ m.{read} }}}}|{{{{ m.content }}}};{{% endfor %}}"
    assert said(tmp_path, [{"messages": talk}], template) == "|a;because|b;"


def test_what_a_template_leaves_out_is_counted(tmp_path):
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    thinking = [TALK[0], TALK[3]]
    for record, left_out in (
        ({"messages": thinking}, 1),
        ({"messages": TALK[:1], "tools": TOOLS}, 1),
        ({"messages": [TALK[0], {"role": "assistant", "content": "-", "tool_calls": [CALL]}]}, 1),
        ({"messages": TALK[:1]}, 0),
    ):
        found: list[SourceRead] = []
        said(tmp_path, [record], bare, found)
        assert found[0].left_out == left_out, record
    # of an earlier turn alone, as Qwen3's template does: not all is left out
    last = "{% for m in messages %}{{ m.content }}{% if loop.last %}{{ m.reasoning_content }}{% endif %}{% endfor %}"
    found = []
    assert said(tmp_path, [{"messages": [{**TALK[3], "reasoning_content": "Hm."}, *thinking]}], last, found) == (
        "Yes.Rain?Yes.Wet is rain."
    )
    assert found[0].left_out == 0


def test_text_in_parts_is_joined_and_other_parts_are_left_to_the_template(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = "{% for m in messages %}{{ m.content if m.content is string else m.content | length }};{% endfor %}"
    records = [{"messages": [{"role": "user", "content": parts}, {"role": "tool", "content": [*parts, {"x": 1}]}]}]
    assert said(tmp_path, records, template) == "a\nb;3;"


def test_questions_with_answers_and_with_calls_are_chats(tmp_path):
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert said(tmp_path, [alpaca, {**alpaca, "input": ""}]) == "[user]Add.\n\n1 2[assistant]3[user]Add.[assistant]3"
    described = {"name": "weather", "parameters": {}}
    answers = [{"name": "weather", "arguments": {"place": "Oslo"}}]
    xlam = {"query": "Rain?", "answers": json.dumps(answers), "tools": json.dumps([described])}
    assert said(tmp_path, [xlam]) == (
        f'<tools>{json.dumps([described])}</tools>[user]Rain?[assistant]<weather place="Oslo">'
    )


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"messages": "[not json"}, r'line 1 must have a list in "messages", got \[not json'),
        ({"query": "a", "answers": "fly"}, r'line 1 must have a list in "answers", got fly'),
        # arguments that are no object stay, and the template says what it thinks of them
        (
            {"messages": [{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            "must be a chat that the tokenizer's template takes: .*items",
        ),
    ],
)
def test_a_chat_that_cannot_be_read(tmp_path, record, match):
    with pytest.raises(MoESparseError, match=match):
        said(tmp_path, [record])


def test_a_question_and_its_answer_are_read_when_asked_for(tmp_path):
    file = write(tmp_path / "a.jsonl", json.dumps({"instruction": "Add.", "output": "3"}))
    with pytest.raises(MoESparseError, match=r'is a chat record \("instruction"\), .*give chat=True'):
        text.windows(file, make_tokenizer(), samples=1, length=1)
