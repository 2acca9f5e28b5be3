"""A penalty for leaving the reference model, estimated on the sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from fwasync.losses.policy import Response, Terms

if TYPE_CHECKING:
    import torch

__all__ = ("KLForm", "with_kl")

KLForm = Literal["k3", "value"]
"""How KL(policy ‖ reference) is estimated, with d = ref - π.

* `"k3"`: e^d - d - 1, which is never negative, and whose gradient pulls the policy back. Schulman, "Approximating KL
  Divergence", 2020; Shao et al., "DeepSeekMath", 2024, equation 4.
* `"value"`: -d without a gradient, as the first cookbooks had it: it shows in the loss and **trains nothing**.
"""


def with_kl(
    r: Response, loss: torch.Tensor, metrics: Mapping[str, torch.Tensor], *, beta: float, form: KLForm
) -> Terms:
    """Add β KL to a loss where there is a reference.

    Args:
        r: The sample's active tokens.
        loss: Of each token without the penalty, `[T]`.
        metrics: Its own, `[T]` each.
        beta: β; 0 measures the KL and adds nothing.
        form: Which estimate.

    Returns:
        The loss of each token, and metrics: its own, `mean_adv_loss` (without the penalty), `ref_kl` (in nats),
        `mean_kl_penalty`, `mean_loss`.
    """
    told = {**metrics, "mean_adv_loss": loss}
    if r.reference is not None:
        kl = _estimate(r.policy, r.reference, form)
        told["ref_kl"] = kl
        if beta > 0:
            told["mean_kl_penalty"] = beta * kl
            loss = loss + beta * kl
    return Terms(loss, {**told, "mean_loss": loss})


def _estimate(policy: torch.Tensor, reference: torch.Tensor, form: KLForm) -> torch.Tensor:
    if form == "value":
        return policy.detach() - reference
    distance = reference - policy
    return distance.exp() - distance - 1
