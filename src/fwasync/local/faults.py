"""Which fault happens when: the rules of a plan as a pure state machine, without I/O and without a clock.

Invariants
    * At most one fault for each occasion: that of the first rule whose turn it is. Every rule that
      fits counts every occasion, whether it strikes or not.
    * What a rule with a probability decides depends on the seed, its place in the plan, the route and the
      count of occasions on that route, and on nothing else.
    * A future that was lost stays lost; a withheld one is let go once, by its time or by hand.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal, get_args

from fwasync._wire import completions, hot_load
from fwasync._wire.fault_reports import FaultEvent, FaultReport
from fwasync._wire.faults import (
    Action,
    CutStream,
    FailHotLoad,
    FailOperation,
    FailProvisioning,
    Fault,
    FaultPlan,
    LoseFuture,
    Nan,
    Reject,
    Route,
    SlowFuture,
    SlowStream,
    StaleReplica,
    StuckProvisioning,
    routes_of,
)

__all__ = ("FaultScript", "FutureFaults", "Held", "Lost", "Occasion", "Who", "control_route_of", "route_of")

Occasion = Literal["request", "stream", "operation", "future"]
"""When faults are decided: as a request comes in; as one comes in that asks for a stream and has met no other fault; as
a new training operation, start of a resource or hot-load is accepted; or as a new future is acknowledged."""

_LONGEST_LOG = 10_000
_WITHOUT_GATE = ("asample", "create_model")


@dataclass(frozen=True, slots=True)
class Who:
    """What a request is about, as far as it says."""

    model_id: str | None = None
    seq_id: int | None = None
    request_id: str | None = None
    resource: str | None = None


def route_of(path: str) -> str:
    """The name of a route for its path below the API's prefix."""
    if path.startswith("client/"):
        return path
    return "finish_session" if path.endswith("/finish") else path.partition("/")[0]


_KINDS = {"rlorTrainerJobs": "trainer_job", "deployments": "deployment"}
_VERBS = {"GET": "get", "POST": "create", "PATCH": "update", "DELETE": "delete"}


def control_route_of(method: str, path: str) -> tuple[str, str | None]:
    """The name of a route that is not the trainer API's, and the id of the resource that its path names."""
    if path == completions.PATH:
        return "completions", None
    if path == hot_load.PATH:
        return ("hot_load" if method == "POST" else "hot_load_status"), None
    _, _, _, _, kind, *rest = [*path.split("/"), "", "", ""]
    resource, _, verb = rest[0].partition(":") if rest else ("", "", "")
    if kind not in _KINDS or any(rest[1:]):
        return "control_plane", None
    if not resource:
        name = f"list_{_KINDS[kind]}s" if method == "GET" else f"create_{_KINDS[kind]}"
    else:
        name = f"{verb or _VERBS.get(method, '')}_{_KINDS[kind]}"
    return (name if name in get_args(Route) else "control_plane"), resource or None


def _fits(action: Action, occasion: Occasion, route: str) -> bool:
    if route not in routes_of(action):
        return False
    match action:
        case SlowFuture() | LoseFuture():
            return occasion == "future"
        case FailOperation():
            return occasion == ("future" if route in _WITHOUT_GATE else "operation")
        case Nan() | Reject(counted=True):
            return occasion == "operation"
        case StuckProvisioning() | FailProvisioning() | FailHotLoad() | StaleReplica():
            return occasion == "operation"
        case CutStream() | SlowStream():
            return occasion == "stream"
        case _:
            return occasion == "request"


class FaultScript:
    """The rules of one plan, and what they have done.

    Args:
        plan: The rules.
    """

    def __init__(self, plan: FaultPlan) -> None:
        self._faults = plan.faults
        self._seed = plan.seed
        self._occasions: Counter[int] = Counter()
        self._on_route: Counter[tuple[int, str]] = Counter()
        self._fired = [0] * len(plan.faults)
        self._log: deque[FaultEvent] = deque(maxlen=_LONGEST_LOG)

    def fire(self, occasion: Occasion, route: str, who: Who) -> Action | None:
        """Count an occasion, and say which fault is to happen."""
        chosen: int | None = None
        for index, fault in enumerate(self._faults):
            if fault.route in ("*", route) and _fits(fault.action, occasion, route):
                due = self._count(index, fault, route)
                if due and chosen is None:
                    chosen = index
        if chosen is None:
            return None
        action = self._faults[chosen].action
        self._fired[chosen] += 1
        name = action.__struct_config__.tag
        event = FaultEvent(chosen, str(name), route, who.model_id, who.seq_id, who.request_id, who.resource)
        self._log.append(event)
        return action

    def report(self) -> FaultReport:
        """What has happened so far."""
        return FaultReport(fired=list(self._fired), log=list(self._log))

    def _count(self, index: int, fault: Fault, route: str) -> bool:
        """Count an occasion for a rule; says whether it is its turn."""
        self._occasions[index] += 1
        self._on_route[index, route] += 1
        count = self._occasions[index]
        if fault.nth is not None:
            return count == fault.nth
        if fault.every is not None:
            return count % fault.every == 0
        if fault.first is not None:
            return count <= fault.first
        if fault.probability is not None:
            dice = random.Random(f"{self._seed}/{index}/{route}/{self._on_route[index, route]}")
            return dice.random() < fault.probability
        return True


# -- what stays after a fault ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """The result is withheld; for `seconds` more, or until it is released (`None`)."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Lost:
    """The result is lost."""


class FutureFaults:
    """What happened to futures. The time comes in as an argument, in seconds of any one clock."""

    def __init__(self) -> None:
        self._held: dict[str, float | None] = {}
        self._lost: set[str] = set()
        self._failed: dict[str, FailOperation] = {}

    def strike(self, action: Action, request_id: str, *, now: float) -> None:
        """Let a fault happen to a future."""
        match action:
            case SlowFuture(seconds):
                self._held[request_id] = None if seconds is None else now + seconds
            case LoseFuture():
                self._lost.add(request_id)
            case FailOperation():
                self._failed[request_id] = action
            case _:
                raise AssertionError(f"{action} is not a fault of a future")

    def fate(self, request_id: str, *, now: float) -> Held | Lost | FailOperation | None:
        """What a poll for this future is to find."""
        if request_id in self._held:
            until = self._held[request_id]
            if until is None or until > now:
                return Held(None if until is None else until - now)
            del self._held[request_id]
        if request_id in self._lost:
            return Lost()
        return self._failed.get(request_id)

    def release(self, request_id: str | None) -> int:
        """Let a withheld result go, or all; says how many there were."""
        names = list(self._held) if request_id is None else [name for name in (request_id,) if name in self._held]
        for name in names:
            del self._held[name]
        return len(names)
