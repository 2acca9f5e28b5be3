"""Where two ways of making tokens part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Chat
from fwasync.data.messages import Message
from fwasync.data.parity import check_parity, compare_rows, first_divergence
from unit.data.conftest import CHATML

Make = Callable[..., ChatTokenizer]
ids = st.lists(st.integers(0, 3), max_size=12)


@given(ours=ids, theirs=ids)
def test_they_part_where_they_first_differ(ours: list[int], theirs: list[int]) -> None:
    found = first_divergence(ours, theirs, str)
    if found is None:
        assert ours == theirs
        return
    assert ours[: found.position] == theirs[: found.position]
    assert ours[found.position : found.position + 1] != theirs[found.position : found.position + 1]
    assert list(found.ours) == ours[found.position :][:8]
    assert list(found.theirs) == theirs[found.position :][:8]
    assert found.before == str(tuple(ours[: found.position][-8:]))


def chat(*turns: tuple[str, str], line: int = 1) -> Chat:
    return Chat(tuple(Message(role, text) for role, text in turns), line)


def test_the_chat_template_is_on_a_par_with_itself(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(CHATML)
    rows = [chat(("user", "the"), ("assistant", "fox"), ("user", "x"), ("assistant", "y")), chat(("assistant", "z"))]
    assert check_parity(tokenizer, tokenizer, rows) is None
    assert check_parity(tokenizer, chat_tokenizer(f"{CHATML}{{{{ '\n' }}}}"), rows[1:]) is None, (
        "white space at the end"
    )


def test_special_tokens_in_texts_are_where_it_differs_from_others(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(CHATML)
    found = check_parity(tokenizer, tokenizer, [chat(("user", "a")), chat(("user", "b<|im_end|>"), line=7)])
    assert found is not None
    assert found.line == 7
    assert found.divergence.theirs[0] == tokenizer.stop_tokens[0]
    assert str(found).splitlines()[0] == (
        "line 7, the whole conversation: the renderer and the chat template differ; "
        "they part at token 4, after '<|im_start|>user\\nb'"
    )


class Forgetful:
    """A renderer that asks for an answer differently than the template."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.supervised = tokenizer.supervised

    def render(self, messages: Any, *, add_generation_prompt: bool = False, tools: Any = ()) -> list[int]:
        tokens = self.tokenizer.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return tokens[:-1] if add_generation_prompt else tokens


def test_prompts_are_compared_too(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(CHATML)
    row = chat(("user", "the"), ("assistant", "fox"), line=3)
    found = check_parity(Forgetful(tokenizer), tokenizer, [row])
    assert found is not None
    first, ours, theirs = str(found).splitlines()
    assert first.startswith("line 3, the prompt of messages[1]: the renderer and the chat template differ")
    assert first.endswith("<|im_start|>assistant'")
    assert ours == "  renderer  [] ''"
    assert theirs.startswith("  template  [")
    assert theirs.endswith(r"] '\n'")


def test_the_prompt_of_the_message_to_come_is_compared(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(CHATML)
    found = check_parity(Forgetful(tokenizer), tokenizer, [chat(("user", "the"))])
    assert found is not None
    assert found.what == "the prompt of the next message"


CHATS = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox"}]
SPELT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>"}]


def file_of(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


async def test_rows_of_any_kind_of_file_are_compared(chat_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    sides = {"chosen": {"messages": CHATS}, "rejected": {"messages": CHATS}}
    texts = {"chosen": {"text": "a"}, "rejected": {"text": "b"}}
    path = file_of(tmp_path / "rows.jsonl", {"messages": CHATS[:1]}, {"messages": "faulty"}, sides, texts)
    found = await compare_rows(path, tokenizer)
    assert (found.rows, found.failure, found.is_expected) == (2, None, True)
    assert str(found) == "2 compared, with the chat template's tokens"
    assert str(await compare_rows(file_of(path, texts), tokenizer)) == "no row is a conversation"
    path = file_of(path, {"messages": CHATS}, {**sides, "rejected": {"messages": SPELT}}, {"messages": SPELT})
    found = await compare_rows(path, tokenizer)
    assert found.failure is not None
    assert (found.failure.line, found.is_expected) == (2, True)
    assert str(found).endswith("\n  a message spells a special token, which stays text here")
    assert (await compare_rows(path, tokenizer, max_rows=1)).failure is None


async def test_another_renderer_that_differs_is_not_expected(chat_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    path = file_of(tmp_path / "rows.jsonl", {"messages": [{"role": "tool"}, *CHATS]}, {"messages": CHATS})
    found = await compare_rows(path, tokenizer, renderer=Forgetful(tokenizer))
    assert found.failure is not None
    assert (found.failure.line, found.failure.what) == (2, "the prompt of messages[1]")
    assert (found.rows, found.is_expected) == (1, False)
