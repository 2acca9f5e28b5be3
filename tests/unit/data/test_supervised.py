"""Rows of a file: counted, measured, and never dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np
import pytest

from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Chat, Message, read_chats
from fwasync.data.loading import Progress
from fwasync.data.rendering import TrainOnWhat
from fwasync.data.supervised import SupervisedRows, load_supervised, tokenize
from fwasync.errors import DatasetError
from fwasync.local.tokenizer import CHAT_TEMPLATE, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(build_tokenizer(), CHAT_TEMPLATE, {"eos_token": "<|end|>"})


def chats(*answers: str) -> list[Chat]:
    return [Chat((Message("user", "?"), Message("assistant", text)), line) for line, text in enumerate(answers, 1)]


def test_rows_that_are_too_long_are_counted_and_told(tokenizer: ChatTokenizer) -> None:
    found = tokenize("a.jsonl", chats("a", "bbbb", "c" * 9, "d"), tokenizer, max_seq_len=9)
    assert [len(row.tokens) for row in found.rows] == [6, 9, 6]
    assert found.too_long == (3,)
    assert found.tokens == 21
    assert found.trained_tokens == 2 + 5 + 2
    assert found.describe_too_long() == "1 of 4 rows have more than 9 tokens and are left out: line 3"


def test_only_the_first_lines_are_listed(tokenizer: ChatTokenizer) -> None:
    found = tokenize("a.jsonl", chats("a", *["b" * 9] * 7), tokenizer, max_seq_len=6)
    assert found.describe_too_long().endswith("line 2, 3, 4, 5, 6, …")
    assert tokenize("a.jsonl", chats("a"), tokenizer, max_seq_len=6).describe_too_long() == ""


def test_nothing_left_is_an_error(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DatasetError, match="all 2 rows are longer than 5 tokens"):
        tokenize("a.jsonl", chats("a", "b"), tokenizer, max_seq_len=5)


def test_rows_that_the_template_refuses_are_told_together(tokenizer: ChatTokenizer) -> None:
    strange = [Chat((Message("oracle", "x"), Message("assistant", "y")), line) for line in (4, 8)]
    with pytest.raises(DatasetError, match=r"a\.jsonl has 2 faulty rows:\n.*line 4.*oracle.*\n.*line 8.*oracle"):
        tokenize("a.jsonl", [*chats("a"), *strange], tokenizer, max_seq_len=99)


def test_nothing_left_says_how_long_the_shortest_is(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DatasetError, match=r"all 3 rows are longer .* The shortest has 6 \(line 2\)"):
        tokenize("a.jsonl", chats("bb", "a", "c"), tokenizer, max_seq_len=5)


TURNS = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "dd"))


def trained(tokenizer: ChatTokenizer, rows: SupervisedRows) -> list[tuple[int, str, str]]:
    """Of each row: its line, all of its text, and what of it is trained on."""
    decode = tokenizer.decode_all
    return [(row.line, decode(row.tokens), decode(row.tokens[row.weights > 0])) for row in rows.rows]


def test_what_is_trained_on_is_chosen(tokenizer: ChatTokenizer) -> None:
    whole = "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>dd<|end|>"
    for what, text in (
        (TrainOnWhat.ALL_ASSISTANT_MESSAGES, "b<|end|>dd<|end|>"),
        (TrainOnWhat.LAST_ASSISTANT_MESSAGE, "dd<|end|>"),
        (TrainOnWhat.ALL_TOKENS, whole),
    ):
        found = tokenize("a.jsonl", [Chat(TURNS, 4)], tokenizer, max_seq_len=99, train_on_what=what)
        assert trained(tokenizer, found) == [(4, whole, text)]


def test_a_split_row_trains_each_answer_once(tokenizer: ChatTokenizer) -> None:
    found = tokenize("a.jsonl", [Chat(TURNS, 4)], tokenizer, max_seq_len=99, split=True)
    start = "<|user|>a<|end|><|assistant|>b<|end|>"
    assert trained(tokenizer, found) == [
        (4, start, "b<|end|>"),
        (4, f"{start}<|user|>c<|end|><|assistant|>dd<|end|>", "dd<|end|>"),
    ]


def test_rows_say_how_they_may_be_trained_on(tokenizer: ChatTokenizer) -> None:
    rows = [Chat((TURNS[0], Message("assistant", "b", trainable=False)), line) for line in (1, 2)]
    with pytest.raises(DatasetError, match=r"line 1, messages\[1\]: it says .*; use 'customized'\n  line 2"):
        tokenize("a.jsonl", rows, tokenizer, max_seq_len=99)
    with pytest.raises(DatasetError, match="line 1, messages: no message of the assistant is to be trained on"):
        tokenize("a.jsonl", rows, tokenizer, max_seq_len=99, train_on_what=TrainOnWhat.CUSTOMIZED)


class Counting:
    """A renderer of a user's own: a token for each message."""

    def __init__(self, weights: list[float] | None = None) -> None:
        self.weights = weights

    def render(self, messages: Any, *, add_generation_prompt: bool = False, tools: Any = ()) -> list[int]:
        return [len(message.content) for message in messages]

    def supervised(self, messages: Any, trained: Any, *, tools: Any = ()) -> tuple[list[int], list[float]]:
        weights = [float(index in trained) for index in range(len(messages))]
        return self.render(messages), weights if self.weights is None else self.weights


def test_another_renderer_takes_the_place_of_the_template(tokenizer: ChatTokenizer) -> None:
    def rows(weights: list[float] | None = None) -> SupervisedRows:
        return tokenize("a.jsonl", [Chat(TURNS, 4)], tokenizer, max_seq_len=9, renderer=Counting(weights))

    assert rows().rows[0].tokens.tolist() == [1, 1, 1, 2]
    assert rows().rows[0].weights.tolist() == [0, 1, 0, 1]
    with pytest.raises(DatasetError, match="line 4, messages: no token of it is trained on"):
        rows([1, 0, 0, 0])
    with pytest.raises(DatasetError, match="gave 4 tokens and 2 weights"):
        rows([1, 0])


def test_an_error_of_a_renderer_tells_its_row(tokenizer: ChatTokenizer) -> None:
    class Broken(Counting):
        def supervised(self, messages: Any, trained: Any, *, tools: Any = ()) -> Any:
            raise AssertionError("no such role")

    with pytest.raises(AssertionError, match="no such role") as caught:
        tokenize("a.jsonl", [Chat(TURNS, 4)], tokenizer, max_seq_len=9, renderer=Broken())
    assert caught.value.__notes__ == ["the renderer was asked for line 4 of a.jsonl"]


def write(path: Path, count: int) -> Path:
    row = {"messages": [{"role": message.role, "content": message.content} for message in TURNS]}
    path.write_text(f"{json.dumps(row)}\n" * count, encoding="utf-8")
    return path


async def test_a_file_is_loaded_as_it_is_read_and_tokenized(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", 300)
    seen: list[Progress] = []
    found = await load_supervised(path, tokenizer, max_seq_len=99, on_progress=seen.append)
    same = tokenize(path, read_chats(path), tokenizer, max_seq_len=99)
    assert [row.line for row in found.rows] == list(range(1, 301))
    for row, other in zip(found.rows, same.rows, strict=True):
        assert row.tokens.tolist() == other.tokens.tolist()
        assert row.weights.tolist() == other.weights.tolist()
        assert row.tokens.dtype == np.int32
    assert seen[-1] == Progress(300, path.stat().st_size, path.stat().st_size)
    assert [step.line for step in seen] == sorted(step.line for step in seen)
    assert len((await load_supervised(path, tokenizer, max_seq_len=99, max_rows=7)).rows) == 7
    with pytest.raises(DatasetError, match="is empty; it needs a row"):
        await load_supervised(write(tmp_path / "empty.jsonl", 0), tokenizer, max_seq_len=99)


async def test_loading_can_be_cancelled_and_leaves_nothing_running(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """The reading stops with the slice that was running."""

    class Endless(Counting):
        calls = 0

        def supervised(self, messages: Any, trained: Any, *, tools: Any = ()) -> Any:
            self.calls += 1
            if self.calls == 3:
                anyio.from_thread.run_sync(scope.cancel)
            return super().supervised(messages, trained, tools=tools)

    renderer = Endless()
    path = write(tmp_path / "a.jsonl", 50_000)
    with anyio.CancelScope() as scope:
        await load_supervised(path, tokenizer, max_seq_len=99, renderer=renderer)
    assert scope.cancelled_caught
    calls = renderer.calls
    assert 3 <= calls < 50_000
    await anyio.to_thread.run_sync(lambda: None)
    assert renderer.calls == calls
