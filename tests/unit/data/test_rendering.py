"""Which messages are trained on, and which renderer is meant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fwasync.data.chat import ChatTokenizer
from fwasync.data.messages import Message
from fwasync.data.rendering import (
    Renderer,
    RenderRefusal,
    TrainOnWhat,
    resolve_renderer,
    split_answers,
    trained_messages,
)
from fwasync.errors import UsageError
from unit.data.conftest import CHATML

ROLES = ("system", "user", "assistant", "user", "assistant", "tool", "assistant", "user")
CHAT = [Message(role, role) for role in ROLES]


@pytest.mark.parametrize(
    ("what", "indices"),
    [
        (TrainOnWhat.LAST_ASSISTANT_MESSAGE, [6]),
        (TrainOnWhat.LAST_ASSISTANT_TURN, [4, 6]),
        (TrainOnWhat.ALL_ASSISTANT_MESSAGES, [2, 4, 6]),
        (TrainOnWhat.CUSTOMIZED, [2, 4, 6]),
        (TrainOnWhat.ALL_TOKENS, [2, 4, 6]),
    ],
)
def test_which_messages_are_trained_on(what: TrainOnWhat, indices: list[int]) -> None:
    assert trained_messages(CHAT, what) == indices


def test_a_turn_without_a_question_is_all_of_it() -> None:
    chat = [Message("assistant", "a"), Message("tool", "b"), Message("assistant", "c")]
    assert trained_messages(chat, TrainOnWhat.LAST_ASSISTANT_TURN) == [0, 2]


def test_messages_may_choose_for_themselves() -> None:
    chat = [
        Message("user", "a", trainable=False),
        *(Message("assistant", "b", trainable=t) for t in (None, False, True)),
    ]
    assert trained_messages(chat, TrainOnWhat.CUSTOMIZED) == [1, 3]
    with pytest.raises(RenderRefusal, match="train_on_what is 'all_assistant_messages'; use 'customized'") as caught:
        trained_messages(chat[1:], TrainOnWhat.ALL_ASSISTANT_MESSAGES)
    assert caught.value.field == "messages[1]"
    with pytest.raises(RenderRefusal, match="only messages of the assistant"):
        trained_messages([Message("user", "a", trainable=True)], TrainOnWhat.CUSTOMIZED)
    with pytest.raises(RenderRefusal, match="no message of the assistant is to be trained on"):
        trained_messages([Message("assistant", "a", trainable=False)], TrainOnWhat.CUSTOMIZED)


def test_names_are_read_in_capitals_or_not() -> None:
    assert TrainOnWhat.parse("LAST_ASSISTANT_TURN") is TrainOnWhat.LAST_ASSISTANT_TURN
    assert TrainOnWhat.parse(" all-assistant-turns ") is TrainOnWhat.ALL_ASSISTANT_MESSAGES
    with pytest.raises(UsageError, match="train_on_what is 'everything'; it must be one of last_assistant_message, "):
        TrainOnWhat.parse("everything")


def test_a_split_trains_each_answer_once_after_what_led_to_it() -> None:
    assert split_answers(CHAT, [2, 6]) == [(CHAT[:3], [2]), (CHAT[:7], [6])]


class Words:
    """A renderer of a user's own."""

    def __init__(self, tokenizer: object = None) -> None:
        self.tokenizer = tokenizer

    def render(self, messages: Any, *, add_generation_prompt: bool = False, tools: Any = ()) -> list[int]:
        return [len(message.content) for message in messages]

    def supervised(self, messages: Any, trained: Any, *, tools: Any = ()) -> tuple[list[int], list[float]]:
        return self.render(messages), [float(index in trained) for index in range(len(messages))]


def test_a_renderer_is_an_object_or_a_name_or_the_chat_template(
    chat_tokenizer: Callable[..., ChatTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer(CHATML)
    assert isinstance(tokenizer, Renderer)
    assert resolve_renderer(None, tokenizer) is tokenizer
    words = Words()
    assert resolve_renderer(words, tokenizer) is words
    module = ModuleType("my_renderers")
    monkeypatch.setitem(sys.modules, "my_renderers", module)
    vars(module).update(Words=Words, words=words, nothing=lambda tokenizer: None, same=lambda given: given)
    made = resolve_renderer("my_renderers:Words", tokenizer)
    assert isinstance(made, Renderer)
    assert made.render([Message("user", "abc")]) == [3]
    assert resolve_renderer("my_renderers:same", tokenizer) is tokenizer
    for choice, told in (
        ("qwen3", "must look like 'module:attribute' or 'file.py:attribute', or be left out"),
        ("my_renderers:", "must look like"),
        ("my_renderers:none", "cannot be imported"),
        ("no_such_module:x", "cannot be imported: No module named"),
        ("my_renderers:words", "must be a function or class"),
        ("my_renderers:nothing", "what 'my_renderers:nothing' gives is a NoneType, without the methods"),
        (Words, "the renderer is a type, without the methods"),
        (3, "the renderer is a int, without the methods"),
    ):
        with pytest.raises(UsageError, match=told):
            resolve_renderer(choice, tokenizer)  # pyright: ignore[reportArgumentType]


BROKEN = """\
class Broken:
    def __init__(self, tokenizer):
        self.given = tokenizer["given"]

    def render(self, messages, *, add_generation_prompt=False, tools=()):
        return self.given(messages)

    def supervised(self, messages, trained, *, tools=()):
        return [1, 2], self.given(messages)
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the renderer of that file, under its name."""
    path = tmp_path / "broken_renderer.py"
    path.write_text(BROKEN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return lambda **given: resolve_renderer(f"{path}:Broken", given)


def test_what_a_named_renderer_raises_is_its_own_error(broken: Callable[..., Any]) -> None:

    def raises(messages: Any) -> Any:
        raise failure

    failure: Exception = KeyError("x")
    with pytest.raises(UsageError, match=r"^renderer '.*:Broken' raised KeyError: 'given' \(\w+\.py, line 3\)"):
        broken()
    made = broken(given=raises)
    for call in (lambda: made.render(CHAT), lambda: made.supervised(CHAT, [1])):
        with pytest.raises(UsageError, match=r"^renderer '.*:Broken' raised KeyError: 'x' \("):
            call()
    failure = RenderRefusal("not this one")
    with pytest.raises(RenderRefusal, match="not this one"):
        made.render(CHAT)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "tokens that are no list of integers: None"),
        ([[1], [2, 3]], r"tokens that are no list of integers: \[\[1\], \[2, 3\]\]"),
        (["a"], r"tokens that are no list of integers: \['a'\]"),
        ([0.5], r"tokens that are no list of integers: \[0\.5\]"),
        ([-1, 3], "tokens from -1 to 3"),
        ([2**31], "tokens from 2147483648 to 2147483648"),
    ],
)
def test_what_a_named_renderer_gives_is_looked_at(given: Any, told: str, broken: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=rf"Broken' gave {told}$"):
        broken(given=lambda messages: given).render(CHAT)


def test_weights_that_are_none(broken: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"gave weights that are no list of numbers: \['all'\]$"):
        broken(given=lambda messages: ["all"]).supervised(CHAT, [1])
