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
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import msgspec

from fwasync._wire.messages import CreateModelRequest, LoraConfigMessage, ModelCreated, encode
from fwasync.local.engine.api import BaseModel, Engine, EngineError, Lora
from fwasync.local.futures import FutureStore
from fwasync.local.operations import Kind, Operations, Submission, Target, digest_of
from fwasync.local.refusal import Refusal, Refused, failed
from fwasync.local.sampling import SamplingDesk
from fwasync.local.sequence import Accepted, Conflict, SequenceGate
from fwasync.local.sessions import Sessions
from fwasync.local.workers import Worker

__all__ = ("Model", "TrainingDesk")

_log = logging.getLogger(__name__)

Receipt = str | Refusal

_WAY_OUT = "create a model and load a checkpoint into it"


@dataclass(slots=True, eq=False)
class Pending:
    """An accepted operation without a result. `ticket` is its place at the training thread, once it has one."""

    request_id: str
    work: Callable[[Target], bytes]
    unloads: bool = False
    ticket: int | None = None


@dataclass(slots=True, eq=False)
class Model:
    """A model as the event loop sees it."""

    target: Target
    base_model: BaseModel
    lora: Lora | None
    base_only: bool
    digest: bytes
    create_request_id: str
    gate: SequenceGate[Pending, Receipt] = field(default_factory=SequenceGate[Pending, Receipt])
    unload_request_id: str | None = None
    ended: str | None = None


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
            Refused: Unknown session or base model, an impossible adapter, or the number is taken.
        """
        self._sessions.touch(message.session_id)
        model_id = f"{message.session_id}:train:{message.model_seq_id}"
        digest = digest_of(body)
        known = self._models.get(model_id)
        if known is not None:
            if known.digest != digest:
                raise Refused(409, f"model_seq_id {message.model_seq_id} was already used by another request")
            return known.create_request_id, model_id
        base_model = self._engine.models.get(message.base_model)
        if base_model is None:
            names = ", ".join(self._engine.models)
            raise Refused(400, f"unknown base_model {message.base_model!r}; this service has: {names}")
        lora = None if message.base_only else _lora(message.lora_config)
        seed = message.lora_config.seed if message.lora_config else None

        def work(target: Target) -> bytes:
            try:
                target.trainer = self._engine.trainer(base_model.name, lora, seed=seed)
            except EngineError as error:
                target.gone = f"model {model_id} could not be created: {error}"
                raise
            return encode(ModelCreated(model_id=model_id))

        pending = Pending(_request_id(), work)
        model = Model(
            Target(model_id, message.session_id),
            base_model,
            lora,
            bool(message.base_only),
            digest,
            pending.request_id,
        )
        self._models[model_id] = model
        self._futures.open(pending.request_id, lambda: self._why(model, pending))
        self._start(model, pending)
        return pending.request_id, model_id

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

    async def submit(self, kind: Kind, body: bytes) -> tuple[str, str]:
        """Take an operation in.

        Returns:
            The future's request id and the model's id.

        Raises:
            Refused: It is not accepted, or was not when it came first.
        """
        submission = await anyio.to_thread.run_sync(self._operations.read, kind, body, limiter=self._reading)
        model = self._find(submission.model_id)
        self._sessions.touch(model.target.session_id)
        receipt = self._admit(kind, model, submission)
        if isinstance(receipt, Refusal):
            raise Refused(receipt.status, receipt.detail)
        return receipt, submission.model_id

    def _admit(self, kind: Kind, model: Model, submission: Submission) -> Receipt:
        if kind == "unload_model" and model.unload_request_id is not None:
            return model.unload_request_id
        known = model.gate.find(submission.seq_id, submission.digest)
        if known is None:
            self.model(submission.model_id)
            refusal = submission.refusal or self._refuse(kind, model, submission)
            pending = None
            receipt: Receipt = refusal or _request_id()
            if isinstance(receipt, str) and submission.work is not None:
                pending = self._accept(model, receipt, submission.work, unloads=kind == "unload_model")
            known = model.gate.offer(submission.seq_id, submission.digest, receipt, pending)
            if isinstance(known, Accepted):
                self._run(model, known.ready)
                return receipt
        if isinstance(known, Conflict):
            raise Refused(409, f"seq_id {known.seq_id} was already used by another request of this model")
        return known.receipt

    def _accept(self, model: Model, request_id: str, work: Callable[[Target], bytes], *, unloads: bool) -> Pending:
        pending = Pending(request_id, work, unloads)
        self._futures.open(request_id, lambda: self._why(model, pending))
        if unloads:
            model.unload_request_id = request_id
        return pending

    def _refuse(self, kind: Kind, model: Model, submission: Submission) -> Refusal | None:
        if model.base_only and kind not in ("forward", "unload_model"):
            return Refusal(400, f"{kind}: {submission.model_id} is a base-only reference: it answers forward")
        if submission.unnamed is not None:
            number, directory = submission.unnamed
            return self._samplers.reserve(model.target.session_id, number, model.base_model.name, directory)
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
        target, request_id, work = model.target, pending.request_id, pending.work

        def job() -> None:
            body = _result(target, work)
            try:
                self._loop.call_soon_threadsafe(self._futures.resolve, request_id, body)
            except RuntimeError:
                _log.info("the service stopped before the result of %s could be told", request_id)

        pending.ticket = self._worker.put(job)


def _request_id() -> str:
    return f"req-{secrets.token_hex(12)}"


def _lora(config: LoraConfigMessage | None) -> Lora | None:
    if config is None or config.rank == 0:
        return None
    given = msgspec.structs.asdict(config)
    return Lora(**{name: value for name, value in given.items() if value is not None})


def _release(target: Target, why: str) -> None:
    target.trainer, target.gone = None, why


def _result(target: Target, work: Callable[[Target], bytes]) -> bytes:
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
