"""The plan of scripted faults, as the local service's admin API takes it.

A plan is a list of rules. A rule is an action, the route that it strikes, and at which occasions: the nth, every
nth, the first n, or with a probability (reproducible from the plan's seed); without any of these, always. What
an occasion is depends on the action: a request for those that disturb the exchange, a new operation (however
often it is sent) for those that strike the operation or its future. At an occasion at most one fault happens,
that of the first rule whose turn it is; all rules go on counting.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

__all__ = (
    "Action",
    "Delay",
    "Drop",
    "EvictSession",
    "FailOperation",
    "Fault",
    "FaultPlan",
    "Kill",
    "LoseFuture",
    "Nan",
    "NotReady",
    "Reject",
    "Reset",
    "Route",
    "SlowFuture",
    "Status",
    "Truncate",
    "routes_of",
)

Route = Literal[
    "*",
    "asample",
    "cancel_future",
    "checkpoints",
    "client/config",
    "client/dynamic_config",
    "create_model",
    "create_sampling_session",
    "create_session",
    "finish_session",
    "forward",
    "forward_backward",
    "get_info",
    "get_server_capabilities",
    "healthz",
    "list_checkpoints",
    "load_weights",
    "optim_step",
    "retrieve_future",
    "samplers",
    "save_weights",
    "save_weights_for_sampler",
    "session_heartbeat",
    "sessions",
    "telemetry",
    "training_runs",
    "unload_model",
    "weights_info",
]
"""A route is named by the first part of its path below `/api/v1`, but for `client/…` and for `sessions/{id}/finish`,
which is `finish_session`. `*` is every route that the action can strike."""

_NUMERIC = ("forward", "forward_backward", "optim_step")
_OPERATIONS = (*_NUMERIC, "load_weights", "save_weights", "save_weights_for_sampler", "unload_model")
_FUTURES = (*_OPERATIONS, "asample", "create_model")
_OF_SESSIONS = (*_FUTURES, "create_sampling_session", "get_info", "session_heartbeat")


class _Wire(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is written by hand: a misspelt field is an error."""


# -- actions ---------------------------------------------------------------------------------------


class Drop(_Wire, frozen=True, tag="drop"):
    """Close the connection without an answer, before anything is done or (`after`) when it is done."""

    after: bool = False


class Reset(_Wire, frozen=True, tag="reset"):
    """Reset the connection (TCP RST) without an answer, before anything is done or (`after`) when it is done."""

    after: bool = False


class Truncate(_Wire, frozen=True, tag="truncate"):
    """Do the work, send half of the answer's body, and close: `Content-Length` promised more."""


class Status(_Wire, frozen=True, tag="status"):
    """Answer with an error status, before anything is done or (`after`) when it is done.

    `retry_after_s` is told as `Retry-After`, rounded up to seconds, and precisely as `Retry-After-Ms`.
    """

    status: int
    retry_after_s: float | None = None
    after: bool = False

    def __post_init__(self) -> None:
        if not 400 <= self.status <= 599:
            raise ValueError(f"Status: {self.status} is not an error status; use 400 to 599")
        _require_not_negative("Status", "retry_after_s", self.retry_after_s)


class Delay(_Wire, frozen=True, tag="delay"):
    """Wait for some seconds, before the work begins or (`after`) before its answer is sent."""

    seconds: float
    after: bool = False

    def __post_init__(self) -> None:
        _require_not_negative("Delay", "seconds", self.seconds)


class NotReady(_Wire, frozen=True, tag="not_ready"):
    """Answer a poll with "try again", at once or after a delay, in one of the two forms that services use."""

    delay_s: float = 0.0
    status: Literal[200, 408] = 408
    queue_state: str = "active"
    reason: str | None = None

    def __post_init__(self) -> None:
        _require_not_negative("NotReady", "delay_s", self.delay_s)


class SlowFuture(_Wire, frozen=True, tag="slow_future"):
    """Withhold the result for some seconds, or until it is released. The operation itself is not held up."""

    seconds: float | None = None

    def __post_init__(self) -> None:
        _require_not_negative("SlowFuture", "seconds", self.seconds)


class LoseFuture(_Wire, frozen=True, tag="lose_future"):
    """Forget the result: polls are answered with 410. The operation takes effect."""


class FailOperation(_Wire, frozen=True, tag="fail_operation"):
    """Accept the operation, and let it fail without an effect."""

    category: Literal["user", "server", "unknown"] = "server"
    message: str = "a scripted fault"


class Reject(_Wire, frozen=True, tag="reject"):
    """Refuse the operation with 400 or 422. Its number is used up (`counted`), or free as if it had not come."""

    counted: bool = True
    status: Literal[400, 422] = 400
    message: str = "a scripted fault"


class EvictSession(_Wire, frozen=True, tag="evict_session"):
    """End the session of the request: heartbeats are answered with 410, everything else with `status`."""

    status: Literal[404, 410] = 404


class Nan(_Wire, frozen=True, tag="nan"):
    """Let the numbers be NaN.

    `"failed"` is how a careful service tells it: the operation fails and has no effect. With the other two it takes
    effect, and what a careless service would send is sent: `"null"` for the first logprob and for each metric (in
    protobuf, NaN itself), or `"missing"` without the first datum's logprobs and without metrics.
    """

    form: Literal["failed", "null", "missing"] = "failed"


class Kill(_Wire, frozen=True, tag="kill"):
    """Do the work, wait until the operation has taken effect, and kill the service's process (`kill -9`)."""


Action = (
    Drop
    | Reset
    | Truncate
    | Status
    | Delay
    | NotReady
    | SlowFuture
    | LoseFuture
    | FailOperation
    | Reject
    | EvictSession
    | Nan
    | Kill
)

_ALL: tuple[str, ...] = tuple(name for name in get_args(Route) if name != "*")


def routes_of(action: Action) -> tuple[str, ...]:
    """The routes that an action can strike."""
    match action:
        case NotReady():
            return ("retrieve_future",)
        case SlowFuture() | LoseFuture() | FailOperation():
            return _FUTURES
        case Reject():
            return _OPERATIONS
        case Nan():
            return _NUMERIC
        case EvictSession():
            return _OF_SESSIONS
        case _:
            return _ALL


# -- the plan --------------------------------------------------------------------------------------


class Fault(_Wire, frozen=True):
    """A rule: an action, the route that it strikes, and at which occasions; at most one of the last four is given.

    Attributes:
        action: What happens.
        route: Where; `"*"` is every route that the action can strike.
        nth: At the nth occasion only, from 1.
        every: At every nth occasion.
        first: At the first n occasions.
        probability: At each occasion with this probability, from the plan's seed: a route's nth occasion is decided
            the same in every run, whatever happens on other routes.
    """

    action: Action
    route: Route = "*"
    nth: int | None = None
    every: int | None = None
    first: int | None = None
    probability: float | None = None

    def __post_init__(self) -> None:
        kind = type(self.action).__name__
        allowed = routes_of(self.action)
        if self.route != "*" and self.route not in allowed:
            raise ValueError(f"Fault: {kind} cannot strike {self.route!r}; choose among: *, {', '.join(allowed)}")
        given = [name for name in ("nth", "every", "first", "probability") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"Fault: {kind} has both {' and '.join(given)}; give one of them, or none for always")
        for name in given:
            value: float = getattr(self, name)
            if name == "probability" and not 0.0 <= value <= 1.0:
                raise ValueError(f"Fault: probability is {value}; it must be from 0 to 1")
            if name != "probability" and value < 1:
                raise ValueError(f"Fault: {name} is {value}; it must be at least 1")


class FaultPlan(_Wire, frozen=True):
    """Rules, in the order of their precedence, and the seed of those with a probability."""

    faults: list[Fault] = []
    seed: int = 0


def _require_not_negative(action: str, field: str, value: Any) -> None:
    if value is not None and not 0.0 <= value < float("inf"):
        raise ValueError(f"{action}: {field} is {value}; it must be a number of seconds, at least 0")
