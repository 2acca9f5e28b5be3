"""REINFORCE: the plain policy gradient, corrected by the ratio of policy and sampler; no clip and no TIS.

For each active token, with the advantage A of its sample

    L = -A exp(clamp(π - inf, ±20)) + β KL

summed over tokens and samples. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
Reinforcement Learning", 1992; the ratio makes samples of slightly other weights count as they should.
"""

from __future__ import annotations

from pydantic import Field

from fwasync.config.base import Config
from fwasync.losses.kl import KLForm, with_kl
from fwasync.losses.policy import PolicyLoss, Response, Terms

__all__ = ("ReinforceConfig", "reinforce_loss")

_LOG_CAP = 20.0


class ReinforceConfig(Config):
    """What leaving the reference costs."""

    kl_beta: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="β; above 0 a reference is needed.")
    kl: KLForm = Field(default="k3", description="How the KL is estimated.")


def reinforce_loss(config: ReinforceConfig | None = None) -> PolicyLoss:
    """REINFORCE with its settings; it runs on the client only."""
    config = config or ReinforceConfig()

    def formula(r: Response) -> Terms:
        ratio = (r.policy - r.sampler).clamp(-_LOG_CAP, _LOG_CAP).exp()
        return with_kl(r, -r.advantage * ratio, {"is_ratio_mean": ratio}, beta=config.kl_beta, form=config.kl)

    return PolicyLoss(name="reinforce", formula=formula, kl_beta=config.kl_beta)
