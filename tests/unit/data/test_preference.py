"""Preferences: three forms, read strictly; and pairs of them, of which none is dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fwasync.data.chat import ChatTokenizer
from fwasync.data.messages import Message
from fwasync.data.pairs import load_preferences, preference_batch
from fwasync.data.preference import Preference, read_preference
from fwasync.errors import DatasetError
from unit.data.conftest import CHATML, THINKING

Make = Callable[..., ChatTokenizer]

ASK = {"role": "user", "content": "the"}
ASKED = Message("user", "the")


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def side(text: str) -> dict[str, Any]:
    return {"messages": [ASK, answer(text)]}


def scored(text: str, score: Any) -> dict[str, Any]:
    return side(text) | {"evals": {"score": score}}


A = {"chosen": side("fox"), "rejected": side("dog")}
B = {"samples": [scored("dog", 0.0), scored("fox", 1.0)]}
C = {"input": {"messages": [ASK]}, "preferred_output": [answer("fox")], "non_preferred_output": [answer("dog")]}
EXPECTED = Preference((ASKED, Message("assistant", "fox")), (ASKED, Message("assistant", "dog")), 5)


@pytest.mark.parametrize(
    "row",
    [
        A,
        B,
        {"samples": [side("fox") | {"score": 1}, scored("dog", 0)]},
        C,
        C | {"input": [ASK]},
        C | {"input": "the"},
        {"input": "the", "preferred_output": "fox", "non_preferred_output": "dog"},
    ],
)
def test_three_forms_come_to_one(row: dict[str, Any]) -> None:
    assert read_preference(row, 5) == EXPECTED


def test_texts_and_tools() -> None:
    row = {"chosen": {"text": "a b"}, "rejected": {"text": "a c"}, "tools": [{"name": "f"}]}
    assert read_preference(row, 1) == Preference("a b", "a c", 1, ({"name": "f"},))


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"messages": []}, "", "it is no preference: it must have chosen and rejected, or samples, or"),
        ({"chosen": side("x")}, "rejected", "it is missing"),
        (A | {"id": 3}, "id", "it is not understood; this form has chosen, rejected, tools"),
        (A | {"samples": []}, "samples", "it is not understood"),
        (A | {"tools": 3}, "tools", "it is a number; it must be a list of tools"),
        (A | {"rejected": "x"}, "rejected", "it is a string; it must be an object with messages or text"),
        (A | {"rejected": {}}, "rejected", "it must have either messages or text"),
        (A | {"rejected": side("x") | {"text": "x"}}, "rejected", "it must have either messages or text"),
        (A | {"rejected": side("x") | {"score": 1}}, "rejected.score", "it is not understood"),
        (A | {"rejected": {"text": ""}}, "rejected.text", "it is empty"),
        (A | {"rejected": {"text": 3}}, "rejected.text", "it is a number; it must be a string"),
        (A | {"rejected": {"text": "x"}}, "", "one side is a text and the other has messages"),
        (A | {"rejected": {"messages": [ASK]}}, "rejected.messages", "the last message must be the assistant's"),
        (
            A | {"rejected": {"messages": [answer("")]}},
            "rejected.messages[0].content",
            "the assistant's answer is empty",
        ),
        (
            A | {"rejected": {"messages": [answer("x") | {"weight": 0}]}},
            "rejected.messages[0]",
            "it says whether it is trained on",
        ),
        ({"samples": {}}, "samples", "it is an object; it must be a list"),
        ({"samples": []}, "samples", "no sample has the score 1.0 (chosen) or 0.0 (rejected)"),
        ({"samples": [scored("x", 1)]}, "samples", "no sample has the score 0.0 (rejected)"),
        (
            {"samples": [scored("x", 1), scored("y", 1.0)]},
            "samples[1].evals.score",
            "a second sample has the score 1.0",
        ),
        ({"samples": [scored("x", 0.5), scored("y", 1)]}, "samples[0].evals.score", "it is 0.5; it must be 1.0"),
        ({"samples": [scored("x", True), scored("y", 1)]}, "samples[0].evals.score", "it is True; it must be"),
        ({"samples": [side("x"), scored("y", 1)]}, "samples[0].evals.score", "it is None; it must be"),
        ({"samples": [3, scored("y", 1), scored("x", 0)]}, "samples[0]", "it is a number; it must be an object"),
        (C | {"preferred_output": 3}, "preferred_output", "it is a number; it must be a list"),
        (C | {"preferred_output": ""}, "preferred_output", "it is empty"),
        (C | {"input": {"message": []}}, "input.message", "it is not understood; this form has messages"),
        (C | {"input": 3}, "input", "it is a number; it must be a list"),
        ({"preferred_output": "x"}, "non_preferred_output", "it is missing"),
    ],
)
def test_what_is_no_preference_is_told_with_its_field(row: dict[str, Any], field: str, reason: str) -> None:
    faults = read_preference(row, 1)
    assert isinstance(faults, list)
    assert [name for name, _ in faults] == [field]
    assert faults[0][1].startswith(reason)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


async def test_pairs_part_where_the_answers_begin(tmp_path: Path, chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(CHATML)
    found = await load_preferences(write(tmp_path / "p.jsonl", A, B, C), tokenizer, max_seq_len=99)
    prompt = tokenizer.render([ASKED], add_generation_prompt=True)
    for line, pair in enumerate(found.pairs, 1):
        assert pair.line == line
        assert pair.response_start == len(prompt)
        assert pair.chosen[: len(prompt)].tolist() == pair.rejected[: len(prompt)].tolist() == prompt
        assert tokenizer.decode_all(pair.chosen[len(prompt) :]) == "fox<|im_end|>"
        assert tokenizer.decode_all(pair.rejected[len(prompt) :]) == "dog<|im_end|>"
    assert found.left_out == ()
    assert found.describe_left_out() == ""
    chosen, rejected, *rest = preference_batch(found.pairs)
    assert len(rest) == 4
    for datum, tokens in ((chosen, found.pairs[0].chosen), (rejected, found.pairs[0].rejected)):
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        assert weights.tolist() == [0] * (len(prompt) - 1) + [1] * (len(tokens) - len(prompt))


async def test_texts_are_tokens_as_they_stand(tmp_path: Path, chat_tokenizer: Make) -> None:
    row = {"chosen": {"text": "<|im_start|>a"}, "rejected": {"text": "<|im_start|>b"}}
    found = await load_preferences(write(tmp_path / "p.jsonl", row), chat_tokenizer(CHATML), max_seq_len=9)
    assert found.pairs[0].response_start == 1
    assert found.pairs[0].chosen[0] == 0


async def test_what_cannot_be_used_is_left_out_and_told(tmp_path: Path, chat_tokenizer: Make) -> None:
    long = {"chosen": side("fox"), "rejected": side("dog " * 30)}
    thinks = {"chosen": {"messages": [ASK, answer("x") | {"thinking": "t"}]}, "rejected": side("y")}
    same = {"chosen": side("x"), "rejected": side("x")}
    start = {"chosen": {"text": "x y"}, "rejected": {"text": "x y z"}}
    short = {"chosen": {"text": "<|im_end|>"}, "rejected": {"text": "x y z"}}
    path = write(tmp_path / "p.jsonl", A, long, thinks, same, start, short, long, long, long)
    found = await load_preferences(path, chat_tokenizer(CHATML), max_seq_len=30)
    assert [pair.line for pair in found.pairs] == [1]
    assert [(row.line, row.cause) for row in found.left_out] == [
        (2, "too long"),
        (3, "unrenderable"),
        (4, "without a difference"),
        (5, "without a difference"),
        (6, "too short"),
        *((line, "too long") for line in (7, 8, 9)),
    ]
    long_told, unrenderable, no_difference, short_told = found.describe_left_out().splitlines()
    assert long_told.startswith("4 of 9 rows are too long and left out: line 2: ")
    assert long_told.endswith("tokens, and 30 are allowed, and 1 more")
    assert unrenderable.startswith(
        "1 of 9 rows are unrenderable and left out: line 3: the chat template does not write"
    )
    assert "line 4: both sides have the same tokens; line 5: one side is how the other begins" in no_difference
    assert "line 6: a side has a single token" in short_told


async def test_faults_of_a_file_are_told_together_and_nothing_is_used(tmp_path: Path, chat_tokenizer: Make) -> None:
    path = write(tmp_path / "p.jsonl", A, {"chosen": side("x")}, {"samples": [scored("x", 2)]}, C)
    with pytest.raises(DatasetError) as caught:
        await load_preferences(path, chat_tokenizer(CHATML), max_seq_len=99)
    head, *told = str(caught.value).splitlines()
    assert head == f"{path} has 2 faulty rows:"
    assert [line.partition(": ")[0] for line in told] == ["  line 2, rejected", "  line 3, samples[0].evals.score"]
    assert [problem.line for problem in caught.value.problems] == [2, 3]


async def test_nothing_left_is_an_error_that_says_why(tmp_path: Path, chat_tokenizer: Make) -> None:
    with pytest.raises(DatasetError) as caught:
        await load_preferences(write(tmp_path / "p.jsonl", A), chat_tokenizer(CHATML), max_seq_len=5)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'p.jsonl'} has no pair that can be trained on:",
        "1 of 1 rows are too long and left out: line 1: 12 tokens, and 5 are allowed",
        "the shortest of those that are too long has 12 tokens (line 1)",
    ]
    with pytest.raises(DatasetError, match="it needs a row such as"):
        await load_preferences(write(tmp_path / "q.jsonl"), chat_tokenizer(CHATML), max_seq_len=5)


async def test_what_a_history_forgets_is_no_obstacle(tmp_path: Path, chat_tokenizer: Make) -> None:
    """Only the last answer is compared, so earlier turns may lose their thinking."""
    before = [ASK, answer("x") | {"thinking": "quick"}, {"role": "user", "content": "y"}]
    row = {"chosen": {"messages": [*before, answer("fox")]}, "rejected": {"messages": [*before, answer("dog")]}}
    found = await load_preferences(write(tmp_path / "p.jsonl", row), chat_tokenizer(THINKING), max_seq_len=99)
    assert len(found.pairs) == 1
