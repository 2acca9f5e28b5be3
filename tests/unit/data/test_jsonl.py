"""Files of chats: what is read, and what is said of files that cannot be."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from fwasync.data.jsonl import Chat, Message, read_chats
from fwasync.errors import DatasetError, UsageError

GOOD = {"messages": [{"role": "user", "content": "31524"}, {"role": "assistant", "content": "12345"}]}


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def messages(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_rows_keep_their_lines_and_blank_lines_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, b"", b"  ", messages(("system", ""), ("assistant", "é\U0001f600")))
    first, second = read_chats(path)
    assert first == Chat((Message("user", "31524"), Message("assistant", "12345")), 1)
    assert second == Chat((Message("system", ""), Message("assistant", "é\U0001f600")), 4)


def test_windows_line_ends_a_byte_order_mark_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + row)
    assert [chat.line for chat in read_chats(path)] == [1, 2]


def test_other_keys_of_a_row_are_its_owners(tmp_path: Path) -> None:
    assert read_chats(write(tmp_path / "a.jsonl", {**GOOD, "id": 7, "source": {"x": []}, "tools": None}))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"\xffx", "line 1: not UTF-8: byte 0xff at column 1"),
        (b'{"messages": [}', "line 1: not JSON: "),
        (b'{"messages": NaN}', "line 1: not JSON: "),
        ([1], "line 1: it is a list; each line must be an object"),
        (b"null", "line 1: it is null;"),
        ({"prompt": "x", "completion": "y"}, "line 1, messages: it is missing; the row has 'prompt', 'completion'"),
        ({"messages": "hi"}, "line 1, messages: it is a string; it must be a list"),
        ({"messages": []}, "line 1, messages: it is empty"),
        ({"messages": ["hi"]}, "line 1, messages[0]: it is a string; it must be an object"),
        ({"messages": [{"content": "x"}]}, "line 1, messages[0].role: it is missing"),
        (messages(("assistant", "a"), ("bot", "x")), "line 1, messages[1].role: 'bot' is not a role; use system, user"),
        (messages((["user"], "x")), "line 1, messages[0].role: ['user'] is not a role"),
        ({"messages": [{"role": "assistant"}]}, "line 1, messages[0].content: it is missing"),
        (messages(("assistant", None)), "line 1, messages[0].content: the assistant's answer is empty"),
        (messages(("assistant", 3)), "line 1, messages[0].content: it is a number; it must be a string"),
        (messages(("assistant", True)), "line 1, messages[0].content: it is a boolean; it must be a string"),
        (messages(("assistant", [{"type": "text"}])), "line 1, messages[0].content[0].text: it is null; it must be"),
        (messages(("user", "x"), ("assistant", "")), "line 1, messages[1].content: the assistant's answer is empty"),
        (messages(("user", "x")), "line 1, messages: no message is from the assistant"),
        ({"messages": [{"role": "assistant", "content": "x", "mood": 0}]}, "line 1, messages[0].mood: it is not under"),
        ({**GOOD, "tools": ["f"]}, "line 1, tools[0]: it is a string; a tool is an object"),
    ],
)
def test_a_faulty_row_is_told_with_line_field_and_reason(tmp_path: Path, row: object, told: str) -> None:
    path = write(tmp_path / "a.jsonl", row, GOOD)
    with pytest.raises(DatasetError) as caught:
        read_chats(path)
    assert str(caught.value).startswith(f"{path} has 1 faulty row:\n  {told}")


def test_all_problems_are_told_together_up_to_ten(tmp_path: Path) -> None:
    rows = [messages(("bot", index), ("assistant", "x")) for index in range(7)]
    with pytest.raises(DatasetError) as caught:
        read_chats(write(tmp_path / "a.jsonl", GOOD, *rows))
    head, *told, rest = str(caught.value).splitlines()
    assert head.endswith("has 7 faulty rows:")
    assert len(told) == 10
    assert told[0].startswith("  line 2, messages[0].role")
    assert told[1].startswith("  line 2, messages[0].content")
    assert rest == "  … and 4 more"
    assert len(caught.value.problems) == 10


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"missing\.jsonl: there is no such file"):
        read_chats(tmp_path / "missing.jsonl")
    with pytest.raises(DatasetError, match="is a directory; name a JSONL file"):
        read_chats(tmp_path)
    with pytest.raises(DatasetError, match="is empty; it needs a row"):
        read_chats(write(tmp_path / "empty.jsonl", b"", b" "))


def test_the_error_is_a_usage_error_and_survives_pickling(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_chats(write(tmp_path / "a.jsonl", {}))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.problems == caught.value.problems


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gzip.compress(b"{}", mtime=0), "is gzip: unpack"),
        (json.dumps(GOOD).encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"PAR1\x15\x04", "is Parquet: write its rows as JSON"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DatasetError, match=told):
        read_chats(tmp_path / "a.jsonl")
