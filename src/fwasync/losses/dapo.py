"""DAPO: the clipped surrogate with a higher upper bound, and an optional bound on what a bad token can cost.

For each active token, with ρ = exp(clamp(π - prox, ±cap)), the TIS weight w and the advantage A of its sample

    L = max(-ρ A, -clip(ρ, 1 - ε, 1 + ε_h) A)        and with c, where A < 0:  L = min(-c A, L)

of which w L is summed over tokens and samples. Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at
Scale", 2025, section 3.1 ("Clip-Higher"); its token-level loss is a sum too, to be divided by `num_loss_tokens`. The
dual clip c is of Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2020.
"""

from __future__ import annotations

from pydantic import Field

from fwasync.config.base import Config
from fwasync.losses.policy import Kernel, PolicyLoss, Response, Terms
from fwasync.losses.tis import TISConfig

__all__ = ("DAPOConfig", "dapo_loss")


class DAPOConfig(Config):
    """How far the policy may move."""

    eps_clip: float = Field(default=0.2, ge=0, allow_inf_nan=False, description="ε: ratios below 1 - ε are clipped.")
    eps_clip_high: float = Field(
        default=0.28, ge=0, allow_inf_nan=False, description="ε_h: ratios above 1 + ε_h are clipped."
    )
    eps_clip_c: float | None = Field(
        default=None, gt=1, allow_inf_nan=False, description="c: where A < 0, the loss is at most -c A."
    )
    ratio_log_cap: float = Field(
        default=20.0, ge=0, allow_inf_nan=False, description="The log-ratio is held within ±cap, without a gradient."
    )


def dapo_loss(config: DAPOConfig | None = None, tis: TISConfig | None = None) -> PolicyLoss:
    """DAPO with its settings; the kernel `ppo` computes it, and `dapo` where c is set."""
    config, tis = config or DAPOConfig(), tis or TISConfig()
    low, high, cap, c = 1 - config.eps_clip, 1 + config.eps_clip_high, config.ratio_log_cap, config.eps_clip_c

    def formula(r: Response) -> Terms:
        ratio = (r.policy - r.old_policy).clamp(-cap, cap).exp()
        loss = (-ratio * r.advantage).maximum(-ratio.clamp(low, high) * r.advantage)
        if c is not None and r.advantage < 0:
            loss = loss.clamp(max=-c * r.advantage)
        return Terms(r.weight * loss, {"ppo_ratio_mean": ratio, "dapo_clip_frac": (ratio < low) | (ratio > high)})

    settings = {"clip_low_threshold": low, "clip_high_threshold": high, "ratio_log_cap": cap}
    kernel = Kernel("ppo", settings) if c is None else Kernel("dapo", {**settings, "eps_clip_c": c})
    return PolicyLoss(name="dapo", formula=formula, kernel=kernel, tis=tis)
