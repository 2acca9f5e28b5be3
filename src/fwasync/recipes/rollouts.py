"""Rollouts of recipes: one answer to a prompt, rewarded; or the user's own coroutine, held to the trainer's limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from fwasync.errors import RecoverableRolloutError
from fwasync.recipes.groups import Answer, PromptGroup, RewardFn, TakenRow, rewards_of
from fwasync.rollout.context import RolloutContext
from fwasync.rollout.trajectory import Rollout, RolloutGroup

__all__ = ("FittingRollout", "PromptRollout", "RolloutTooLongError", "SingleTurn", "answered")

PromptRollout = Callable[[TakenRow, RolloutContext], Awaitable[Rollout | None]]
"""`async def rollout(prompt, ctx)`: one rollout of a prompt, or `None` for one that is not to count."""


class RolloutTooLongError(RecoverableRolloutError):
    """A rollout has a segment that is longer than the trainer takes."""


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """One answer to each prompt.

    Attributes:
        reward: The reward function.
        max_tokens: The longest answer.
        max_seq_len: The longest prompt with its answer.
        temperature: Of the sampling.
    """

    reward: RewardFn
    max_tokens: int
    max_seq_len: int
    temperature: float

    async def __call__(self, prompt: TakenRow, ctx: RolloutContext) -> Rollout | None:
        """Sample and reward.

        Raises:
            Exception: What the sampler or the reward function raises.

        **Cancellation:** the request ends; a reward function that runs in a thread goes on, unheard.
        """
        session = ctx.session()
        session.append(prompt.prompt_tokens)
        room = self.max_seq_len - len(prompt.prompt_tokens)
        turn = await session.sample(max_tokens=min(self.max_tokens, room), temperature=self.temperature)
        if not turn.tokens:
            return None  # there is no token that could learn
        ctx.note("waiting for its reward")
        (reward,) = await rewards_of(self.reward, [turn.text], prompt.row)
        return session.rollout(reward)


@dataclass(frozen=True, slots=True)
class FittingRollout:
    """A rollout that the trainer can take; one that is too long is lost, and counted by that cause."""

    rollout: PromptRollout
    max_seq_len: int

    async def __call__(self, prompt: TakenRow, ctx: RolloutContext) -> Rollout | None:
        """Roll out.

        Raises:
            RolloutTooLongError: It has become too long.
            Exception: What the rollout raises.

        **Cancellation:** that of the rollout.
        """
        rollout = await self.rollout(prompt, ctx)
        if isinstance(rollout, Rollout):
            longest = max(len(segment.tokens) for segment in rollout.segments)
            if longest > self.max_seq_len:
                raise RolloutTooLongError(f"a segment has {longest} tokens; the trainer takes {self.max_seq_len}")
        return rollout


def answered(group: RolloutGroup[TakenRow]) -> PromptGroup:
    """A group for metrics and files: of each rollout, what was sampled is its answer."""
    answers: list[Answer] = []
    for rollout in group.rollouts:
        parts = [(segment.tokens[segment.mask], segment.logprobs[segment.mask]) for segment in rollout.segments]
        tokens, logprobs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        answers.append(Answer(tokens, logprobs, rollout.text, rollout.reward, rollout.truncated))
    advantages = np.asarray(group.advantages, np.float64)
    return PromptGroup(group.row.row, group.row.prompt_tokens, tuple(answers), advantages, group.version)
