"""Evaluation: one greedy answer to each prompt, rewarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import anyio.to_thread
import numpy as np

from fwasync import AsyncSamplingClient
from fwasync.data.chat import ChatTokenizer
from fwasync.data.prompts import PromptRow
from fwasync.recipes.prompts import render_prompts

__all__ = ("Answer", "Evaluation", "evaluate")


@dataclass(frozen=True, slots=True)
class Answer:
    """The greedy answer to a prompt, and its reward."""

    row: PromptRow
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
        return float(np.mean([answer.text.strip() == answer.row.ground_truth for answer in self.answers]))


async def evaluate(
    sampler: AsyncSamplingClient,
    rows: Sequence[PromptRow],
    *,
    tokenizer: ChatTokenizer,
    reward: Callable[[str, PromptRow], float],
    max_tokens: int,
) -> Evaluation:
    """Answer all prompts at once, at temperature 0.

    Raises:
        FwasyncError: What sampling raises.

    **Cancellation:** nothing remains.
    """
    from fwasync.types import ModelInput, SamplingParams

    prompts = await anyio.to_thread.run_sync(render_prompts, "", rows, tokenizer)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, stop=tokenizer.stop_tokens or None)
    texts = [""] * len(rows)

    async def answer(index: int) -> None:
        response = await sampler.sample(ModelInput.from_ints(list(prompts.tokens[index] or ())), 1, params)
        texts[index] = tokenizer.decode(response.sequences[0].tokens)

    async with anyio.create_task_group() as tasks:
        for index in range(len(rows)):
            tasks.start_soon(answer, index)
    return Evaluation(tuple(Answer(row, text, reward(text, row)) for row, text in zip(rows, texts, strict=True)))
