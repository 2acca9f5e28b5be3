"""What a rollout brings: token sequences that know which of their tokens were sampled, by which weights, and a reward.

Invariants
    * The arrays of a segment have one entry for each of its tokens.
    * A mask covers sampled tokens and no others; the logprob and the version of each of them is known.
    * Advantages belong to rollouts: all segments of one have the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fwasync.data.datums import masked_policy_datum
from fwasync.errors import UsageError

if TYPE_CHECKING:
    from fwasync.types import Datum

__all__ = ("Rollout", "RolloutGroup", "Segment", "rewards_differ", "rollout_datums")

RowT = TypeVar("RowT")
RowT_co = TypeVar("RowT_co", covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One sequence of tokens, which becomes one datum.

    Attributes:
        tokens: int64 `[L]`, L at least 2.
        logprobs: The sampler's, float32 `[L]` in nats; 0 where the mask is false.
        mask: bool `[L]`, true on the tokens that were sampled; not on the first.
        versions: int32 `[L]`, the policy version that sampled each token; -1 where the mask is false.

    Raises:
        UsageError: Lengths disagree, the mask is not of bools, no token was sampled, or one of them has no version or a
            logprob that is not a finite number.
    """

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    versions: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        lengths = [len(array) for array in (self.tokens, self.logprobs, self.mask, self.versions)]
        if len(set(lengths)) != 1:
            raise UsageError(f"a segment's tokens, logprobs, mask and versions have the lengths {lengths}")
        if getattr(self.mask, "dtype", None) != np.bool_:
            raise UsageError("the mask of a segment is a NumPy array of bool")
        if not self.mask[1:].any() or self.mask[0]:
            raise UsageError("a segment begins with a token that was given, and has at least one that was sampled")
        if not np.isfinite(self.logprobs[self.mask]).all():
            raise UsageError("a segment has a sampled token whose logprob is not a finite number")
        if (self.versions[self.mask] < 0).any():
            raise UsageError("a segment has a sampled token without a version")


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One run of the policy on a row.

    Attributes:
        segments: Its token sequences; several where the conversation was cut or branched.
        reward: A finite number.
        text: The last answer, for people.
        truncated: Whether an answer was cut off at its longest length.
        metrics: Further numbers of this rollout.

    Raises:
        UsageError: There are no segments, or the reward is not a finite number.
    """

    segments: tuple[Segment, ...]
    reward: float
    text: str = ""
    truncated: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        if not self.segments:
            raise UsageError("a rollout has at least one segment; return None to drop it")
        if not math.isfinite(self.reward):
            raise UsageError(f"the reward of a rollout is {self.reward}; it must be a finite number")

    @property
    def sampled_tokens(self) -> int:
        """How many of its tokens were sampled."""
        return sum(int(segment.mask.sum()) for segment in self.segments)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup(Generic[RowT_co]):
    """The rollouts of one row that are left.

    Attributes:
        row: The row.
        row_index: Its place in the source.
        version: The policy version that was published when the group started: none of its tokens is older.
        rollouts: At least `min_group_size` of them.
        advantages: One for each rollout.
    """

    row: RowT_co
    row_index: int
    version: int
    rollouts: tuple[Rollout, ...]
    advantages: tuple[float, ...]


def rewards_differ(group: RolloutGroup[object]) -> bool:
    """Whether a group has something to teach: a filter for the scheduler."""
    return len({rollout.reward for rollout in group.rollouts}) > 1


def rollout_datums(
    groups: Sequence[RolloutGroup[RowT]], *, scale: float = 1.0, include_loss_mask: bool = False
) -> list[Datum]:
    """The datums of groups for a policy loss, in the order of groups, rollouts and segments.

    Args:
        groups: A chunk, or the groups of a batch.
        scale: Multiplies every advantage. Trainers sum over tokens: 1 / (sampled tokens) makes the loss their mean.
        include_loss_mask: Give each its mask as `loss_mask` too, which the losses of `fwasync.losses` read.
    """
    return [
        masked_policy_datum(
            segment.tokens,
            segment.logprobs,
            segment.mask,
            advantage * scale,
            include_loss_mask=include_loss_mask,
        )
        for group in groups
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        for segment in rollout.segments
    ]
