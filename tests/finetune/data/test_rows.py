from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.rows import load_rows
from finetune.errors import UserError


def write(path: Path, rows: Any) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows, indent=1))
    return str(path)


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
}
SHAREGPT = {"id": "x", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("row", "format_", "roles"),
    [
        (ALPACA, "alpaca", ["user", "assistant"]),
        ({"instruction": "q", "context": "", "response": "a", "category": "x"}, "alpaca", ["user", "assistant"]),
        ({"question": "q", "answer": "a"}, "alpaca", ["user", "assistant"]),
        (MESSAGES, "messages", ["system", "user", "assistant"]),
        (SHAREGPT, "messages", ["user", "assistant"]),
        (["q", "a", "q2", "a2", "q3"], "dialogue", ["user", "assistant", "user", "assistant"]),
    ],
)
def test_format_is_detected_from_the_content(tmp_path: Path, row: Any, format_: str, roles: list[str]) -> None:
    loaded = load_rows(name=None, path=write(tmp_path / "a.jsonl", [row] * 3))
    assert loaded.format == format_
    assert [m["role"] for m in loaded.rows[0].messages] == roles
    assert "3 of the first 3" in loaded.reason
    assert loaded.rows[2].where == "a.jsonl:3"


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    row = load_rows(name=None, path=write(tmp_path / "a.jsonl", [ALPACA])).rows[0]
    assert row.messages[0]["content"] == "Add.\n\n1 and 2"


def test_texts_are_read_from_jsonl_rows_and_text_files(tmp_path: Path) -> None:
    assert load_rows(name=None, path=write(tmp_path / "a.jsonl", [{"text": "x"}])).rows[0].text == "x"
    rows = load_rows(name=None, path=write(tmp_path / "a.txt", "one\ntwo\n\n\nthree\n")).rows
    assert [(row.text, row.where) for row in rows] == [("one\ntwo", "a.txt:1"), ("three", "a.txt:5")]


def test_json_rows_have_line_numbers(tmp_path: Path) -> None:
    rows = load_rows(name=None, path=write(tmp_path / "a.json", [ALPACA, ALPACA])).rows
    assert [row.where for row in rows] == ["a.json:2", "a.json:7"]
    rows = load_rows(name=None, path=write(tmp_path / "b.json", {"version": 1, "data": [ALPACA]})).rows
    assert len(rows) == 1


def test_all_broken_lines_are_counted_and_five_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(ALPACA), *(['{"instruction": "x",'] * 7)]))
    with pytest.raises(UserError) as caught:
        load_rows(name=None, path=str(path))
    text = str(caught.value)
    assert "7 of 8 lines are not JSON" in text
    assert "a.jsonl:2" in text
    assert "a.jsonl:6" in text
    assert "a.jsonl:7" not in text
    assert "2 more" in text


def test_unknown_and_mixed_formats_are_errors_unless_skipped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 of 3 rows match no known format") as caught:
        load_rows(name=None, path=write(tmp_path / "a.jsonl", [{"foo": 1}] * 3))
    assert "foo (int)" in str(caught.value)
    mixed = write(tmp_path / "b.jsonl", [ALPACA, ALPACA, {"foo": 1}])
    with pytest.raises(UserError, match="1 of 3 rows do not have the format alpaca") as caught:
        load_rows(name=None, path=mixed)
    assert "b.jsonl:3" in str(caught.value)
    skipped = load_rows(name=None, path=mixed, skip_bad=True)
    assert (len(skipped.rows), skipped.skipped) == (2, ["b.jsonl:3"])


def test_unreadable_sources_raise_errors_that_name_the_cause(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    for path, message in [
        (tmp_path / "rwos.jsonl", "did you mean"),
        (tmp_path / "rows.jsonl", "empty"),
    ]:
        with pytest.raises(UserError, match=message):
            load_rows(name=None, path=str(path))
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="unsupported type"):
        load_rows(name=None, path=str(tmp_path / "a.csv"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2"):
        load_rows(name=None, path=str(tmp_path / "b.jsonl"))
    (tmp_path / "c.json").write_text('[\n{"a": 1},\n{"a" 2}\n]')
    with pytest.raises(UserError, match=r"c\.json:3"):
        load_rows(name=None, path=str(tmp_path / "c.json"))
    with pytest.raises(UserError, match="not installed"):
        load_rows(name="package:no-such-package", path=None)


def test_rows_are_read_from_files_of_a_package(tmp_path: Path) -> None:
    rows = load_rows(name="package:chatterbot-corpus", path=None, files=["*/english/coding.yml"])
    assert rows.format == "dialogue"
    assert len(rows.rows) > 100
    with pytest.raises(UserError, match=r"english/trivia\.yml|it has"):
        load_rows(name="package:chatterbot-corpus", path=None, files=["*/english/nothing.yml"])


def test_unknown_hub_dataset_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"data\.name"):
        load_rows(name="nobody/no-such-dataset", path=None)


def test_max_rows_limits_the_number_of_rows(tmp_path: Path) -> None:
    assert len(load_rows(name=None, path=write(tmp_path / "a.jsonl", [ALPACA] * 9), max_rows=4).rows) == 4


def test_unicode_line_separators_do_not_split_jsonl_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "a\u2028b\x85c", "answer": "d"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (row,) = load_rows(name=None, path=str(path)).rows
    assert row.messages[0]["content"] == "a\u2028b\x85c"
