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

import math
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field

import anyio
import anyio.to_thread
from pydantic import Field

from fwasync.checkpoints.ledger import CheckpointEntry
from fwasync.checkpoints.resume import ResumeInfo
from fwasync.checkpoints.saving import CheckpointKind
from fwasync.data.chat import ChatTokenizer
from fwasync.data.prompts import PromptRow, load_prompts
from fwasync.data.rendering import resolve_renderer
from fwasync.errors import DatasetError, UsageError
from fwasync.losses import PolicyLoss
from fwasync.recipes.batches import Batches
from fwasync.recipes.callbacks import StepCallback, called
from fwasync.recipes.collecting import Collected, Collector, RowCounts
from fwasync.recipes.groups import GroupFilter, GroupSampler, RewardFn, TakenRow, rewards_differ
from fwasync.recipes.optimizer import adam_params, remote_metrics
from fwasync.recipes.policy_config import PolicyConfig
from fwasync.recipes.policy_dry_run import dry_run
from fwasync.recipes.policy_update import PolicyUpdate, policy_batch
from fwasync.recipes.prompts import Prompts, render_prompts
from fwasync.recipes.recording import recording
from fwasync.recipes.rewards import load_reward
from fwasync.recipes.rollout_metrics import rollout_metrics, write_trajectories
from fwasync.recipes.runner import Runner
from fwasync.recipes.saving import DATA_KEY, Checkpoints, find_start
from fwasync.recipes.serving import ServedPolicy, serve_policy
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Trainers, Where
from fwasync.tracking.run import Run
from fwasync.training.custom_loss import require_torch

__all__ = ("PHASE", "Config", "PromptRow", "Result", "SampledEvalFn", "dry_run", "train")

PHASE = "rl"

_ROWS = "rows"

SampledEvalFn = Callable[[int, ServedPolicy], Awaitable[Mapping[str, float]] | Mapping[str, float]]
"""`(step, policy) -> metrics`, called every `evaluation_interval` steps and after the last. Nothing is trained then.
`policy` samples the weights that were published last. The metrics are logged with the step's own."""


class Config(PolicyConfig):
    """What determines a run."""

    refill: bool = Field(default=True, description="Take another row for each that is dropped, so that steps are full.")
    evaluation_interval: int = Field(default=1, ge=1, description="Steps between evaluations, if one is given.")


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Attributes:
        steps: The optimizer steps that are done, those of earlier processes among them.
        total_steps: Those of the whole run if no row were dropped; dropped rows are replaced, which leaves fewer.
        checkpoint: The last one that was saved; `None` if there is none.
        rows: What became of the rows.
        stopped: Why it was stopped before its end; `None` if it was not.
        job_id: The trainer job, where there was one.
    """

    steps: int
    total_steps: int
    checkpoint: CheckpointEntry | None
    rows: RowCounts
    stopped: str | None = None
    job_id: str | None = None


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
        reward: `reward(text, row) -> float`, sync (it runs in a worker thread) or async; by default the one that
            `config.reward` names.
        where: Where; by default on the service that the environment names.
        run: Where to log; by default in `config.log_path`. The recipe's page in the documentation lists the metrics.
        rows: The rows of `config.dataset`, if they were read already.
        keep: Which groups are trained on; the others are dropped, and replaced if `config.refill`.
        stop: Looked at between steps; if it is asked, the run saves a checkpoint and returns.
        on_step: Called after each step.
        evaluate: Called every `config.evaluation_interval` steps, and after the last.

    Raises:
        UsageError: The configuration or the data cannot be trained on; nothing was. Or a reward is not finite.
        DatasetError: No row had answers whose rewards differ: nothing was trained.
        FwasyncError: What the service's operations raise.
        Exception: What `reward`, `keep`, `on_step` or `evaluate` raises.

    **Cancellation:** the run keeps what was logged; checkpoints that were listed stay.
    """
    config.check()
    reward = reward or load_reward(config.reward)
    loss = config.loss()
    if not config.is_builtin(loss):
        require_torch()
    where = where or Where()
    async with AsyncExitStack() as stack:
        run, runner = await stack.enter_async_context(recording(config, run))
        for note in config.notes():
            run.message(note)
        if rows is None:
            rows = await load_prompts(config.dataset, max_rows=config.max_rows)
        # What can be found wrong is found before anything is brought up that costs money.
        name = config.tokenizer_model or config.deployment.tokenizer_model
        rendered = await _rendered(config, rows, name) if name else None
        start = await find_start(config, where, run, PHASE)
        path = start.path if start else None
        trainers = await stack.enter_async_context(
            where.open(config, start=path, reference=loss.kl_beta > 0, deploy=config.deployment, tell=run.message)
        )
        tokenizer, prompts = rendered or await _rendered(config, rows, await trainers.tokenizer_name(config))
        max_seq_len = await trainers.max_seq_len(config)
        prompts = prompts.limited(max_seq_len)
        if prompts.dropped:
            run.message(prompts.describe_dropped())
        checkpoints = Checkpoints(
            config,
            trainers,
            run,
            {DATA_KEY: prompts.digest()},
            timeout=config.weight_sync.dcp_timeout,
            prefix=f"{PHASE}-" if where.trainers else "",
        )
        checkpoints.check_data(start)
        served = await stack.enter_async_context(
            serve_policy(
                trainers,
                tokenizer=tokenizer,
                deploy=config.deployment,
                weight_sync=config.weight_sync,
                concurrency=config.concurrency,
            )
        )
        training = _Training(
            config,
            trainers,
            served,
            run,
            runner,
            checkpoints,
            prompts,
            _update(config, trainers, loss, run),
            on_step,
            evaluate,
        )
        sampler = GroupSampler(
            served,
            tokenizer,
            reward,
            size=config.completions_per_prompt,
            max_tokens=config.max_completion_tokens,
            max_seq_len=max_seq_len,
            temperature=config.temperature,
            seed=config.seed,
        )
        result = await training.go(start, sampler, keep, StopRequest() if stop is None else stop)
        if result.stopped is None:
            await checkpoints.promote(result.checkpoint, runner)
            await runner.completed()
        else:
            await runner.stopped(result.stopped)
        return result


async def _rendered(config: Config, rows: Sequence[PromptRow], tokenizer: str) -> tuple[ChatTokenizer, Prompts]:
    def tokenized() -> tuple[ChatTokenizer, Prompts]:
        loaded = ChatTokenizer.load(tokenizer)
        renderer = resolve_renderer(config.renderer_name or None, loaded)
        return loaded, render_prompts(config.dataset, rows, renderer)

    return await anyio.to_thread.run_sync(tokenized, abandon_on_cancel=True)


def _update(config: Config, trainers: Trainers, loss: PolicyLoss, run: Run) -> PolicyUpdate:
    builtin = config.is_builtin(loss)
    if builtin and trainers.pipeline_parallelism > 1:
        why = f"the trainer has a pipeline of {trainers.pipeline_parallelism} stages, and kernels need one of 1"
        if config.loss_path == "builtin":
            raise UsageError(f"loss_path is 'builtin': {why}; take another training shape, or 'custom'")
        require_torch()
        run.message(f"the loss is computed here, which takes a forward pass more: {why}")
        builtin = False
    return PolicyUpdate(
        trainers.policy,
        trainers.reference,
        loss,
        builtin=builtin,
        old_policy=config.asks_old_policy,
        timeout=config.step_timeout_s,
    )


# -- the steps ---------------------------------------------------------------------------------------


@dataclass
class _Training:
    """The loop: sample, train, publish."""

    config: Config
    trainers: Trainers
    served: ServedPolicy
    run: Run
    runner: Runner
    checkpoints: Checkpoints
    prompts: Prompts
    update: PolicyUpdate
    on_step: StepCallback | None
    evaluate: SampledEvalFn | None
    total: int = 0
    checkpoint: CheckpointEntry | None = None
    counts: RowCounts = field(default_factory=RowCounts)
    in_flight_peak: int = 0

    async def go(self, start: ResumeInfo | None, sampler: GroupSampler, keep: GroupFilter, stop: StopRequest) -> Result:
        config = self.config
        number, consumed = (start.step, start.data_consumed) if start else (0, 0)
        began, self.checkpoint = number, start.entry if start else None
        if self.checkpoint is not None:
            self.counts = RowCounts(**self.checkpoint.extra.get(_ROWS, {}))
        order = Batches(self.prompts.usable, 1, epochs=config.epochs, seed=config.seed, shuffle=config.shuffle)
        steps = math.ceil(order.steps() / config.prompt_groups_per_step)
        self.total = min(steps, config.max_steps or sys.maxsize)
        rows = _taken(order, self.prompts, consumed)
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
        await self._conclude(number, began, source.consumed, stopped)
        return Result(number, self.total, self.checkpoint, self.counts, stopped, self.trainers.job_id)

    def _is_over(self, number: int, source: Collector) -> bool:
        return number >= self.total or source.is_exhausted

    async def _publish_first(self, number: int, *, is_resumed: bool) -> None:
        """See to it that the weights that begin are those that are sampled."""
        if self.served.version is None or is_resumed or self.config.weight_sync.weight_sync_before_training:
            await self.served.publish(number)

    def _watch(self, in_flight: int) -> None:
        self.in_flight_peak = max(self.in_flight_peak, in_flight)
        self.run.gauge("rollout/in_flight", in_flight)

    async def _step(self, number: int, collected: Collected, source: Collector, started: float) -> None:
        config, client, timeout = self.config, self.trainers.policy, self.config.step_timeout_s
        sampled = anyio.current_time()
        learning_rate = config.lr_scheduler.rate(config.learning_rate, number, self.total)
        adam = adam_params(config.adam, learning_rate, grad_clip_norm=config.grad_clip_norm)
        batch = await anyio.to_thread.run_sync(policy_batch, collected.kept, number - 1)
        backward = await self.update.submit(batch)
        optim_step = client.optim_step(adam, config.grad_accumulation_normalization, timeout=timeout)
        output, update = await backward.future, await optim_step
        trained = anyio.current_time()
        sync_s = await self._sync(number)
        # Behind that: a snapshot that is not the sampler's makes it impossible to send a difference.
        self.counts += RowCounts.of(collected)
        last, marks = self._is_over(number, source), {_ROWS: asdict(self.counts)}
        saving = self.checkpoints.submit(number, source.consumed, last=last, more=marks)
        ended = anyio.current_time()
        wall = max(ended - started, 1e-9)
        remote = remote_metrics(output, update)
        metrics = {
            **{f"train/{name}": value for name, value in batch.distance(output).items()},
            **remote,
            **rollout_metrics(collected, step=number - 1),
            "rollout/in_flight": self.in_flight_peak,
            "rollout/fwd_bwd_count": 1,
            "train/loss": remote.get("train/loss:sum", math.nan) / max(batch.active_tokens, 1),
            "train/active_tokens": batch.active_tokens,
            "train/step_tokens": batch.targets,
            "train/effective_grad_accum_steps": 1,
            "train/lr": learning_rate,
            "train/data_consumed": source.consumed,
            "perf/sample_wait_time": sampled - started,
            "perf/ref_forward_time": backward.reference_s,
            "perf/train_time": trained - sampled,
            "perf/weight_sync_time": sync_s,
            "perf/step_wall_time": wall,
            "perf/wait_time_ratio": (sampled - started) / wall,
            "perf/overlap_ratio": 1 - (sampled - started) / wall,
            "perf/weight_sync_ratio": sync_s / wall,
            "perf/rollout_samples_per_s": config.completions_per_prompt * len(collected.kept) / wall,
            "perf/rollout_tokens_per_s": batch.active_tokens / wall,
            "perf/train_tokens_per_s": batch.targets / max(trained - sampled, 1e-9),
            **self._concurrency(),
        }
        if self.evaluate is not None and (last or number % config.evaluation_interval == 0):
            metrics |= await called(self.evaluate(number, self.served))
        if config.trajectory_dir is not None:
            await anyio.to_thread.run_sync(write_trajectories, config.trajectory_dir, number, collected.kept)
        self.run.log(PHASE, number, metrics)
        if saving is not None:
            self.checkpoint = await self.checkpoints.finish(saving)
        await self.runner.step(number, metrics, tokens=batch.targets)
        if self.on_step is not None:
            await called(self.on_step(number, metrics))

    async def _sync(self, number: int) -> float:
        """Publish the weights of a step, if it is time; how long that took."""
        interval = self.config.weight_sync.weight_sync_interval
        if not interval or number % interval:
            return 0.0
        started = anyio.current_time()
        await self.served.publish(number)
        return anyio.current_time() - started

    def _concurrency(self) -> dict[str, float]:
        if self.config.concurrency.mode is None:
            return {}
        return {f"concurrency/{name}": value for name, value in self.served.concurrency.step_completed().items()}

    async def _conclude(self, number: int, began: int, consumed: int, stopped: str | None) -> None:
        """Save what is not saved yet."""
        saved, kind = self.checkpoint, CheckpointKind.BOTH if stopped is None else CheckpointKind.STATE
        if stopped is None and not number:
            raise DatasetError(f"{self.config.dataset}: no group was kept, so nothing was trained: {self.counts}")
        self.run.message(f"rows: {self.counts}")
        if stopped is not None:
            self.run.message(f"{stopped}: step {number} of {self.total} is done. The same log_path goes on from there.")
            is_due = number > began and (saved is None or saved.step < number)
        else:  # the last rows may have been dropped, all of them, behind the last step
            is_complete = saved is not None and saved.sampler_path is not None and saved.data_consumed == consumed
            is_due = self.config.save_final_checkpoint and not is_complete
        if is_due:
            suffix = "" if saved is None or saved.step < number else "-final"
            marks = {_ROWS: asdict(self.counts)}
            pending = self.checkpoints.save(number, consumed, kind, suffix=suffix, more=marks)
            self.checkpoint = await self.checkpoints.finish(pending)


def _taken(order: Batches, prompts: Prompts, consumed: int) -> Iterator[TakenRow]:
    """The rows that are left, one by one."""
    for batch in order.after(consumed):
        (index,) = batch.rows
        tokens = prompts.tokens[index]
        assert tokens is not None, "rows that cannot be used are passed by"
        yield TakenRow(prompts.rows[index], tokens, batch.consumed)
