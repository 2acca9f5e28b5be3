"""What is left to do of a run, from its configuration, its rows and where it goes on. Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from fwasync.checkpoints.resume import ResumeInfo
from fwasync.recipes.batches import Batch, Batches
from fwasync.recipes.config import RecipeConfig

__all__ = ("Plan",)


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a run.

    Attributes:
        order: All its batches.
        step: The steps that are done.
        consumed: The rows that are consumed.
        total: The steps that will be done in the end.
    """

    order: Batches
    step: int
    consumed: int
    total: int

    @classmethod
    def of(cls, config: RecipeConfig, usable: Sequence[bool], start: ResumeInfo | None = None) -> Plan:
        """The plan of a run that goes on somewhere; `None` is its beginning."""
        order = Batches(usable, config.batch_size, epochs=config.epochs, seed=config.seed)
        step, consumed = (start.step, start.data_consumed) if start else (0, 0)
        return cls(order, step, consumed, min(step + order.steps(consumed), config.max_steps or sys.maxsize))

    def batches(self) -> Iterator[Batch]:
        """Those that are left."""
        return islice(self.order.after(self.consumed), max(self.total - self.step, 0))

    def describe(self, config: RecipeConfig) -> list[str]:
        """What is to be done, in lines."""
        passes = next(islice(self.order.after(), self.total - 1, None)).consumed / self.order.rows
        return [
            f"{self.total:,} steps of {config.batch_size} rows: {passes:.2f} passes over the data",
            f"{config.checkpoints(self.total)} checkpoint(s)",
        ]
