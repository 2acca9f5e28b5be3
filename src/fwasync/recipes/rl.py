"""Reinforcement learning on rewards: GRPO, and the other policy losses.

For each prompt a group of answers is sampled and rewarded; an answer learns from how its reward differs from its
group's (Shao et al., "DeepSeekMath", 2024, section 4.1). Each step is sampled whole, from the weights that were
published last, and then trained on: sampling and training do not overlap.

Groups whose rewards do not differ teach nothing and are dropped, and further rows take their places.

Invariants
    * Each row of a pass is sampled once, and is kept, filtered or failed; every one is counted in a metric.
    * A run depends on its configuration alone, and on its reward function: seeds are of rows, and not of time.
    * A run that is killed at any moment and started again takes the steps that it would have taken, if weights are
      published at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import anyio
import anyio.to_thread
from pydantic import Field

from fwasync.checkpoints.ledger import CheckpointEntry
from fwasync.data.chat import ChatTokenizer
from fwasync.data.prompts import PromptRow
from fwasync.errors import FwasyncError
from fwasync.recipes.callbacks import StepCallback, called, judged
from fwasync.recipes.collecting import Collected, Collector, RowCounts
from fwasync.recipes.groups import GroupFilter, GroupSampler, RewardFn, rewards_differ
from fwasync.recipes.named import describe_named, load_reward
from fwasync.recipes.optimizer import adam_params
from fwasync.recipes.policy_config import PolicyConfig
from fwasync.recipes.policy_session import (
    PolicySession,
    Result,
    SampledEvalFn,
    dry_policy_run,
    open_session,
    recorded_policy_run,
)
from fwasync.recipes.policy_update import Passes, policy_batch
from fwasync.recipes.rollout_metrics import rollout_metrics, write_trajectories
from fwasync.recipes.runner import Runner
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from fwasync.tracking.run import Run

__all__ = ("PHASE", "Config", "PromptRow", "Result", "SampledEvalFn", "dry_run", "train")

PHASE = "rl"

_ROWS = "rows"


class Config(PolicyConfig):
    """What determines a run."""

    refill: bool = Field(default=True, description="Take another row for each that is dropped, so that steps are full.")
    evaluation_interval: int = Field(default=1, ge=1, description="Steps between evaluations, if one is given.")


async def train(
    config: Config,
    *,
    reward: RewardFn | None = None,
    where: Where | None = None,
    run: Run | None = None,
    rows: Sequence[PromptRow] | None = None,
    keep: GroupFilter = rewards_differ,
    stop: StopRequest | None = None,
    on_step: StepCallback | None = None,
    evaluate: SampledEvalFn | None = None,
) -> Result:
    """Reinforce what the reward function likes; go on where the run in `config.log_path` was interrupted, if it was.

    Args:
        config: What to do.
        reward: `reward(text, row) -> float`, sync (it runs in a worker thread) or async; else `config.reward` names it.
        where: Where; by default on the service that the environment names.
        run: Where to log; by default in `config.log_path`. The recipe's page in the documentation lists the metrics.
        rows: The rows of `config.dataset`, if they were read already.
        keep: Which groups are trained on; the others are dropped, and replaced if `config.refill`.
        stop: Looked at between steps; if it is asked, the run saves a checkpoint and returns.
        on_step: Called after each step.
        evaluate: Called every `config.evaluation_interval` steps, and after the last.

    Raises:
        UsageError: The configuration or the data cannot be trained on; nothing was. Or a reward is not finite, or the
            function that `config.reward` names raised.
        DatasetError: No row had answers whose rewards differ: nothing was trained.
        FwasyncError: What the service's operations raise.
        Exception: What `reward`, `keep`, `on_step` or `evaluate` raises.

    **Cancellation:** the run keeps what was logged; checkpoints that were listed stay.
    """
    config.check()
    reward = await load_reward(config.reward) if reward is None else reward
    async with (
        recorded_policy_run(config, run) as (run, runner),
        open_session(config, PHASE, where or Where(), run, rows) as session,
    ):
        training = _Training(config, session, run, runner, on_step, evaluate)
        sampler = GroupSampler(
            session.served,
            session.tokenizer,
            reward,
            size=config.completions_per_prompt,
            max_tokens=config.max_completion_tokens,
            max_seq_len=session.max_seq_len,
            temperature=config.temperature,
            seed=config.seed,
        )
        result = await training.go(sampler, keep, StopRequest() if stop is None else stop)
        await session.checkpoints.end(result.checkpoint, runner, stopped=result.stopped)
        return result


async def dry_run(config: Config, *, tokenizer: ChatTokenizer | None, max_seq_len: int | None) -> list[str]:
    """Import the reward function, and check the prompts as `dry_policy_run` does; nothing is started."""
    config.check()
    reward = await load_reward(config.reward)
    found = await dry_policy_run(config, tokenizer=tokenizer, max_seq_len=max_seq_len)
    return [describe_named(reward), *found]


# -- the steps ---------------------------------------------------------------------------------------


@dataclass
class _Training:
    """The loop: sample, train, publish."""

    config: Config
    session: PolicySession
    run: Run
    runner: Runner
    on_step: StepCallback | None
    evaluate: SampledEvalFn | None
    total: int = 0
    checkpoint: CheckpointEntry | None = None
    counts: RowCounts = field(default_factory=RowCounts)
    in_flight_peak: int = 0

    async def go(self, sampler: GroupSampler, keep: GroupFilter, stop: StopRequest) -> Result:
        config, session, start = self.config, self.session, self.session.start
        number, consumed = (start.step, start.data_consumed) if start else (0, 0)
        began, self.checkpoint = number, start.entry if start else None
        if self.checkpoint is not None:
            self.counts = RowCounts(**self.checkpoint.extra.get(_ROWS, {}))
        order, self.total = session.plan()
        rows = session.prompts.taken(order, consumed)
        source = Collector(rows, consumed, sampler.sample, keep=keep, refill=config.refill, tell=self._watch)
        self.run.begin(PHASE, self.total)
        self.runner.begin(number, self.total)
        if not self._is_over(number, source):
            await self._publish_first(number, is_resumed=start is not None)
        collected: Collected | None = None
        while not self._is_over(number, source) and not stop.requested:
            started = anyio.current_time()
            self.in_flight_peak = 0
            collected = await source.collect(config.prompt_groups_per_step, after=collected)
            if collected.kept:
                number += 1
                await self._step(number, collected, source, started)
                collected = None
        self.counts += RowCounts.of(collected)
        stopped = stop.reason if not self._is_over(number, source) else None
        result = Result(number, self.total, self.checkpoint, self.counts, stopped, session.trainers.job_id)
        return await session.conclude(self.run, result, source.consumed, began=began, more=self._marks())

    def _is_over(self, number: int, source: Collector) -> bool:
        return number >= self.total or source.is_exhausted

    async def _publish_first(self, number: int, *, is_resumed: bool) -> None:
        """See to it that the weights that begin are those that are sampled."""
        if self.session.served.version is None or is_resumed or self.config.weight_sync.weight_sync_before_training:
            await self.session.served.publish(number)

    def _watch(self, in_flight: int) -> None:
        self.in_flight_peak = max(self.in_flight_peak, in_flight)
        self.run.gauge("rollout/in_flight", in_flight)

    async def _step(self, number: int, collected: Collected, source: Collector, started: float) -> None:
        config, session = self.config, self.session
        sampled = anyio.current_time()
        learning_rate = config.lr_scheduler.rate(config.learning_rate, number, self.total)
        adam = adam_params(config.adam, learning_rate, grad_clip_norm=config.grad_clip_norm)
        passes = Passes()
        batch = await anyio.to_thread.run_sync(policy_batch, collected.kept, number - 1)
        passes.add(batch, await session.update.submit(batch))
        optim_step = session.trainers.policy.optim_step(
            adam, config.grad_accumulation_normalization, timeout=config.step_timeout_s
        )
        remote = await passes.metrics(optim_step)
        trained = anyio.current_time()
        failure: Exception | None = None
        sync_s = 0.0
        try:
            sync_s = await self._sync(number)
        except FwasyncError as error:  # the step is done nevertheless, and is counted
            failure = error
        # Behind that: a snapshot that is not the sampler's makes it impossible to send a difference.
        self.counts += RowCounts.of(collected)
        last = self._is_over(number, source)
        saving = session.checkpoints.submit(number, source.consumed, last=last, more=self._marks())
        if saving is None and failure is not None:
            saving = session.checkpoints.save(number, source.consumed, more=self._marks())
        ended = anyio.current_time()
        wall = max(ended - started, 1e-9)
        metrics = {
            **remote,
            **rollout_metrics(collected, step=number - 1),
            "rollout/in_flight": self.in_flight_peak,
            "train/lr": learning_rate,
            "train/data_consumed": source.consumed,
            "perf/sample_wait_time": sampled - started,
            "perf/ref_forward_time": passes.reference_s,
            "perf/train_time": trained - sampled,
            "perf/weight_sync_time": sync_s,
            "perf/step_wall_time": wall,
            "perf/wait_time_ratio": (sampled - started) / wall,
            "perf/overlap_ratio": 1 - (sampled - started) / wall,
            "perf/weight_sync_ratio": sync_s / wall,
            "perf/rollout_samples_per_s": config.completions_per_prompt * len(collected.kept) / wall,
            "perf/rollout_tokens_per_s": batch.active_tokens / wall,
            "perf/train_tokens_per_s": batch.targets / max(trained - sampled, 1e-9),
            **session.concurrency_metrics(),
        }
        try:
            if self.evaluate is not None and not failure and (last or number % config.evaluation_interval == 0):
                metrics |= await judged(self.evaluate(number, session.served))
            if config.trajectory_dir is not None:
                await anyio.to_thread.run_sync(write_trajectories, config.trajectory_dir, number, collected.kept)
        except Exception as error:  # what is done is logged and saved, whatever comes after it
            if failure is None:
                failure = error
            else:
                failure.add_note(f"and then: {error!r}")
        self.run.log(PHASE, number, metrics)
        if saving is not None:
            self.checkpoint = await session.checkpoints.finish(saving)
        if failure is not None:
            raise failure
        await self.runner.step(number, metrics, tokens=batch.targets)
        if self.on_step is not None:
            await called(self.on_step(number, metrics))

    async def _sync(self, number: int) -> float:
        """Publish the weights of a step, if it is time; how long that took."""
        interval = self.config.weight_sync.weight_sync_interval
        if not interval or number % interval:
            return 0.0
        started = anyio.current_time()
        await self.session.served.publish(number)
        return anyio.current_time() - started

    def _marks(self) -> dict[str, object]:
        return {_ROWS: asdict(self.counts)}
