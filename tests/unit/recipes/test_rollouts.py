"""Rollouts as datums, metrics and answers, and the bound of their length."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from fwasync.data.prompts import PromptRow
from fwasync.recipes.async_rl import Config
from fwasync.recipes.groups import TakenRow
from fwasync.recipes.policy_update import merge_chunks, rollout_batch
from fwasync.recipes.rollouts import FittingRollout, RolloutTooLongError, answered
from fwasync.rollout.context import RolloutContext
from fwasync.rollout.failures import is_recoverable
from fwasync.rollout.trajectory import Rollout, RolloutGroup
from fwasync.rollout.transcript import TokenTranscript

ROW = TakenRow(PromptRow((), "truth", {}, 1), (5, 6), 1)


def conversation() -> Rollout:
    """Two turns, sampled by versions 3 and 4."""
    transcript = TokenTranscript()
    transcript.append([5, 6])
    transcript.append_sampled([7, 8], [-0.5, -1.0], 3)
    transcript.append([9])
    transcript.append_sampled([10], [-2.0], 4)
    return Rollout((transcript.segment(),), 1.0, "text")


def group(*rollouts: Rollout) -> RolloutGroup[TakenRow]:
    return RolloutGroup(ROW, 0, 3, rollouts, tuple(0.5 for _ in rollouts))


def test_a_conversation_learns_where_it_was_sampled_from_the_logprobs_of_what_sampled_it() -> None:
    batch = rollout_batch([group(conversation())], version=5)
    (datum,) = batch.loss_datums
    inputs = {name: tensor.to_numpy().tolist() for name, tensor in datum.loss_fn_inputs.items()}
    assert inputs["target_tokens"] == [6, 7, 8, 9, 10]
    assert inputs["weights"] == inputs["loss_mask"] == [0, 1, 1, 0, 1]
    assert batch.sampler_logprobs[0].tolist() == [0, -0.5, -1, 0, -2]
    assert (batch.prompt_lens, batch.advantages, batch.staleness) == ([2], [0.5], [2])  # of its oldest tokens
    assert (batch.active_tokens, batch.targets) == (3, 5)
    assert "loss_mask" not in batch.datums[0].loss_fn_inputs  # which forward passes do not know


def test_what_was_sampled_is_the_answer() -> None:
    (answer,) = answered(group(conversation())).answers
    assert (answer.tokens.tolist(), answer.logprobs.tolist()) == ([7, 8, 10], [-0.5, -1, -2])
    assert (answer.text, answer.reward, answer.truncated) == ("text", 1.0, False)


async def test_a_rollout_that_is_too_long_is_lost_and_no_more() -> None:
    async def rollout(prompt: TakenRow, ctx: RolloutContext) -> Rollout | None:
        return conversation()

    async def nothing(prompt: TakenRow, ctx: RolloutContext) -> Any:
        return None

    ctx = cast("RolloutContext", None)
    assert await FittingRollout(rollout, 6)(ROW, ctx) is not None
    assert await FittingRollout(nothing, 6)(ROW, ctx) is None
    with pytest.raises(RolloutTooLongError, match="a segment has 6 tokens; the trainer takes 5") as error:
        await FittingRollout(rollout, 5)(ROW, ctx)
    assert is_recoverable(error.value)


def test_chunks_are_told_as_one_batch() -> None:
    parts = [
        {"loss:sum": 1.0, "active_tokens": 1.0, "total_resp_tokens": 4.0, "mask_ratio": 0.25, "ratio": 1.0, "a:max": 1},
        {
            "loss:sum": 2.0,
            "active_tokens": 3.0,
            "total_resp_tokens": 4.0,
            "mask_ratio": 0.75,
            "ratio": 2.0,
            "rare": 7.0,
        },
    ]
    assert merge_chunks(parts, [1, 3]) == {
        "loss:sum": 3.0,
        "active_tokens": 4.0,
        "total_resp_tokens": 8.0,
        "mask_ratio": 0.5,
        "ratio": 1.75,
        "a:max": 1,
        "rare": 7.0,
    }


def test_the_defaults_are_the_cookbooks() -> None:
    defaults = Config(log_path=Path("run"))
    settings = defaults.rollouts()
    assert (defaults.max_head_offpolicy_versions, settings.max_staleness) == (0, 0)
    assert (settings.groups_per_batch, settings.group_size, settings.chunks_per_batch) == (1, 4, 1)
    assert (settings.max_concurrency, settings.least_group_size, settings.max_group_retries) == (None, 1, 0)
    assert np.isclose(defaults.kl_beta, 0.001)
