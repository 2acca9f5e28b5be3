"""How many times as long as it could a service takes: its latency against its own recent minimum. Pure.

A service that is full answers later, also if it says nothing of its queues: what a request waits for comes on top of
the time that it takes alone. That is how TCP Vegas sees a queue, in the ratio of the round-trip time to the smallest
that was seen (L. Brakmo, L. Peterson: TCP Vegas, IEEE JSAC 13(8), 1995); Netflix's `concurrency-limits` carries it over
to requests. As in BBR (N. Cardwell et al., ACM Queue 14(5), 2016) the minimum is that of the recent past only: else a
service that has become slower for good, or prompts that have grown longer, would look like a queue for ever.

With m the mean latency of an interval, e its moving average and f the least m of the last intervals:

    e ← m at first, then α m + (1 - α) e;    slowdown = e / max(f, 1 ms)

What this cannot see is a queue that was there from the beginning, and made by others.
"""

from __future__ import annotations

from collections import deque

__all__ = ("LatencyTrack",)

_SHORTEST_S = 0.001


class LatencyTrack:
    """The latencies of one kind.

    Args:
        alpha: Weight of the newest interval in the moving average.
        horizon: How many intervals the minimum is of.
    """

    __slots__ = ("_alpha", "_ema", "_recent", "_seconds", "_units")

    def __init__(self, alpha: float, horizon: int) -> None:
        self._alpha = alpha
        self._recent: deque[float] = deque(maxlen=horizon)
        self._ema: float | None = None
        self.discard()

    def add(self, seconds: float, units: int = 1) -> None:
        """Take a request into the interval that took so long for so many units of work, such as tokens.

        The mean of an interval is that of its units, so that short requests weigh no more than they are.
        """
        self._seconds += seconds
        self._units += units

    def close(self) -> float | None:
        """Close the interval; the slowdown after it, or `None` if nothing was seen in it."""
        if not self._units:
            return None
        mean = self._seconds / self._units
        self.discard()
        self._ema = mean if self._ema is None else self._alpha * mean + (1.0 - self._alpha) * self._ema
        self._recent.append(mean)
        return self._ema / max(min(self._recent), _SHORTEST_S)

    def discard(self) -> None:
        """Forget the interval."""
        self._seconds, self._units = 0.0, 0

    def restart(self) -> None:
        """Begin a new average, as after a change of the load; the minimum stays."""
        self._ema = None
        self.discard()
