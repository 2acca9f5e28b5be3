"""A penalty for leaving the reference model, estimated on the sampled tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = ("KLForm", "kl_terms")

KLForm = Literal["k3", "value"]
"""How KL(policy ‖ reference) is estimated, with d = ref - π.

* `"k3"`: e^d - d - 1, which is never negative, and whose gradient pulls the policy back. Schulman, "Approximating KL
  Divergence", 2020; Shao et al., "DeepSeekMath", 2024, equation 4.
* `"value"`: -d without a gradient, as the first cookbooks had it: it shows in the loss and **trains nothing**.
"""


def kl_terms(policy: torch.Tensor, reference: torch.Tensor, form: KLForm) -> torch.Tensor:
    """The estimate for each token.

    Args:
        policy: π, `[T]`.
        reference: ref, `[T]`.
        form: Which estimate.

    Returns:
        `[T]`, in nats.
    """
    if form == "value":
        return policy.detach() - reference
    distance = reference - policy
    return distance.exp() - distance - 1
