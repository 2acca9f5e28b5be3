"""Importance sampling: the policy gradient, corrected for the update's distance from its data; nothing is clipped.

For each active token, with the TIS weight w and the advantage A of its sample

    L = -w A exp(clamp(π - prox, ±cap))

summed over tokens and samples. Its gradient at π = prox is that of REINFORCE, -w A ∇π. Kakade and Langford,
"Approximately Optimal Approximate Reinforcement Learning", 2002; Schulman et al., "Trust Region Policy Optimization",
2015, section 3.
"""

from __future__ import annotations

from pydantic import Field

from fwasync.config.base import Config
from fwasync.losses.policy import Kernel, PolicyLoss, Response, Terms
from fwasync.losses.tis import TISConfig

__all__ = ("ImportanceSamplingConfig", "importance_sampling_loss")


class ImportanceSamplingConfig(Config):
    """How large the ratio may become."""

    ratio_log_cap: float = Field(
        default=20.0, ge=0, allow_inf_nan=False, description="The log-ratio is held within ±cap, without a gradient."
    )


def importance_sampling_loss(
    config: ImportanceSamplingConfig | None = None, tis: TISConfig | None = None
) -> PolicyLoss:
    """Importance sampling with its settings; the kernel of that name computes it."""
    config, tis = config or ImportanceSamplingConfig(), tis or TISConfig()
    cap = config.ratio_log_cap

    def formula(r: Response) -> Terms:
        ratio = (r.policy - r.old_policy).clamp(-cap, cap).exp()
        return Terms(-r.weight * r.advantage * ratio, {"is_ratio_mean": ratio})

    kernel = Kernel("importance_sampling", {"ratio_log_cap": cap})
    return PolicyLoss(name="importance_sampling", formula=formula, kernel=kernel, tis=tis)
