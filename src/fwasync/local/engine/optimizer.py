"""AdamW on one flat vector.

Kingma and Ba, "Adam", 2015; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
The state is the two moments and the number of steps: restoring them continues bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fwasync.local.engine.api import EngineError

if TYPE_CHECKING:
    from fwasync.local.engine.api import Adam
    from fwasync.local.engine.architecture import FloatArray

__all__ = ("AdamState", "check_adam", "clip_to_norm")


_SMALLEST_EPS = 1e-37
"""Below it float32 sees zero, and a weight without a gradient would become 0 / 0."""


@dataclass(slots=True)
class AdamState:
    """Running means of the gradient and of its square, and how many steps made them."""

    first: FloatArray
    second: FloatArray
    steps: int = 0

    @classmethod
    def like(cls, parameters: FloatArray) -> AdamState:
        """Start anew for these parameters."""
        return cls(np.zeros_like(parameters), np.zeros_like(parameters))

    def update(self, parameters: FloatArray, gradient: FloatArray, adam: Adam) -> None:
        """Take one step, changing `parameters` in place."""
        self.steps += 1
        self.first *= adam.beta1
        self.first += (1 - adam.beta1) * gradient
        self.second *= adam.beta2
        self.second += (1 - adam.beta2) * np.square(gradient)
        if adam.weight_decay:
            parameters *= 1 - adam.learning_rate * adam.weight_decay
        denominator = np.sqrt(self.second)
        denominator *= 1 / math.sqrt(1 - adam.beta2**self.steps)
        denominator += adam.eps
        step_size = adam.learning_rate / (1 - adam.beta1**self.steps)
        parameters -= step_size * self.first / denominator


def check_adam(adam: Adam) -> None:
    """Raise EngineError naming the first parameter that is out of its range."""
    checks = (
        ("learning_rate", adam.learning_rate >= 0, "at least 0"),
        ("beta1", 0 <= adam.beta1 < 1, "in [0, 1)"),
        ("beta2", 0 <= adam.beta2 < 1, "in [0, 1)"),
        ("eps", adam.eps >= _SMALLEST_EPS, f"at least {_SMALLEST_EPS}"),
        ("weight_decay", adam.weight_decay >= 0, "at least 0"),
        ("grad_clip_norm", True, "a number"),
    )
    for name, in_range, rule in checks:
        value: float = getattr(adam, name)
        if not in_range or not math.isfinite(value):
            raise EngineError(f"adam_params: {name} must be finite and {rule}, got {value}")


def clip_to_norm(gradient: FloatArray, limit: float) -> float:
    """Scale `gradient` in place to a Euclidean norm of at most `limit`; returns the norm it had.

    A limit of zero or less does nothing.
    """
    norm = float(np.linalg.norm(gradient.astype(np.float64)))
    if 0 < limit < norm:
        gradient *= limit / norm
    return norm
