"""The policy as it is sampled: sample these prompts, publish these weights.

Samples come from elsewhere than gradients, and where from depends on the two ways of `trainers`:

* with a **deployment**, every version is hot-loaded into it, and it is asked for completions;
* on a **service that runs**, every version is a snapshot with a sampling client of its own.

A recipe does not see the difference:

```python
async with serve_policy(trainers, tokenizer=tokenizer) as served:
    await served.publish(0)
    group = await served.sample_with_prompt_tokens(prompt, n=8, max_tokens=256, seed=7)
    ...  # an optimizer step
    await served.publish(1)
```

`ServedPolicy` is asked like an `AsyncDeploymentSampler`, so it can be handed to whatever samples from one, once: new
versions are published beneath it.

Invariants
    * The return of `publish` is the commit. Until then, and if it fails or is cancelled, `version` is what is served
      still, or `None` if that is not known any more; then nothing is sampled until a version is published.
    * Where each snapshot has a client, that of an old one stays open until its last request has ended.
    * Requests of all versions share one concurrency controller.
"""

from __future__ import annotations

import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from fwasync import (
    AsyncDeploymentSampler,
    AsyncWeightSyncer,
    ConcurrencyConfig,
    DeployConfig,
    SampledCompletion,
    WeightSyncConfig,
    concurrency_controller,
)
from fwasync.data.chat import ChatTokenizer
from fwasync.errors import UsageError, WeightSyncError
from fwasync.recipes.trainers import Trainers
from fwasync.rollout.samplers import Samplers
from fwasync.sampling.aimd import Observation
from fwasync.sampling.concurrency import ConcurrencyController

if TYPE_CHECKING:
    from fwasync.types import SampledSequence

__all__ = ("ServedPolicy", "serve_policy")

logger = logging.getLogger(__name__)

_OK = 200
_LOOK_S = 1.0


class ServedPolicy(ABC):
    """The policy under training, as it is sampled. Made by `serve_policy`.

    Attributes:
        concurrency: What all requests share.
    """

    def __init__(self, concurrency: ConcurrencyController, version: int | None = None) -> None:
        self.concurrency = concurrency
        self._version = version
        self._publishing = anyio.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} version {self._version}: {self.concurrency!r}>"

    @property
    def version(self) -> int | None:
        """The version that was published last; `None` if what is served is not known.

        0 is also what a deployment serves that has its base model's weights.
        """
        return self._version

    async def sample_with_prompt_tokens(
        self,
        prompt_token_ids: Sequence[int],
        n: int = 1,
        *,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: str | Sequence[str] | Sequence[int] | None = None,
        seed: int | None = None,
        logprobs: bool = True,
    ) -> list[SampledCompletion]:
        """Sample a group of completions of a prompt, with their logprobs.

        Args:
            prompt_token_ids: The prompt.
            n: How many completions.
            max_tokens: The most tokens of each.
            temperature: Of the sampling. Logprobs are those of the model itself, at temperature 1.
            top_p: Keep the likeliest tokens up to this mass.
            top_k: Keep so many of the likeliest tokens; 0 keeps all.
            stop: What ends a completion; unset, what the model itself ends with.
            seed: For the same completions each time, of the same weights.
            logprobs: They are told in any case; only so that samplers of either kind are asked alike.

        Raises:
            UsageError: What is served is not known.
            ServiceError, TransportError, OperationError: What the sampler raises.

        **Cancellation:** the requests of the whole group end.
        """
        del logprobs
        if self._version is None:
            raise UsageError("it is not known which weights are served: publish a version first")
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        return await self._sample(list(prompt_token_ids), n, {**options, "stop": stop, "seed": seed})

    async def publish(self, version: int) -> str:
        """Serve the policy's weights of now: as they are behind everything that was submitted to its client.

        Deployments get the difference to the version before, so snapshots that are saved by other means come behind the
        last version, or a hot-load is refused.

        Args:
            version: What they are called from now on, such as the optimizer steps that made them.

        Returns:
            The snapshot's path or full name.

        Raises:
            WeightSyncError: The deployment did not load them, twice: once what has changed, and once all weights.
            FwasyncError: What saving the snapshot raises.

        **Cancellation:** `version` tells what is served: what was before, or `None`. A snapshot may have been saved.
        """
        async with self._publishing:
            return await self._publish(version)

    @abstractmethod
    async def _sample(self, prompt: list[int], n: int, options: dict[str, Any]) -> list[SampledCompletion]: ...

    @abstractmethod
    async def _publish(self, version: int) -> str: ...


@asynccontextmanager
async def serve_policy(
    trainers: Trainers,
    *,
    tokenizer: ChatTokenizer | None = None,
    deploy: DeployConfig | None = None,
    weight_sync: WeightSyncConfig | None = None,
    concurrency: ConcurrencyConfig | None = None,
) -> AsyncGenerator[ServedPolicy]:
    """Serve the policy of trainers that are up, for the time of the block.

    Nothing is published by this. On a service that runs, nothing can be sampled before; a deployment may have its base
    model's weights, which are version 0.

    Args:
        trainers: What is up; with its deployment, if it has one.
        tokenizer: The model's: services have to be told what ends an answer, and deployments take stops as texts.
        deploy: The deployment's configuration: how long one completion may take, how many replicas there are.
        weight_sync: How weights travel.
        concurrency: How many requests run at a time.

    Raises:
        HotLoadTimeoutError: The deployment has no replicas that answer.

    **Cancellation:** every request ends, and every client is closed. A hot-load may go on at the deployment.
    """
    deploy, weight_sync = deploy or DeployConfig(), weight_sync or WeightSyncConfig()
    controller = concurrency_controller(concurrency or ConcurrencyConfig(), replicas=deploy.replica_count or 1)
    async with AsyncExitStack() as stack:
        if trainers.deployment is None:
            snapshots = _Snapshots(trainers, controller, [] if tokenizer is None else tokenizer.stop_tokens)
            await snapshots.open()
            stack.push_async_callback(snapshots.aclose)
            yield snapshots
            return
        hot_loads, base_model = trainers.hot_loads, trainers.deployment.base_model
        assert hot_loads is not None, "who has a deployment has a control plane"
        syncer = AsyncWeightSyncer(
            trainers.policy,
            hot_loads,
            trainers.deployment.deployment_id,
            base_model=base_model,
            hotload_timeout=weight_sync.weight_sync_timeout,
            first_checkpoint_type=weight_sync.first_checkpoint_type,
            lora_rank=trainers.policy.lora_rank or 0,
        )
        replicas = await syncer.wait_for_hotload_ready(deploy.deployment_timeout_s, _LOOK_S)
        untouched = all(replica.snapshot is None for replica in replicas)
        sampler = await stack.enter_async_context(
            AsyncDeploymentSampler(
                trainers.inference_url, trainers.deployment.inference_model, trainers.api_key, concurrency=controller
            )
        )
        version = 0 if untouched else None
        yield _Deployed(sampler, syncer, version, tokenizer=tokenizer, timeout=deploy.sample_timeout)


# -- a deployment ------------------------------------------------------------------------------------


class _Deployed(ServedPolicy):
    """A deployment, into which versions are hot-loaded."""

    def __init__(
        self,
        sampler: AsyncDeploymentSampler,
        syncer: AsyncWeightSyncer,
        version: int | None,
        *,
        tokenizer: ChatTokenizer | None,
        timeout: float,
    ) -> None:
        super().__init__(sampler.concurrency, version)
        self._sampler = sampler
        self._syncer = syncer
        self._tokenizer = tokenizer
        self._timeout = timeout

    async def _sample(self, prompt: list[int], n: int, options: dict[str, Any]) -> list[SampledCompletion]:
        options["stop"] = self._texts(options["stop"])
        return await self._sampler.sample_with_prompt_tokens(
            prompt, n, logprobs=True, http_timeout=self._timeout, **options
        )

    def _texts(self, stop: str | Sequence[str] | Sequence[int] | None) -> str | list[str | int] | None:
        """Stops as texts, without those that end an answer in any case."""
        if stop is None or isinstance(stop, str) or self._tokenizer is None:
            return stop if stop is None or isinstance(stop, str) else list(stop)
        own, decode = self._tokenizer.stop_tokens, self._tokenizer.decode_all
        return [each if isinstance(each, str) else decode([each]) for each in stop if each not in own] or None

    async def _publish(self, version: int) -> str:
        try:
            try:
                snapshot = await self._syncer.save_and_hotload(f"sampler-{version}")
            except WeightSyncError as error:
                logger.warning("version %d is sent once more, with all weights: %s", version, error)
                snapshot = await self._syncer.save_and_hotload(f"sampler-{version}")
        except BaseException:
            if self._syncer.base_identity is None:  # a load may have begun
                self._version = None
            raise
        self._version = version
        return snapshot


# -- a service that runs -----------------------------------------------------------------------------


class _Snapshots(ServedPolicy):
    """A sampling client for each version."""

    def __init__(self, trainers: Trainers, concurrency: ConcurrencyController, stop_tokens: list[int]) -> None:
        super().__init__(concurrency)
        self._trainers = trainers
        self._stop_tokens = stop_tokens
        self._samplers = Samplers()

    async def open(self) -> None:
        await self._samplers.open()

    async def aclose(self) -> None:
        self._version = None
        await self._samplers.aclose()

    async def _sample(self, prompt: list[int], n: int, options: dict[str, Any]) -> list[SampledCompletion]:
        from fwasync.types import ModelInput, SampleResponse, SamplingParams

        options |= {"stop": options["stop"] or self._stop_tokens or None, "top_k": options["top_k"] or -1}
        params = SamplingParams(**options)
        async with self.concurrency.slot() as slot:
            used = self._samplers.use()
            try:  # the newest version of now, and not of when the slot was asked for
                response: SampleResponse = await used.policy().sampler.sample(ModelInput.from_ints(prompt), n, params)
            finally:
                used.release()
            slot.observation = Observation(_OK)
        return [_completion(prompt, sequence) for sequence in response.sequences]

    async def _publish(self, version: int) -> str:
        name = f"sampler-{version}-{secrets.token_hex(4)}"
        path = (await self._trainers.policy.save_weights_for_sampler(name)).path
        entered = await self._samplers.enter(self._trainers.service.create_sampling_client(model_path=path))
        self._samplers.follow(entered, version)
        self._version = version
        return path


def _completion(prompt: list[int], sequence: SampledSequence) -> SampledCompletion:
    return SampledCompletion(
        text="",
        full_tokens=[*prompt, *sequence.tokens],
        prompt_len=len(prompt),
        finish_reason=sequence.stop_reason,
        completion_len=len(sequence.tokens),
        inference_logprobs=None if sequence.logprobs is None else list(sequence.logprobs),
    )
