"""From groups to a gradient: the batch of a policy loss, and its two paths.

| path | the loss is computed | torch | passes over the batch |
|---|---|---|---|
| built-in | by a kernel of the service | not needed | 1 |
| custom | here, from the logprobs of a forward pass | needed | 2 |

The old policy's logprobs take one pass more, before the update, unless the samplers' stand in for them.

Invariants
    * A datum has the tokens that were sampled, and the sampler's logprobs beside them; nothing is padded or cut.
    * The loss is a sum over completion tokens; `optim_step` divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np
import numpy.typing as npt

from fwasync import APIFuture, AsyncTrainingClient
from fwasync.data.alignment import align_sample_logprobs
from fwasync.data.datums import completion_datum
from fwasync.losses import PolicyInputs, PolicyLoss
from fwasync.recipes.groups import PromptGroup

if TYPE_CHECKING:
    from fwasync.types import Datum, ForwardBackwardOutput

__all__ = ("Backward", "PolicyBatch", "PolicyUpdate", "policy_batch")

Logprobs = list[npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class PolicyBatch:
    """The datums of one step, and what belongs to each of them. Answers without a single token have none.

    Attributes:
        datums: In the order of the groups and of their answers.
        prompt_lens: Prompt tokens P of each.
        sampler_logprobs: float32 `[N]` of each, 0 for the prompt.
        advantages: Of each.
        staleness: Optimizer steps between the weights that sampled each and those that learn.
    """

    datums: list[Datum]
    prompt_lens: list[int]
    sampler_logprobs: Logprobs
    advantages: list[float]
    staleness: list[int]

    @property
    def targets(self) -> int:
        """Tokens that are predicted, those of prompts among them."""
        return sum(map(len, self.sampler_logprobs))

    @property
    def active_tokens(self) -> int:
        """Completion tokens."""
        return sum(len(each) - p + 1 for each, p in zip(self.sampler_logprobs, self.prompt_lens, strict=True))

    def inputs(self, old_policy: Logprobs | None, reference: Logprobs | None) -> PolicyInputs:
        """What a policy loss needs beside the datums."""
        return PolicyInputs(
            advantages=self.advantages,
            reference_logprobs=reference,
            prompt_len=self.prompt_lens,
            sampler_logprobs=self.sampler_logprobs,
            old_policy_logprobs=old_policy,
            staleness=self.staleness,
        )

    def distance(self, output: ForwardBackwardOutput) -> dict[str, float]:
        """How far the trainer is from the sampler, as custom losses tell it too.

        Returns:
            `inference_diff`, the mean over samples of mean |π - inf|, and `inference_kld`, of mean e^d - d - 1 with
            d = π - inf; nothing if the output has no logprobs.
        """
        if not all("logprobs" in record for record in output.loss_fn_outputs):
            return {}
        differences = [
            (trainer - sampler)[prompt_len - 1 :].astype(np.float64)
            for trainer, sampler, prompt_len in zip(
                _logprobs(output), self.sampler_logprobs, self.prompt_lens, strict=True
            )
        ]
        return {
            "inference_diff": float(np.mean([np.abs(d).mean() for d in differences])),
            "inference_kld": float(np.mean([(np.exp(d) - d - 1).mean() for d in differences])),
        }


def policy_batch(groups: Sequence[PromptGroup], step: int) -> PolicyBatch:
    """The batch of a step; `step` optimizer steps have made the weights that are to learn."""
    batch = PolicyBatch([], [], [], [], [])
    for group in groups:
        prompt = group.prompt_tokens
        for answer, advantage in zip(group.answers, group.advantages, strict=True):
            if not len(answer.tokens):
                continue
            batch.datums.append(completion_datum(prompt, answer.tokens))
            batch.prompt_lens.append(len(prompt))
            batch.sampler_logprobs.append(
                align_sample_logprobs(answer.logprobs, prompt_len=len(prompt), completion_len=len(answer.tokens))
            )
            batch.advantages.append(float(advantage))
            batch.staleness.append(step - group.version)
    return batch


@dataclass(frozen=True, slots=True)
class Backward:
    """A forward and backward pass that was submitted.

    Attributes:
        future: Its result.
        passes: How many passes over the batch went before it, beside the reference's.
        reference_s: Seconds until the reference and the old policy had answered.
    """

    future: APIFuture[ForwardBackwardOutput]
    passes: int
    reference_s: float


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """Submits the gradient of a policy loss.

    Attributes:
        policy: The policy.
        reference: The reference, if the loss needs one.
        loss: The loss.
        builtin: Take the service's kernel; else the loss is computed here.
        old_policy: Ask for the policy's logprobs before the update; else the sampler's stand in for them.
        timeout: Seconds that each pass may take.
    """

    policy: AsyncTrainingClient
    reference: AsyncTrainingClient | None
    loss: PolicyLoss
    builtin: bool
    old_policy: bool
    timeout: float

    async def submit(self, batch: PolicyBatch) -> Backward:
        """Submit the pass.

        Raises:
            DatumError: Logprobs do not fit, or are not finite.
            FwasyncError: What the forward passes raise.

        **Cancellation:** nothing was submitted but forward passes, which change nothing.
        """
        started = anyio.current_time()
        asked = [self.reference if self.loss.kl_beta > 0 else None, self.policy if self.old_policy else None]
        futures = [
            None if client is None else client.forward(batch.datums, "cross_entropy", timeout=self.timeout)
            for client in asked
        ]
        reference, old_policy = [None if future is None else _logprobs(await future) for future in futures]
        seconds = anyio.current_time() - started
        inputs = batch.inputs(old_policy, reference)
        options: dict[str, Any] = {"timeout": self.timeout}
        if not self.builtin:
            future = self.policy.forward_backward_custom(batch.datums, self.loss.custom(inputs), **options)
            return Backward(future, int(self.old_policy), seconds)
        kernel = await anyio.to_thread.run_sync(self.loss.builtin, inputs, batch.datums)
        assert kernel is not None, "the configuration was checked"
        future = self.policy.forward_backward(kernel.datums, kernel.loss_fn, kernel.loss_fn_config, **options)
        return Backward(future, int(self.old_policy), seconds)


def _logprobs(output: ForwardBackwardOutput) -> Logprobs:
    return [record["logprobs"].to_numpy() for record in output.loss_fn_outputs]
