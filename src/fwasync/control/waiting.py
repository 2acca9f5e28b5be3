"""Waiting for a resource: look, judge, pause, until it is ready, has failed, or time is up.

Invariants
    * Delays and deadlines are pure decisions (`poll_delay`, `Clock`); only `wait_for` sleeps.
    * A deadline also ends a request that is on its way; a cancellation ends everything at once.
    * Each look is told to `on_progress`, and what it finds changed to the log (`fwasync.control`, INFO).
    * Time in the queue for machines counts against its own deadline, and the other one begins after it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import anyio

from fwasync.config.launch import OnProgress, Progress
from fwasync.control.states import Verdict
from fwasync.errors import ProvisioningError, ProvisioningTimeoutError, UsageError

__all__ = ("Clock", "Look", "poll_delay", "wait_for")

T = TypeVar("T")

logger = logging.getLogger("fwasync.control")

_FIRST_S = 0.5
_GROWTH = 1.5


def poll_delay(looks: int, *, cap_s: float, jitter: float) -> float:
    """Seconds until the next look: rising from half a second to `cap_s`, less up to a half at random.

    Args:
        looks: How many there have been, at least 1.
        cap_s: The longest.
        jitter: A uniform random number in [0, 1).
    """
    return min(_FIRST_S * _GROWTH ** min(looks - 1, 60), cap_s) * (1.0 - 0.5 * jitter)


@dataclass(frozen=True, slots=True)
class Clock:
    """The deadlines of a wait, in seconds of any clock.

    Attributes:
        deadline: When time is up.
        queued: Whether that is the time for the queue.
    """

    deadline: float
    queued: bool

    @classmethod
    def start(cls, now: float, *, timeout: float) -> Clock:
        """A wait that begins."""
        return cls(now + timeout, queued=False)

    def seen(self, now: float, *, queued: bool, timeout: float, pending_timeout: float) -> Clock:
        """The clock after a look: another deadline begins if the queue was entered or left."""
        if queued == self.queued:
            return self
        return Clock(now + (pending_timeout if queued else timeout), queued)


@dataclass(frozen=True, slots=True)
class Look(Generic[T]):
    """What one look found.

    Attributes:
        value: What is ready, if it is.
        verdict: What to do.
        state: The state, in the service's words.
        message: What the resource says of itself.
    """

    value: T
    verdict: Verdict
    state: str
    message: str = ""


async def wait_for(
    look: Callable[[], Awaitable[Look[T]]],
    *,
    resource: str,
    failed: type[ProvisioningError],
    timeout: float,
    pending_timeout: float,
    cap_s: float,
    on_progress: OnProgress | None,
) -> T:
    """Look again and again until the resource is ready.

    Args:
        look: One look; errors of it end the wait.
        resource: Its full name.
        failed: The error for one that has failed.
        timeout: Seconds, not counting those in the queue for machines.
        pending_timeout: Seconds in that queue.
        cap_s: The longest pause between looks.
        on_progress: Called after each look.

    Raises:
        UsageError: There would be no pause.
        ProvisioningTimeoutError: Time is up.

    **Cancellation:** nothing remains; the resource is untouched.
    """
    if not cap_s > 0:
        raise UsageError(f"poll_interval_s is {cap_s}; it must be above 0 seconds")
    started = anyio.current_time()
    clock = Clock.start(started, timeout=timeout)
    looks, seen, said = 0, "not seen yet", ""
    while True:
        with anyio.CancelScope(deadline=clock.deadline):
            found = await look()
            now = anyio.current_time()
            if (found.state, found.message) != (seen, said):
                logger.info("%s", _sentence(resource, found.state, found.message, f"after {now - started:.0f} s"))
            looks, seen, said = looks + 1, found.state, found.message
            if on_progress is not None:
                on_progress(Progress(resource, seen, said, now - started))
            if found.verdict.action == "ready":
                return found.value
            if found.verdict.action == "failed":
                raise failed(_sentence(resource, seen, said, found.verdict.reason), resource=resource, state=seen)
            clock = clock.seen(now, queued=found.verdict.queued, timeout=timeout, pending_timeout=pending_timeout)
            pause = poll_delay(looks, cap_s=cap_s, jitter=random.random())
            await anyio.sleep(max(0.0, min(pause, clock.deadline - now)))
        now = anyio.current_time()
        if now >= clock.deadline:
            limit, phase = (pending_timeout, "waiting for machines") if clock.queued else (timeout, "getting ready")
            raise ProvisioningTimeoutError(
                _sentence(
                    resource,
                    seen,
                    said,
                    f"not ready after {now - started:.0f} s, {limit:g} s allowed for {phase}; wait again, allow more "
                    "time, or delete it",
                ),
                resource=resource,
                state=seen,
            )


def _sentence(resource: str, state: str, said: str, advice: str) -> str:
    return ": ".join(part for part in (f"{resource} is {state}", said, advice) if part)
