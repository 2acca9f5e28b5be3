"""pass@k: how likely one of k answers to a prompt is right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fwasync.errors import UsageError

__all__ = ("compute_pass_at_k",)

_CORRECT = 0.5


def compute_pass_at_k(groups: Iterable[Sequence[float]], ks: Sequence[int] = (1,)) -> dict[str, float]:
    """Estimate pass@k without bias: the mean over prompts of 1 - C(n - c, k) / C(n, k).

    Of the n answers to a prompt, c are right. Chen et al., "Evaluating Large Language Models Trained on Code", 2021,
    equation 1.

    Args:
        groups: The rewards of the answers to each prompt; an answer is right if its reward is above 0.5.
        ks: Numbers of answers, each at least 1.

    Returns:
        `rollout/pass@<k>` for each k. A prompt with fewer than k answers says nothing about that k and is left out; a k
        about which no prompt says anything has no entry.

    Raises:
        UsageError: A k is less than 1.
    """
    if any(k < 1 for k in ks):
        raise UsageError(f"pass@k is of at least one answer; ks is {list(ks)}")
    counts = [(len(rewards), sum(reward > _CORRECT for reward in rewards)) for rewards in groups]
    estimates = {k: [_pass(n, c, k) for n, c in counts if n >= k] for k in ks}
    return {f"rollout/pass@{k}": math.fsum(values) / len(values) for k, values in estimates.items() if values}


def _pass(n: int, c: int, k: int) -> float:
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
