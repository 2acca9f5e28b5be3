"""The rows of a file to train on, chats or pairs, with an exact account of those that are not.

This is the one place where recipes meet `fwasync.data`.

Invariants
    * Rows keep their places: the n-th row here is the n-th row of the file, or `None` if it is left out.
    * Every row that is left out is in the account, with its line and the reason.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Faults, Parse, Problem
from fwasync.data.loading import open_lines, source_name, take_all
from fwasync.data.pairs import Pair, load_preferences
from fwasync.data.parity import compare_rows
from fwasync.data.rendering import TrainOnWhat
from fwasync.data.supervised import Row, load_supervised
from fwasync.errors import DatasetError

__all__ = ("Item", "TrainingRows", "count_rows", "describe_dropped", "describe_parity", "load_pairs", "load_rows")


class Item(Protocol):
    """A row in tokens."""

    @property
    def length(self) -> int:
        """Its tokens, or those of its longest sequence."""
        ...

    @property
    def parts(self) -> tuple[npt.NDArray[Any], ...]:
        """All that it is made of."""
        ...


R = TypeVar("R", bound=Item)


@dataclass(frozen=True, slots=True)
class TrainingRows(Generic[R]):
    """What a file came to.

    Attributes:
        source: The file.
        rows: In order; `None` for one that is left out.
        lines: The line of each.
        dropped: Those that are left out: line and reason.
    """

    source: str
    rows: tuple[R | None, ...] = field(repr=False)
    lines: tuple[int, ...] = field(repr=False)
    dropped: tuple[Problem, ...] = ()

    @property
    def usable(self) -> list[bool]:
        """For each row whether it can be trained on."""
        return [row is not None for row in self.rows]

    def chosen(self, indices: Sequence[int]) -> list[R]:
        """Rows by their indices; those that are left out are passed by."""
        return [row for row in (self.rows[index] for index in indices) if row is not None]

    def kept(self) -> list[R]:
        """All rows that can be trained on."""
        return self.chosen(range(len(self.rows)))

    def limited(self, max_seq_len: int) -> TrainingRows[R]:
        """Leave out the rows that have more tokens.

        Raises:
            DatasetError: Then nothing is left.
        """
        fits = [row is not None and row.length <= max_seq_len for row in self.rows]
        if not any(fits):
            others = f". {self.describe_dropped()}" if self.dropped else ""
            lengths = [(row.length, line) for row, line in zip(self.rows, self.lines, strict=True) if row is not None]
            shortest = ". The shortest has {} (line {})".format(*min(lengths)) if lengths else ""
            raise DatasetError(
                f"{self.source}: all {len(lengths)} rows are longer than {max_seq_len} tokens; nothing is left"
                + shortest
                + others
            )
        dropped = [
            Problem(line, "", f"{row.length} tokens are more than {max_seq_len}")
            for row, line, fit in zip(self.rows, self.lines, fits, strict=True)
            if row is not None and not fit
        ]
        rows = tuple(row if fit else None for row, fit in zip(self.rows, fits, strict=True))
        return TrainingRows(self.source, rows, self.lines, (*self.dropped, *dropped))

    def first(self, count: int | None) -> TrainingRows[R]:
        """The file up to its `count`-th row that can be trained on; `None` is all of it."""
        places = [index for index, usable in enumerate(self.usable) if usable]
        if count is None or len(places) <= count:
            return self
        return self._part(range(places[count - 1] + 1))

    def split(self, others: Sequence[int]) -> tuple[TrainingRows[R], TrainingRows[R]]:
        """The rows without some, and those."""
        apart = set(others)
        own = [index for index in range(len(self.rows)) if index not in apart]
        return self._part(own), self._part(sorted(apart))

    def _part(self, indices: Sequence[int]) -> TrainingRows[R]:
        lines = tuple(self.lines[index] for index in indices)
        inside = set(lines)
        dropped = tuple(problem for problem in self.dropped if problem.line in inside)
        return TrainingRows(self.source, tuple(self.rows[index] for index in indices), lines, dropped)

    def digest(self) -> str:
        """Stands for all rows in their order: a cursor means something for these only."""
        state = hashlib.blake2b(digest_size=8)
        for row in self.rows:
            for part in () if row is None else row.parts:
                state.update(part.tobytes() + b"/")
            state.update(b"|")
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
    split: bool = False,
    max_examples: int | None = None,
) -> TrainingRows[Row]:
    """Read and tokenize a file of chats, in a worker thread.

    Args:
        source: A path or a URL.
        tokenizer: The model's.
        renderer_name: `module:attribute` of a renderer, instead of the tokenizer's chat template; see
            `resolve_renderer`.
        train_on_what: Which messages are learnt; see `TrainOnWhat`.
        split: Make a row of each answer; see `split_answers`.
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
        split=split,
        max_rows=max_examples,
    )
    return TrainingRows(source_name(source), found.rows, tuple(row.line for row in found.rows))


def describe_dropped(dropped: Sequence[Problem], rows: int) -> str:
    """One sentence on those of all rows that are left out; empty if there are none."""
    if not dropped:
        return ""
    told = "; ".join(map(str, dropped[:5])) + ("; …" if len(dropped) > 5 else "")
    return f"{len(dropped)} of {rows} rows are left out: {told}"


async def describe_parity(
    source: str, tokenizer: ChatTokenizer, *, renderer_name: str, max_rows: int | None = None
) -> str:
    """Whether the first rows of a file get the tokens of the model's chat template, as a line or a few.

    Raises:
        UsageError: The renderer cannot be had.

    **Cancellation:** the reading stops; nothing goes on.
    """
    parity = await compare_rows(source, tokenizer, renderer=renderer_name or None, max_rows=max_rows)
    return f"{'' if parity.is_expected else 'WARNING: '}rendering: {parity}"


async def load_pairs(source: str, tokenizer: ChatTokenizer, *, renderer_name: str = "") -> TrainingRows[Pair]:
    """Read and tokenize a file of preferences, in a worker thread; see `load_preferences`.

    Raises:
        DatasetError: The file cannot be read, is faulty, or has no pair that can be used.
        UsageError: The renderer cannot be had.

    **Cancellation:** the reading stops; nothing goes on.
    """
    found = await load_preferences(source, tokenizer, max_seq_len=sys.maxsize, renderer=renderer_name or None)
    pairs = {pair.line: pair for pair in found.pairs}
    dropped = tuple(Problem(row.line, "", f"{row.cause}: {row.reason}") for row in found.left_out)
    lines = tuple(sorted([*pairs, *(problem.line for problem in dropped)]))
    return TrainingRows(source_name(source), tuple(pairs.get(line) for line in lines), lines, dropped)


async def count_rows(source: str, parse: Parse[Any], *, max_rows: int | None = None) -> int:
    """How many rows a file has, each of which is checked as well as it can be without a tokenizer.

    Raises:
        DatasetError: The file cannot be read, is faulty, or has no rows.

    **Cancellation:** the reading stops; nothing goes on.
    """
    async with open_lines(source, max_rows=max_rows) as lines:
        faults, rows = Faults(lines.name), 0

        def take(item: object) -> None:
            nonlocal rows
            if isinstance(item, Problem):
                faults.add(item)
            rows += 1

        await take_all(lines, lines.rows(parse), take)
    faults.check()
    if not rows:
        raise DatasetError(f"{lines.name} is empty")
    return rows
