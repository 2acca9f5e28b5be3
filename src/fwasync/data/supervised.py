"""A file of chats as supervised rows: tokenized, measured, split from those that are too long; and batches of them.

The loss of a batch is a mean over its trained tokens: weights are divided by their sum, because trainers sum. So the
gradient's scale does not depend on how long the answers are, on any trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import numpy as np
import numpy.typing as npt

from fwasync.data.chat import ChatTokenizer
from fwasync.data.datums import supervised_datum
from fwasync.data.jsonl import CHAT_EXAMPLE, Chat, Faults, Problem, read_chat
from fwasync.data.loading import OnProgress, open_lines, take_all
from fwasync.data.rendering import (
    Renderer,
    RenderRefusal,
    TrainOnWhat,
    rendering_line,
    resolve_renderer,
    split_answers,
    trained_messages,
)
from fwasync.errors import DatasetError

if TYPE_CHECKING:
    from fwasync.types import Datum, ForwardBackwardOutput

__all__ = ("Row", "SupervisedRows", "load_supervised", "mean_loss", "supervised_batch", "tokenize")


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens int32 `[L]` and weights float32 `[L]` of a chat, and its line in the file."""

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    line: int = 0

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.tokens)

    @property
    def parts(self) -> tuple[npt.NDArray[Any], ...]:
        """All that it is made of."""
        return self.tokens, self.weights


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """What a file came to.

    Attributes:
        rows: What can be trained on, in the order of the file.
        too_long: The lines of rows that have more than `max_seq_len` tokens, in order.
        max_seq_len: That limit.
    """

    rows: tuple[Row, ...]
    too_long: tuple[int, ...]
    max_seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens in the rows that can be trained on."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def trained_tokens(self) -> int:
        """How many of them have a weight."""
        return sum(int(np.count_nonzero(row.weights)) for row in self.rows)

    def describe_too_long(self) -> str:
        """One sentence on the rows that are left out; empty if there are none."""
        if not self.too_long:
            return ""
        lines = ", ".join(map(str, self.too_long[:5])) + (", …" if len(self.too_long) > 5 else "")
        total = len(self.rows) + len(self.too_long)
        count = f"{len(self.too_long)} of {total} rows"
        return f"{count} have more than {self.max_seq_len} tokens and are left out: line {lines}"


@dataclass(frozen=True, slots=True)
class Rendering:
    """How chats become rows.

    Attributes:
        renderer: What renders them.
        train_on_what: Which of their messages are trained on.
        split: Make a row of each answer, with the conversation that led to it; see `split_answers`.
        source: The file that they are from, for errors.
    """

    renderer: Renderer
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    split: bool = False
    source: str | Path = "the chats"

    def rows(self, chats: Iterable[Chat | Problem]) -> Iterator[Row | Problem]:
        """The rows of chats, of any length, and what is wrong with others; computed as they are asked for."""
        for chat in chats:
            if isinstance(chat, Problem):
                yield chat
                continue
            try:
                with rendering_line(chat.line, self.source):
                    yield from self._rows(chat)
            except RenderRefusal as refusal:
                yield Problem(chat.line, refusal.field, str(refusal))

    def _rows(self, chat: Chat) -> Iterator[Row]:
        trained = trained_messages(chat.messages, self.train_on_what)
        whole = [(chat.messages, trained)]
        all_tokens = self.train_on_what is TrainOnWhat.ALL_TOKENS
        for messages, indices in split_answers(chat.messages, trained) if self.split and not all_tokens else whole:
            if all_tokens:
                ids: Any = self.renderer.render(messages, tools=chat.tools)
                weights: Any = np.ones(len(ids), np.float32)
            else:
                ids, weights = self.renderer.supervised(messages, indices, tools=chat.tools)
            tokens = np.asarray(ids, np.int32)
            if len(tokens) != len(weights):
                raise DatasetError(f"the renderer gave {len(tokens)} tokens and {len(weights)} weights")
            weights = np.asarray(weights, np.float32)
            if not np.any(weights[1:]):
                raise RenderRefusal("no token of it is trained on")
            yield Row(tokens, weights, chat.line)


class _Rows:
    """Takes rows, and says in the end what the file came to."""

    def __init__(self, name: str | Path, max_seq_len: int) -> None:
        self._faults = Faults(name)
        self._name = name
        self._max_seq_len = max_seq_len
        self._rows: list[Row] = []
        self._too_long: list[int] = []
        self._shortest = (0, 0)

    def take(self, item: Row | Problem) -> None:
        if isinstance(item, Problem):
            self._faults.add(item)
            return
        length = len(item.tokens)
        self._shortest = min(self._shortest, (length, item.line)) if self._shortest[0] else (length, item.line)
        if length > self._max_seq_len:
            self._too_long.append(item.line)
        else:
            self._rows.append(item)

    def finish(self) -> SupervisedRows:
        self._faults.check()
        if not self._rows and not self._too_long:
            raise DatasetError(f"{self._name} is empty; it needs a row such as {CHAT_EXAMPLE}")
        if not self._rows:
            length, line = self._shortest
            raise DatasetError(
                f"{self._name}: all {len(self._too_long)} rows are longer than {self._max_seq_len} tokens; nothing is "
                f"left. The shortest has {length} (line {line}): give max_seq_len that much, if the model takes it"
            )
        return SupervisedRows(tuple(self._rows), tuple(self._too_long), self._max_seq_len)


def tokenize(
    path: str | Path,
    chats: Iterable[Chat],
    tokenizer: ChatTokenizer,
    *,
    max_seq_len: int,
    renderer: Renderer | str | None = None,
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    split: bool = False,
) -> SupervisedRows:
    """Tokenize the chats of a file.

    This computes for a while: on an event loop, call it through `anyio.to_thread.run_sync`.

    Args:
        path: Where they are from, to be named in errors.
        chats: The chats.
        tokenizer: The model's.
        max_seq_len: Rows of more tokens are left out, and told.
        renderer: Another renderer than the model's chat template; see `resolve_renderer`.
        train_on_what: What of them is trained on.
        split: Make a row of each answer, with the conversation that led to it; see `split_answers`.

    Raises:
        DatasetError: The renderer refuses rows, or all of them are too long.
    """
    rendering = Rendering(resolve_renderer(renderer, tokenizer), train_on_what, split, path)
    rows = _Rows(path, max_seq_len)
    for item in rendering.rows(chats):
        rows.take(item)
    return rows.finish()


async def load_supervised(
    source: str | Path,
    tokenizer: ChatTokenizer,
    *,
    max_seq_len: int,
    renderer: Renderer | str | None = None,
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    split: bool = False,
    max_rows: int | None = None,
    on_progress: OnProgress | None = None,
) -> SupervisedRows:
    """Read and tokenize a file of chats, line by line, in a worker thread; of the text nothing is kept.

    Args:
        source: A path, or an http(s) URL.
        tokenizer: The model's.
        max_seq_len: Rows of more tokens are left out, and told.
        renderer: Another renderer than the model's chat template; see `resolve_renderer`.
        train_on_what: What is trained on.
        split: Make a row of each answer, with the conversation that led to it; see `split_answers`.
        max_rows: Read so many rows at most.
        on_progress: Told on the event loop how far it is.

    Raises:
        DatasetError: The file cannot be read, is faulty, or has no row that is short enough.
        ServiceError, TransportError: The URL cannot be had.

    **Cancellation:** the reading stops within a slice, of some hundredths of a second; nothing goes on.
    """
    chosen = await anyio.to_thread.run_sync(resolve_renderer, renderer, tokenizer)
    async with open_lines(source, max_rows=max_rows) as lines:
        rendering = Rendering(chosen, train_on_what, split, lines.name)
        rows = _Rows(lines.name, max_seq_len)
        await take_all(lines, rendering.rows(lines.rows(read_chat)), rows.take, on_progress)
    return rows.finish()


def supervised_batch(rows: Sequence[Row]) -> list[Datum]:
    """Datums for `cross_entropy`, in the order of the rows; the weights of the whole batch sum to 1."""
    total = sum(float(row.weights[1:].sum()) for row in rows)
    return [supervised_datum(row.tokens, row.weights / total) for row in rows]


def mean_loss(rows: Sequence[Row], output: ForwardBackwardOutput) -> float:
    """The mean over the trained tokens of a batch of -log p, in nats, from the trainer's output for it."""
    weighted = total = 0.0
    for row, record in zip(rows, output.loss_fn_outputs, strict=True):
        weights = row.weights[1:].astype(np.float64)
        weighted -= float(weights @ record["logprobs"].to_numpy())
        total += float(weights.sum())
    return weighted / total
