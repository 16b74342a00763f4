"""How raw rows become conversations: keys that mean something are read, the others are named, other kinds of data are refused."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.formats import BadRow, Row, answers, refuse_preferences, to_row, without_reasoning
from finetune.errors import UserError

ASKED, ANSWERED = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}


def row_of(value: Any, format_: str = "messages") -> Row:
    row = to_row(("rows:1", value), format_)
    assert row is not None
    return row


def contents(row: Row) -> list[str]:
    return [message["content"] for message in row.messages]


@pytest.mark.parametrize(
    ("extra", "question"),
    [
        (71, "Double:\n\n71"),
        (0.5, "Double:\n\n0.5"),
        ("", "Double:"),
        (None, "Double:"),
        (["a", 2], "Double:\n\na\n2"),
    ],
)
def test_alpaca_input_may_be_a_number_or_a_list(extra: Any, question: str) -> None:
    row = row_of({"instruction": "Double:", "input": extra, "output": 142}, "alpaca")
    assert contents(row) == [question, "142"]


def test_alpaca_history_becomes_turns() -> None:
    row = row_of({"instruction": "And 3?", "output": "6", "history": [["2?", "4"]]}, "alpaca")
    assert [(m["role"], m["content"]) for m in row.messages] == [
        ("user", "2?"), ("assistant", "4"), ("user", "And 3?"), ("assistant", "6"),
    ]  # fmt: skip
    assert row.unread == ()


def test_tools_and_tool_calls_are_read_and_arguments_become_an_object() -> None:
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": 4}, ANSWERED]
    row = row_of({"messages": turns, "tools": '[{"type": "function", "function": {"name": "add"}}]'})
    assert row.tools == ({"type": "function", "function": {"name": "add"}},)
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 2}}
    assert contents(row) == ["What is 2 + 2?", "", "4", "4"]
    assert all(answer.strip() for answer in answers(row)), "a turn that only calls a tool is not an empty answer"
    assert row.unread == ()


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_a_turn_is_read(key: str) -> None:
    row = row_of({"messages": [ASKED, ANSWERED | {key: "two and two"}]})
    assert row.messages[1]["reasoning_content"] == "two and two"


@pytest.mark.parametrize(
    ("mark", "trained"), [({"weight": 0}, False), ({"train": False}, False), ({"weight": 1, "train": True}, True)]
)
def test_marked_turns_are_not_trained(mark: dict[str, Any], trained: bool) -> None:
    row = row_of({"messages": [ASKED, ANSWERED | mark]})
    assert row.untrained == (frozenset() if trained else {1})
    assert row.unread == ()


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (ANSWERED | {"weight": 0.5}, "weight of a turn is 0.5"),
        ({"role": "narrator", "content": "x"}, "'narrator'"),
        ({"role": ["user"], "content": "x"}, "['user']"),
        (ANSWERED | {"tool_calls": "[" * 100_000}, "tool_calls is text, but not JSON"),
        ({"role": "assistant", "content": None}, "turn 2 (assistant) has no content"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}, "image_url"),
        ({"role": "assistant", "content": {"a": 1}}, "content is an object"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}, "a tool call has no name"),
        ({"role": "assistant", "content": "cut \ud83d"}, "half of a surrogate pair at character 5"),
    ],
)
def test_values_that_cannot_be_trained_are_named(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        row_of({"messages": [ASKED, turn]})
    assert reason in str(caught.value)


def test_parts_of_a_content_list_are_joined() -> None:
    row = row_of(
        {"messages": [ASKED | {"content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]}, ANSWERED]}
    )
    assert contents(row)[0] == "What is it?"


def test_other_keys_are_named_if_they_have_a_value() -> None:
    row = row_of({"messages": [ASKED | {"mood": "curious", "note": ""}, ANSWERED], "id": 7, "source": None})
    assert set(row.unread) == {"id", "messages[].mood"}


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]},
        {"prompt": "p", "completion": "bad", "label": False},
    ],
)
def test_preference_data_is_refused_by_name(value: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="preference data"):
        refuse_preferences([("rows:1", {"text": "x"}), ("rows:2", value)])


def test_reasoning_is_dropped_by_key_and_between_tags_of_answers_alone() -> None:
    messages = (
        {"role": "user", "content": "<think>mine</think> stays"},
        {"role": "assistant", "content": "<think>\none\n</think>\n\nfirst", "reasoning_content": "why"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "<reasoning>a</reasoning>second <think>open", "tool_calls": [1]},
    )
    row = without_reasoning(Row("r", messages))
    assert [message["content"] for message in row.messages] == [
        "<think>mine</think> stays",
        "first",
        "and?",
        "second <think>open",
    ]
    assert "reasoning_content" not in row.messages[1]
    for text, expected in (
        ("secret\n</think>\n\nanswer", "answer"),  # the prompt opened the thought
        ("<think>not closed", ""),
        ("<think>a<think>b</think>c</think> d", "d"),
        ("\n<think>a</think>\n\nx", "x"),
        (" x", " x"),
    ):
        (message,) = without_reasoning(Row("r", ({"role": "assistant", "content": text},))).messages
        assert message["content"] == expected
    assert row.messages[3]["tool_calls"] == [1]
    assert without_reasoning(Row("t", text="<think>a</think>")).text == "<think>a</think>"
