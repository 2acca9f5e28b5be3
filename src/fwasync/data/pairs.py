"""Preferences in tokens: pairs of sequences, and where they part.

A pair's `response_start` is how many tokens its two sides have in common at their beginning. In the coordinates of a
datum (`fwasync.data.datums`) what is compared begins at `alignment.response_start(pair.response_start)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio.to_thread
import numpy as np
import numpy.typing as npt

from fwasync.data.chat import ChatTokenizer
from fwasync.data.datums import masked_datum
from fwasync.data.jsonl import Faults, Problem
from fwasync.data.loading import OnProgress, open_lines, take_all
from fwasync.data.preference import Preference, Side, read_preference
from fwasync.data.rendering import Renderer, RenderRefusal, rendering_line, resolve_renderer
from fwasync.errors import DatasetError

if TYPE_CHECKING:
    from fwasync.types import Datum

__all__ = ("LeftOut", "Pair", "PreferencePairs", "load_preferences", "preference_batch", "render_pair")

Cause = Literal["too long", "too short", "unrenderable", "without a difference"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Tokens int32 `[L]` and `[M]` of the two sides, how many of them are the same at the beginning, and the line."""

    chosen: npt.NDArray[np.int32]
    rejected: npt.NDArray[np.int32]
    response_start: int
    line: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def parts(self) -> tuple[npt.NDArray[np.int32], ...]:
        """All that it is made of."""
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not used: its line, why in a word or two, and in a sentence; and the tokens of its longer side."""

    line: int
    cause: Cause
    reason: str
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class PreferencePairs:
    """What a file came to.

    Attributes:
        pairs: What can be trained on, in the order of the file.
        left_out: The other rows, in order.
    """

    pairs: tuple[Pair, ...]
    left_out: tuple[LeftOut, ...]

    def describe_left_out(self) -> str:
        """One line for each cause for which rows are left out; empty if there are none."""
        total = len(self.pairs) + len(self.left_out)
        told: list[str] = []
        for cause in dict.fromkeys(row.cause for row in self.left_out):
            rows = [row for row in self.left_out if row.cause == cause]
            more = f", and {len(rows) - 3} more" if len(rows) > 3 else ""
            where = "; ".join(f"line {row.line}: {row.reason}" for row in rows[:3])
            told.append(f"{len(rows)} of {total} rows are {cause} and left out: {where}{more}")
        return "\n".join(told)


def render_pair(
    preference: Preference, tokenizer: ChatTokenizer, renderer: Renderer, *, max_seq_len: int
) -> Pair | LeftOut:
    """A preference in tokens, or why it cannot be used.

    A conversation ends with the marker that ends its last answer.
    """

    def tokens(side: Side) -> npt.NDArray[np.int32]:
        if isinstance(side, str):
            return np.asarray(tokenizer.encode(side), np.int32)
        ids, weights = renderer.supervised(side, [len(side) - 1], tools=preference.tools)
        answer = np.flatnonzero(weights)
        return np.asarray(ids, np.int32)[: int(answer[-1]) + 1 if len(answer) else None]

    try:
        chosen, rejected = tokens(preference.chosen), tokens(preference.rejected)
    except RenderRefusal as refusal:
        return LeftOut(preference.line, "unrenderable", str(refusal))
    shorter = min(len(chosen), len(rejected))
    different = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
    common = int(different[0]) if len(different) else shorter
    pair = Pair(chosen, rejected, common, preference.line)
    if common == shorter:
        same = "both sides have the same tokens" if len(chosen) == len(rejected) else "one side is how the other begins"
        return LeftOut(preference.line, "without a difference", same, pair.length)
    if shorter < 2:
        return LeftOut(preference.line, "too short", "a side has a single token, which nothing predicts", pair.length)
    if pair.length > max_seq_len:
        reason = f"{pair.length} tokens, and {max_seq_len} are allowed"
        return LeftOut(preference.line, "too long", reason, pair.length)
    return pair


class _Pairs:
    """Takes what became of rows, and says in the end what the file came to."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._faults = Faults(name)
        self._pairs: list[Pair] = []
        self._left_out: list[LeftOut] = []

    def take(self, item: Pair | LeftOut | Problem) -> None:
        if isinstance(item, Problem):
            self._faults.add(item)
        elif isinstance(item, Pair):
            self._pairs.append(item)
        else:
            self._left_out.append(item)

    def finish(self) -> PreferencePairs:
        self._faults.check()
        found = PreferencePairs(tuple(self._pairs), tuple(self._left_out))
        if not found.pairs:
            told = found.describe_left_out() or 'it needs a row such as {"chosen": {…}, "rejected": {…}}'
            long = [row for row in found.left_out if row.cause == "too long"]
            shortest = min(long, key=lambda row: row.tokens, default=None)
            if shortest is not None:
                told += f"\nthe shortest of those that are too long has {shortest.tokens} tokens (line {shortest.line})"
            raise DatasetError(f"{self._name} has no pair that can be trained on:\n{told}")
        return found


async def load_preferences(
    source: str | Path,
    tokenizer: ChatTokenizer,
    *,
    max_seq_len: int,
    renderer: Renderer | str | None = None,
    max_rows: int | None = None,
    on_progress: OnProgress | None = None,
) -> PreferencePairs:
    """Read and tokenize a file of preferences, line by line, in a worker thread; of the text nothing is kept.

    Args:
        source: A path, or an http(s) URL.
        tokenizer: The model's.
        max_seq_len: Pairs with a side of more tokens are left out, and told.
        renderer: Another renderer than the model's chat template; see `resolve_renderer`.
        max_rows: Read so many rows at most.
        on_progress: Told on the event loop how far it is.

    Raises:
        DatasetError: The file cannot be read, is faulty, or has no pair that can be used.
        ServiceError, TransportError: The URL cannot be had.

    **Cancellation:** the reading stops within a slice, of some hundredths of a second; nothing goes on.
    """
    chosen_renderer = await anyio.to_thread.run_sync(resolve_renderer, renderer, tokenizer)

    def pairs_of(items: Iterator[Preference | Problem]) -> Iterator[Pair | LeftOut | Problem]:
        for item in items:
            if isinstance(item, Problem):
                yield item
                continue
            with rendering_line(item.line, lines.name):
                rendered = render_pair(item, tokenizer, chosen_renderer, max_seq_len=max_seq_len)
            yield rendered

    async with open_lines(source, max_rows=max_rows) as lines:
        pairs = _Pairs(lines.name)
        await take_all(lines, pairs_of(lines.rows(read_preference)), pairs.take, on_progress)
    return pairs.finish()


def preference_batch(pairs: Sequence[Pair]) -> list[Datum]:
    """Datums `[chosen, rejected, chosen, rejected, …]`, by pairs; weights are 1 from `response_start` on."""
    return [
        masked_datum(tokens, np.arange(len(tokens)) >= pair.response_start)
        for pair in pairs
        for tokens in (pair.chosen, pair.rejected)
    ]
