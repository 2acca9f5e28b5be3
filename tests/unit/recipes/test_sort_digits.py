"""The task of the demonstration, and the file that ships with it."""

from __future__ import annotations

import json

import pytest

from fwasync.data.messages import Message
from fwasync.data.prompts import PromptRow
from fwasync.recipes import sort_digits


def test_the_file_is_what_its_maker_makes() -> None:
    assert sort_digits.data_text() == sort_digits.make_rows()


def test_the_rows_are_mixed_as_promised() -> None:
    rows = [json.loads(line)["messages"] for line in sort_digits.data_text().splitlines()]
    assert len(rows) == 4096
    pairs = [(user["content"], assistant["content"]) for user, assistant in rows]
    assert all(sorted(prompt) == sorted(answer) for prompt, answer in pairs)
    upwards = sum(answer == "".join(sorted(prompt)) for prompt, answer in pairs)
    downwards = sum(answer == "".join(sorted(prompt, reverse=True)) for prompt, answer in pairs)
    same = sum(len(set(prompt)) == 1 for prompt, _ in pairs)
    assert upwards + downwards - same == 4096
    assert 0.29 < upwards / 4096 < 0.31


def test_held_out_prompts_are_seen_nowhere_else() -> None:
    held_out = {row.messages[0].content: row.ground_truth for row in sort_digits.held_out_rows()}
    assert len(held_out) == 128
    assert all(truth == "".join(sorted(digits)) for digits, truth in held_out.items())
    taught = {json.loads(line)["messages"][0]["content"] for line in sort_digits.data_text().splitlines()}
    assert not held_out.keys() & taught


@pytest.mark.parametrize(
    ("text", "reward"),
    [("12345", 1.0), (" 12345\n", 1.0), ("12354", 0.3), ("54321", 0.1), ("1234", 0.0), ("123456", 0.0), ("", 0.0)],
)
def test_reward(text: str, reward: float) -> None:
    row = PromptRow((Message("user", "31524"),), None, {}, 1)
    assert sort_digits.reward(text, row) == pytest.approx(reward)
