"""When to try again: a pure decision. Time and randomness come in as arguments.

Capped exponential delays with full jitter, so that a thousand clients which lost the same service do not
return together; a service that says `Retry-After` is obeyed; the whole is bounded by a budget in seconds,
because an operator wants to know within a known time.
"""

from __future__ import annotations

import email.utils
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ("RETRYABLE_STATUSES", "RetryPolicy", "retry_after")

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that say nothing final. 409 is not among them: it is a contradiction, and stays one."""

_LONGEST_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to keep trying. The delay before an attempt is random, uniform from zero to an upper end that doubles.

    Attributes:
        base_s: Upper end of the first delay.
        cap_s: Upper end of every delay.
        budget_s: No new attempt starts later than this after the first one.
    """

    base_s: float = 0.5
    cap_s: float = 10.0
    budget_s: float = 300.0

    def delay(self, attempt: int, *, elapsed_s: float, jitter: float, retry_after_s: float | None) -> float | None:
        """Seconds to wait before the next attempt, or `None` to give up.

        Args:
            attempt: How many attempts have failed, at least 1.
            elapsed_s: Seconds since the first attempt began.
            jitter: A uniform random number in [0, 1).
            retry_after_s: What the service asked for, if it did. More than a minute is not heeded.
        """
        if retry_after_s is not None and retry_after_s <= _LONGEST_RETRY_AFTER_S:
            delay = retry_after_s
        else:
            delay = jitter * min(self.base_s * 2.0 ** min(attempt - 1, 30), self.cap_s)
        return delay if elapsed_s + delay <= self.budget_s else None

    def for_contact(self) -> RetryPolicy:
        """The policy for the first request of all: a wrong address should be told at once, not after minutes."""
        return RetryPolicy(min(self.base_s, 0.2), min(self.cap_s, 1.0), min(self.budget_s, 3.0))


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """What `Retry-After` asks for, in seconds; `None` if it is absent or unreadable.

    Args:
        headers: Response headers, with lower-case names.
        now: Seconds since the epoch, to read the form that is a date.
    """
    milliseconds = headers.get("retry-after-ms")
    value = headers.get("retry-after")
    try:
        if milliseconds is not None:
            seconds = float(milliseconds) / 1000.0
        elif value is not None and value.strip().isdigit():
            seconds = float(value)
        elif value is not None:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        else:
            return None
    except ValueError:
        return None
    return seconds if seconds > 0.0 else None
