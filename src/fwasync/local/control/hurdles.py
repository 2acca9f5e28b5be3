"""What keeps trainer jobs and deployments from coming up; nothing, unless faults are scripted.

Invariants
    * Used on the event loop's thread only, and not written down: a restart takes every hurdle away.
    * A start meets at most one hurdle; the next start of the same resource begins without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ("Hurdle", "Hurdles")


@dataclass(frozen=True, slots=True)
class Hurdle:
    """One hurdle: the state that the resource is in meanwhile, what it says, and until when.

    One that `fails` the start is never taken away.
    """

    state: str
    message: str = ""
    until: float = math.inf
    fails: bool = False


def _none(_route: str, _id: str) -> Hurdle | None:
    return None


class Hurdles:
    """The hurdles of all resources, by their full names.

    Args:
        clock: Tells the time in seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._standing: dict[str, Hurdle] = {}
        self.decide: Callable[[str, str], Hurdle | None] = _none

    def start(self, route: str, name: str) -> None:
        """A resource begins to start, asked for by a request of this route."""
        self._standing.pop(name, None)
        hurdle = self.decide(route, name.rpartition("/")[2])
        if hurdle is not None:
            self._standing[name] = hurdle

    def before(self, name: str) -> Hurdle | None:
        """What stands before a resource that is starting."""
        hurdle = self._standing.get(name)
        if hurdle is None or self._clock() < hurdle.until:
            return hurdle
        del self._standing[name]
        return None

    def release(self, resource: str | None) -> int:
        """Take the hurdle of a resource away, by its id or full name, or those of all; says how many there were."""
        stuck = [name for name, hurdle in self._standing.items() if not hurdle.fails]
        freed = [name for name in stuck if resource in (None, name, name.rpartition("/")[2])]
        for name in freed:
            del self._standing[name]
        return len(freed)
