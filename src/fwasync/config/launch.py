"""Open a trainer or a deployment for the time of a block: what a launch creates, it removes, and nothing else.

Invariants
    * A creation that was begun is finished even if it is cancelled, for a bounded time: else a request on its way could
      create the resource after it was removed.
    * Removal is armed before the creation is sent, and disarmed only by the answer that it existed before.
    * Removal is shielded from cancellation and bounded. What could not be removed is told: as an error of its own if
      nothing else went wrong, else as a note on what did; and logged. Only who may not even create is not told that he
      may not remove.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import anyio

from fwasync.config.resources import DeploymentConfig, TrainerJobConfig
from fwasync.errors import (
    AuthenticationError,
    PermissionDeniedError,
    ProvisioningError,
    ProvisioningTimeoutError,
    UsageError,
)

__all__ = (
    "Created",
    "Deployments",
    "OnProgress",
    "Progress",
    "TrainerJobs",
    "launch_deployment",
    "launch_trainer",
    "new_job_id",
    "removed_after",
)

logger = logging.getLogger("fwasync.config")

CREATE_GRACE_S = 20.0
REMOVE_WITHIN_S = 40.0

_NOT_ALLOWED = (AuthenticationError, PermissionDeniedError, UsageError)


@dataclass(frozen=True, slots=True)
class Progress:
    """One look at a resource that is waited for.

    Attributes:
        resource: Its full name.
        state: Its state, in the service's words.
        message: What it says of itself, or what is waited for.
        elapsed_s: Seconds since the wait began.
    """

    resource: str
    state: str
    message: str
    elapsed_s: float


OnProgress = Callable[[Progress], None]
"""Called each time that a resource was looked at."""

E = TypeVar("E", covariant=True)
T = TypeVar("T")


class Created(Protocol):
    """What a manager says of a resource that it was asked to create."""

    @property
    def created(self) -> bool:
        """False if it existed before."""
        ...


class TrainerJobs(Protocol[E]):
    """What `launch` needs of a manager of trainer jobs."""

    async def exists(self, job_id: str) -> bool:
        """Whether there is such a job, not deleted."""
        ...

    async def create(self, config: TrainerJobConfig) -> Created:
        """Create a job; one that has the id already is not an error."""
        ...

    async def wait_for_ready(self, job_id: str, *, timeout_s: float, on_progress: OnProgress | None = None) -> E:
        """Wait for a new job."""
        ...

    async def reconnect_and_wait(self, job_id: str, *, timeout_s: float, on_progress: OnProgress | None = None) -> E:
        """Wait for a job that existed before; resume it if need be."""
        ...

    async def delete(self, job_id: str) -> None:
        """Delete it; one that is gone is not an error."""
        ...


class Deployments(Protocol[E]):
    """What `launch` needs of a manager of deployments."""

    async def base_model_of(self, deployment_id: str) -> str | None:
        """The base model of an existing deployment; `None` if there is no such deployment."""
        ...

    async def create(self, config: DeploymentConfig) -> Created:
        """Create a deployment; one that has the id already is not an error."""
        ...

    async def wait_for_ready(self, deployment_id: str, *, timeout_s: float, on_progress: OnProgress | None = None) -> E:
        """Wait until it serves."""
        ...

    async def delete(self, deployment_id: str) -> None:
        """Delete it; one that is gone is not an error."""
        ...


def new_job_id() -> str:
    """An id for a trainer job that no other has."""
    return f"fwasync-{uuid.uuid4().hex[:20]}"


@asynccontextmanager
async def launch_trainer(
    jobs: TrainerJobs[T], config: TrainerJobConfig, *, timeout: float, on_progress: OnProgress | None = None
) -> AsyncGenerator[T]:
    """A trainer for the time of the block; see `InfraConfig.launch`."""
    job_id = config.requested_job_id
    if job_id is not None and await jobs.exists(job_id):
        yield await jobs.reconnect_and_wait(job_id, timeout_s=timeout, on_progress=on_progress)
        return
    job_id = job_id or new_job_id()
    named = config.model_copy(update={"requested_job_id": job_id})
    async with removed_after(lambda: jobs.create(named), lambda: jobs.delete(job_id), what=f"trainer job {job_id}"):
        yield await jobs.wait_for_ready(job_id, timeout_s=timeout, on_progress=on_progress)


@asynccontextmanager
async def launch_deployment(
    deployments: Deployments[T], config: DeploymentConfig, *, timeout: float, on_progress: OnProgress | None = None
) -> AsyncGenerator[T]:
    """A deployment for the time of the block; see `DeployConfig.launch`."""
    deployment_id = config.deployment_id
    existing = await deployments.base_model_of(deployment_id)
    if existing is not None:
        if existing not in ("", config.base_model):
            raise UsageError(
                f"deployment {deployment_id} exists and serves {existing}, not {config.base_model}; "
                "choose another deployment_id, or delete it first"
            )
        yield await deployments.wait_for_ready(deployment_id, timeout_s=timeout, on_progress=on_progress)
        return
    async with removed_after(
        lambda: deployments.create(config),
        lambda: deployments.delete(deployment_id),
        what=f"deployment {deployment_id}",
    ):
        yield await deployments.wait_for_ready(deployment_id, timeout_s=timeout, on_progress=on_progress)


@asynccontextmanager
async def removed_after(
    create: Callable[[], Awaitable[Created]], remove: Callable[[], Awaitable[None]], *, what: str
) -> AsyncGenerator[None]:
    """Create something, and remove it when the block is left, however, if it was not there before.

    Args:
        create: Creates it.
        remove: Removes it; that it is not there is not an error.
        what: Its name, for errors.

    **Cancellation:** while it is created: the request is given a grace of 20 s to be answered. Then it is removed, for
    which there are 40 s.
    """
    ours = True
    expected: tuple[type[Exception], ...] = ()

    async def creating() -> None:
        nonlocal ours, expected
        try:
            ours = (await create()).created
        except _NOT_ALLOWED as error:
            expected = (type(error),)
            raise

    try:
        await _carry_through(creating, grace_s=CREATE_GRACE_S)
        yield
    except BaseException as error:
        if ours and (failure := await _remove(remove, what, expected)):
            error.add_note(str(failure))
        raise
    if ours and (failure := await _remove(remove, what)):
        raise failure


async def _carry_through(call: Callable[[], Awaitable[None]], *, grace_s: float) -> None:
    """Await a call which, once begun, is not cancelled with its caller, but given a grace to finish."""
    shield = anyio.CancelScope(shield=True)
    finished = anyio.Event()
    failures: list[Exception] = []

    async def run() -> None:
        with shield:
            try:
                await call()
            except Exception as error:
                failures.append(error)
        finished.set()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        try:
            await finished.wait()
        finally:
            shield.deadline = anyio.current_time() + grace_s
    for failure in failures:
        raise failure


async def _remove(
    remove: Callable[[], Awaitable[None]], what: str, expected: tuple[type[Exception], ...] = ()
) -> ProvisioningError | None:
    """Remove it within its time, whoever is cancelled; what went wrong, if something did that was not expected."""
    failure: ProvisioningError | None = None

    async def removing() -> None:
        nonlocal failure
        reason = f"no answer within {REMOVE_WITHIN_S:g} s"
        kind = ProvisioningTimeoutError
        try:
            with anyio.move_on_after(REMOVE_WITHIN_S):
                await remove()
                return
        except expected:
            return
        except Exception as error:
            reason, kind = str(error), ProvisioningError
        failure = kind(f"{what} was not removed: {reason}. It may still cost money: delete it by hand.", resource=what)
        logger.error("%s", failure)

    with anyio.CancelScope(shield=True):
        await _carry_through(removing, grace_s=REMOVE_WITHIN_S)
    return failure
