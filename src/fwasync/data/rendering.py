"""What turns chats into tokens, and which of their messages are trained on.

A renderer is any object with the two methods of `Renderer`. The model's own chat template is one (`ChatTokenizer`), and
it is the one that is used unless another is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from fwasync.config.named import load_named, raised_by
from fwasync.data.messages import Message
from fwasync.errors import FwasyncError, UsageError

__all__ = (
    "RenderRefusal",
    "Renderer",
    "TrainOnWhat",
    "rendering_line",
    "resolve_renderer",
    "split_answers",
    "trained_messages",
)

T = TypeVar("T")


class RenderRefusal(UsageError):
    """These messages cannot be rendered.

    Attributes:
        field: Which of them, such as `messages[2]`.
    """

    def __init__(self, message: str, *, field: str = "messages") -> None:
        super().__init__(message)
        self.field = field


@runtime_checkable
class Renderer(Protocol):
    """What is asked of a renderer.

    Both methods block while they compute, and are called in worker threads, one call at a time.
    """

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Sequence[int]:
        """The tokens of a conversation, at its end with what invites the assistant to speak if that is wanted.

        Raises:
            RenderRefusal: It cannot be rendered.
        """
        ...

    def supervised(
        self, messages: Sequence[Message], trained: Collection[int], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[Sequence[int] | npt.NDArray[np.integer[Any]], Sequence[float] | npt.NDArray[np.floating[Any]]]:
        """The tokens of a conversation, and as many weights: 1 where what these messages say is trained on, else 0.

        Args:
            messages: The conversation.
            trained: The indices of messages of the assistant.
            tools: What the assistant may call.

        Raises:
            RenderRefusal: It cannot be rendered, or the weights cannot be told.
        """
        ...


class TrainOnWhat(StrEnum):
    """Which tokens of a chat are trained on.

    A turn of the assistant is all that it says between two messages of the user, tools answering in between; so all of
    its turns are all of its messages.
    """

    LAST_ASSISTANT_MESSAGE = "last_assistant_message"
    LAST_ASSISTANT_TURN = "last_assistant_turn"
    ALL_ASSISTANT_MESSAGES = "all_assistant_messages"
    ALL_TOKENS = "all_tokens"
    CUSTOMIZED = "customized"
    """The assistant's messages, but for those whose `trainable` is false or whose `weight` is 0."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """By name, in capitals or not; `all_assistant_turns` is `all_assistant_messages`.

        Raises:
            UsageError: There is no such one.
        """
        name = text.strip().lower().replace("-", "_").replace("all_assistant_turns", "all_assistant_messages")
        try:
            return cls(name)
        except ValueError:
            raise UsageError(f"train_on_what is {text!r}; it must be one of {', '.join(cls)}") from None


def trained_messages(messages: Sequence[Message], what: TrainOnWhat) -> list[int]:
    """The indices of the assistant's messages that are trained on, in order; all of them for `ALL_TOKENS`.

    Raises:
        RenderRefusal: There are none, or messages say that they are trainable where nobody asks them.
    """
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    for index, message in enumerate(messages):
        if message.trainable is not None and what is not TrainOnWhat.CUSTOMIZED:
            reason = f"it says whether it is trained on, but train_on_what is {what.value!r}; use 'customized'"
            raise RenderRefusal(reason, field=f"messages[{index}]")
        if message.trainable and message.role != "assistant":
            raise RenderRefusal("only messages of the assistant can be trained on", field=f"messages[{index}]")
    match what:
        case TrainOnWhat.LAST_ASSISTANT_MESSAGE:
            answers = answers[-1:]
        case TrainOnWhat.LAST_ASSISTANT_TURN:
            asked = [index for index, message in enumerate(messages) if message.role == "user"]
            start = max((index for index in asked if answers and index < answers[-1]), default=-1)
            answers = [index for index in answers if index > start]
        case TrainOnWhat.CUSTOMIZED:
            answers = [index for index in answers if messages[index].trainable is not False]
        case _:
            pass
    if not answers:
        raise RenderRefusal("no message of the assistant is to be trained on")
    return answers


def split_answers(messages: Sequence[Message], trained: Sequence[int]) -> list[tuple[Sequence[Message], list[int]]]:
    """One conversation for each message that is trained on, ending with it: what is said later never touches it.

    For templates that write an answer differently once the conversation goes on, such as those that drop the thinking
    of earlier turns: each answer is trained on once, after exactly what the model is shown when it gives it.
    """
    return [(messages[: index + 1], [index]) for index in trained]


def resolve_renderer(choice: Renderer | str | None, tokenizer: T) -> Renderer | T:
    """The renderer that is meant.

    Args:
        choice: A renderer; or `"module:attribute"` or `"file.py:attribute"`, which names a function or class that is
            called with the tokenizer and gives one; or `None`, for the tokenizer's own chat template.
        tokenizer: The model's.

    Raises:
        UsageError: It names nothing, or what it gives is no renderer. Once it renders, what a renderer that is named
            raises is one too, with its place.
    """
    if choice is None:
        return tokenizer
    if not isinstance(choice, str):
        return _checked(choice, "the renderer")
    make: Callable[[T], object] = load_named(
        choice, "renderer", otherwise=", or be left out for the model's own chat template"
    )
    if not callable(make):
        raise UsageError(f"renderer {choice!r} must be a function or class that takes a tokenizer and gives a renderer")
    what = f"renderer {choice!r}"
    with _told(what):
        made = make(tokenizer)
    if made is tokenizer:
        return tokenizer
    return _Named(what, _checked(made, f"what {choice!r} gives"))


@dataclass(frozen=True, slots=True)
class _Named:
    """A renderer under its name: what it raises is told as its own error, and what it gives is checked."""

    what: str
    renderer: Renderer

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Sequence[int]:
        with _told(self.what):
            ids = self.renderer.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self._tokens(ids).tolist()

    def supervised(
        self, messages: Sequence[Message], trained: Collection[int], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        with _told(self.what):
            ids, weights = self.renderer.supervised(messages, trained, tools=tools)
        return self._tokens(ids), self._list(weights, "bif", "weights")

    def _tokens(self, given: object) -> npt.NDArray[Any]:
        tokens = self._list(given, "iu", "tokens")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
            raise UsageError(f"{self.what} gave tokens from {tokens.min()} to {tokens.max()}")
        return tokens

    def _list(self, given: object, kinds: str, name: str) -> npt.NDArray[Any]:
        """What it gave, as an array of one dimension; `kinds` are those of numpy's dtypes.

        Raises:
            UsageError: It is none.
        """
        try:
            array = np.asarray(given)
        except (TypeError, ValueError, RuntimeError):  # of different lengths, say
            array = None
        if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
            numbers = "integers" if kinds == "iu" else "numbers"
            raise UsageError(f"{self.what} gave {name} that are no list of {numbers}: {repr(given)[:80]}")
        return array


@contextmanager
def _told(what: str) -> Generator[None]:
    try:
        yield
    except FwasyncError:
        raise
    except Exception as error:
        raise raised_by(what, error) from error


@contextmanager
def rendering_line(line: int, source: str | Path) -> Generator[None]:
    """What a renderer raises meanwhile, but for a refusal, gets a note of the line of a file that it was asked for."""
    try:
        yield
    except RenderRefusal:
        raise
    except Exception as error:
        error.add_note(f"the renderer was asked for line {line} of {source}")
        raise


def _checked(renderer: object, what: str) -> Renderer:
    if isinstance(renderer, Renderer) and not isinstance(renderer, type):
        return renderer
    raise UsageError(f"{what} is a {type(renderer).__name__}, without the methods render and supervised of a renderer")
