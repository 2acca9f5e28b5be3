"""The demonstration: one small model, first shown what to do, then rewarded for the better way.

Supervised training comes first, on demonstrations that are mixed on purpose (see `sort_digits`); GRPO goes on with the
same model and optimizer. Greedy answers to held-out prompts are judged before, between and after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field

from fwasync import AsyncServiceClient
from fwasync.data.chat import ChatTokenizer
from fwasync.recipes import rl, sft, sort_digits
from fwasync.recipes.evaluate import Evaluation, evaluate
from fwasync.recipes.optimizer import AdamConfig
from fwasync.recipes.schedules import LRSchedule
from fwasync.recipes.trainers import Where
from fwasync.tracking.run import Run

__all__ = ("PHASE", "Config", "Stage", "train")

PHASE = "held-out"

_BATCH = 64
_GROUPS = 16
_ADAM = AdamConfig(beta2=0.95, eps=1e-12, weight_decay=0.0)


class Config(BaseModel):
    """What determines a run.

    Attributes:
        log_path: The directory of the run.
        seed: Of the order of demonstrations, of prompts and of samples.
        sft_steps: Steps of supervised training.
        grpo_steps: Steps of GRPO.
        base_model: The model to start from; all its parameters are trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_path: Path
    seed: int = Field(default=0, ge=0)
    sft_steps: int = Field(default=300, ge=1)
    grpo_steps: int = Field(default=40, ge=1)
    base_model: str = "fwasync/qwen3-tiny"

    def sft(self) -> sft.Config:
        """The configuration of supervised training."""
        return sft.Config(
            dataset=str(self.log_path / sort_digits.DATA_FILE),
            log_path=self.log_path,
            base_model=self.base_model,
            lora_rank=0,
            learning_rate=3e-3,
            lr_scheduler=LRSchedule(warmup_steps=20),
            adam=_ADAM,
            grad_clip_norm=1.0,
            batch_size=_BATCH,
            epochs=math.ceil(self.sft_steps * _BATCH / sort_digits.ROWS),
            max_steps=self.sft_steps,
            seed=self.seed,
            dcp_save_interval=100,
        )

    def rl(self) -> rl.Config:
        """The configuration of GRPO. It practises on the prompts of the demonstrations, without their answers."""
        return rl.Config(
            dataset=str(self.log_path / sort_digits.DATA_FILE),
            log_path=self.log_path,
            base_model=self.base_model,
            max_rows=None,
            epochs=math.ceil(self.grpo_steps * _GROUPS / sort_digits.ROWS),
            learning_rate=5e-4,
            adam=_ADAM,
            grad_clip_norm=1.0,
            prompt_groups_per_step=_GROUPS,
            completions_per_prompt=8,
            max_completion_tokens=sort_digits.MAX_TOKENS,
            kl_beta=0.0,
            anchor_logp="rollout",
            max_steps=self.grpo_steps,
            seed=self.seed,
            dcp_save_interval=20,
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """How a model does on the held-out prompts at one point of the run."""

    name: str
    evaluation: Evaluation


async def train(config: Config, *, service: AsyncServiceClient, run: Run, on_stage: Callable[[Stage], None]) -> None:
    """Do it all.

    Args:
        config: What to do.
        service: Where.
        run: Where to log; the data file and the checkpoints are kept there too.
        on_stage: Told how the model does, at each of the three points.

    **Cancellation:** what was logged, saved and told stays.
    """
    rows = sort_digits.held_out_rows()
    await run.write_text(sort_digits.DATA_FILE, sort_digits.data_text())

    async def judge(name: str, point: int, *, base_model: str | None = None, snapshot: str | None = None) -> None:
        async with service.create_sampling_client(base_model=base_model, model_path=snapshot) as sampler:
            evaluation = await evaluate(
                sampler,
                rows,
                tokenizer=tokenizer,
                reward=sort_digits.reward,
                max_tokens=sort_digits.MAX_TOKENS,
            )
        run.log(PHASE, point, {"eval/exact": evaluation.exact, "eval/reward": evaluation.mean_reward})
        on_stage(Stage(name, evaluation))

    taught_by = config.sft()
    async with Where(service=service).open(taught_by) as trainers:
        tokenizer = await anyio.to_thread.run_sync(ChatTokenizer.load, await trainers.tokenizer_name(taught_by))
        run.begin(PHASE, 3)
        await judge("base model", 1, base_model=config.base_model)
        taught = await sft.train(taught_by, where=Where(trainers=trainers), run=run)
        await judge("after SFT", 2, snapshot=taught.checkpoint.sampler_path if taught.checkpoint else None)
        # All groups are kept: one whose rewards do not differ has no gradient, and steps stay comparable.
        rewarded = await rl.train(
            config.rl(), reward=sort_digits.reward, where=Where(trainers=trainers), run=run, keep=lambda _: True
        )
        await judge("after GRPO", 3, snapshot=rewarded.checkpoint.sampler_path if rewarded.checkpoint else None)
