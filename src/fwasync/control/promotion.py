"""Promotion: a trainer's checkpoint becomes a model of the account."""

from __future__ import annotations

import random

import anyio
import msgspec

from fwasync._http.reading import read
from fwasync._wire.control import LongOperation, Model, PromoteRequest, Promotion
from fwasync.control.names import check_id, output_model_problems, path_of
from fwasync.control.plane import Plane
from fwasync.control.resources import ModelInfo
from fwasync.control.waiting import poll_delay
from fwasync.errors import (
    BadRequestError,
    ConflictError,
    OperationFailedError,
    OperationTimeoutError,
    ProtocolError,
    UsageError,
)

__all__ = ("promote",)

_START_S = 300.0
_LONGEST_PAUSE_S = 10.0


async def promote(
    plane: Plane, job_id: str, checkpoint_id: str, output_model_id: str, *, base_model: str, timeout: float
) -> ModelInfo:
    """Promote a checkpoint and wait for the model; see `AsyncFireworksClient.promote_checkpoint`."""
    problems = output_model_problems(output_model_id)
    if problems:
        raise UsageError(" ".join(problems))
    check_id("checkpoint_id", checkpoint_id)
    owner = f"accounts/{await plane.account()}"
    request = PromoteRequest(
        output_model=f"{owner}/models/{output_model_id}",
        trainer_job_id=f"{owner}/rlorTrainerJobs/{check_id('job_id', job_id)}",
        base_model=base_model,
        async_promotion=True,
    )
    what = f"promoting checkpoint {checkpoint_id} of trainer job {job_id}"
    path, attempts = f"v1/{owner}/checkpoints/{checkpoint_id}:promote", list[int | None]()

    async def start() -> bytes:
        return await plane.call(
            what, "POST", path, body=request, timeout=_START_S, on_failure=lambda status, _: attempts.append(status)
        )

    try:
        try:
            body = await start()
        except BadRequestError as error:
            if "async_promotion" not in str(error):
                raise
            # An older service, which promotes before it answers.
            request.async_promotion = None
            body = await start()
    except ConflictError as error:
        if attempts:
            error.add_note(
                f"an earlier attempt of this call got no answer and may have made {request.output_model}: "
                "`get_model` tells whether it is there"
            )
        raise
    answer = read(what, body, Promotion)
    if answer.model is not None:
        return ModelInfo.read(answer.model)
    if answer.operation is None:
        raise ProtocolError(f"{what}: the answer holds neither a model nor an operation; check the service's version")
    return ModelInfo.read(await _finished(plane, what, answer.operation, timeout))


async def _finished(plane: Plane, what: str, operation: LongOperation, timeout: float) -> Model:
    polls = 0
    with anyio.move_on_after(timeout):
        while not operation.done:
            polls += 1
            await anyio.sleep(poll_delay(polls, cap_s=_LONGEST_PAUSE_S, jitter=random.random()))
            operation = await plane.get(what, f"v1/{path_of(operation.name)}", LongOperation)
        if operation.error is not None:
            raise OperationFailedError(
                f"{what} failed: {operation.error.message or operation.error.code}", request_id=operation.name
            )
        if isinstance(operation.response, msgspec.UnsetType):
            raise ProtocolError(f"{what}: the operation is done and names no model", request_id=operation.name)
        return read(what, bytes(operation.response), Model)
    raise OperationTimeoutError(
        f"{what} is not done after {timeout:g} s. It goes on at the service, as {operation.name}; the model appears "
        "when it is done.",
        request_id=operation.name,
    )
