"""`PolicyConfig`: what the configurations of recipes that train a policy on rewards have in common.

Names and defaults are the cookbook's. What cannot be done as configured is refused before anything is brought up; what
a default cannot do here is left out, and `notes` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fwasync.config import ConcurrencyConfig, DeployConfig, WandBConfig, WeightSyncConfig
from fwasync.config.base import Config, ResourceId
from fwasync.errors import UsageError
from fwasync.losses import (
    CISPOConfig,
    DAPOConfig,
    DecoupledConfig,
    DROConfig,
    GRPOConfig,
    GSPOConfig,
    ImportanceSamplingConfig,
    PolicyLoss,
    ReinforceConfig,
    TISConfig,
    check_normalization,
    policy_loss,
)
from fwasync.losses.kl import KLForm
from fwasync.recipes.config import RecipeConfig

__all__ = ("PolicyConfig",)

_WITH_KL = ("grpo", "reinforce")
_WITHOUT_OLD_POLICY = ("reinforce", "decoupled")
_NUM_LOSS_TOKENS = "num_loss_tokens"


class PolicyConfig(RecipeConfig):
    """What determines a run."""

    has_reference: ClassVar[bool] = True

    not_taken: ClassVar[Mapping[str, str]] = {
        "policy_base_url": "say where a trainer runs already by --base-url, or where=Where(url, key) in a program, and "
        "leave infra.training_shape_id unset; a trainer job that is there is named by policy_job_id",
        "reference_base_url": "on a trainer that runs already the reference is the base model there; a trainer job "
        "that is there is named by reference_job_id",
    }

    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False, description="After the warm-up.")
    max_rows: int | None = Field(default=100, ge=1, description="Only so many rows of the file are read.")
    shuffle: bool = Field(default=True, description="Another order in each pass. Else that of the file.")
    renderer_name: str = Field(
        default="", description="Another renderer, as module:attribute. Empty: the tokenizer's own chat template."
    )
    reward: str = Field(
        default="",
        description="Your reward(text, row) -> float, as module:function or file.py:function. Programs may pass one.",
    )
    completions_per_prompt: int = Field(default=4, ge=2, description="Answers to each prompt: a group.")
    max_completion_tokens: int = Field(default=1024, ge=1, description="The longest answer.")
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="Of the sampling.")
    prompt_groups_per_step: int = Field(default=1, ge=1, description="Groups of an optimizer step.")
    grad_accumulation_normalization: str | None = Field(
        default=_NUM_LOSS_TOKENS,
        description="By what the trainer divides the gradient, as losses are sums: num_loss_tokens, num_sequences, "
        "none. Unset: as the trainer likes.",
    )
    policy_loss: str = Field(default="grpo", description="One of fwasync.losses.POLICY_LOSSES.")
    loss_path: Literal["auto", "builtin", "custom"] = Field(
        default="auto",
        description="'builtin' computes the loss by a kernel of the service, 'custom' here, with torch; 'auto' takes "
        "the kernel where it has the same gradient. Kernels need a trainer without pipeline parallelism.",
    )
    anchor_logp: Literal["old_policy", "rollout"] = Field(
        default="old_policy",
        description="Where ratios begin: the policy's logprobs of before the step, by a forward pass, or the "
        "sampler's, which spares it. Then TIS weights are 1.",
    )
    kl_beta: float = Field(
        default=0.001, ge=0, allow_inf_nan=False, description="What leaving the reference costs, of grpo and reinforce."
    )
    kl: KLForm = Field(default="k3", description="How that is estimated.")
    eps_clip: float = Field(default=0.2, ge=0, allow_inf_nan=False, description="Of grpo: ratios below are clipped.")
    eps_clip_high: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Of grpo: ratios above. Unset: eps_clip."
    )
    ratio_log_cap: float = Field(default=20.0, gt=0, allow_inf_nan=False, description="Of importance_sampling.")
    dapo: DAPOConfig = Field(default=DAPOConfig(), description="Of dapo.")
    dro: DROConfig = Field(default=DROConfig(), description="Of dro.")
    gspo: GSPOConfig = Field(default=GSPOConfig(), description="Of gspo.")
    cispo: CISPOConfig = Field(default=CISPOConfig(), description="Of cispo.")
    decoupled: DecoupledConfig = Field(default=DecoupledConfig(), description="Of decoupled.")
    tis: TISConfig = Field(default=TISConfig(), description="How tokens are weighted by trainer and sampler.")
    router_replay: bool = Field(default=False, description="Not supported: trainers are sent no routing matrices.")
    router_replay_completion_only: bool = Field(default=True, description="Of router_replay.")
    trajectory_dir: Path | None = Field(default=None, description="A file of all answers for each step, if set.")
    policy_job_id: ResourceId | None = Field(
        default=None,
        description="The trainer job. One that is there is used and left in place; else it is made under this id, and "
        "removed in the end.",
    )
    reference_job_id: ResourceId | None = Field(
        default=None, description="The reference's trainer job, likewise. It is kept to the end of the run."
    )
    deployment: DeployConfig = Field(default=DeployConfig(), description="What samples, on the control plane.")
    weight_sync: WeightSyncConfig = Field(default=WeightSyncConfig(), description="When it gets the weights.")
    concurrency: ConcurrencyConfig = Field(default=ConcurrencyConfig(), description="How much is sampled at a time.")
    wandb: WandBConfig = Field(default=WandBConfig(project="grpo-tinker"), description="Weights & Biases.")

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints; it may be set in either place."""
        return self.dcp_save_interval or self.weight_sync.dcp_save_interval

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer that is named; empty if it is the trainer's own."""
        return self.tokenizer_model or self.deployment.tokenizer_model or ""

    @property
    def checkpoint_timeout_s(self) -> float | None:
        """Seconds that saving or loading a checkpoint may take."""
        return self.weight_sync.dcp_timeout

    @property
    def jobs(self) -> tuple[str | None, str | None]:
        """The trainer jobs to use that may be there already."""
        return self.policy_job_id, self.reference_job_id

    @property
    def beta(self) -> float:
        """`kl_beta` as it is used: a default that has no place here is 0; `notes` says so."""
        return 0.0 if "kl_beta" not in self.model_fields_set and self._no_penalty() else self.kl_beta

    @property
    def asks_old_policy(self) -> bool:
        """Whether the policy's logprobs of before the step are needed."""
        return self.anchor_logp == "old_policy" and self.policy_loss not in _WITHOUT_OLD_POLICY

    def loss(self) -> PolicyLoss:
        """The loss with its settings.

        Raises:
            UsageError: There is none of that name, or it takes no TIS weights.
        """
        settings: dict[str, Config] = {
            "grpo": GRPOConfig(kl_beta=self.beta, eps_clip=self.eps_clip, eps_clip_high=self.eps_clip_high, kl=self.kl),
            "importance_sampling": ImportanceSamplingConfig(ratio_log_cap=self.ratio_log_cap),
            "dapo": self.dapo,
            "dro": self.dro,
            "gspo": self.gspo,
            "cispo": self.cispo,
            "reinforce": ReinforceConfig(kl_beta=self.beta, kl=self.kl),
            "decoupled": self.decoupled,
        }
        tis = self.tis if "tis" in self.model_fields_set else None
        return policy_loss(self.policy_loss, settings.get(self.policy_loss), tis)

    def is_builtin(self, loss: PolicyLoss) -> bool:
        """Whether the service's kernel computes it."""
        return self.loss_path != "custom" and loss.obstacle is None

    def notes(self) -> list[str]:
        """What the run does that one might not expect, as sentences."""
        found: list[str] = []
        if self.beta != self.kl_beta and (why := self._no_penalty()):
            found.append(f"no KL penalty: {why}")
        loss = self.loss()
        if self.loss_path == "auto" and loss.obstacle is not None:
            found.append(f"the loss is computed here, which takes a forward pass more: {loss.obstacle}")
        return found

    def problems(self) -> list[str]:
        """What keeps the run from being started, as sentences."""
        found = super().problems()
        given = self.model_fields_set
        if "batch_size" in given:
            found.append("batch_size is set; a step's size is prompt_groups_per_step times completions_per_prompt.")
        if self.infra.training_shape_id is not None and not self.tokenizer_name:
            found.append("tokenizer_model is empty; name it, so that prompts are checked before a trainer costs money.")
        if self.router_replay:
            found.append(
                "router_replay is set; trainers are sent no routing matrices, and choose the experts of each token "
                "themselves. Set it to false; tis weighs tokens by how far trainer and sampler differ."
            )
        if self.deployment.deployment_id is not None and self.infra.training_shape_id is None:
            found.append("deployment.deployment_id is set; only a trainer job's weights are synced: set infra too.")
        intervals = {self.dcp_save_interval, self.weight_sync.dcp_save_interval} - {0}
        if len(intervals) > 1:
            found.append("dcp_save_interval and weight_sync.dcp_save_interval differ; set one of them.")
        if self.kl_beta > 0 and "kl_beta" in given and (why := self._no_penalty()):
            found.append(f"kl_beta is {self.kl_beta:g}: {why}. Set it to 0.")
        if self.beta == 0 and self.infra.ref_training_shape_id is not None:
            found.append("infra.ref_training_shape_id is set, and nothing asks a reference: there is no KL penalty.")
        try:
            loss = self.loss()
            check_normalization(loss.reduction, self.grad_accumulation_normalization)
            if self.loss_path == "builtin" and loss.obstacle is not None:
                found.append(f"loss_path is 'builtin': {loss.obstacle}. Use 'custom' or 'auto'.")
        except UsageError as error:
            found.append(f"{error}.")
        return found

    def _no_penalty(self) -> str | None:
        """Why leaving the reference cannot cost anything; `None` if it can."""
        if self.policy_loss not in _WITH_KL:
            return f"{self.policy_loss} has no term for it"
        infra = self.infra
        if infra.training_shape_id is not None and infra.ref_training_shape_id is None and not self.lora_rank:
            return "there is no reference, as infra.ref_training_shape_id is not set"
        return None
