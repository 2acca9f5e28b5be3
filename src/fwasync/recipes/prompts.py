"""The prompts of a file as tokens to sample from, with an exact account of those that are left out.

Invariants
    * Rows keep their places: the n-th prompt here is that of the n-th row of the file, or `None` if it is left out.
    * Every row that is left out is in the account, with its line and the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fwasync.data.jsonl import Problem
from fwasync.data.prompts import PromptRow
from fwasync.data.rendering import Renderer, RenderRefusal, rendering_line
from fwasync.errors import DatasetError
from fwasync.recipes.batches import Batches
from fwasync.recipes.groups import TakenRow
from fwasync.recipes.rows import describe_dropped

__all__ = ("Prompts", "render_prompts")


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a file came to.

    Attributes:
        path: The file.
        rows: Its rows.
        tokens: The prompt of each row; `None` for one that is left out.
        dropped: Those that are left out: line and reason.
    """

    path: str | Path
    rows: tuple[PromptRow, ...]
    tokens: tuple[tuple[int, ...] | None, ...]
    dropped: tuple[Problem, ...] = ()

    @property
    def usable(self) -> list[bool]:
        """For each row whether it can be sampled."""
        return [prompt is not None for prompt in self.tokens]

    def limited(self, max_seq_len: int) -> Prompts:
        """Leave out the prompts that leave no room for an answer.

        Raises:
            DatasetError: Then nothing is left.
        """
        fits = [prompt is not None and len(prompt) < max_seq_len for prompt in self.tokens]
        if not any(fits):
            raise DatasetError(
                f"{self.path}: all {len(self.rows)} prompts fill {max_seq_len} tokens or cannot be rendered; "
                "nothing is left"
            )
        dropped = [
            Problem(row.line, "", f"a prompt of {len(prompt)} tokens leaves no room for an answer in {max_seq_len}")
            for row, prompt, fit in zip(self.rows, self.tokens, fits, strict=True)
            if prompt is not None and not fit
        ]
        kept = tuple(prompt if fit else None for prompt, fit in zip(self.tokens, fits, strict=True))
        return replace(self, tokens=kept, dropped=(*self.dropped, *dropped))

    def digest(self) -> str:
        """Stands for all prompts in their order: a cursor means something for these only."""
        state = hashlib.blake2b(digest_size=8)
        for prompt in self.tokens:
            state.update(b"|" if prompt is None else np.asarray(prompt, np.int64).tobytes() + b"/")
        return state.hexdigest()

    def taken(self, order: Batches, consumed: int = 0) -> Iterator[TakenRow]:
        """The prompts that come after a cursor, one by one, in this order."""
        for batch in order.after(consumed):
            for index in batch.rows:
                tokens = self.tokens[index]
                assert tokens is not None, "rows that cannot be used are passed by"
                yield TakenRow(self.rows[index], tokens, batch.consumed)

    def describe_dropped(self) -> str:
        """One sentence on the rows that are left out; empty if there are none."""
        return describe_dropped(self.dropped, len(self.rows))


def render_prompts(path: str | Path, rows: Sequence[PromptRow], renderer: Renderer) -> Prompts:
    """Tokenize the prompts of a file. This computes for a while: on an event loop, call it in a worker thread."""
    tokens: list[tuple[int, ...] | None] = []
    dropped: list[Problem] = []
    for row in rows:
        try:
            with rendering_line(row.line, path):
                rendered = renderer.render(row.messages, add_generation_prompt=True, tools=row.tools)
            tokens.append(tuple(int(token) for token in rendered))
        except RenderRefusal as refusal:
            tokens.append(None)
            dropped.append(Problem(row.line, refusal.field, str(refusal)))
    return Prompts(path, tuple(rows), tuple(tokens), tuple(dropped))
