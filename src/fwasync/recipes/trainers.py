"""Where a recipe trains: `Where` says it, `Where.open` brings up what is needed, `Trainers` is what is up.

There are two ways, told apart by the configuration alone:

* `infra.training_shape_id` is set: the **control plane** is asked for a trainer job (a second one for the reference, if
  there is a shape for it, and a deployment, if one is configured). They are there inside of the block and removed after
  it. Checkpoints have paths that any trainer job of the account can load, and snapshots can be promoted.
* else a **service that runs** already and speaks the Tinker training API is used as it is.

Every recipe opens its trainers by this:

```python
async with where.open(config, start=resume.path if resume else None, reference=True) as trainers:
    trainers.policy.forward_backward(...)
    trainers.reference.forward(...)
```

**The reference** is a trainer of its own where `infra.ref_training_shape_id` is set, and else the frozen base model on
the policy's service, in the policy's session (`create_base_training_client`), or, where a service has no such thing,
an adapter that nothing trains; a recipe does not see the difference. One that needs it for a part of the run only asks
for `early_release`, and opens it with `trainers.open_reference()`: its trainer job comes up with the policy's, and is
removed as soon as that block is left.

**Samplers.** A recipe that samples passes its `DeployConfig` as `deploy`. On the control plane `trainers.deployment` is
then the deployment that takes the policy's snapshots, of the shape that goes with the training shape if none is set; an
`AsyncDeploymentSampler` samples from it, and an `AsyncWeightSyncer` on `trainers.policy` and `trainers.hot_loads`
brings it new weights. On a service that runs there is none: `trainers.service.create_sampling_client(model_path=...)`
samples from a snapshot's path. `serving` hides that difference from a recipe: sample these prompts, publish these
weights.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from fwasync import (
    AsyncDeploymentManager,
    AsyncFireworksClient,
    AsyncHotLoadManager,
    AsyncServiceClient,
    AsyncTrainerJobManager,
    AsyncTrainingClient,
    DeployConfig,
    provision,
)
from fwasync._http.credentials import find_key
from fwasync._wire.paths import split_cross_job
from fwasync.checkpoints.promotion import Promoter
from fwasync.config.launch import Progress
from fwasync.control.resources import DeploymentInfo, TrainerServiceEndpoint
from fwasync.errors import BadRequestError, FwasyncError, NotFoundError, UsageError
from fwasync.recipes.claims import claimed
from fwasync.recipes.config import RecipeConfig

__all__ = ("Trainers", "Where")

Tell = Callable[[str], None]
OpenReference = Callable[[], AbstractAsyncContextManager[AsyncTrainingClient]]


@dataclass(frozen=True, slots=True)
class Trainers:
    """What is up.

    Attributes:
        service: The policy's service.
        policy: The model that is trained.
        reference: The frozen reference, if one was asked for that lasts as long as the policy.
        deployment: The deployment that takes the policy's snapshots, if one was asked for on the control plane.
        job_id: The policy's trainer job; `None` on a service that runs.
        promoter: Makes models of snapshots, where there is a control plane.
        max_context_length: Of the policy in tokens, if the control plane says so.
        hot_loads: Loads snapshots into the deployment, where there is a control plane.
        passing_reference: Opens the reference, if one was asked for.
        inference_url: Where deployments are asked for completions, where there is a control plane.
        api_key: Its key; never shown.
        pipeline_parallelism: Stages of the policy's pipeline, where a deployment was asked for. With more than one, the
            service's own policy losses are not to be had.
    """

    service: AsyncServiceClient
    policy: AsyncTrainingClient
    reference: AsyncTrainingClient | None = None
    deployment: DeploymentInfo | None = None
    job_id: str | None = None
    promoter: Promoter | None = None
    max_context_length: int | None = None
    hot_loads: AsyncHotLoadManager | None = None
    passing_reference: OpenReference | None = field(default=None, repr=False)
    inference_url: str = ""
    api_key: str = field(default="", repr=False)
    pipeline_parallelism: int = 1

    def unfinished(self) -> list[str]:
        """What has been asked of them and has no result yet, a line for each operation."""
        clients = {"policy": self.policy, "reference": self.reference}
        return [
            f"the {role} has no result of {operation}"
            for role, client in clients.items()
            if client is not None
            for operation in client.statistics().unfinished
        ]

    def open_reference(self) -> AbstractAsyncContextManager[AsyncTrainingClient]:
        """The frozen reference for the time of a block; opened once. A trainer job of its own is removed behind it.

        That it cannot be removed then is told and not raised: it is tried again when all trainers are left.

        Raises:
            UsageError: None was asked for.
        """
        if self.reference is not None:
            return nullcontext(self.reference)
        if self.passing_reference is None:
            raise UsageError("there is no reference: ask for one when the trainers are opened")
        return self.passing_reference()

    async def max_seq_len(self, config: RecipeConfig) -> int:
        """The longest row that is trained on, in tokens: as configured, and never more than the service tells.

        Raises:
            UsageError: Nobody tells.

        **Cancellation:** nothing remains.
        """
        name, told = self.policy.base_model or config.base_model, self.max_context_length
        try:
            if told is None:
                models = (await self.service.get_server_capabilities()).supported_models
                told = {model.model_name: model.max_context_length for model in models}.get(name)
        except FwasyncError:
            if config.max_seq_len is None:
                raise
        limit = config.longest(told)
        if limit is None:
            raise UsageError(f"the service does not tell the context length of {name}; set max_seq_len")
        return limit

    async def tokenizer_name(self, config: RecipeConfig) -> str:
        """The policy's tokenizer: as configured, else as the service names it, else the base model's name.

        **Cancellation:** nothing remains.
        """
        if config.tokenizer_model:
            return config.tokenizer_model
        return (await self.policy.get_info()).model_data.tokenizer_id or config.base_model


@dataclass(frozen=True, slots=True)
class Where:
    """Where to train. Nothing given is the environment's service.

    Attributes:
        base_url: The control plane, if the configuration names a training shape; else the trainer service. Unset: the
            environment's, as for `AsyncFireworksClient` and `AsyncServiceClient`.
        api_key: Its key. Unset: the environment's.
        service: Or: an open client of a trainer service, which stays open.
        trainers: Or: what is up already, to go on with as it is; then nothing is resumed.
    """

    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    service: AsyncServiceClient | None = None
    trainers: Trainers | None = None

    @asynccontextmanager
    async def open(
        self,
        config: RecipeConfig,
        *,
        start: str | None = None,
        reference: bool = False,
        early_release: bool = False,
        deploy: DeployConfig | None = None,
        tell: Tell | None = None,
    ) -> AsyncGenerator[Trainers]:
        """Bring up what a recipe needs, for the time of the block.

        Args:
            config: The recipe's configuration.
            start: A checkpoint from which weights and optimizer of the policy begin.
            reference: Whether a frozen reference is needed.
            early_release: It is needed for a part of the run: `open_reference` opens it.
            deploy: The deployment that samples, where there is a control plane.
            tell: Told what is waited for.

        Raises:
            UsageError: URL or key are missing, or the reference has no place.
            ProvisioningError: A trainer or deployment did not come up; on leaving: could not be removed.
            OperationFailedError, BadRequestError: The service does not have the model or the checkpoint.
            ServiceError, TransportError: As for any request.

        **Cancellation:** what was created is removed before the cancellation goes on, within about a minute.
        """
        if self.trainers is not None:
            yield self.trainers
            return
        async with AsyncExitStack() as stack:
            if config.infra.training_shape_id is not None:
                trainers = await self._launched(stack, config, start, reference, deploy, tell)
            else:
                trainers = await self._connected(stack, config, start, reference)
            if reference and not early_release:
                frozen = await stack.enter_async_context(trainers.open_reference())
                trainers = replace(trainers, reference=frozen)
            yield trainers

    async def _connected(
        self, stack: AsyncExitStack, config: RecipeConfig, start: str | None, reference: bool
    ) -> Trainers:
        service = self.service
        if service is None:
            service = await stack.enter_async_context(AsyncServiceClient(self.base_url, self.api_key))
        policy = await stack.enter_async_context(_policy(service, config, start))
        frozen = partial(_base_model, service, config) if reference else None
        return Trainers(service, policy, passing_reference=frozen)

    async def _launched(
        self,
        stack: AsyncExitStack,
        config: RecipeConfig,
        start: str | None,
        reference: bool,
        deploy: DeployConfig | None,
        tell: Tell | None,
    ) -> Trainers:
        if self.service is not None:
            raise UsageError("infra names a training shape, which asks the control plane for a trainer: give base_url")
        infra = config.infra
        if reference and infra.ref_training_shape_id is None and config.lora_rank == 0:
            raise UsageError(
                "the reference needs a trainer of its own where all parameters are trained: set "
                "infra.ref_training_shape_id"
            )
        if not reference:
            infra = infra.model_copy(update={"ref_training_shape_id": None})
        fireworks = await stack.enter_async_context(AsyncFireworksClient(self.base_url, self.api_key))
        jobs, deployments = AsyncTrainerJobManager(fireworks), AsyncDeploymentManager(fireworks)
        stages = 1
        if deploy is not None and infra.training_shape_id is not None:
            stages = (await fireworks.resolve_training_profile(infra.training_shape_id)).pipeline_parallelism
        own = await stack.enter_async_context(claimed(config, infra, deploy, jobs, deployments, tell))
        if start is not None and tell is not None:
            await _tell_of_the_last_job(jobs, start, tell, own.taken)
        if deploy is not None and own.deployment is not None:
            deploy = deploy.model_copy(update={"deployment_id": own.deployment})
        job_id, reference_job_id = config.jobs
        up = await stack.enter_async_context(
            provision(
                jobs,
                deployments,
                infra=infra,
                base_model=config.base_model,
                lora_rank=config.lora_rank,
                deploy=deploy,
                job_id=job_id or own.policy,
                reference_job_id=reference_job_id or own.reference,
                on_progress=None if tell is None else _Changes(tell),
            )
        )
        service = await stack.enter_async_context(AsyncServiceClient(up.policy.base_url, self.api_key))
        policy = await stack.enter_async_context(_policy(service, config, start))
        frozen = None
        if up.reference is not None:
            frozen = partial(
                _reference_job,
                None if reference_job_id else jobs,
                up.reference,
                self.api_key,
                config.base_model,
                tell,
            )
        elif reference:
            frozen = partial(service.create_base_training_client, config.base_model)
        return Trainers(
            service,
            policy,
            deployment=up.deployment,
            job_id=up.policy.job_id,
            promoter=fireworks,
            max_context_length=up.policy.max_context_length,
            hot_loads=AsyncHotLoadManager(fireworks),
            passing_reference=frozen,
            inference_url=fireworks.base_url,
            api_key=find_key(fireworks.base_url, self.api_key, os.environ),
            pipeline_parallelism=stages,
        )


def _policy(service: AsyncServiceClient, config: RecipeConfig, start: str | None) -> AsyncTrainingClient:
    if start is None:
        return service.create_training_client(config.base_model, config.lora_rank, seed=config.seed)
    options = {} if config.checkpoint_timeout_s is None else {"timeout": config.checkpoint_timeout_s}
    return service.create_training_client_from_state_with_optimizer(
        start, base_model=config.base_model, lora_rank=config.lora_rank, **options
    )


@asynccontextmanager
async def _base_model(service: AsyncServiceClient, config: RecipeConfig) -> AsyncGenerator[AsyncTrainingClient]:
    """The frozen base model. A service that has adapters only gives one that nothing trains: it begins at zero."""
    async with AsyncExitStack() as stack:
        frozen = service.create_base_training_client(config.base_model)
        try:
            reference = await stack.enter_async_context(frozen)
        except BadRequestError:
            if config.lora_rank == 0:
                raise
            adapter = service.create_training_client(config.base_model, config.lora_rank)
            reference = await stack.enter_async_context(adapter)
        yield reference


@asynccontextmanager
async def _reference_job(
    jobs: AsyncTrainerJobManager | None,
    job: TrainerServiceEndpoint,
    api_key: str | None,
    base_model: str,
    tell: Tell | None,
) -> AsyncGenerator[AsyncTrainingClient]:
    """The reference on a trainer job of its own, which is deleted by `jobs`, if given, as soon as it is not needed."""
    async with (
        AsyncServiceClient(job.base_url, api_key) as service,
        service.create_training_client(base_model, lora_rank=0) as frozen,
    ):
        yield frozen
    if jobs is None:
        return
    try:
        await jobs.delete(job.job_id)
    except FwasyncError as error:
        if tell is not None:
            tell(f"reference trainer job {job.job_id} is not deleted yet, which is tried again at the end: {error}")


async def _tell_of_the_last_job(jobs: AsyncTrainerJobManager, start: str, tell: Tell, known: Collection[str]) -> None:
    """A process that was killed has left its trainer job running, which costs money; those that are known excepted."""
    job_id, _ = split_cross_job(start) or ("", "")
    if not job_id or job_id in known:
        return
    try:
        state = (await jobs.get(job_id)).state
    except NotFoundError:
        return
    if state == "RUNNING":
        tell(f"trainer job {job_id}, which saved {start}, is still running: delete it, unless another run uses it")


class _Changes:
    """Tells of a resource that is waited for when its state changes."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._last: dict[str, str] = {}

    def __call__(self, progress: Progress) -> None:
        if self._last.get(progress.resource) != progress.state:
            self._last[progress.resource] = progress.state
            self._tell(f"{progress.resource}: {progress.state} {progress.message}".rstrip())
