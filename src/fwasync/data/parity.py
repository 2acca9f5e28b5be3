"""Where two ways of making tokens part: to see what is wrong before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fwasync.data.jsonl import Chat
from fwasync.data.rendering import Renderer

if TYPE_CHECKING:
    from fwasync.data.chat import ChatTokenizer

__all__ = ("Divergence", "ParityFailure", "check_parity", "first_divergence")

Decode = Callable[[Sequence[int]], str]

_CONTEXT = 8


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
    the prompt of each of its answers, to the last token. The template's tokens are those of `apply_chat_template` of
    transformers; so `tokenizer` itself, as the renderer, differs only where a message spells a special token, which it
    keeps as text.

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


def _renderings(chat: Chat) -> Iterator[tuple[str, int, bool]]:
    """What is rendered: its name, how many messages, and whether as a prompt."""
    for index, message in enumerate(chat.messages):
        if message.role == "assistant" and index:
            yield f"the prompt of messages[{index}]", index, True
    yield "the whole conversation", len(chat.messages), False


def _without_space(tokens: Sequence[int], tokenizer: ChatTokenizer) -> Sequence[int]:
    end = len(tokens)
    while end and not tokenizer.decode_all(tokens[end - 1 : end]).strip():
        end -= 1
    return tokens[:end]
