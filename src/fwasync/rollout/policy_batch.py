"""From groups to the batch of a policy loss, and from its result to what was learnt.

Invariants
    * The batch is in the order of the groups and of their completions.
    * Its loss is a mean over completion tokens: every advantage is divided by their number, because trainers sum. So
      the gradient's scale does not depend on how many tokens were sampled, on any trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fwasync.data.datums import policy_datum
from fwasync.rollout.advantages import group_advantages
from fwasync.rollout.groups import Completion, Group

if TYPE_CHECKING:
    from fwasync.types import Datum, ForwardBackwardOutput

__all__ = ("PolicyBatch", "policy_batch")


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """Datums, and for each of them its completion and its advantage, before the division.

    `tokens` counts completion tokens.
    """

    datums: tuple[Datum, ...]
    completions: tuple[Completion, ...]
    advantages: tuple[float, ...]
    tokens: int

    def loss(self, output: ForwardBackwardOutput) -> float:
        """The mean over completion tokens of -exp(log p - log q) A, p being the trainer's and q the sampler's."""
        terms = [
            -advantage * float(np.exp(difference, dtype=np.float64).sum())
            for difference, advantage in zip(self._differences(output), self.advantages, strict=True)
        ]
        return sum(terms) / self.tokens

    def kl(self, output: ForwardBackwardOutput) -> float:
        """The mean over completion tokens of log q - log p: an estimate of how far the trainer is from the sampler."""
        return -sum(float(difference.sum(dtype=np.float64)) for difference in self._differences(output)) / self.tokens

    def _differences(self, output: ForwardBackwardOutput) -> list[npt.NDArray[np.float32]]:
        """log p - log q of each completion."""
        differences: list[npt.NDArray[np.float32]] = []
        for record, completion in zip(output.loss_fn_outputs, self.completions, strict=True):
            trainer: npt.NDArray[np.float32] = record["logprobs"].to_numpy()
            differences.append(trainer[-len(completion.tokens) :] - completion.logprobs)
        return differences


def policy_batch(groups: Sequence[Group]) -> PolicyBatch:
    """The batch of one optimizer step. Completions without a single token hold nothing to learn and are left out."""
    kept: list[tuple[Group, Completion, float]] = []
    for group in groups:
        advantages = group_advantages([completion.reward for completion in group.completions])
        for completion, advantage in zip(group.completions, advantages, strict=True):
            if len(completion.tokens):
                kept.append((group, completion, float(advantage)))
    tokens = sum(len(completion.tokens) for _, completion, _ in kept)
    datums = [
        policy_datum(group.prompt_tokens, completion.tokens, completion.logprobs, advantage / tokens)
        for group, completion, advantage in kept
    ]
    return PolicyBatch(
        tuple(datums),
        tuple(completion for _, completion, _ in kept),
        tuple(advantage for _, _, advantage in kept),
        tokens,
    )
