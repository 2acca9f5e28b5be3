"""When a completion is asked for again: a pure decision, with time and randomness as arguments.

An attempt that met a busy or broken service is repeated with growing pauses. A deployment that is not there (404, 425)
may be swapping its weights: it is asked again at a steady pace, and these attempts are counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from fwasync.errors import UsageError

__all__ = ("AttemptPolicy", "Attempts")

_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_SWAPPING = frozenset({404, 425})


@dataclass(frozen=True, slots=True)
class AttemptPolicy:
    """How often, and how long in between.

    Attributes:
        attempts: The most attempts at a service that is busy or does not answer.
        base_s: The first pause between them; it doubles. Each is multiplied by a random number in [0.5, 1.5).
        cap_s: The longest pause, also if the service asks for a longer one.
        hotload_max_retries: The most repeats for a deployment that is not there.
        hotload_retry_interval: Seconds between them.
    """

    attempts: int = 7
    base_s: float = 2.0
    cap_s: float = 30.0
    hotload_max_retries: int = 10
    hotload_retry_interval: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.hotload_max_retries < 0:
            raise UsageError(
                f"attempts is {self.attempts} and hotload_max_retries {self.hotload_max_retries}; "
                "use at least 1 and at least 0"
            )


class Attempts:
    """The attempts at one request.

    Attributes:
        failed: How many have failed.
        reached: Whether any of them got to the service.
    """

    __slots__ = ("_busy", "_policy", "_swapping", "failed", "reached")

    def __init__(self, policy: AttemptPolicy) -> None:
        self._policy = policy
        self._busy = 0
        self._swapping = 0
        self.failed = 0
        self.reached = False

    def pause(self, status: int | None, *, jitter: float, retry_after_s: float | None) -> float | None:
        """Seconds to wait before the next attempt, after one has failed; `None` to give up.

        Args:
            status: What it was answered; `None` if there was no answer.
            jitter: A uniform random number in [0, 1).
            retry_after_s: What the service asked for, if it did.
        """
        policy = self._policy
        self.failed += 1
        if status in _SWAPPING:
            self._swapping += 1
            return policy.hotload_retry_interval if self._swapping <= policy.hotload_max_retries else None
        if status is not None and status not in _BUSY:
            return None
        self._busy += 1
        if self._busy >= policy.attempts:
            return None
        pause = min(policy.base_s * 2.0 ** (self._busy - 1), policy.cap_s) * (0.5 + jitter)
        return max(pause, min(retry_after_s or 0.0, policy.cap_s))
