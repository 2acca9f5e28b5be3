"""GSPO: one ratio for each sequence, clipped as a whole.

For the active tokens of a sample, with its advantage A and the TIS weight w of each token

    s = exp(min(mean(π - prox), cap))
    L = w · max(-s_t A, -clip(s_t, 1 - l, 1 + h) A)        s_t = s exp(π - stopgrad(π))

summed over tokens and samples: s_t has the value s, and the gradient s ∇π of its own token. Where all weights are equal
that sum has the gradient of the sequence's own loss times the number of its tokens. Zheng et al., "Group Sequence
Policy Optimization", 2025, equations 7 (s) and 14 (s_t).

The mean is over **active** tokens, so that what a tool wrote does not move the ratio of what the policy wrote.
"""

from __future__ import annotations

from pydantic import Field

from fwasync.config.base import Config
from fwasync.losses.policy import Kernel, PolicyLoss, Response, Terms
from fwasync.losses.tis import TISConfig

__all__ = ("GSPOConfig", "gspo_loss")


class GSPOConfig(Config):
    """How far the policy may move, over a sequence."""

    clip_ratio_low: float = Field(
        default=0.2, ge=0, allow_inf_nan=False, description="l: ratios below 1 - l are clipped."
    )
    clip_ratio_high: float = Field(
        default=0.2, ge=0, allow_inf_nan=False, description="h: ratios above 1 + h are clipped."
    )
    seq_ratio_log_cap: float = Field(
        default=10.0, ge=0, allow_inf_nan=False, description="The largest log-ratio; above it there is no gradient."
    )


def gspo_loss(config: GSPOConfig | None = None, tis: TISConfig | None = None) -> PolicyLoss:
    """GSPO with its settings; the kernel `gspo` computes it, unless a token may get the weight 0: it is in the mean
    here, and the kernel cannot tell it from a token of the prompt.
    """
    config, tis = config or GSPOConfig(), tis or TISConfig()
    low, high, cap = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high, config.seq_ratio_log_cap

    def formula(r: Response) -> Terms:
        sequence = (r.policy - r.old_policy).mean().detach()
        ratio = (r.policy - r.policy.detach() + sequence).clamp(max=cap).exp()
        loss = (-ratio * r.advantage).maximum(-ratio.clamp(low, high) * r.advantage)
        return Terms(r.weight * loss, {"ppo_ratio_mean": ratio, "gspo_clip_frac": (ratio < low) | (ratio > high)})

    kernel = Kernel("gspo", {"clip_low_threshold": low, "clip_high_threshold": high, "seq_ratio_log_cap": cap})
    return PolicyLoss(name="gspo", formula=formula, kernel=kernel, tis=tis, every_token_counts=True)
