"""Concurrency controllers: how many requests run at a time, shared by any number of samplers and tasks on one loop.

Invariants
    * At most `window_size` slots are taken, but for those that were taken before the window shrank.
    * Slots are given in the order of asking; nobody who asks later overtakes who waits.
    * A waiter that is cancelled leaves no hole, even if its slot was given to it in the same moment.
    * All of it happens on one event loop at a time: a waiter of another would not be woken, and is refused.
"""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import anyio
import anyio.lowlevel

from fwasync.errors import UsageError
from fwasync.sampling.aimd import AdaptiveWindow, AimdSettings, Observation

if TYPE_CHECKING:
    from fwasync.config.reference import ConcurrencyConfig

__all__ = (
    "AdaptiveConcurrencyController",
    "ConcurrencyController",
    "ConcurrencyStatistics",
    "FixedConcurrencyController",
    "Slot",
    "concurrency_controller",
)


@dataclass(frozen=True, slots=True)
class ConcurrencyStatistics:
    """A controller at a moment.

    Attributes:
        window: The window; a fraction where it adapts.
        in_flight: Slots that are taken.
        waiting: Tasks that wait for one.
        max_in_flight: The most that were taken at a time so far.
        requests: How many attempts have been observed so far.
        ema_prefill_queue: Moving average of the prefill queue in seconds, where one is kept.
        slowdown: How many times its recent minimum the latency is, where that is followed.
    """

    window: float
    in_flight: int
    waiting: int
    max_in_flight: int
    requests: int
    ema_prefill_queue: float | None = None
    slowdown: float | None = None


class Slot:
    """A place among those that run, for the block of an `async with`.

    Attributes:
        began: When it was taken, on the event loop's clock.
        observation: What its request told; put here before the slot is left. Without it, nothing is learned.
    """

    __slots__ = ("_leave", "_loop", "_take", "began", "observation")

    def __init__(self, take: Callable[[], Awaitable[asyncio.AbstractEventLoop]], leave: Callable[[Slot], None]) -> None:
        self._take = take
        self._leave = leave
        self.observation: Observation | None = None

    @property
    def age_s(self) -> float:
        """Seconds since it was taken."""
        return self._loop.time() - self.began

    async def __aenter__(self) -> Self:
        self._loop = await self._take()
        self.began = self._loop.time()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._leave(self)


class ConcurrencyController(ABC):
    """What every controller does: give slots in order, and learn from what they were used for.

    ```python
    async with controller.slot() as slot:
        ...  # one request
        slot.observation = Observation(200, prefill_queue_s=0.02)
    ```
    """

    def __init__(self) -> None:
        self._in_flight = 0
        self._max_in_flight = 0
        self._requests = 0
        self._waiters: OrderedDict[anyio.Event, None] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    @abstractmethod
    def window_size(self) -> int:
        """How many slots there are."""

    @abstractmethod
    def statistics(self) -> ConcurrencyStatistics:
        """The controller at this moment. Changes nothing."""

    @abstractmethod
    def step_completed(self) -> dict[str, float]:
        """Close a training step: adjust the window, and return the step's figures for a log."""

    @property
    def in_flight(self) -> int:
        """How many slots are taken."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """How many tasks wait for a slot."""
        return len(self._waiters)

    def slot(self) -> Slot:
        """A slot to wait for and to hold for a block: `async with controller.slot() as slot`.

        A slot that is left without an observation, as by a cancellation, teaches nothing.

        Raises:
            UsageError: On entering: others hold or await slots on another event loop.

        **Cancellation:** a waiter leaves the queue; a holder's slot goes to the next.
        """
        return Slot(self._take, self._leave)

    def observe(self, observation: Observation, *, began: float | None = None) -> None:
        """Learn from an attempt that keeps its slot, such as one that is repeated at once. `slot` does it at its end.

        Args:
            observation: What it told.
            began: When it began, on the event loop's clock.
        """
        self._requests += 1
        self._learn(observation, began)
        self._admit()

    @abstractmethod
    def _learn(self, observation: Observation, began: float | None) -> None: ...

    async def _take(self) -> asyncio.AbstractEventLoop:
        await anyio.lowlevel.checkpoint_if_cancelled()
        loop = self._claimed_loop()
        if self._waiters or self._in_flight >= self.window_size:
            await self._turn()
        else:
            self._add()
        return loop

    def _leave(self, slot: Slot) -> None:
        if slot.observation is not None:
            self.observe(slot.observation, began=slot.began)
        self._in_flight -= 1
        self._admit()

    async def _turn(self) -> None:
        given = anyio.Event()
        self._waiters[given] = None
        try:
            await given.wait()
        except BaseException:
            if given.is_set():
                self._in_flight -= 1
                self._admit()
            else:
                del self._waiters[given]
            raise

    def _claimed_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._in_flight or self._waiters:
                raise UsageError(
                    "this concurrency controller gives slots on another event loop; make one for each loop (all "
                    "blocking clients share a loop of their own)"
                )
            self._loop = loop
        return loop

    def _admit(self) -> None:
        while self._waiters and self._in_flight < self.window_size:
            self._add()
            given, _ = self._waiters.popitem(last=False)
            given.set()

    def _add(self) -> None:
        self._in_flight += 1
        if self._in_flight > self._max_in_flight:
            self._max_in_flight = self._in_flight


class FixedConcurrencyController(ConcurrencyController):
    """So many at a time, always.

    Args:
        max_concurrency: How many, at least 1.

    Raises:
        UsageError: It is less.
    """

    def __init__(self, max_concurrency: int) -> None:
        if max_concurrency < 1:
            raise UsageError(f"max_concurrency is {max_concurrency}; at least one request must be allowed")
        super().__init__()
        self._size = max_concurrency

    def __repr__(self) -> str:
        return f"<FixedConcurrencyController {self._in_flight} of {self._size}>"

    @property
    def window_size(self) -> int:
        """How many slots there are."""
        return self._size

    def statistics(self) -> ConcurrencyStatistics:
        """The controller at this moment. Changes nothing."""
        return ConcurrencyStatistics(
            float(self._size), self._in_flight, len(self._waiters), self._max_in_flight, self._requests
        )

    def step_completed(self) -> dict[str, float]:
        """`window`: there is nothing to adjust."""
        return {"window": float(self._size)}

    def _learn(self, observation: Observation, began: float | None) -> None:
        """Nothing is learned."""


@dataclass(slots=True)
class _Step:
    requests: int = 0
    prefill_s: float = 0.0
    prefills: int = 0
    statuses: int = 0
    congested: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    windows: float = 0.0
    max_in_flight: int = 0

    def add(self, observation: Observation, *, window: float, in_flight: int) -> None:
        self.requests += 1
        self.windows += window
        self.max_in_flight = max(self.max_in_flight, in_flight)
        if observation.prefill_queue_s is not None:
            self.prefills += 1
            self.prefill_s += observation.prefill_queue_s
        elif observation.congested or observation.succeeded:
            self.statuses += 1
            self.congested += observation.congested
        self.prompt_tokens += observation.prompt_tokens
        self.cached_tokens += observation.cached_prompt_tokens


class AdaptiveConcurrencyController(ConcurrencyController):
    """As many at a time as the deployment takes without a queue; see `aimd`.

    Args:
        settings: The constants; those of `AimdSettings` unless given.
    """

    def __init__(self, settings: AimdSettings | None = None) -> None:
        super().__init__()
        self._window = AdaptiveWindow(settings or AimdSettings())
        self._step = _Step()

    def __repr__(self) -> str:
        return f"<AdaptiveConcurrencyController {self._in_flight} of {self.window_size}>"

    @property
    def window_size(self) -> int:
        """How many slots there are now."""
        return self._window.size

    def statistics(self) -> ConcurrencyStatistics:
        """The controller at this moment. Changes nothing."""
        return ConcurrencyStatistics(
            self._window.window,
            self._in_flight,
            len(self._waiters),
            self._max_in_flight,
            self._requests,
            self._window.ema_prefill_queue,
            self._window.slowdown,
        )

    def step_completed(self) -> dict[str, float]:
        """Adjust the window by what is left of the step, and return the step's figures.

        Returns:
            `window` and `window_after` around this adjustment, `avg_window`, `requests`, `max_in_flight`,
            `pending_decrease` (slots taken beyond the window), `cache_hit_rate` of prompt tokens, and of what the
            window follows: `avg_pq` and `ema_pq` (seconds, before the adjustment), or `status_responses`,
            `congestion_responses`, `congestion_rate` and, if latency was told, `slowdown` (after the adjustment).
        """
        step, before, ema = self._step, self._window.window, self._window.ema_prefill_queue
        self._window.adjust()
        self._step = _Step()
        self._admit()
        figures = {
            "window": before,
            "window_after": self._window.window,
            "avg_window": step.windows / step.requests if step.requests else before,
            "requests": float(step.requests),
            "max_in_flight": float(step.max_in_flight),
            "pending_decrease": float(max(0, self._in_flight - self.window_size)),
            "cache_hit_rate": step.cached_tokens / step.prompt_tokens if step.prompt_tokens else 0.0,
        }
        if step.statuses and not step.prefills:
            return (
                figures
                | {
                    "status_responses": float(step.statuses),
                    "congestion_responses": float(step.congested),
                    "congestion_rate": step.congested / step.statuses,
                }
                | ({} if self._window.slowdown is None else {"slowdown": self._window.slowdown})
            )
        mean = step.prefill_s / step.prefills if step.prefills else 0.0
        return figures | {"avg_pq": mean, "ema_pq": 0.0 if ema is None else ema}

    def _learn(self, observation: Observation, began: float | None) -> None:
        self._step.add(observation, window=self._window.window, in_flight=self._in_flight)
        self._window.observe(observation, now=asyncio.get_running_loop().time(), began=began)


_WINDOW_OF_A_REPLICA = 8


def concurrency_controller(config: ConcurrencyConfig, *, replicas: int = 1) -> ConcurrencyController:
    """The controller that a configuration describes; make one, and give it to all samplers that share a service.

    Args:
        config: The configuration. Without a mode there is no limit, or that of `max_concurrency`.
        replicas: How many replicas the service has, for where `adaptive` begins.

    Raises:
        UsageError: `replicas` is less than one.
    """
    if replicas < 1:
        raise UsageError(f"replicas is {replicas}; a service that answers has at least one")
    if config.mode != "adaptive":
        return FixedConcurrencyController(config.max_concurrency or sys.maxsize)
    return AdaptiveConcurrencyController(
        AimdSettings(
            initial_window=config.initial_window or _WINDOW_OF_A_REPLICA * replicas,
            min_window=config.min_window,
            max_window=config.max_window,
            prefill_queue_target=config.prefill_queue_target,
            adjustment_interval=config.rollout_adjustment_interval,
        )
    )
