"""Groups to test with: rows, answers of one letter a token, and what samples them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fwasync.data.messages import Message
from fwasync.data.prompts import PromptRow
from fwasync.recipes.groups import Answer, PromptGroup, TakenRow
from fwasync.rollout.advantages import group_advantages


def row(line: int = 1, text: str = "?", truth: Any = None) -> PromptRow:
    return PromptRow((Message("user", text),), truth, {}, line)


def taken(cursor: int) -> TakenRow:
    return TakenRow(row(cursor), (1, 2), cursor)


def group(
    rewards: Sequence[float], *, prompt: Sequence[int] = (1, 2), lengths: Sequence[int] | None = None, version: int = 0
) -> PromptGroup:
    """Answers of the tokens 3, 4, 5 …, with the logprobs -0.5, -1, -1.5 …."""
    answers = [
        Answer(
            np.arange(3, 3 + length),
            (-0.5 * np.arange(1, 1 + length)).astype(np.float32),
            "x" * length,
            reward,
            length > 2,
        )
        for reward, length in zip(rewards, lengths or [2] * len(rewards), strict=True)
    ]
    return PromptGroup(row(), tuple(prompt), tuple(answers), group_advantages(rewards), version)
