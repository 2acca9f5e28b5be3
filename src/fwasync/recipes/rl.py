"""GRPO: for each prompt sample a group of answers, reward them, and learn from how they differ.

Shao et al., "DeepSeekMath", 2024, section 4.1, on policy: every step samples from the weights that it then trains.
The loss is `importance_sampling` with group-normalised advantages, a mean over completion tokens.

A run depends on its configuration alone: prompts and the seed of every request are derived from seed, step and
index, and groups are trained on in the order of their prompts, whichever arrived first.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fwasync import AsyncServiceClient, AsyncTrainingClient
from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.checkpoints.saving import CheckpointKind, Saved, submit_checkpoint
from fwasync.recipes.optimizer import AdamConfig, adam_params, grad_norm
from fwasync.recipes.schedules import LRSchedule
from fwasync.recipes.seeds import derive_seed
from fwasync.rollout.groups import Decoding, Group, Prompt, Reward, Tokenizer, sample_groups
from fwasync.rollout.policy_batch import policy_batch
from fwasync.tracking.run import Run

__all__ = ("PHASE", "Config", "PromptSource", "train")

PHASE = "grpo"

_ADAM = AdamConfig(beta2=0.95, eps=1e-12, weight_decay=0.0)

PromptSource = Callable[[random.Random, int], Sequence[Prompt]]
"""Prompts of a step: given randomness of the step's own and how many are wanted."""


class Config(BaseModel):
    """What determines a run.

    Attributes:
        log_path: The directory of the run.
        steps: Optimizer steps.
        groups_per_step: Prompts of a step.
        group_size: Answers to each prompt.
        learning_rate: Reached after the warm-up, and kept.
        warmup_steps: Steps in which it rises from nothing.
        temperature: Of sampling. Logprobs are those of temperature 1, so another temperature is off policy.
        max_tokens: The longest answer.
        grad_clip_norm: The gradient's norm is clipped to this; 0 does not clip.
        seed: Of prompts and samples.
        save_every: Steps between checkpoints; 0 saves at the end only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_path: Path
    steps: int = Field(default=40, ge=1)
    groups_per_step: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=2)
    learning_rate: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_tokens: int = Field(default=64, ge=1)
    grad_clip_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    save_every: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Weights on their way to a sampler, and how many optimizer steps made them."""

    version: int
    saved: Awaitable[Saved]


async def train(
    config: Config,
    *,
    service: AsyncServiceClient,
    client: AsyncTrainingClient,
    tokenizer: Tokenizer,
    prompts: PromptSource,
    reward: Reward,
    run: Run,
) -> CheckpointEntry:
    """Reinforce what the reward function likes.

    Args:
        config: What to do.
        service: Where.
        client: The model to go on with; its optimizer goes on too.
        tokenizer: The model's.
        prompts: Gives the prompts of a step.
        reward: Gives the reward of an answer; it runs in a worker thread.
        run: Where to log: see `_rollout_metrics` and the end of the loop.

    Returns:
        The last checkpoint.

    **Cancellation:** the run keeps what was logged; checkpoints that were listed stay.
    """
    ledger = CheckpointLedger(run.log_path)
    decoding = Decoding(config.group_size, config.max_tokens, config.temperature)
    schedule = LRSchedule(warmup_steps=config.warmup_steps)
    version = 0
    in_flight_peak = 0

    def publish() -> _Snapshot:
        return _Snapshot(version, client.save_weights_for_sampler(f"{PHASE}-sampler-{version:06d}"))

    def watch(in_flight: int) -> None:
        nonlocal in_flight_peak
        in_flight_peak = max(in_flight_peak, in_flight)
        run.gauge("rollout/in_flight", in_flight)

    checkpoint: CheckpointEntry | None = None
    run.begin(PHASE, config.steps)
    snapshot = publish()
    for step in range(1, config.steps + 1):
        started, in_flight_peak = anyio.current_time(), 0
        asked = prompts(random.Random(derive_seed(config.seed, "prompts", step)), config.groups_per_step)
        async with service.create_sampling_client(model_path=(await snapshot.saved).path) as sampler:
            groups = await sample_groups(
                sampler,
                asked,
                seeds=[derive_seed(config.seed, "sample", step, index) for index in range(len(asked))],
                decoding=decoding,
                tokenizer=tokenizer,
                reward=reward,
                on_in_flight=watch,
            )
        sampled = anyio.current_time()
        batch = policy_batch(groups)
        staleness = version - snapshot.version
        # All that this step asks of the trainer is submitted at once, and done in this order.
        learning_rate = schedule.rate(config.learning_rate, step, config.steps)
        forward_backward = client.forward_backward(batch.datums, "importance_sampling")
        optim_step = client.optim_step(adam_params(_ADAM, learning_rate, grad_clip_norm=config.grad_clip_norm))
        version += 1
        last = step == config.steps
        saving = None
        if last or (config.save_every and step % config.save_every == 0):
            kind = CheckpointKind.BOTH if last else CheckpointKind.STATE
            consumed = step * config.groups_per_step
            saving = submit_checkpoint(client, f"{PHASE}-{step:06d}", step=step, data_consumed=consumed, kind=kind)
        if not last:
            snapshot = publish()
        output, update = await forward_backward, await optim_step
        ended = anyio.current_time()
        metrics = {
            **_rollout_metrics(groups),
            "rollout/staleness": float(staleness),
            "rollout/in_flight": float(in_flight_peak),
            "train/loss": batch.loss(output),
            "train/kl": batch.kl(output),
            "train/learning_rate": learning_rate,
            **grad_norm(update),
            "perf/tokens_per_s": batch.tokens / (ended - started),
            "perf/sample_time": sampled - started,
            "perf/train_time": ended - sampled,
        }
        run.log(PHASE, step, metrics)
        if saving is not None:
            checkpoint = await saving.finish(ledger)
    assert checkpoint is not None, "the last step saves one"
    return checkpoint


def _rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward; accuracy, the part of rewards above 0.5; lengths in tokens; the part that `max_tokens` cut off."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = np.array([completion.reward for completion in completions])
    lengths = [len(completion.tokens) for completion in completions]
    return {
        "rollout/reward": float(rewards.mean()),
        "rollout/accuracy": float((rewards > 0.5).mean()),
        "rollout/response_len/mean": float(np.mean(lengths)),
        "rollout/truncated_ratio": float(np.mean([not completion.finished for completion in completions])),
    }
