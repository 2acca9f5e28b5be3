"""The scripted faults of a running service: the plan in force, what it does to operations, resources and hot-loads, and
the admin API.

Invariants
    * A new plan begins from zero: counters are cleared, withheld results are released, lost ones found again, and what
      was kept from starting starts.
    * What the service applied is written down on the training thread at the moment when it took effect.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fwasync._wire import tensors
from fwasync._wire.fault_reports import AppliedOperation, Effects, Released, ReleaseRequest
from fwasync._wire.faults import (
    Action,
    EvictSession,
    FailHotLoad,
    FailOperation,
    FailProvisioning,
    FaultPlan,
    Nan,
    Reject,
    StaleReplica,
    StuckProvisioning,
    routes_of,
)
from fwasync._wire.protobuf.results import decode_outputs
from fwasync.local.control.hurdles import Hurdle
from fwasync.local.control.records import Load
from fwasync.local.engine.api import EngineError
from fwasync.local.faults import FaultScript, FutureFaults, Who
from fwasync.local.operations import Submission, Target, Work
from fwasync.local.refusal import Refusal
from fwasync.local.results import Result, batch_result, failed
from fwasync.local.service import TrainerService
from fwasync.local.web import json_response, read_message

__all__ = ("FaultDesk", "kill")


def kill() -> None:
    """End this process as the operating system would: no handler runs, nothing is flushed."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


class FaultDesk:
    """Holds the plan, and carries out what touches operations. Used on the event loop, but for the noting of effects.

    Args:
        service: The service that is to suffer.
    """

    def __init__(self, service: TrainerService) -> None:
        self.service = service
        self.script = FaultScript(FaultPlan())
        self.futures = FutureFaults()
        self.released = anyio.Event()
        self._acknowledged: set[str] = set()
        self._gone: dict[str, int] = {}
        self._effects: defaultdict[str, list[AppliedOperation]] = defaultdict(list)

    def routes(self) -> list[Route]:
        """The admin API."""
        return [
            Route("/admin/faults", self._put, methods=["PUT"]),
            Route("/admin/faults", self._report, methods=["GET"]),
            Route("/admin/faults", self._delete, methods=["DELETE"]),
            Route("/admin/release", self._release, methods=["POST"]),
            Route("/admin/effects", self._applied, methods=["GET"]),
            Route("/admin/sampling", self._sampling, methods=["GET"]),
            Route("/admin/kill", self._kill, methods=["POST"]),
        ]

    # -- operations --------------------------------------------------------------------------------

    def alter(self, submission: Submission) -> Submission:
        """What becomes of a new operation: itself, with its effect noted, or something worse."""
        kind, work = submission.kind, submission.work
        if work is None:
            return submission
        action = self.script.fire("operation", kind, Who(submission.model_id, submission.seq_id))
        match action:
            case Reject(status=status, message=message):
                return replace(submission, work=None, refusal=Refusal(status, f"{kind}: {message}"))
            case FailOperation(category=category, message=message):
                return replace(submission, work=_failing(message, category))
            case Nan(form="failed"):
                return replace(submission, work=_not_a_number)
            case Nan(form=form):
                work = _spoiling(work, missing=form == "missing")
            case _:
                pass
        return replace(submission, work=self._noting(submission, work))

    def _noting(self, submission: Submission, work: Work) -> Work:
        applied = AppliedOperation(submission.kind, submission.seq_id)

        def noted(target: Target) -> Result:
            result = work(target)
            self._effects[target.model_id].append(applied)
            return result

        return noted

    # -- the control plane -------------------------------------------------------------------------

    def hurdle(self, route: str, resource: str) -> Hurdle | None:
        """What keeps a trainer job or deployment from starting."""
        is_job = route.endswith("_job")
        match self.script.fire("operation", route, Who(resource=resource)):
            case StuckProvisioning(seconds, state):
                until = math.inf if seconds is None else time.time() + seconds
                return Hurdle(state if is_job else "CREATING", "held up by a scripted fault", until)
            case FailProvisioning(message):
                return Hurdle("JOB_STATE_FAILED" if is_job else "FAILED", message, fails=True)
            case _:
                return None

    def alter_load(self, deployment: str, load: Load) -> Load:
        """What becomes of a hot-load: itself, or something worse."""
        match self.script.fire("operation", "hot_load", Who(resource=deployment)):
            case FailHotLoad(None, message):
                return msgspec.structs.replace(load, error=message)
            case FailHotLoad(int(replica), message):
                return msgspec.structs.replace(load, kept={replica: message})
            case StaleReplica(replica):
                return msgspec.structs.replace(load, kept={replica: ""})
            case _:
                return load

    # -- sessions and futures ----------------------------------------------------------------------

    def evict(self, session_id: str, action: EvictSession) -> None:
        """End a session."""
        self.service.end_session(session_id, f"session {session_id} was evicted by a scripted fault")
        self._gone[session_id] = action.status

    def status_of(self, session_id: str | None, route: str) -> int | None:
        """How a request of an evicted session is answered; `None` for a session that was not."""
        if session_id is None or session_id not in self._gone or route not in routes_of(EvictSession()):
            return None
        return 410 if route == "session_heartbeat" else self._gone[session_id]

    def acknowledged(self, route: str, who: Who) -> None:
        """A future was acknowledged to a client; perhaps not for the first time."""
        if who.request_id is None or who.request_id in self._acknowledged:
            return
        self._acknowledged.add(who.request_id)
        action: Action | None = self.script.fire("future", route, who)
        if action is not None:
            self.futures.strike(action, who.request_id, now=time.monotonic())

    # -- the admin API -----------------------------------------------------------------------------

    def _begin(self, plan: FaultPlan) -> None:
        self.script = FaultScript(plan)
        self.futures = FutureFaults()
        self.service.control.hurdles.release(None)
        self._wake()

    def _wake(self) -> None:
        self.released.set()
        self.released = anyio.Event()

    async def _put(self, request: Request) -> Response:
        self._begin(await read_message(request, FaultPlan))
        return await self._report(request)

    async def _delete(self, request: Request) -> Response:
        self._begin(FaultPlan())
        return await self._report(request)

    async def _report(self, _request: Request) -> Response:
        return json_response(msgspec.json.encode(self.script.report()))

    async def _release(self, request: Request) -> Response:
        message = await read_message(request, ReleaseRequest)
        everything = message.request_id is None and message.resource is None
        released = 0
        if message.request_id is not None or everything:
            released += self.futures.release(message.request_id)
        if message.resource is not None or everything:
            released += self.service.control.hurdles.release(message.resource)
        self._wake()
        return json_response(msgspec.json.encode(Released(released)))

    async def _applied(self, _request: Request) -> Response:
        effects = Effects({model_id: list(applied) for model_id, applied in list(self._effects.items())})
        return json_response(msgspec.json.encode(effects))

    async def _sampling(self, _request: Request) -> Response:
        return json_response(msgspec.json.encode(await self.service.samplers.load()))

    async def _kill(self, _request: Request) -> Response:
        kill()
        raise AssertionError  # nobody is there any more


# -- operations that go wrong ---------------------------------------------------------------------------


def _not_a_number(_target: Target) -> Result:
    raise EngineError("datum 0: the loss is not finite at position 0 (a scripted fault)")


def _failing(message: str, category: str) -> Work:
    def fail(_target: Target) -> Result:
        return failed(message, category)

    return fail


def _spoiling(work: Work, *, missing: bool) -> Work:
    return lambda target: _spoiled(work(target), missing=missing)


def _spoiled(result: Result, *, missing: bool) -> Result:
    if result.form == "json":
        fields: dict[str, Any] = msgspec.json.decode(result.body)
        metrics: dict[str, Any] = fields.pop("metrics", None) or {}
        if not missing:
            fields["metrics"] = dict.fromkeys(metrics)
        return Result(msgspec.json.encode(fields))
    output_type, metrics, records = decode_outputs(result.body)
    outputs = [{name: array.copy() for name, array in record.items()} for record in records]
    if missing:
        outputs[0].pop("logprobs")
        metrics = {}
    else:
        # JSON writes it as null, protobuf as it is.
        outputs[0]["logprobs"].reshape(-1)[0] = float("nan")
        metrics = dict.fromkeys(metrics, float("nan"))
    return batch_result(tensors.ForwardBackwardResult(outputs, metrics, output_type))
