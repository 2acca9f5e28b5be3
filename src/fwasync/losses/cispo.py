"""CISPO: the importance weight is clipped, not the update, so that every token keeps a gradient.

For each active token, with ρ = exp(clamp(π - prox, ±cap)), the TIS weight w and the advantage A of its sample

    L = -w A stopgrad(clip(ρ, 1 - l, 1 + h)) π

summed over tokens and samples. MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
2025, equations 4 and 5.
"""

from __future__ import annotations

from pydantic import Field

from fwasync.config.base import Config
from fwasync.losses.policy import Kernel, PolicyLoss, Response, Terms
from fwasync.losses.tis import TISConfig

__all__ = ("CISPOConfig", "cispo_loss")


class CISPOConfig(Config):
    """Between which bounds the importance weight is kept."""

    eps_low: float = Field(default=0.2, ge=0, allow_inf_nan=False, description="l: the least weight is 1 - l.")
    eps_high: float = Field(default=0.28, ge=0, allow_inf_nan=False, description="h: the largest weight is 1 + h.")
    ratio_log_cap: float = Field(
        default=20.0, ge=0, allow_inf_nan=False, description="The log-ratio is held within ±cap."
    )


def cispo_loss(config: CISPOConfig | None = None, tis: TISConfig | None = None) -> PolicyLoss:
    """CISPO with its settings; the kernel `cispo` computes it."""
    config, tis = config or CISPOConfig(), tis or TISConfig()
    low, high, cap = 1 - config.eps_low, 1 + config.eps_high, config.ratio_log_cap

    def formula(r: Response) -> Terms:
        ratio = (r.policy - r.old_policy).detach().clamp(-cap, cap).exp()
        return Terms(
            -r.weight * r.advantage * ratio.clamp(low, high) * r.policy,
            {"ppo_ratio_mean": ratio, "cispo_clip_frac": (ratio < low) | (ratio > high)},
        )

    kernel = Kernel("cispo", {"clip_low_threshold": low, "clip_high_threshold": high, "ratio_log_cap": cap})
    return PolicyLoss(name="cispo", formula=formula, kernel=kernel, tis=tis)
