"""Learning-rate schedules: the rate of a step, from its number alone. Pure.

With step t from 1 to T, base rate L, floor ratio r and W steps of warm-up:

    t <= W                     L · t/W
    t >= T                     L · r
    between, p = (t - D)/(T - D), where the decay begins at D = W
        linear                 L · (1 - p(1 - r))
        cosine                 L · (r + (1 - r)(1 + cos πp)/2)
        sqrt                   L · max(r, 1 - √p (1 - r))

`constant` stays at L after the warm-up. `wsd` (warm up, stay, decay) stays at L until D = max(W, T - round(q T)) with
`decay_ratio` q, and then decays in the way of `decay_type`.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from fwasync.config.base import Config

__all__ = ("LRSchedule",)

Decay = Literal["linear", "cosine", "sqrt"]


class LRSchedule(Config):
    """How the learning rate changes over a run."""

    type: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="constant", description="What comes after the warm-up."
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps in which the rate rises from nothing.")
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1, description="Or: their part of all steps.")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="Where a decay ends, as a part of the rate.")
    decay_ratio: float | None = Field(
        default=None, gt=0, le=1, description="The part of all steps in which 'wsd' decays. Unset: a tenth."
    )
    decay_type: Decay | None = Field(default=None, description="In which way 'wsd' decays. Unset: 'linear'.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give either warmup_steps or warmup_ratio, not both")
        for name in ("decay_ratio", "decay_type"):
            if self.type != "wsd" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for type 'wsd'; type {self.type!r} decays from the warm-up to the end")
        return self

    def rate(self, base: float, step: int, total: int) -> float:
        """The learning rate of a step.

        Args:
            base: The rate that is reached after the warm-up.
            step: The step, from 1.
            total: All steps of the run.
        """
        warmup = self.warmup_steps if self.warmup_steps is not None else round((self.warmup_ratio or 0.0) * total)
        if step <= warmup:
            return base * step / warmup
        if self.type == "constant":
            return base
        begins = warmup
        if self.type == "wsd":
            begins = max(warmup, total - round((self.decay_ratio or 0.1) * total))
            if step < begins:
                return base
        if step >= total:
            return base * self.min_lr_ratio
        part = (step - begins) / (total - begins)
        return base * _decayed(
            self.decay_type or "linear" if self.type == "wsd" else self.type, part, self.min_lr_ratio
        )


def _decayed(decay: Decay, part: float, floor: float) -> float:
    if decay == "linear":
        return 1 - part * (1 - floor)
    if decay == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2
    return max(floor, 1 - math.sqrt(part) * (1 - floor))
