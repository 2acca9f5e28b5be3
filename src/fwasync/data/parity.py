"""Where two ways of making tokens part: to see what is wrong before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import numpy.typing as npt

from fwasync.data.jsonl import Chat, JsonRow, Problem, read_conversation
from fwasync.data.loading import open_lines, take_all
from fwasync.data.messages import Fault
from fwasync.data.preference import read_preference
from fwasync.data.rendering import Renderer, RenderRefusal, rendering_line, resolve_renderer

if TYPE_CHECKING:
    from fwasync.data.chat import ChatTokenizer

__all__ = ("Divergence", "Parity", "ParityFailure", "check_parity", "compare_rows", "first_divergence")

Decode = Callable[[Sequence[int]], str]

_CONTEXT = 8
_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two sequences of tokens part.

    Attributes:
        position: Of the first token that differs, from 0; the length of the shorter one, if the other begins with it.
        ours: A few tokens of ours from there on; none at its end.
        theirs: As many of the other.
        before: The text of the tokens before, which both have.
        our_text: That of `ours`.
        their_text: That of `theirs`.
    """

    position: int
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    before: str
    our_text: str
    their_text: str

    def describe(self, *, ours: str = "ours", theirs: str = "theirs") -> str:
        """Three lines for people."""
        width = max(len(ours), len(theirs))
        return (
            f"they part at token {self.position}, after {self.before!r}\n"
            f"  {ours:<{width}}  {list(self.ours)} {self.our_text!r}\n"
            f"  {theirs:<{width}}  {list(self.theirs)} {self.their_text!r}"
        )


@dataclass(frozen=True, slots=True)
class ParityFailure:
    """A row that a renderer and the chat template turn into different tokens.

    Attributes:
        line: Of the file.
        what: Which rendering of the row.
        divergence: Where.
    """

    line: int
    what: str
    divergence: Divergence

    def __str__(self) -> str:
        where = f"line {self.line}, {self.what}: the renderer and the chat template differ"
        return f"{where}; {self.divergence.describe(ours='renderer', theirs='template')}"


@dataclass(frozen=True, slots=True)
class Parity:
    """What came of comparing the rows of a file.

    Attributes:
        rows: How many were compared, up to the first that differs.
        failure: That one; `None` if there is none.
        own: What renders is the chat template itself.
    """

    rows: int
    failure: ParityFailure | None
    own: bool

    @property
    def is_expected(self) -> bool:
        """Whether all is as it should be: the chat template itself differs where a message spells a special token."""
        return self.failure is None or self.own

    def __str__(self) -> str:
        if self.failure is not None:
            kept = "\n  a message spells a special token, which stays text here" if self.own else ""
            return f"{self.failure}{kept}"
        return f"{self.rows:,} compared, with the chat template's tokens" if self.rows else "no row is a conversation"


def first_divergence(
    ours: Sequence[int] | npt.NDArray[Any], theirs: Sequence[int] | npt.NDArray[Any], decode: Decode
) -> Divergence | None:
    """Where two sequences of tokens part, if they do.

    Args:
        ours: `[L]`.
        theirs: `[M]`.
        decode: The text of tokens, special ones included.
    """
    pairs = zip(ours, theirs, strict=False)
    position = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    if position == len(ours) == len(theirs):
        return None
    a, b, before = (
        tuple(int(token) for token in tokens)
        for tokens in (
            ours[position : position + _CONTEXT],
            theirs[position : position + _CONTEXT],
            ours[max(0, position - _CONTEXT) : position],
        )
    )
    return Divergence(position, a, b, decode(before), decode(a), decode(b))


def check_parity(renderer: Renderer, tokenizer: ChatTokenizer, chats: Iterable[Chat]) -> ParityFailure | None:
    """The first row for which a renderer's tokens are not those of the model's own chat template, if there is one.

    Each conversation is compared as a whole, but for white space that follows its end, which nobody trains on; and as
    the prompt of each of its answers, and of the one that is to come, to the last token. The template's tokens are
    those of `apply_chat_template` of transformers; so `tokenizer` itself, as the renderer, differs only where a message
    spells a special token, which it keeps as text.

    This computes for a while: on an event loop, call it through `anyio.to_thread.run_sync`.

    Raises:
        RenderRefusal: One of the two does not take a conversation.
    """
    for chat in chats:
        for what, end, prompt in _renderings(chat):
            messages = chat.messages[:end]
            ours = renderer.render(messages, add_generation_prompt=prompt, tools=chat.tools)
            theirs = tokenizer.template_tokens(messages, add_generation_prompt=prompt, tools=chat.tools)
            if not prompt:
                ours, theirs = _without_space(ours, tokenizer), _without_space(theirs, tokenizer)
            found = first_divergence(ours, theirs, tokenizer.decode_all)
            if found is not None:
                return ParityFailure(chat.line, what, found)
    return None


async def compare_rows(
    source: str | Path, tokenizer: ChatTokenizer, *, renderer: Renderer | str | None = None, max_rows: int | None = None
) -> Parity:
    """Compare a renderer with the chat template on the rows of a file, in a worker thread; see `check_parity`.

    Args:
        source: A path, or an http(s) URL; chats, prompts or preferences.
        tokenizer: The model's.
        renderer: As for `resolve_renderer`; `None` is the tokenizer itself.
        max_rows: Compare so many rows at most, and no more than 1,000 in any case.

    Rows that cannot be read, and conversations that one of the two does not take, are passed by: who loads the file to
    train on it tells them.

    Raises:
        DatasetError: The file cannot be read.
        UsageError: The renderer cannot be had, or raises.
        ServiceError, TransportError: The URL cannot be had.

    **Cancellation:** the comparison stops within a slice, of some hundredths of a second; nothing goes on.
    """
    found: dict[int, ParityFailure | None] = {}

    def compared(rows: Iterable[tuple[Chat, ...] | Problem]) -> Iterator[tuple[int, ParityFailure | None]]:
        for row in rows:
            for chat in () if isinstance(row, Problem) else row:
                try:
                    with rendering_line(chat.line, lines.name):
                        failure = check_parity(chosen, tokenizer, [chat])
                except RenderRefusal:
                    continue
                yield chat.line, failure
                if failure is not None:
                    return

    def take(item: tuple[int, ParityFailure | None]) -> None:
        found.update([item])

    async with open_lines(source, max_rows=min(max_rows or _ROWS, _ROWS)) as lines:
        chosen = await anyio.to_thread.run_sync(resolve_renderer, renderer, tokenizer)
        await take_all(lines, compared(lines.rows(_conversations)), take)
    failures = [failure for failure in found.values() if failure is not None]
    return Parity(len(found), failures[0] if failures else None, chosen is tokenizer)


def _conversations(row: JsonRow, line: int) -> tuple[Chat, ...] | list[Fault]:
    """The conversations of a row of any kind of file."""
    if "messages" in row:
        messages, tools, faults = read_conversation(row)
        return faults or (Chat(messages, line, tools),)
    found = read_preference(row, line)
    if isinstance(found, list):
        return found
    return tuple(Chat(side, line, found.tools) for side in (found.chosen, found.rejected) if not isinstance(side, str))


def _renderings(chat: Chat) -> Iterator[tuple[str, int, bool]]:
    """What is rendered: its name, how many messages, and whether as a prompt."""
    for index, message in enumerate(chat.messages):
        if message.role == "assistant" and index:
            yield f"the prompt of messages[{index}]", index, True
    yield "the whole conversation", len(chat.messages), False
    if chat.messages[-1].role != "assistant":
        yield "the prompt of the next message", len(chat.messages), True


def _without_space(tokens: Sequence[int], tokenizer: ChatTokenizer) -> Sequence[int]:
    end = len(tokens)
    while end and not tokenizer.decode_all(tokens[end - 1 : end]).strip():
        end -= 1
    return tokens[:end]
