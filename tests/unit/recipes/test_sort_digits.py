"""The task of the demonstration, and the file that ships with it."""

from __future__ import annotations

import json
import random

import pytest

from fwasync.recipes import sort_digits
from fwasync.rollout.groups import Prompt


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
    held_out = {prompt.messages[0].content for prompt in sort_digits.held_out_prompts()}
    assert len(held_out) == 128
    taught = {json.loads(line)["messages"][0]["content"] for line in sort_digits.data_text().splitlines()}
    practised = {p.messages[0].content for p in sort_digits.practice_prompts(random.Random(0), 5000)}
    assert not held_out & taught
    assert not held_out & practised


def test_practice_depends_on_its_randomness_alone() -> None:
    first = sort_digits.practice_prompts(random.Random(5), 4)
    assert first == sort_digits.practice_prompts(random.Random(5), 4)
    assert first != sort_digits.practice_prompts(random.Random(6), 4)
    assert all(prompt.truth == "".join(sorted(prompt.messages[0].content)) for prompt in first)


@pytest.mark.parametrize(
    ("text", "reward"),
    [("12345", 1.0), (" 12345\n", 1.0), ("12354", 0.3), ("54321", 0.1), ("1234", 0.0), ("123456", 0.0), ("", 0.0)],
)
def test_reward(text: str, reward: float) -> None:
    assert sort_digits.reward(Prompt((), truth="12345"), text) == pytest.approx(reward)
