"""A file of chats as supervised rows: tokenized, measured, split from those that are too long; and batches of them.

The loss of a batch is a mean over its trained tokens: weights are divided by their sum, because trainers sum. So the
gradient's scale does not depend on how long the answers are, on any trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fwasync.data.chat import ChatTokenizer
from fwasync.data.datums import supervised_datum
from fwasync.data.jsonl import Chat, Problem, refuse
from fwasync.errors import DatasetError

if TYPE_CHECKING:
    from fwasync.types import Datum, ForwardBackwardOutput

__all__ = ("Row", "SupervisedRows", "mean_loss", "supervised_batch", "tokenize")


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens int64 `[L]` and weights float32 `[L]` of a chat."""

    tokens: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """What a file came to.

    Attributes:
        rows: What can be trained on.
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


def tokenize(path: str | Path, chats: Sequence[Chat], tokenizer: ChatTokenizer, *, max_seq_len: int) -> SupervisedRows:
    """Tokenize the chats of a file.

    This computes for a while: on an event loop, call it through `anyio.to_thread.run_sync`.

    Args:
        path: Where they are from, to be named in errors.
        chats: The chats.
        tokenizer: The model's.
        max_seq_len: Rows of more tokens are left out, and told.

    Raises:
        DatasetError: The chat template refuses rows, or all of them are too long.
    """
    rows: list[Row] = []
    too_long: list[int] = []
    problems: list[Problem] = []
    for chat in chats:
        try:
            tokens, weights = tokenizer.supervised(chat)
        except DatasetError as error:
            problems.extend(error.problems)
            continue
        if len(tokens) > max_seq_len:
            too_long.append(chat.line)
        else:
            rows.append(Row(tokens, weights))
    refuse(path, problems)
    if not rows:
        raise DatasetError(f"{path}: all {len(chats)} rows are longer than {max_seq_len} tokens; nothing is left")
    return SupervisedRows(tuple(rows), tuple(too_long), max_seq_len)


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
