"""`RecipeConfig`: what the configurations of all recipes have in common. Names and defaults are the cookbook's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from fwasync.config import InfraConfig, WandBConfig
from fwasync.config.base import Config
from fwasync.control.names import output_model_problems
from fwasync.errors import UsageError
from fwasync.recipes.optimizer import ADAM_PRESETS, DEFAULT_ADAM, AdamConfig
from fwasync.recipes.runner import RunnerConfig
from fwasync.recipes.schedules import LRSchedule

__all__ = ("RecipeConfig",)


def _preset(given: object) -> object:
    if not isinstance(given, str):
        return given
    if given not in ADAM_PRESETS:
        raise ValueError(f"there is no preset {given!r}; it must be one of {', '.join(ADAM_PRESETS)}, or an AdamConfig")
    return ADAM_PRESETS[given]


def _model_id(given: str | None) -> str | None:
    problems = output_model_problems(given) if given is not None else []
    if problems:
        raise ValueError(" ".join(problems))
    return given


class RecipeConfig(Config):
    """What determines a run. It is immutable; a field that does not exist is refused with the nearest name."""

    has_reference: ClassVar[bool] = False
    """Whether the recipe knows of a reference."""

    log_path: Path = Field(description="The directory of the run. Given again, the run goes on where it was.")
    base_model: str = Field(default="accounts/fireworks/models/qwen3-8b", description="The model to start from.")
    dataset: str = Field(default="", description="A JSONL file.")
    tokenizer_model: str = Field(
        default="",
        description="The tokenizer: a directory, or a name on the Hugging Face hub. Empty: that of the trainer.",
    )
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False, description="After the warm-up.")
    lr_scheduler: LRSchedule = Field(default=LRSchedule(), description="How it changes.")
    adam: Annotated[AdamConfig, BeforeValidator(_preset)] = Field(
        default=DEFAULT_ADAM, description="The optimizer, or the name of a preset: 'default' or 'fast'."
    )
    grad_clip_norm: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="The gradient's norm is clipped to this. 0 does not clip."
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the rows.")
    batch_size: int = Field(default=32, ge=1, description="Rows of a step. The last step of a pass may have fewer.")
    max_steps: int | None = Field(default=None, ge=1, description="The run ends after so many steps at the latest.")
    max_seq_len: int | None = Field(
        default=None,
        ge=2,
        description="Longer rows are left out, and told, as are those that the model's context cannot take.",
    )
    lora_rank: int = Field(default=0, ge=0, description="Rank of the adapter; 0 trains all parameters.")
    seed: int = Field(default=0, ge=0, description="Of the order of the rows, and of an adapter's first weights.")
    init_from_checkpoint: str | None = Field(
        default=None, description="Weights and optimizer to begin from: a path, job:name, or a name of this run."
    )
    dcp_save_interval: int = Field(
        default=0, ge=0, description="Steps between checkpoints. 0: none, and a run that is killed cannot be resumed."
    )
    save_final_checkpoint: bool = Field(default=True, description="Save a checkpoint and a snapshot at the end.")
    output_model_id: Annotated[str | None, AfterValidator(_model_id)] = Field(
        default=None, description="The id of the model that the last snapshot becomes."
    )
    step_timeout: float = Field(default=0.0, ge=0, description="Seconds that a step may take. 0: an hour.")
    infra: InfraConfig = Field(default=InfraConfig(), description="The trainers. Without a shape: a service that runs.")
    wandb: WandBConfig = Field(default=WandBConfig(), description="Weights & Biases.")
    runner: RunnerConfig = Field(default=RunnerConfig(), description="Files for the program that started the run.")

    def check(self) -> None:
        """Find what is wrong before anything is started.

        Raises:
            UsageError: Something is; all of it is told.
        """
        if problems := self.problems():
            raise UsageError("\n".join(problems))

    def problems(self) -> list[str]:
        """What keeps the run from being started, as sentences; recipes add their own."""
        found: list[str] = []
        if not self.base_model:
            found.append("base_model is empty; name the model to start from.")
        if not self.dataset:
            found.append("dataset is empty; name a JSONL file.")
        launched = self.infra.training_shape_id is not None
        if launched and self.base_model and not self.base_model.startswith("accounts/"):
            found.append(f"base_model is {self.base_model!r}; a trainer job wants accounts/<account>/models/<model>.")
        if self.infra.ref_training_shape_id is not None and not self.has_reference:
            found.append("infra.ref_training_shape_id is set; this recipe has no reference.")
        elif self.infra.ref_training_shape_id is not None and not launched:
            found.append("infra.ref_training_shape_id is set; set infra.training_shape_id too, or no trainer comes up.")
        job, reference_job = self.jobs
        if job is not None and not launched:
            found.append("a trainer job is named; name its shape too, as infra.training_shape_id.")
        if reference_job is not None and self.infra.ref_training_shape_id is None:
            found.append("reference_job_id is set; name the shape of that job too, as infra.ref_training_shape_id.")
        if self.output_model_id is not None and not launched:
            found.append("output_model_id is set; only a trainer job's snapshot becomes a model: set infra too.")
        if self.output_model_id is not None and not self.save_final_checkpoint:
            found.append("output_model_id needs the last snapshot; do not set save_final_checkpoint to false.")
        return found

    def longest(self, context_length: int | None) -> int | None:
        """The longest row in tokens: `max_seq_len`, and never more than the model takes; `None` if neither is known."""
        return min((limit for limit in (self.max_seq_len, context_length) if limit is not None), default=None)

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints."""
        return self.dcp_save_interval

    def checkpoints(self, steps: int) -> int:
        """How many are saved in a run of so many steps."""
        final, interval = int(self.save_final_checkpoint), self.checkpoint_interval
        return final + ((steps - final) // interval if interval else 0)

    @property
    def checkpoint_timeout_s(self) -> float | None:
        """Seconds that saving or loading a checkpoint may take; `None` is as the client has it."""
        return None

    @property
    def jobs(self) -> tuple[str | None, str | None]:
        """The trainer jobs to use that may be there already: the policy's and the reference's; `None` is a new one."""
        return None, None

    @property
    def step_timeout_s(self) -> float:
        """Seconds that a step may take."""
        return self.step_timeout or 3600.0
