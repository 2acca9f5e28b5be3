"""The plan of scripted faults, as the local service's admin API takes it.

A plan is a list of rules. A rule is an action, the route that it strikes, and at which occasions: the nth, every
nth, the first n, or with a probability (reproducible from the plan's seed); without any of these, always. What
an occasion is depends on the action: a request for those that disturb the exchange, a streamed answer for those that
disturb its stream, and for those that strike an operation or its future, the start of a resource or a hot-load: that it
was accepted, however often it is sent. At an occasion at most one fault happens,
that of the first rule whose turn it is; all rules go on counting.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

__all__ = (
    "Action",
    "CutStream",
    "Delay",
    "Drop",
    "EvictSession",
    "FailHotLoad",
    "FailOperation",
    "FailProvisioning",
    "Fault",
    "FaultPlan",
    "Kill",
    "LoseFuture",
    "Nan",
    "NotReady",
    "Preempt",
    "Reject",
    "Reset",
    "Route",
    "SlowFuture",
    "SlowStream",
    "StaleReplica",
    "Status",
    "StuckProvisioning",
    "Truncate",
    "routes_of",
)

Route = Literal[
    "*",
    "asample",
    "cancel_future",
    "cancel_trainer_job",
    "checkpoints",
    "client/config",
    "client/dynamic_config",
    "completions",
    "control_plane",
    "create_deployment",
    "create_model",
    "create_sampling_session",
    "create_session",
    "create_trainer_job",
    "delete_deployment",
    "delete_trainer_job",
    "finish_session",
    "forward",
    "forward_backward",
    "get_deployment",
    "get_info",
    "get_server_capabilities",
    "get_trainer_job",
    "healthz",
    "hot_load",
    "hot_load_status",
    "list_checkpoints",
    "list_deployments",
    "list_trainer_jobs",
    "load_adapter",
    "load_weights",
    "optim_step",
    "resume_trainer_job",
    "retrieve_future",
    "samplers",
    "save_weights",
    "save_weights_for_sampler",
    "session_heartbeat",
    "sessions",
    "telemetry",
    "training_runs",
    "unload_model",
    "update_deployment",
    "weights_info",
]
"""A route of the trainer API is named by the first part of its path below `/api/v1`, but for `client/…` and for
`sessions/{id}/finish`, which is `finish_session`; that it goes through a trainer job's gateway makes no difference.
Those of trainer jobs, deployments, hot-loads and completions have names of their own, and `control_plane` is the rest.
`*` is every route that the action can strike."""

_NUMERIC = ("forward", "forward_backward", "optim_step")
_OPERATIONS = (*_NUMERIC, "load_adapter", "load_weights", "save_weights", "save_weights_for_sampler", "unload_model")
_FUTURES = (*_OPERATIONS, "asample", "create_model")
_STARTS = ("create_deployment", "create_trainer_job", "resume_trainer_job")
_OF_CONTROL = (
    *_STARTS,
    "cancel_trainer_job",
    "completions",
    "control_plane",
    "delete_deployment",
    "delete_trainer_job",
    "get_deployment",
    "get_trainer_job",
    "hot_load",
    "hot_load_status",
    "list_deployments",
    "list_trainer_jobs",
    "update_deployment",
)
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


class Preempt(_Wire, frozen=True, tag="preempt"):
    """Take the machines away from the trainer job through whose gateway a request comes, or that is asked for.

    The request is answered as the gateway of a job that does not run answers. The job's sessions and models are gone,
    its checkpoints are not; resuming it starts it again.
    """

    state: Literal["JOB_STATE_FAILED", "JOB_STATE_PAUSED", "JOB_STATE_CANCELLED"] = "JOB_STATE_FAILED"
    message: str = "pre-empted by a scripted fault"


class StuckProvisioning(_Wire, frozen=True, tag="stuck_provisioning"):
    """Let a trainer job or deployment not come up, for some seconds or until it is released.

    `state` is what a job says meanwhile; a deployment is CREATING.
    """

    seconds: float | None = None
    state: Literal["JOB_STATE_PENDING", "JOB_STATE_CREATING"] = "JOB_STATE_PENDING"

    def __post_init__(self) -> None:
        _require_not_negative("StuckProvisioning", "seconds", self.seconds)


class FailProvisioning(_Wire, frozen=True, tag="fail_provisioning"):
    """Let a trainer job or deployment fail instead of coming up."""

    message: str = "a scripted fault"


class FailHotLoad(_Wire, frozen=True, tag="fail_hot_load"):
    """Let a hot-load fail on one replica, counted from 0, or on all: it says so, and keeps what it serves."""

    replica: int | None = None
    message: str = "a scripted fault"


class StaleReplica(_Wire, frozen=True, tag="stale_replica"):
    """Let one replica, counted from 0, keep what it serves at a hot-load, as if it had not heard of it."""

    replica: int = 0


class CutStream(_Wire, frozen=True, tag="cut_stream"):
    """Close the connection of a streamed completion after so many events.

    `clean` ends the answer in order, as a proxy does whose server has died: only what is missing tells of it.
    """

    events: int = 1
    clean: bool = False

    def __post_init__(self) -> None:
        if self.events < 0:
            raise ValueError(f"CutStream: events is {self.events}; it must be at least 0")


class SlowStream(_Wire, frozen=True, tag="slow_stream"):
    """Wait for some seconds before each event of a streamed completion."""

    seconds: float

    def __post_init__(self) -> None:
        _require_not_negative("SlowStream", "seconds", self.seconds)


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
    | Preempt
    | StuckProvisioning
    | FailProvisioning
    | FailHotLoad
    | StaleReplica
    | CutStream
    | SlowStream
)

_ALL: tuple[str, ...] = tuple(name for name in get_args(Route) if name != "*")
_OF_TRAINERS = tuple(name for name in _ALL if name not in _OF_CONTROL)


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
        case Preempt():
            return (*_OF_TRAINERS, "get_trainer_job")
        case StuckProvisioning() | FailProvisioning():
            return _STARTS
        case FailHotLoad() | StaleReplica():
            return ("hot_load",)
        case CutStream() | SlowStream():
            return ("completions",)
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
