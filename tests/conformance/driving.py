"""What the scripts that drive clients share: scenarios that may break one by one, and the clients' complaints."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any


class Complaints(logging.Handler):
    """What a client logs as a warning or worse."""

    def __init__(self, logger: str) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        logging.getLogger(logger).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.name}: {record.getMessage()}")


def attempt(scenario: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it sees, or its traceback."""
    try:
        return scenario()
    except Exception:
        return {"broken": traceback.format_exc()}
