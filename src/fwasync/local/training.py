"""Models and their operations, from submission to result.

Invariants
    * State is touched on the event loop's thread only; trainers on the training thread only.
    * Per model, operations reach the training thread in the order that the gate gives.
    * One training thread applies everything in the order it was released: runs repeat exactly.
    * An accepted operation has a future that is resolved in the end, whatever happens to it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread

from fwasync._wire.messages import CreateModelRequest, LoadWeightsRequest
from fwasync.local.engine.api import Engine, EngineError
from fwasync.local.futures import FutureStore
from fwasync.local.models import (
    Model,
    Origin,
    Pending,
    Receipt,
    from_base_model,
    from_checkpoint,
    model_id_of,
    request_id,
)
from fwasync.local.operations import Kind, Operations, Submission, Target, Work, digest_of
from fwasync.local.refusal import Refusal, Refused
from fwasync.local.results import Result, failed
from fwasync.local.sampling import SamplingDesk
from fwasync.local.sequence import Accepted, Conflict
from fwasync.local.sessions import Sessions
from fwasync.local.workers import Worker

__all__ = ("TrainingDesk",)

_log = logging.getLogger(__name__)

T = TypeVar("T")

_WAY_OUT = "create a model and load a checkpoint into it"


class TrainingDesk:
    """Takes training requests in."""

    def __init__(
        self,
        engine: Engine,
        operations: Operations,
        futures: FutureStore,
        sessions: Sessions,
        samplers: SamplingDesk,
    ) -> None:
        self._engine = engine
        self._operations = operations
        self._futures = futures
        self._sessions = sessions
        self._samplers = samplers
        self._models: dict[str, Model] = {}
        self._worker = Worker("fwasync-training")
        # One at a time, so that requests are admitted in the order in which they came.
        self._reading = anyio.CapacityLimiter(1)
        self._loop = asyncio.get_running_loop()
        # Asked once about each new operation; scripted faults come in here.
        self.alter: Callable[[Submission], Submission] = _as_it_is
        # Asked once about each new model, and may refuse it; what a trainer job was created for comes in here.
        self.admit: Callable[[Origin], Origin] = _as_it_is

    # -- models ------------------------------------------------------------------------------------

    def model(self, model_id: str) -> Model:
        """A model that is there.

        Raises:
            Refused: It is not.
        """
        model = self._find(model_id)
        if model.ended is not None:
            raise Refused(404, f"{model.ended}; {_WAY_OUT}")
        return model

    def _find(self, model_id: str) -> Model:
        model = self._models.get(model_id)
        if model is None:
            raise Refused(
                404,
                f"model {model_id!r} is not here: the service was restarted, the session has ended, or it never had "
                f"it; {_WAY_OUT}",
            )
        return model

    def create(self, message: CreateModelRequest, body: bytes) -> tuple[str, str]:
        """Begin to create a model, or find the one that the same request created before.

        Returns:
            The future's request id and the model's id.

        Raises:
            Refused: Unknown session or base model, the number is taken, or the trainer job is for other models.
        """
        self._sessions.touch(message.session_id)
        model_id, digest = model_id_of(message.session_id, message.model_seq_id), digest_of(body)
        known = self._known(model_id, digest)
        if known is None:
            known = self._begin(model_id, message.session_id, from_base_model(self._engine, message), digest)
        return known, model_id

    async def create_from_checkpoint(self, message: LoadWeightsRequest, body: bytes) -> tuple[str, str]:
        """Begin to create a model from a checkpoint; otherwise as `create`.

        Raises:
            Refused: Also where there is no such checkpoint.
        """
        session_id, number = message.session_id, message.model_seq_id
        if session_id is None or number is None:
            raise Refused(422, "load_weights: it needs model_id and seq_id, or session_id and model_seq_id")
        self._sessions.touch(session_id)
        model_id, digest = model_id_of(session_id, number), digest_of(body)
        known = self._known(model_id, digest)
        if known is not None:
            return known, model_id
        try:
            job = self._sessions.find(session_id).owner
            path, directory = await anyio.to_thread.run_sync(self._operations.checkpoint, message.path, None, job)
            info = await anyio.to_thread.run_sync(self._engine.snapshot_info, directory)
        except EngineError as error:
            raise Refused(400, f"load_weights: {error}") from None
        # The same request may have come again meanwhile, and the session may have ended.
        self._sessions.touch(session_id)
        known = self._known(model_id, digest)
        if known is None:
            origin = from_checkpoint(self._engine, message, model_id, path, directory, info)
            known = self._begin(model_id, session_id, origin, digest)
        return known, model_id

    def _known(self, model_id: str, digest: bytes) -> str | None:
        known = self._models.get(model_id)
        if known is None:
            return None
        if known.digest != digest:
            number = model_id.rpartition(":")[2]
            raise Refused(409, f"model_seq_id {number} was already used by another request")
        return known.create_request_id

    def _begin(self, model_id: str, session_id: str, origin: Origin, digest: bytes) -> str:
        origin = self.admit(origin)
        pending = Pending(request_id(), origin.work)
        target = Target(model_id, session_id, self._sessions.find(session_id).owner)
        model = Model(target, origin, digest, pending.request_id)
        self._models[model_id] = model
        self._futures.open(pending.request_id, lambda: self._why(model, pending))
        self._start(model, pending)
        return pending.request_id

    def models(self) -> list[Model]:
        """All models, also those that were unloaded, while their session lasts."""
        return list(self._models.values())

    def end_session(self, session_id: str, why: str) -> None:
        """Unload the models of a session, after what they have begun."""
        for model_id in [name for name in self._models if name.startswith(f"{session_id}:")]:
            model = self._models.pop(model_id)
            self._give_up(model, why)
            if model.ended is None:
                self._worker.put(lambda target=model.target: _release(target, why))

    def when_done(self, job: Callable[[], None]) -> None:
        """Run a job on the training thread, after everything that was begun."""
        self._worker.put(job)

    # -- operations --------------------------------------------------------------------------------

    async def submit(self, kind: Kind, body: bytes, *, protobuf: bool = False) -> tuple[str, str]:
        """Take an operation in.

        Returns:
            The future's request id and the model's id.

        Raises:
            Refused: It is not accepted, or was not when it came first.
        """
        read = partial(self._operations.read, kind, body, protobuf=protobuf)
        submission = await anyio.to_thread.run_sync(read, limiter=self._reading)
        model = self._find(submission.model_id)
        self._sessions.touch(model.target.session_id)
        model.last_request = datetime.now(UTC)
        receipt = self._admit(model, submission)
        if isinstance(receipt, Refusal):
            raise Refused(receipt.status, receipt.detail)
        return receipt, submission.model_id

    def _admit(self, model: Model, submission: Submission) -> Receipt:
        unloads = submission.kind == "unload_model"
        if unloads and model.unload_request_id is not None:
            return model.unload_request_id
        known = model.gate.find(submission.seq_id, submission.digest)
        if known is None:
            self.model(submission.model_id)
            submission = self.alter(submission)
            refusal = submission.refusal or self._refuse(model, submission)
            pending = None
            receipt: Receipt = refusal or request_id()
            if isinstance(receipt, str) and submission.work is not None:
                pending = self._accept(model, receipt, submission.work, unloads=unloads)
            known = model.gate.offer(submission.seq_id, submission.digest, receipt, pending)
            if isinstance(known, Accepted):
                self._run(model, known.ready)
                return receipt
        if isinstance(known, Conflict):
            raise Refused(409, f"seq_id {known.seq_id} was already used by another request of this model")
        return known.receipt

    def _accept(self, model: Model, name: str, work: Work, *, unloads: bool) -> Pending:
        pending = Pending(name, work, unloads)
        self._futures.open(name, lambda: self._why(model, pending))
        if unloads:
            model.unload_request_id = name
        return pending

    def _refuse(self, model: Model, submission: Submission) -> Refusal | None:
        kind = submission.kind
        if model.origin.base_only and kind not in ("forward", "unload_model"):
            return Refusal(400, f"{kind}: {submission.model_id} is a base-only reference: it answers forward")
        if model.origin.forward_only and kind in ("forward_backward", "optim_step"):
            return Refusal(400, f"{kind}: trainer job {model.target.job} is forwardOnly: its models answer forward")
        if submission.unnamed is not None:
            number, directory = submission.unnamed
            return self._samplers.reserve(model.target.session_id, number, model.origin.base_model.name, directory)
        return None

    def _run(self, model: Model, ready: tuple[Pending, ...]) -> None:
        for pending in ready:
            if model.ended is not None:
                self._futures.resolve(pending.request_id, failed(model.ended, "user"))
                continue
            self._start(model, pending)
            if pending.unloads:
                self._give_up(model, f"model {model.target.model_id} was unloaded")
                model.ended = f"model {model.target.model_id} was unloaded"

    def _give_up(self, model: Model, why: str) -> None:
        missing = model.gate.waiting_for
        for pending in model.gate.drop():
            text = f"{why} while this operation waited for seq_id {missing}; it had no effect"
            self._futures.resolve(pending.request_id, failed(text, "user"))

    def _why(self, model: Model, pending: Pending) -> str:
        if pending.ticket is None:
            return f"waiting for seq_id {model.gate.waiting_for}"
        ahead = self._worker.ahead(pending.ticket)
        return "running" if ahead <= 0 else f"queued behind {ahead} of the service's operations"

    # -- the training thread -----------------------------------------------------------------------

    def _start(self, model: Model, pending: Pending) -> None:
        target, name, work = model.target, pending.request_id, pending.work

        def job() -> None:
            result = _result(target, work)
            try:
                self._loop.call_soon_threadsafe(self._futures.resolve, name, result)
            except RuntimeError:
                _log.info("the service stopped before the result of %s could be told", name)

        pending.ticket = self._worker.put(job)


def _as_it_is(thing: T) -> T:
    return thing


def _release(target: Target, why: str) -> None:
    target.trainer, target.gone = None, why


def _result(target: Target, work: Work) -> Result:
    try:
        return work(target)
    except EngineError as error:
        return failed(str(error), "user")
    except OSError as error:
        _log.exception("an operation of %s failed", target.model_id)
        return failed(f"the service could not write or read its data directory: {error.strerror}", "server")
    except Exception:
        number = secrets.token_hex(4)
        _log.exception("an operation of %s failed (%s)", target.model_id, number)
        return failed(f"internal error {number} of the service; its log tells more", "server")
