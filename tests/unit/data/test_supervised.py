"""Rows of a file: counted, measured, and never dropped in silence."""

from __future__ import annotations

import pytest

from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Chat, Message
from fwasync.data.supervised import tokenize
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
