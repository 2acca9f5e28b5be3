"""How many requests a deployment can take at a time: additive increase, multiplicative decrease, as a pure machine.

Three signals move the window. Where the service tells how long requests queued before their prefill, a moving average
of that is held near a target. Where it does not, a refusal for want of room (429, 503, no answer) shrinks the window at
once; and an interval without one lets it grow by a step, or shrinks it if the service has become slower by more than a
tolerance (see `latency`). Latency is the time per token of whole answers, and of streamed ones, which are read at their
reader's pace, the time to the first token.

Invariants
    * `min_window <= window <= max_window`, and so is its whole part, `size`.
    * Within `shrink_cooldown_s`, refusals shrink it once: a burst of them is one event.
    * The latency of a request that began before the window shrank last tells nothing: it was measured in another load.
    * Time comes in as an argument; nothing is random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from fwasync.errors import UsageError
from fwasync.sampling.latency import LatencyTrack

__all__ = ("AdaptiveWindow", "AimdSettings", "Observation")

_MOST_INCREASE = 4.0
_SHORTEST_QUEUE_S = 0.001
_DEEP_RETRY = 3
_CONGESTED = (429, 503)


@dataclass(frozen=True, slots=True)
class AimdSettings:
    """The constants of the window.

    Attributes:
        initial_window: Where it starts; clamped to the two limits.
        min_window: It never falls below, at least 1.
        max_window: It never grows beyond.
        prefill_queue_target: Seconds in the prefill queue above which it shrinks.
        additive_increase: The step by which it grows; up to four times that while the queue is far below the target.
        multiplicative_decrease: The factor by which it shrinks, between 0 and 1.
        ema_alpha: Weight of the newest mean in the moving average.
        adjustment_interval: After this many requests it is adjusted; 0 is at step boundaries only.
        shrink_cooldown_s: Seconds after a refusal in which further ones do not shrink it again.
        latency_tolerance: Where no prefill queue is told, it shrinks when latency is more than so many times its recent
            minimum; above 1. `None` leaves latency out of account.
        latency_horizon: Of how many adjustments the minimum is.
    """

    initial_window: float = 8.0
    min_window: int = 1
    max_window: int = 256
    prefill_queue_target: float = 0.5
    additive_increase: float = 1.0
    multiplicative_decrease: float = 0.5
    ema_alpha: float = 0.3
    adjustment_interval: int = 32
    shrink_cooldown_s: float = 1.0
    latency_tolerance: float | None = 2.0
    latency_horizon: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min_window <= self.max_window:
            raise UsageError(
                f"min_window is {self.min_window} and max_window {self.max_window}; "
                "they must be at least 1, and in this order"
            )
        _require("initial_window", self.initial_window, self.initial_window > 0)
        _require("prefill_queue_target", self.prefill_queue_target, self.prefill_queue_target > 0)
        _require("additive_increase", self.additive_increase, self.additive_increase > 0)
        _require("multiplicative_decrease", self.multiplicative_decrease, 0 < self.multiplicative_decrease < 1)
        _require("ema_alpha", self.ema_alpha, 0 < self.ema_alpha <= 1)
        _require("adjustment_interval", self.adjustment_interval, self.adjustment_interval >= 0)
        _require("shrink_cooldown_s", self.shrink_cooldown_s, self.shrink_cooldown_s >= 0)
        if self.latency_tolerance is not None:
            _require("latency_tolerance", self.latency_tolerance, self.latency_tolerance > 1)
        _require("latency_horizon", self.latency_horizon, self.latency_horizon >= 1)


class Observation(msgspec.Struct, frozen=True, gc=False):
    """What one attempt at a request told.

    Attributes:
        status: Its HTTP status; `None` if there was no answer.
        prefill_queue_s: Seconds in the prefill queue, if the service told.
        retry: How many attempts at the same request came before.
        prompt_tokens: Length of the prompt, if told.
        cached_prompt_tokens: How many of them the service had cached, if told.
        ttft_s: Seconds until the first token came, of a streamed answer.
        latency_s: Seconds until the whole answer was there, of another.
        tokens: How many tokens came one after another in `latency_s`.
    """

    status: int | None
    prefill_queue_s: float | None = None
    retry: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    ttft_s: float | None = None
    latency_s: float | None = None
    tokens: int = 0

    @property
    def congested(self) -> bool:
        """Whether the service had no room for it."""
        return self.status is None or self.status in _CONGESTED

    @property
    def succeeded(self) -> bool:
        """Whether the answer is a success."""
        return self.status is not None and 200 <= self.status < 300


class AdaptiveWindow:
    """The window and what it remembers."""

    __slots__ = (
        "_congestion",
        "_ema",
        "_first_token",
        "_now",
        "_outdated",
        "_per_token",
        "_prefill",
        "_seen",
        "_settings",
        "_shrunk_at",
        "_slowdown",
        "_successes",
        "_window",
    )

    def __init__(self, settings: AimdSettings) -> None:
        self._settings = settings
        self._window = self._clamped(settings.initial_window)
        self._ema: float | None = None
        self._first_token = LatencyTrack(settings.ema_alpha, settings.latency_horizon)
        self._per_token = LatencyTrack(settings.ema_alpha, settings.latency_horizon)
        self._slowdown: float | None = None
        self._shrunk_at = self._now = -math.inf
        self._begin_interval()

    @property
    def window(self) -> float:
        """The window itself, a fraction."""
        return self._window

    @property
    def size(self) -> int:
        """How many requests may run at a time."""
        return int(self._window)

    @property
    def ema_prefill_queue(self) -> float | None:
        """The moving average of the prefill queue in seconds; `None` before the first adjustment by it."""
        return self._ema

    @property
    def slowdown(self) -> float | None:
        """How many times its recent minimum the latency is; `None` before the first adjustment by it."""
        return self._slowdown

    def observe(self, observation: Observation, *, now: float, began: float | None = None) -> None:
        """Take an attempt into account.

        Args:
            observation: What it told.
            now: Seconds on any clock that does not go back.
            began: When the attempt began; unset is since the window shrank last.
        """
        self._seen += 1
        self._now = now
        if observation.prefill_queue_s is not None:
            self._prefill.append(observation.prefill_queue_s)
        elif observation.congested:
            self._congestion += 1
            self._shrink(deep=observation.retry >= _DEEP_RETRY)
        elif observation.succeeded:
            self._successes += 1
            self._outdated |= not self._time(observation, self._shrunk_at if began is None else began)
        if self._settings.adjustment_interval and self._seen >= self._settings.adjustment_interval:
            self.adjust()

    def adjust(self) -> None:
        """Close the interval: move the window by what was observed in it, and begin the next."""
        if self._prefill:
            self._follow_queue(sum(self._prefill) / len(self._prefill))
        elif self._successes and not self._congestion:
            self._follow_latency()
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._seen = 0
        self._prefill: list[float] = []
        self._successes = 0
        self._congestion = 0
        self._outdated = False
        self._first_token.discard()
        self._per_token.discard()

    def _time(self, observation: Observation, began: float) -> bool:
        """Take a latency into account, if one is told; whether it is one of this load."""
        if began < self._shrunk_at:
            return observation.ttft_s is None and not observation.tokens
        if observation.ttft_s is not None:
            self._first_token.add(observation.ttft_s)
        elif observation.latency_s is not None and observation.tokens:
            self._per_token.add(observation.latency_s, observation.tokens)
        return True

    def _follow_latency(self) -> None:
        settings = self._settings
        told = [slowdown for track in (self._first_token, self._per_token) if (slowdown := track.close()) is not None]
        if not told and self._outdated:
            return  # what is known is of a larger window
        self._slowdown = max(told, default=self._slowdown)
        if told and settings.latency_tolerance is not None and max(told) > settings.latency_tolerance:
            self._decrease(settings.multiplicative_decrease)
        else:
            self._window = self._clamped(self._window + settings.additive_increase)

    def _decrease(self, factor: float) -> None:
        self._window = self._clamped(self._window * factor)
        self._shrunk_at = self._now
        self._first_token.restart()
        self._per_token.restart()

    def _follow_queue(self, mean_s: float) -> None:
        settings = self._settings
        alpha = settings.ema_alpha
        self._ema = mean_s if self._ema is None else alpha * mean_s + (1.0 - alpha) * self._ema
        if self._ema > settings.prefill_queue_target:
            wanted = self._window * settings.multiplicative_decrease
        else:
            room = settings.prefill_queue_target / max(self._ema, _SHORTEST_QUEUE_S)
            wanted = self._window + settings.additive_increase * min(room, _MOST_INCREASE)
        self._window = self._clamped(wanted)

    def _shrink(self, *, deep: bool) -> None:
        if self._now - self._shrunk_at < self._settings.shrink_cooldown_s:
            return
        factor = self._settings.multiplicative_decrease
        # Who was refused so often waits behind a service that is far too full.
        self._decrease(factor * factor if deep else factor)

    def _clamped(self, window: float) -> float:
        return float(min(max(window, self._settings.min_window), self._settings.max_window))


def _require(name: str, value: float, is_good: bool) -> None:
    if not is_good or not math.isfinite(value):
        raise UsageError(f"{name} is {value}, which is out of its range")
