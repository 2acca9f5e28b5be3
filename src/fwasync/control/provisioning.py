"""`provision`: policy trainer, reference trainer and deployment, brought up together and removed together.

Invariants
    * All come up at the same time; the deployment is created as soon as the trainer exists whose snapshots it takes.
    * The first failure cancels the others. In the end nothing is left that was created here, and all else is in place.
    * What else went wrong on the way down is told by notes on the error that the block is left by.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import anyio

from fwasync._background import Background
from fwasync.config import DeployConfig, InfraConfig
from fwasync.config.launch import OnProgress, Progress, new_job_id
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.resources import DeploymentInfo, TrainerServiceEndpoint
from fwasync.control.trainer_jobs import AsyncTrainerJobManager

__all__ = ("Provisioned", "provision")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What is up.

    Attributes:
        policy: The trainer.
        reference: The forward-only trainer, if a shape for it was configured.
        deployment: The deployment that takes the policy's snapshots, if one was configured.
    """

    policy: TrainerServiceEndpoint
    reference: TrainerServiceEndpoint | None
    deployment: DeploymentInfo | None


@asynccontextmanager
async def provision(
    jobs: AsyncTrainerJobManager,
    deployments: AsyncDeploymentManager,
    *,
    infra: InfraConfig,
    base_model: str,
    lora_rank: int = 0,
    deploy: DeployConfig | None = None,
    job_id: str | None = None,
    reference_job_id: str | None = None,
    on_progress: OnProgress | None = None,
) -> AsyncGenerator[Provisioned]:
    """Everything that a run needs, inside of the block.

    ```python
    async with provision(jobs, deployments, infra=infra, deploy=deploy, base_model=model) as up:
        ...
    ```

    What exists already is used and left in place afterwards: trainer jobs under the ids that are given, resumed if need
    be, and a deployment under `deploy.deployment_id`, which is attached to this run's trainer. A new deployment that
    names no hardware gets the shape that goes with the policy's.

    Args:
        jobs: Manager of the trainer jobs.
        deployments: Manager of the deployments.
        infra: The trainers; a reference is brought up if it names a shape for one.
        base_model: Full name of the model.
        lora_rank: Rank of the policy's adapter; 0 trains all parameters.
        deploy: The deployment, if there is to be one.
        job_id: The policy's trainer job. Unset: a new one.
        reference_job_id: The reference's, if there is to be one.
        on_progress: Called each time that one of them was looked at.

    Raises:
        ProvisioningError, ServiceError, TransportError, UsageError: On entering: the first that failed. On leaving:
            something could not be removed.

    **Cancellation:** what was created is removed before the cancellation goes on, within about a minute.
    """
    job_id = job_id or new_job_id()
    job_name = await jobs.name_of(job_id)
    if deploy is not None:
        deploy = await _with_shape(deploy, jobs, infra)
    exists = anyio.Event()
    run = _Run()
    policy: list[TrainerServiceEndpoint] = []
    reference: list[TrainerServiceEndpoint] = []
    deployment: list[DeploymentInfo] = []

    def seen(progress: Progress) -> None:
        exists.set()  # it can be looked at
        if on_progress is not None:
            on_progress(progress)

    async def bring_up_policy() -> None:
        launch = infra.launch(jobs, base_model=base_model, lora_rank=lora_rank, job_id=job_id, on_progress=seen)
        await run.hold(launch, policy.append)

    async def bring_up_reference() -> None:
        launch = infra.launch(
            jobs, base_model=base_model, reference=True, job_id=reference_job_id, on_progress=on_progress
        )
        await run.hold(launch, reference.append)

    async def bring_up_deployment(config: DeployConfig) -> None:
        await exists.wait()
        launch = config.launch(
            deployments, base_model=base_model, infra=infra, hot_load_trainer_job=job_name, on_progress=on_progress
        )
        await run.hold(_attached(launch, deployments, job_name, config, on_progress), deployment.append)

    members: list[Callable[[], Awaitable[None]]] = [bring_up_policy]
    if infra.ref_training_shape_id is not None:
        members.append(bring_up_reference)
    if deploy is not None:
        members.append(lambda: bring_up_deployment(deploy))
    async with run.together(members):
        yield Provisioned(policy[0], next(iter(reference), None), next(iter(deployment), None))


async def _with_shape(deploy: DeployConfig, jobs: AsyncTrainerJobManager, infra: InfraConfig) -> DeployConfig:
    """The deployment's configuration, with a shape if its own or its hardware is not named."""
    if infra.training_shape_id is None or deploy.deployment_shape or deploy.deployment_accelerator_type:
        return deploy
    shape = (await jobs.client.resolve_training_profile(infra.training_shape_id)).deployment_shape
    return deploy.model_copy(update={"deployment_shape": shape}) if shape else deploy


@asynccontextmanager
async def _attached(
    launch: AbstractAsyncContextManager[DeploymentInfo],
    deployments: AsyncDeploymentManager,
    job_name: str,
    config: DeployConfig,
    on_progress: OnProgress | None,
) -> AsyncGenerator[DeploymentInfo]:
    """A deployment that takes the snapshots of this trainer: one of before took those of another."""
    async with launch as info:
        if info.hot_load_trainer_job != job_name:
            await deployments.update(info.deployment_id, hot_load_trainer_job=job_name)
            info = await deployments.wait_for_ready(
                info.deployment_id, timeout_s=config.deployment_timeout_s, on_progress=on_progress
            )
        yield info


class _Run:
    """Several launches, each in a task of its own."""

    def __init__(self) -> None:
        self._release = anyio.Event()
        self._settled = anyio.Event()
        self._ended = anyio.Event()
        self._rising = self._running = 0
        self._failures: list[Exception] = []
        self._notes: list[str] = []

    async def hold(self, launch: AbstractAsyncContextManager[T], put: Callable[[T], None]) -> None:
        """Bring one up, hand it over, and keep it until all are released."""
        async with launch as value:
            put(value)
            self._rising -= 1
            if not self._rising:
                self._settled.set()
            await self._release.wait()

    @asynccontextmanager
    async def together(self, members: list[Callable[[], Awaitable[None]]]) -> AsyncGenerator[None]:
        """Inside, all are up; after it, all have ended."""
        self._rising = self._running = len(members)
        background = Background()
        await background.open()
        try:
            for member in members:
                background.start(self._guarded, member)
            await self._settled.wait()
            self._raise_failure()
            yield
            self._release.set()
            await self._ended.wait()
            self._raise_failure()
        except BaseException as error:
            await background.aclose()
            for told in [str(failure) for failure in self._failures if failure is not error] + self._notes:
                error.add_note(told)
            raise
        await background.aclose()

    async def _guarded(self, member: Callable[[], Awaitable[None]]) -> None:
        try:
            await member()
        except Exception as error:
            self._failures.append(error)
        except BaseException as error:  # a cancellation, with what it could not remove
            self._notes += getattr(error, "__notes__", ())
            raise
        self._running -= 1
        if not self._running:
            self._ended.set()
        if self._failures:
            self._settled.set()

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures[0]
