"""The chats of a file as rows to train on, with an exact account of those that are not.

This is the one place where recipes on chats meet `fwasync.data`.

Invariants
    * Rows keep their places: the n-th row here is the n-th chat of the file, or `None` if it is left out.
    * Every row that is left out is in the account, with its line and the reason.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Problem
from fwasync.data.rendering import TrainOnWhat
from fwasync.data.supervised import Row, load_supervised
from fwasync.errors import DatasetError

__all__ = ("TrainingRows", "describe_dropped", "load_rows")


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """What a file came to.

    Attributes:
        source: The file.
        rows: A row for each chat, in order; `None` for one that is left out.
        lines: The line of each chat.
        dropped: Those that are left out: line and reason.
    """

    source: str
    rows: tuple[Row | None, ...] = field(repr=False)
    lines: tuple[int, ...] = field(repr=False)
    dropped: tuple[Problem, ...] = ()

    @property
    def usable(self) -> list[bool]:
        """For each row whether it can be trained on."""
        return [row is not None for row in self.rows]

    def chosen(self, indices: Sequence[int]) -> list[Row]:
        """Rows by their indices; those that are left out are passed by."""
        return [row for row in (self.rows[index] for index in indices) if row is not None]

    def limited(self, max_seq_len: int) -> TrainingRows:
        """Leave out the rows that have more tokens.

        Raises:
            DatasetError: Then nothing is left.
        """
        fits = [row is not None and len(row.tokens) <= max_seq_len for row in self.rows]
        if not any(fits):
            raise DatasetError(
                f"{self.source}: all {len(self.rows)} rows are longer than {max_seq_len} tokens; nothing is left"
            )
        dropped = [
            Problem(line, "", f"{len(row.tokens)} tokens are more than {max_seq_len}")
            for row, line, fit in zip(self.rows, self.lines, fits, strict=True)
            if row is not None and not fit
        ]
        rows = tuple(row if fit else None for row, fit in zip(self.rows, fits, strict=True))
        return TrainingRows(self.source, rows, self.lines, (*self.dropped, *dropped))

    def split(self, others: Sequence[int]) -> tuple[TrainingRows, TrainingRows]:
        """The rows without some, and those."""
        apart = set(others)
        parts: list[TrainingRows] = []
        for wanted in (False, True):
            own = [index for index in range(len(self.rows)) if (index in apart) is wanted]
            lines = tuple(self.lines[index] for index in own)
            dropped = tuple(problem for problem in self.dropped if problem.line in lines)
            parts.append(TrainingRows(self.source, tuple(self.rows[index] for index in own), lines, dropped))
        return parts[0], parts[1]

    def digest(self) -> str:
        """Stands for all tokens and weights in their order: a cursor means something for these rows only."""
        state = hashlib.blake2b(digest_size=8)
        for row in self.rows:
            state.update(b"|" if row is None else row.tokens.tobytes() + row.weights.tobytes() + b"/")
        return state.hexdigest()

    def describe_dropped(self) -> str:
        """One sentence on the rows that are left out; empty if there are none."""
        return describe_dropped(self.dropped, len(self.rows))


async def load_rows(
    source: str,
    tokenizer: ChatTokenizer,
    *,
    renderer_name: str = "",
    train_on_what: str = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    max_examples: int | None = None,
) -> TrainingRows:
    """Read and tokenize a file of chats, in a worker thread.

    Args:
        source: A path or a URL.
        tokenizer: The model's.
        renderer_name: `module:attribute` of a renderer, instead of the tokenizer's chat template; see
            `resolve_renderer`.
        train_on_what: Which messages are learnt; see `TrainOnWhat`.
        max_examples: Only so many rows are read.

    Raises:
        DatasetError: The file cannot be read or is faulty.
        UsageError: The renderer cannot be had.

    **Cancellation:** the reading stops; nothing goes on.
    """
    found = await load_supervised(
        source,
        tokenizer,
        max_seq_len=sys.maxsize,
        renderer=renderer_name or None,
        train_on_what=TrainOnWhat.parse(train_on_what),
        max_rows=max_examples,
    )
    return TrainingRows(source, found.rows, tuple(row.line for row in found.rows))


def describe_dropped(dropped: Sequence[Problem], rows: int) -> str:
    """One sentence on those of all rows that are left out; empty if there are none."""
    if not dropped:
        return ""
    told = "; ".join(map(str, dropped[:5])) + ("; …" if len(dropped) > 5 else "")
    return f"{len(dropped)} of {rows} rows are left out: {told}"
