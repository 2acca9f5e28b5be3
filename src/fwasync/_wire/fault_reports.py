"""What came of a plan of faults, and what the service did meanwhile: the answers of the local service's admin API."""

from __future__ import annotations

import msgspec

__all__ = (
    "AppliedOperation",
    "Effects",
    "FaultEvent",
    "FaultReport",
    "ReleaseRequest",
    "Released",
    "SamplingLoad",
)


class FaultEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A fault that happened.

    Attributes:
        rule: Which rule of the plan, from 0.
        action: The action's name, such as `drop`.
        route: Where it struck.
        model_id: The model of the request, where it names one.
        seq_id: The number of the operation within its model, where it has one.
        request_id: The future, where it is known.
        resource: The id of the trainer job or deployment that the request names or went through.
    """

    rule: int
    action: str
    route: str
    model_id: str | None = None
    seq_id: int | None = None
    request_id: str | None = None
    resource: str | None = None


class FaultReport(msgspec.Struct, frozen=True):
    """What a plan has done so far.

    Attributes:
        fired: For each rule, how often it struck.
        log: What happened, in order; the newest ten thousand.
    """

    fired: list[int]
    log: list[FaultEvent]


class AppliedOperation(msgspec.Struct, frozen=True):
    """An operation that took effect: its route, and its number within its model if it had one."""

    kind: str
    seq_id: int | None


class Effects(msgspec.Struct, frozen=True):
    """What the service applied since it was started, by model, in order."""

    models: dict[str, list[AppliedOperation]]


class ReleaseRequest(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Let a withheld result go, or a trainer job or deployment start; without both, all of them."""

    request_id: str | None = None
    resource: str | None = None


class Released(msgspec.Struct, frozen=True):
    """How many were let go."""

    released: int


class SamplingLoad(msgspec.Struct, frozen=True):
    """What the service samples, of all its samplers and deployments.

    Attributes:
        waiting: Requests that have no token yet.
        running: Requests that have some, and get more.
        tokens: How many tokens were sampled since the service was started.
    """

    waiting: int
    running: int
    tokens: int
