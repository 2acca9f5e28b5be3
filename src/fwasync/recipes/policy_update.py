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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np
import numpy.typing as npt

from fwasync import APIFuture, AsyncTrainingClient
from fwasync.data.alignment import align_sample_logprobs
from fwasync.data.datums import completion_datum, masked_datum
from fwasync.losses import PolicyInputs, PolicyLoss
from fwasync.recipes.groups import PromptGroup
from fwasync.recipes.optimizer import remote_metrics
from fwasync.rollout.trajectory import RolloutGroup

if TYPE_CHECKING:
    from fwasync.types import Datum, ForwardBackwardOutput, OptimStepResponse

__all__ = ("Backward", "Passes", "PolicyBatch", "PolicyUpdate", "policy_batch", "rollout_batch")

_COUNTS = ("active_tokens", "total_resp_tokens")

Logprobs = list[npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class PolicyBatch:
    """The datums of one step, and what belongs to each of them. Answers without a single token have none.

    Attributes:
        datums: In the order of the groups and of their answers; the weight 1 is on the tokens that are to learn.
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
        """Tokens that are to learn: those that were sampled."""
        return sum(int(mask.sum()) for mask in self._masks())

    @property
    def loss_datums(self) -> list[Datum]:
        """The datums for a policy loss, which reads the weights as its mask."""
        from fwasync.types import Datum

        return [
            Datum(
                model_input=datum.model_input,
                loss_fn_inputs={**datum.loss_fn_inputs, "loss_mask": datum.loss_fn_inputs["weights"]},
            )
            for datum in self.datums
        ]

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
            (trainer - sampler)[mask].astype(np.float64)
            for trainer, sampler, mask in zip(_logprobs(output), self.sampler_logprobs, self._masks(), strict=True)
        ]
        return {
            "inference_diff": float(np.mean([np.abs(d).mean() for d in differences])),
            "inference_kld": float(np.mean([(np.exp(d) - d - 1).mean() for d in differences])),
        }

    def _masks(self) -> list[npt.NDArray[np.bool_]]:
        return [datum.loss_fn_inputs["weights"].to_numpy() > 0 for datum in self.datums]


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


def rollout_batch(groups: Sequence[RolloutGroup[Any]], version: int) -> PolicyBatch:
    """The same of rollouts, of which each segment is a datum; weights of this version are to learn.

    Of a segment that several versions have sampled, the oldest counts for its staleness.
    """
    batch = PolicyBatch([], [], [], [], [])
    for group in groups:
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True):
            for segment in rollout.segments:
                batch.datums.append(masked_datum(segment.tokens, segment.mask))
                batch.prompt_lens.append(int(segment.mask.argmax()))
                batch.sampler_logprobs.append(np.where(segment.mask, segment.logprobs, np.float32(0))[1:])
                batch.advantages.append(float(advantage))
                batch.staleness.append(version - int(segment.versions[segment.mask].min()))
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
            future = self.policy.forward_backward_custom(batch.loss_datums, self.loss.custom(inputs), **options)
            return Backward(future, int(self.old_policy), seconds)
        kernel = await anyio.to_thread.run_sync(self.loss.builtin, inputs, batch.loss_datums)
        assert kernel is not None, "the configuration was checked"
        future = self.policy.forward_backward(kernel.datums, kernel.loss_fn, kernel.loss_fn_config, **options)
        return Backward(future, int(self.old_policy), seconds)


def _logprobs(output: ForwardBackwardOutput) -> Logprobs:
    return [record["logprobs"].to_numpy() for record in output.loss_fn_outputs]


class Passes:
    """The passes of one optimizer step over the chunks of its batch."""

    def __init__(self) -> None:
        self._parts: list[tuple[PolicyBatch, Backward]] = []

    def add(self, batch: PolicyBatch, backward: Backward) -> None:
        """A chunk was submitted."""
        self._parts.append((batch, backward))

    @property
    def targets(self) -> int:
        """Tokens that are predicted."""
        return sum(batch.targets for batch, _ in self._parts)

    @property
    def reference_s(self) -> float:
        """Seconds until reference and old policy had answered, of all chunks."""
        return sum(backward.reference_s for _, backward in self._parts)

    async def metrics(self, optim_step: APIFuture[OptimStepResponse]) -> dict[str, float]:
        """Wait for all of them and for the step, and tell of it: `train/`, and how many passes there were.

        Raises:
            FwasyncError: What the operations raise.

        **Cancellation:** stops the waiting.
        """
        from fwasync.types import ForwardBackwardOutput

        outputs = [await backward.future for _, backward in self._parts]
        update = await optim_step
        active = [batch.active_tokens for batch, _ in self._parts]
        told = [
            {**batch.distance(output), **output.metrics}
            for (batch, _), output in zip(self._parts, outputs, strict=True)
        ]
        remote = remote_metrics(ForwardBackwardOutput("", [], merge_chunks(told, active)), update)
        # Not every service tells the loss of its kernels.
        loss = {"train/loss": remote["train/loss:sum"] / max(sum(active), 1)} if "train/loss:sum" in remote else {}
        return {
            **remote,
            "rollout/fwd_bwd_count": len(outputs),
            **loss,
            "train/active_tokens": sum(active),
            "train/step_tokens": self.targets,
            "train/effective_grad_accum_steps": len(outputs),
        }


def merge_chunks(parts: Sequence[Mapping[str, float]], active_tokens: Sequence[int]) -> dict[str, float]:
    """What chunks tell, as of one batch: counts and sums are added, `mask_ratio` follows from them, and what else there
    is are means, of the chunks that tell it, weighted by their active tokens."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        told = [(part[name], weight) for part, weight in zip(parts, active_tokens, strict=True) if name in part]
        if name.endswith(":sum") or name in _COUNTS:
            merged[name] = sum(value for value, _ in told)
        elif name.endswith(":max"):
            merged[name] = max(value for value, _ in told)
        elif name.endswith(":min"):
            merged[name] = min(value for value, _ in told)
        else:
            merged[name] = sum(value * weight for value, weight in told) / max(sum(weight for _, weight in told), 1)
    if "mask_ratio" in merged:
        merged["mask_ratio"] = merged["active_tokens"] / max(merged["total_resp_tokens"], 1)
    return merged
