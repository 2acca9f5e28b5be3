"""DPO: learn which of two answers is preferred, from how far each is from a reference model.

For each pair, summed over the tokens of each response

    Δ_c = Σ (π_c - ref_c)        Δ_r = Σ (π_r - ref_r)
    L = -log σ(β (Δ_c - Δ_r))

The loss is a **mean over pairs**; with microbatches, the sum of their means. Rafailov et al., "Direct Preference
Optimization: Your Language Model is Secretly a Reward Model", 2023, equation 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fwasync.errors import DatumError, UsageError
from fwasync.losses.alignment import Floats, Logprobs, check_finite
from fwasync.losses.reduction import LossFn, Reduction
from fwasync.losses.supervised import check_count, check_sizes, microbatches, response

if TYPE_CHECKING:
    import torch

    from fwasync.types import Datum

__all__ = ("make_batch_dpo_loss_fn",)


def make_batch_dpo_loss_fn(
    ref_chosen: Logprobs,
    ref_rejected: Logprobs,
    response_starts: Sequence[int],
    beta: float = 0.1,
    *,
    microbatch_sizes: Sequence[int] | None = None,
) -> LossFn:
    """DPO of a batch of pairs, whose datums are chosen, rejected, chosen, rejected …

    Args:
        ref_chosen: The reference model's logprobs of each pair's chosen sequence, in the positions of its datum, `[N]`.
        ref_rejected: Of its rejected one.
        response_starts: For each pair, the index of the first token that is of the response, in both sequences.
        beta: How firmly the reference holds the policy; above 0.
        microbatch_sizes: Pairs of each microbatch, in order.

    Returns:
        The loss. Metrics, means over pairs: `dpo_loss`, `margin` (Δ_c - Δ_r), `accuracy` (of margins above 0),
        `chosen_reward` (β Δ_c), `rejected_reward` (β Δ_r); and `batch_pairs`.

    Raises:
        UsageError: β is out of its range, the numbers of entries differ, or microbatches are empty.
    """
    pairs = len(response_starts)
    if not (0 < beta < math.inf):
        raise UsageError(f"DPO: beta must be a finite number above 0, got {beta}")
    if not len(ref_chosen) == len(ref_rejected) == pairs:
        raise DatumError(
            f"DPO: there are {pairs} response_starts, {len(ref_chosen)} chosen and {len(ref_rejected)} rejected "
            "sequences of reference logprobs; each pair needs one of each"
        )
    check_sizes(microbatch_sizes)

    def compute(_data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        check_count("DPO", f"{pairs} pairs", 2 * pairs, len(logprobs))

        def distances(side: str, policy: Sequence[torch.Tensor], reference: Logprobs) -> torch.Tensor:
            rows = zip(policy, reference, response_starts, strict=True)
            return torch.stack([_distance(f"DPO: pair {i}, {side}", *row) for i, row in enumerate(rows)])

        chosen = distances("chosen", logprobs[0::2], ref_chosen)
        rejected = distances("rejected", logprobs[1::2], ref_rejected)
        margin = chosen - rejected
        losses = -torch.nn.functional.logsigmoid(beta * margin)
        parts = microbatches("DPO", microbatch_sizes, pairs)
        return torch.stack([losses[part].mean() for part in parts]).sum(), {
            "dpo_loss": losses.mean().item(),
            "margin": margin.mean().item(),
            "accuracy": (margin > 0).double().mean().item(),
            "chosen_reward": beta * chosen.mean().item(),
            "rejected_reward": beta * rejected.mean().item(),
            "batch_pairs": float(pairs),
        }

    return LossFn("dpo", Reduction.MEAN_PAIRS, compute)


def _distance(where: str, policy: torch.Tensor, reference: Sequence[float] | Floats, start: int) -> torch.Tensor:
    """Σ (π - ref) over a response."""
    import torch

    row = np.asarray(reference, np.float64)
    if row.shape != tuple(policy.shape):
        raise DatumError(f"{where}: {len(policy)} reference logprobs are needed, got {row.size}")
    chosen = response(where, policy, start)
    positions = np.arange(len(row) - len(chosen), len(row))
    check_finite(where, "reference logprobs", row[positions], positions)
    return (chosen - torch.as_tensor(row[positions], dtype=policy.dtype, device=policy.device)).sum()
