"""Evaluation: one greedy answer to each prompt, rewarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fwasync.rollout.groups import Decoding, Prompt, Reward, Sampler, Tokenizer, sample_groups

__all__ = ("Answer", "Evaluation", "evaluate")


@dataclass(frozen=True, slots=True)
class Answer:
    """The greedy answer to a prompt, and its reward."""

    prompt: Prompt
    text: str
    reward: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The answers, in the order of the prompts."""

    answers: tuple[Answer, ...]

    @property
    def mean_reward(self) -> float:
        """The mean reward."""
        return float(np.mean([answer.reward for answer in self.answers]))

    @property
    def exact(self) -> float:
        """The part of the answers that are the truth itself, blanks around them aside."""
        return float(np.mean([answer.text.strip() == answer.prompt.truth for answer in self.answers]))


async def evaluate(
    sampler: Sampler, prompts: Sequence[Prompt], *, tokenizer: Tokenizer, reward: Reward, max_tokens: int
) -> Evaluation:
    """Answer all prompts at once, at temperature 0.

    **Cancellation:** nothing remains.
    """
    groups = await sample_groups(
        sampler,
        prompts,
        seeds=[0] * len(prompts),
        decoding=Decoding(num_samples=1, max_tokens=max_tokens, temperature=0.0),
        tokenizer=tokenizer,
        reward=reward,
    )
    return Evaluation(
        tuple(Answer(group.prompt, group.completions[0].text, group.completions[0].reward) for group in groups)
    )
