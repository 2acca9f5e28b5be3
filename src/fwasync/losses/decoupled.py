"""Decoupled PPO: for samples that are some updates old, clip against a nearer policy than the one that sampled.

With inf the logprobs of the weights that sampled, d updates ago, the proximal policy is not computed but interpolated:

    prox = inf / d + (1 - 1/d) stopgrad(π)        and prox = inf where d <= 1
    L = b · max(-ρ A, -clip(ρ, 1 - ε, 1 + ε_h) A)
    ρ = exp(π - prox)        b = exp(prox - inf), truncated or masked above a cap

summed over active tokens and samples. Hilton et al., "Batch size-invariance for policy optimization", 2022, for the two
policies; Fu et al., "AReaL: A Large-Scale Asynchronous Reinforcement Learning System for Language Reasoning", 2025, for
its use with stale samples; the interpolation spares the forward pass of `prox`. b takes the place of the TIS weight.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fwasync.config.base import Config
from fwasync.losses.policy import PolicyLoss, Response, Terms

__all__ = ("DecoupledConfig", "decoupled_loss")

_LOG_CAP = 20.0


class DecoupledConfig(Config):
    """How far the policy may move from the proximal one, and how much a stale sample may count."""

    eps_clip: float = Field(default=0.2, ge=0, allow_inf_nan=False, description="ε: ratios below 1 - ε are clipped.")
    eps_clip_high: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="ε_h: ratios above 1 + ε_h are clipped; `None` takes ε."
    )
    behave_cap: float = Field(default=5.0, ge=0, description="The cap of b; 0 gives every token the weight 0.")
    behave_mode: Literal["token_truncate", "token_mask"] = Field(
        default="token_truncate", description="Above the cap, b is the cap, or 0."
    )


def decoupled_loss(config: DecoupledConfig | None = None) -> PolicyLoss:
    """Decoupled PPO with its settings; it runs on the client only, and reads `PolicyInputs.staleness`."""
    config = config or DecoupledConfig()
    low = 1 - config.eps_clip
    high = 1 + (config.eps_clip if config.eps_clip_high is None else config.eps_clip_high)
    cap, masks = config.behave_cap, config.behave_mode == "token_mask"

    def formula(r: Response) -> Terms:
        alpha = 1 - 1 / r.staleness if r.staleness > 0 else 0.0
        proximal = (1 - alpha) * r.sampler + alpha * r.policy.detach()
        ratio = (r.policy - proximal).clamp(-_LOG_CAP, _LOG_CAP).exp()
        behaviour = (proximal - r.sampler).clamp(-_LOG_CAP, _LOG_CAP).exp()
        above = behaviour > cap
        weight = behaviour.masked_fill(above, 0.0 if masks else cap)
        loss = weight * (-ratio * r.advantage).maximum(-ratio.clamp(low, high) * r.advantage)
        metrics = {
            "decoupled/ppo_ratio_mean": ratio,
            "decoupled/ppo_clip_frac": (ratio < low) | (ratio > high),
            "decoupled/behave_weight_mean": weight,
            "decoupled/behave_clip_frac": above,
            "decoupled/alpha": r.policy.new_full(r.policy.shape, alpha),
        }
        return Terms(loss, metrics)

    return PolicyLoss(name="decoupled", formula=formula, needs_staleness=True)
