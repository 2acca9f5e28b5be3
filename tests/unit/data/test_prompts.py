"""Prompts: what the model continues, and what travels with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fwasync.data.messages import Message
from fwasync.data.prompts import PromptRow, load_prompts
from fwasync.errors import DatasetError

USER, SAID = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) if row is not None else "" for row in rows), encoding="utf-8")
    return path


async def test_answers_at_the_end_are_left_to_the_model(tmp_path: Path) -> None:
    rows = (
        {"messages": [USER], "ground_truth": "4", "id": 7, "tags": ["a"]},
        None,
        {"messages": [USER, SAID, USER, SAID, SAID], "tools": [{"name": "f"}]},
    )
    path = write(tmp_path / "rl.jsonl", *rows)
    user, said = Message("user", "2+2"), Message("assistant", "4")
    first = PromptRow((user,), "4", {"id": 7, "tags": ["a"]}, 1)
    assert await load_prompts(path) == (first, PromptRow((user, said, user), None, {}, 3, ({"name": "f"},)))
    assert await load_prompts(path, max_rows=1) == (first,)


async def test_faulty_rows_are_told_together(tmp_path: Path) -> None:
    path = write(tmp_path / "rl.jsonl", {"messages": [SAID]}, {"prompt": "x"}, {"messages": [USER]})
    with pytest.raises(DatasetError) as caught:
        await load_prompts(path)
    assert str(caught.value).splitlines() == [
        f"{path} has 2 faulty rows:",
        "  line 1, messages: all are from the assistant, so there is nothing to continue",
        "  line 2, messages: it is missing; the row has 'prompt'",
    ]
    with pytest.raises(DatasetError, match="is empty; it needs a row such as"):
        await load_prompts(write(tmp_path / "empty.jsonl"))
