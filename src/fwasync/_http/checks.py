"""Checks of what a caller passes, before it is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fwasync.errors import UsageError

__all__ = ("require_finite",)


def require_finite(what: str, values: Mapping[str, object]) -> None:
    """Refuse NaN and infinities: JSON has no word for them, and encoders write `null`, which means a default.

    Raises:
        UsageError: One of the values is not finite; the text names it.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{what}: {name} is {value}; it must be a finite number")
