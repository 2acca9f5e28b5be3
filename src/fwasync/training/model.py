"""The life of one model on the service: created, worked on in order, drained, left."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import anyio

from fwasync._background import Background
from fwasync._http.reading import read
from fwasync._http.retrieve import retrieve
from fwasync._http.session import Session
from fwasync._wire import messages
from fwasync._wire.messages import encode
from fwasync._wire.runs import WeightsInfo, WeightsInfoRequest
from fwasync.errors import ClosedError, UsageError
from fwasync.training.future import APIFuture
from fwasync.training.lane import Lane
from fwasync.training.operation import AnyOperation, Operation
from fwasync.training.requests import load_weights
from fwasync.training.verbs import Admit

__all__ = ("Model", "ModelSpec", "Statistics")

T = TypeVar("T")

CHECKPOINT_TIMEOUT_S = 2700.0
_GRACE_S = 1.0
_TOLD = 8


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What model to create.

    Attributes:
        base_model: One of the service's models; `None` is that of `state`.
        lora_rank: Rank of the adapter, 0 for all parameters; `None` is that of `state`.
        seed: Of the adapter's initial weights.
        base_only: A frozen reference, which answers forward only.
        state: A checkpoint to begin from.
        with_optimizer: Whether the optimizer begins from it too.
        load_timeout: Seconds that loading `state` may take.
    """

    base_model: str | None
    lora_rank: int | None = None
    seed: int | None = None
    base_only: bool = False
    state: str | None = None
    with_optimizer: bool = False
    load_timeout: float | None = CHECKPOINT_TIMEOUT_S

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 0:
            raise UsageError(f"lora_rank is {self.lora_rank}; it must be at least 1, or 0 to train all parameters")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of a training client's operations.

    Attributes:
        submitted: Since the client was entered.
        queued: Waiting for their turn.
        admitting: Being sent; 0 or 1.
        unawaited: Those whose outcome nobody has learnt yet, the queued ones among them.
        last_number: The number of the last acknowledged request; 0 before the first.
        broken: Whether the order is in doubt, so that nothing more can be sent.
        unfinished: Those without an outcome, a line for each of the eight oldest: verb, state, request, age, and what
            the service says of it.
    """

    submitted: int
    queued: int
    admitting: int
    unawaited: int
    last_number: int
    broken: bool
    unfinished: tuple[str, ...]


class Model:
    """One model, and everything that runs for it.

    Args:
        session: Where it lives.
        spec: What it is.
    """

    def __init__(self, session: Session, spec: ModelSpec) -> None:
        self.session = session
        self.spec = spec
        self.suffix = secrets.token_hex(4)
        self._background = Background()
        self._lane: Lane | None = None
        self._unobserved: set[AnyOperation] = set()
        self._submitted = 0
        self._closed = False

    @property
    def lane(self) -> Lane:
        """The order of its operations.

        Raises:
            ClosedError: It is not open yet.
        """
        if self._lane is None:
            raise ClosedError(
                "the training client is not open: use it as `async with service.create_training_client(...) as client:`"
            )
        return self._lane

    def submit(self, verb: str, admit: Callable[[str], Admit[T]], timeout: float | None) -> APIFuture[T]:
        """Give an operation its place in the order.

        Args:
            verb: The method's name.
            admit: From the model's id to what sends the operation.
            timeout: Seconds that each wait may take.
        """
        lane = self.lane
        operation = Operation(verb, admit(lane.model_id), timeout=timeout, on_observed=self._unobserved.discard)
        lane.append(operation)
        self._unobserved.add(operation)
        self._submitted += 1
        return APIFuture(operation)

    def statistics(self) -> Statistics:
        """Counts, as of now."""
        lane = self.lane
        unfinished = sorted((each for each in self._unobserved if not each.decided), key=lambda each: each.created)
        return Statistics(
            submitted=self._submitted,
            queued=lane.queued,
            admitting=lane.admitting,
            unawaited=len(self._unobserved),
            last_number=lane.last_number,
            broken=lane.broken,
            unfinished=tuple(f"{each.verb}: {each.story()}" for each in unfinished[:_TOLD]),
        )

    # -- life ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Create it on the service, and begin to admit operations."""
        if self._lane is not None or self._closed:
            raise UsageError("a training client is entered once; create another one")
        await self._background.open()
        try:
            self._lane = Lane(self.session, await self._create())
            self._background.start(self._lane.run)
            if self.spec.state is not None:
                await self._load(self.spec.state)
        except BaseException:
            await self._close()
            raise

    async def aclose(self, *, drain: bool) -> None:
        """Leave it: wait for what was submitted, or withdraw what is queued. May be called again.

        Raises:
            FwasyncError, ExceptionGroup: What failed and nobody had awaited.
        """
        if self._closed:
            return
        try:
            if drain:
                await self.drain()
        finally:
            await self._close()

    async def unload(self) -> None:
        """Wait for what was submitted, refuse what comes, and free the model on the service."""
        lane, http = self.lane, self.session.http
        await self.drain()
        await lane.aclose(grace_s=_GRACE_S)
        body = await http.call("POST", "unload_model", [encode(messages.UnloadModelRequest(model_id=lane.model_id))])
        submitted = read("unload_model", body, messages.Submitted)
        await retrieve(http, submitted.request_id, what="unload")

    async def drain(self) -> None:
        """Wait for everything that was submitted and that nobody awaited; raise what failed."""
        errors: list[Exception] = []

        async def settle(operation: AnyOperation) -> None:
            try:
                await APIFuture[Any](operation).result()
            except Exception as error:
                errors.append(error)

        while self._unobserved and not errors:
            async with anyio.create_task_group() as group:
                for operation in tuple(self._unobserved):
                    group.start_soon(settle, operation)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("operations failed that nobody had awaited", errors)

    async def _close(self) -> None:
        self._closed = True
        try:
            if self._lane is not None:
                await self._lane.aclose(grace_s=_GRACE_S)
        finally:
            await self._background.aclose()

    async def _create(self) -> str:
        spec, http = await self._resolve(self.spec), self.session.http
        assert spec.base_model is not None
        lora = messages.LoraConfigMessage(
            rank=spec.lora_rank or 0, seed=spec.seed, train_unembed=True, train_mlp=True, train_attn=True
        )
        request = messages.CreateModelRequest(
            session_id=self.session.session_id,
            model_seq_id=self.session.next_model_number(),
            base_model=spec.base_model,
            lora_config=None if spec.base_only else lora,
            base_only=spec.base_only or None,
        )
        body = await http.call("POST", "create_model", [encode(request)])
        submitted = read("create_model", body, messages.Submitted)
        result = await retrieve(http, submitted.request_id, what=f"creating a model of {spec.base_model}")
        return read("create_model", result.body, messages.ModelCreated).model_id

    async def _resolve(self, spec: ModelSpec) -> ModelSpec:
        if spec.base_model is not None or spec.state is None:
            return spec
        body = encode(WeightsInfoRequest(tinker_path=spec.state))
        info = read("weights_info", await self.session.http.call("POST", "weights_info", [body]), WeightsInfo)
        rank = (info.lora_rank or 0) if info.is_lora else 0
        self.spec = replace(spec, base_model=info.base_model, lora_rank=rank)
        return self.spec

    async def _load(self, path: str) -> None:
        optimizer, timeout = self.spec.with_optimizer, self.spec.load_timeout
        verb = "load_state_with_optimizer" if optimizer else "load_state"
        await self.submit(verb, lambda model_id: load_weights(model_id, path, optimizer=optimizer), timeout)
