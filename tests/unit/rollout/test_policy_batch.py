"""The batch of a policy loss: what it holds, and what is read from its result."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fwasync.data.jsonl import Message
from fwasync.rollout.groups import Completion, Group, Prompt
from fwasync.rollout.policy_batch import policy_batch
from fwasync.types import ForwardBackwardOutput, TensorData

PROMPT = Prompt((Message("user", "?"),))


def completion(tokens: list[int], reward: float) -> Completion:
    return Completion(np.array(tokens), np.full(len(tokens), -1.0, np.float32), "", reward, True)


def group(*completions: Completion) -> Group:
    return Group(PROMPT, (1, 2), completions)


def test_advantages_are_per_group_and_divided_by_all_tokens() -> None:
    batch = policy_batch(
        [group(completion([3, 4], 1.0), completion([5], 0.0)), group(completion([6], 9.0), completion([7], 9.0))]
    )
    assert batch.tokens == 5
    assert batch.advantages == pytest.approx((math.sqrt(0.5), -math.sqrt(0.5), 0, 0))
    first, second, *_ = [datum.loss_fn_inputs["advantages"].to_numpy() for datum in batch.datums]
    assert first == pytest.approx([0, math.sqrt(0.5) / 5, math.sqrt(0.5) / 5])
    assert second == pytest.approx([0, -math.sqrt(0.5) / 5])
    assert [datum.model_input.to_ints() for datum in batch.datums] == [[1, 2, 3], [1, 2], [1, 2], [1, 2]]


def test_a_completion_without_tokens_counts_for_its_group_and_is_not_sent() -> None:
    batch = policy_batch([group(completion([], 0.0), completion([3], 1.0))])
    assert len(batch.datums) == 1
    assert batch.advantages == pytest.approx((math.sqrt(0.5),))


def test_loss_and_kl_are_means_over_completion_tokens() -> None:
    batch = policy_batch([group(completion([3, 4], 1.0), completion([5], 0.0))])
    # The prompt's position comes first, and must not matter.
    trainer = [[-99.0, -1.0, -1.5], [-99.0, -0.5]]
    output = ForwardBackwardOutput(
        loss_fn_output_type="",
        loss_fn_outputs=[{"logprobs": TensorData.from_numpy(np.array(row, np.float32))} for row in trainer],
        metrics={},
    )
    advantage = math.sqrt(0.5)
    assert batch.loss(output) == pytest.approx((-advantage * (1 + math.exp(-0.5)) + advantage * math.exp(0.5)) / 3)
    assert batch.kl(output) == pytest.approx((0 + 0.5 - 0.5) / 3)
