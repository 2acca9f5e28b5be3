"""DRO: direct reward optimisation, in which a squared distance to the old policy takes the place of clipping.

For each active token, with the TIS weight w and the advantage A of its sample

    L = -(w A π - β/2 (π - prox)²)        and 0 where A is 0

summed over tokens and samples. Richemond et al., "Offline Regularised Reinforcement Learning for Large Language Models
Alignment", 2024, whose value function is here the group's mean within A.
"""

from __future__ import annotations

from pydantic import Field

from fwasync.config.base import Config
from fwasync.losses.policy import Kernel, PolicyLoss, Response, Terms
from fwasync.losses.tis import TISConfig

__all__ = ("DROConfig", "dro_loss")


class DROConfig(Config):
    """How firmly the old policy holds the new one."""

    beta: float = Field(default=0.05, ge=0, allow_inf_nan=False, description="β, the weight of the squared distance.")


def dro_loss(config: DROConfig | None = None, tis: TISConfig | None = None) -> PolicyLoss:
    """DRO with its settings; the kernel `dro` computes it, unless a token may get the weight 0: it keeps its distance
    here, and the kernel cannot tell it from a token of the prompt.
    """
    config, tis = config or DROConfig(), tis or TISConfig()

    def formula(r: Response) -> Terms:
        beta = config.beta if r.advantage != 0 else 0.0
        penalty = beta / 2 * (r.policy - r.old_policy).square()
        return Terms(penalty - r.weight * r.advantage * r.policy, {"dro_quad_penalty": penalty})

    kernel = Kernel("dro", {"beta": config.beta})
    return PolicyLoss(name="dro", formula=formula, kernel=kernel, tis=tis, every_token_counts=True)
