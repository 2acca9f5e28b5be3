"""ORPO: learn the chosen answers, and to prefer them to the rejected ones, without a reference.

The loss of a step is a **sum over its pairs**, each of which is a mean over its tokens: one batch of many pairs has the
gradient of many batches of one. So the gradient grows with `batch_size`, which Adam evens out and clipping does not;
`grad_accumulation_normalization = "num_sequences"` divides it by twice the number of pairs.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fwasync.config import WandBConfig
from fwasync.data.pairs import Pair
from fwasync.losses import Reduction, make_batch_orpo_loss_fn
from fwasync.recipes import pairs
from fwasync.recipes.batches import Batch
from fwasync.recipes.callbacks import EvalFn, StepCallback
from fwasync.recipes.loop import Hooks, Result, Submitted, open_loop
from fwasync.recipes.pairs import dry_run
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from fwasync.tracking.run import Run

__all__ = ("PHASE", "Config", "Result", "dry_run", "train")

PHASE = "orpo"


class Config(pairs.PairsConfig):
    """What determines a run."""

    reduction: ClassVar[Reduction] = Reduction.SUM_PAIRS

    base_model: str = Field(
        default="accounts/fireworks/models/qwen3-235b-a22b-instruct-2507", description="The model to start from."
    )
    orpo_lambda: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="Weight of the preference beside the chosen answers."
    )
    wandb: WandBConfig = Field(default=WandBConfig(project="dsv3-training"), description="Weights & Biases.")


async def train(
    config: Config,
    *,
    where: Where | None = None,
    run: Run | None = None,
    stop: StopRequest | None = None,
    on_step: StepCallback | None = None,
    evaluate: EvalFn | None = None,
) -> Result[Pair]:
    """Train on preferences; go on where the run in `config.log_path` was interrupted, if it was.

    Args:
        config: What to do.
        where: Where; by default on the service that the environment names.
        run: Where to log; by default in `config.log_path`. `train/orpo_loss`, `train/sft_loss`, `train/or_loss`,
            `train/log_odds_ratio`, `train/accuracy`, `train/chosen_avg_lp`, `train/rejected_avg_lp` (means over pairs;
            see `make_batch_orpo_loss_fn`), `train/batch_pairs`, `train/step_tokens` (targets), `train/lr`,
            `train/epoch`, `train/step_time_sec`, `train/tokens_per_sec`, and what the trainer tells as `train/<name>`.
        stop: Looked at between steps; if it is asked, the run saves a checkpoint and returns.
        on_step: Called after each step.
        evaluate: Called at the end of each pass.

    Raises:
        UsageError: The configuration or the data cannot be trained on; nothing was.
        FwasyncError: What the service's operations raise.

    **Cancellation:** the run keeps what was logged; checkpoints that were listed stay.
    """
    hooks = Hooks(where, run, stop, on_step, evaluate)
    async with open_loop(config, PHASE, pairs.read, pairs.limited, hooks) as loop:

        async def submit(batch: Batch) -> Submitted:
            rows = loop.rows.chosen(batch.rows)
            loss_fn = make_batch_orpo_loss_fn([pair.response_start for pair in rows], config.orpo_lambda)
            return await pairs.submit_pairs(config, loop.trainers.policy, rows, loss_fn)

        return await loop.go(submit)
