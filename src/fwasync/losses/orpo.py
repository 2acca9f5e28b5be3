"""ORPO: supervised learning of the chosen answer and a preference for it, in one loss without a reference.

For each pair, with p the mean logprob over a response's tokens, held within [-50, -1e-6] for the odds

    logodds(p) = p - log(1 - e^p)
    L = -p_c - λ log σ(logodds(p_c) - logodds(p_r))

**Summed over pairs**, so that one call with many pairs has the gradient of many calls with one each. Hong et al.,
"ORPO: Monolithic Preference Optimization without Reference Model", 2024, equations 6 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fwasync.errors import DatumError, UsageError
from fwasync.losses.reduction import LossFn, Reduction
from fwasync.losses.supervised import check_count, response

if TYPE_CHECKING:
    import torch

    from fwasync.types import Datum

__all__ = ("make_batch_orpo_loss_fn",)

_LOWEST, _HIGHEST = -50.0, -1e-6


def make_batch_orpo_loss_fn(response_starts: Sequence[int], orpo_lambda: float = 1.0) -> LossFn:
    """ORPO of a batch of pairs, whose datums are chosen, rejected, chosen, rejected …

    Args:
        response_starts: For each pair, the index of the first token that is of the response, in both sequences.
        orpo_lambda: λ; 0 leaves supervised learning of the chosen answers.

    Returns:
        The loss. Metrics, means over pairs: `orpo_loss`, `sft_loss`, `or_loss`, `log_odds_ratio`, `accuracy` (of log
        odds ratios above 0), `chosen_avg_lp`, `rejected_avg_lp`; and `orpo_lambda`, `batch_pairs`.

    Raises:
        DatumError: There is no pair.
        UsageError: λ is out of its range.
    """
    pairs = len(response_starts)
    if not pairs:
        raise DatumError("ORPO: at least one pair is needed")
    if not (0 <= orpo_lambda < math.inf):
        raise UsageError(f"ORPO: orpo_lambda must be a finite number of at least 0, got {orpo_lambda}")

    def compute(_data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        check_count("ORPO", f"{pairs} pairs", 2 * pairs, len(logprobs))

        def means(side: str, policy: Sequence[torch.Tensor]) -> torch.Tensor:
            rows = enumerate(zip(policy, response_starts, strict=True))
            return torch.stack([response(f"ORPO: pair {i}, {side}", *row).mean() for i, row in rows])

        chosen, rejected = means("chosen", logprobs[0::2]), means("rejected", logprobs[1::2])
        ratio = _log_odds(chosen) - _log_odds(rejected)
        preference = -torch.nn.functional.logsigmoid(ratio)
        losses = orpo_lambda * preference - chosen
        return losses.sum(), {
            "orpo_loss": losses.mean().item(),
            "sft_loss": -chosen.mean().item(),
            "or_loss": preference.mean().item(),
            "log_odds_ratio": ratio.mean().item(),
            "accuracy": (ratio > 0).double().mean().item(),
            "chosen_avg_lp": chosen.mean().item(),
            "rejected_avg_lp": rejected.mean().item(),
            "orpo_lambda": orpo_lambda,
            "batch_pairs": float(pairs),
        }

    return LossFn("orpo", Reduction.SUM_PAIRS, compute)


def _log_odds(mean_logprob: torch.Tensor) -> torch.Tensor:
    """p - log(1 - e^p), by expm1 near 0 and by log1p elsewhere, where each keeps its digits."""
    import torch

    p = mean_logprob.clamp(_LOWEST, _HIGHEST)
    log_complement = torch.where(p > -math.log(2), (-p.expm1()).log(), (-p.exp()).log1p())
    return p - log_complement
