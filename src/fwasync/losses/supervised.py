"""What the supervised and the preference losses share: responses, slices, and microbatches.

Position j of a datum's arrays predicts token j + 1 of its sequence, so a response that starts with token
`response_start` starts at position max(0, response_start - 1): its first token is part of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fwasync.data.alignment import response_start
from fwasync.errors import DatumError, UsageError
from fwasync.losses.alignment import check_finite

if TYPE_CHECKING:
    import torch

__all__ = ("check_count", "check_sizes", "microbatches", "perplexity", "response")


def response(where: str, logprobs: torch.Tensor, start_token: int) -> torch.Tensor:
    """The logprobs of a response, `[C]` of `[N]`.

    Raises:
        DatumError: It is empty or not of one dimension, or one of its logprobs is not finite.
    """
    if logprobs.ndim != 1:
        raise DatumError(f"{where}: this loss takes one target for each position, got {tuple(logprobs.shape)}")
    start = response_start(start_token)
    chosen = logprobs[start:]
    if not len(chosen):
        raise DatumError(
            f"{where}: response_start {start_token} leaves nothing of its {len(logprobs)} positions to learn"
        )
    check_finite(where, "policy logprobs", chosen.detach().cpu().numpy(), np.arange(start, len(logprobs)))
    return chosen


def check_count(name: str, what: str, expected: int, got: int) -> None:
    """Raise DatumError for an empty batch, or one of another size than expected."""
    if not got:
        raise DatumError(f"{name}: the batch is empty")
    if expected != got:
        raise DatumError(f"{name}: {what} make a batch of {expected}; got {got}")


def check_sizes(sizes: Sequence[int] | None) -> None:
    """Raise UsageError for a list of microbatches that is empty or has one of no size."""
    if sizes is not None and (not len(sizes) or min(sizes) < 1):
        raise UsageError(f"microbatch_sizes must be a list of positive numbers, got {list(sizes)}")


def microbatches(name: str, sizes: Sequence[int] | None, count: int) -> Iterator[slice]:
    """The parts of a batch, of which each is reduced by itself; `None` is one part.

    Raises:
        DatumError: The sizes do not sum to the batch.
    """
    start = 0
    if sizes is not None and sum(sizes) != count:
        raise DatumError(f"{name}: microbatch_sizes sum to {sum(sizes)}, but the batch has {count}")
    for size in [count] if sizes is None else sizes:
        yield slice(start, start + size)
        start += size


def perplexity(mean_nll: float) -> float:
    """exp(mean_nll), infinite where that overflows; NaN stays NaN."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
