"""GRPO: the clipped surrogate with group-relative advantages, and a penalty for leaving the reference.

For each active token, with ρ = exp(π - prox), the TIS weight w and the advantage A of its sample

    L = w · max(-ρ A, -clip(ρ, 1 - ε, 1 + ε_h) A) + β KL

summed over tokens and samples. Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open
Language Models", 2024, equations 3 and 4. The paper divides by each sample's length; here nothing is divided.
"""

from __future__ import annotations

from pydantic import Field

from fwasync.config.base import Config
from fwasync.losses.kl import KLForm, with_kl
from fwasync.losses.policy import Kernel, PolicyLoss, Response, Terms
from fwasync.losses.tis import TISConfig

__all__ = ("GRPOConfig", "grpo_loss")

_LOG_CAP = 20.0


class GRPOConfig(Config):
    """How far the policy may move, and what leaving the reference costs."""

    kl_beta: float = Field(default=0.001, ge=0, allow_inf_nan=False, description="β; above 0 a reference is needed.")
    eps_clip: float = Field(default=0.2, ge=0, allow_inf_nan=False, description="ε: ratios below 1 - ε are clipped.")
    eps_clip_high: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="ε_h: ratios above 1 + ε_h are clipped; `None` takes ε."
    )
    kl: KLForm = Field(default="k3", description="How the KL is estimated.")

    @property
    def bounds(self) -> tuple[float, float]:
        """The ratios at which clipping begins."""
        high = self.eps_clip if self.eps_clip_high is None else self.eps_clip_high
        return 1 - self.eps_clip, 1 + high


def grpo_loss(config: GRPOConfig | None = None, tis: TISConfig | None = None) -> PolicyLoss:
    """GRPO with its settings; the kernel `ppo` computes it where β is 0."""
    config, tis = config or GRPOConfig(), tis or TISConfig()
    low, high = config.bounds

    def formula(r: Response) -> Terms:
        distance = r.policy - r.old_policy
        ratio = distance.clamp(-_LOG_CAP, _LOG_CAP).exp()
        loss = r.weight * (-ratio * r.advantage).maximum(-ratio.clamp(low, high) * r.advantage)
        clipped = (ratio < low) | (ratio > high)
        metrics = {"ppo_ratio_mean": ratio, "ppo_clip_frac": clipped, "ppo_kl": -distance}
        return with_kl(r, loss, metrics, beta=config.kl_beta, form=config.kl)

    kernel = Kernel("ppo", {"clip_low_threshold": low, "clip_high_threshold": high})
    return PolicyLoss(name="grpo", formula=formula, kernel=kernel, tis=tis, kl_beta=config.kl_beta)
