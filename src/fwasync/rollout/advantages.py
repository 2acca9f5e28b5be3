"""Advantages of the completions of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ("group_advantages",)

_EPS = 1e-8


def group_advantages(rewards: Sequence[float] | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Group-normalised advantages: A_i = (r_i - mean(r)) / std(r), with the standard deviation of a sample (n - 1).

    Shao et al., "DeepSeekMath", 2024, section 4.1.2: the group stands in for a learnt baseline.

    Args:
        rewards: Of the completions of one prompt, `[n]`.

    Returns:
        Float64 `[n]`, of mean 0. All zero if the rewards do not differ, or if there is only one: such a group says
        nothing about which completion is better.
    """
    values = np.asarray(rewards, np.float64)
    if len(values) < 2:
        return np.zeros(len(values))
    spread = values.std(ddof=1)
    if spread < _EPS:
        return np.zeros(len(values))
    return (values - values.mean()) / spread
