"""From groups to a gradient: what is sent, on either path, and what the metrics say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwasync.losses import policy_loss
from fwasync.recipes.collecting import Collected
from fwasync.recipes.policy_update import PolicyUpdate, policy_batch
from fwasync.recipes.rollout_metrics import rollout_metrics, write_trajectories
from unit.recipes.groups import group
from unit.recipes.trainer import Trainer

GROUPS = [group([0, 1], lengths=[2, 3], version=4), group([1, 1, 0], prompt=[9], lengths=[1, 0, 2], version=5)]


def test_a_batch_is_what_was_sampled() -> None:
    batch = policy_batch(GROUPS, 6)
    inputs = [datum.model_input.to_ints() for datum in batch.datums]
    targets = [datum.loss_fn_inputs["target_tokens"].tolist() for datum in batch.datums]
    assert inputs == [[1, 2, 3], [1, 2, 3, 4], [9], [9, 3]]
    assert targets == [[2, 3, 4], [2, 3, 4, 5], [3], [3, 4]]
    assert batch.prompt_lens == [2, 2, 1, 1]
    assert [each.tolist() for each in batch.sampler_logprobs] == [
        [0, -0.5, -1],
        [0, -0.5, -1, -1.5],
        [-0.5],
        [-0.5, -1],
    ]
    assert batch.advantages == pytest.approx([-(0.5**0.5), 0.5**0.5, 3**-0.5, -2 * 3**-0.5])
    assert batch.staleness == [2, 2, 1, 1]
    assert (batch.active_tokens, batch.targets) == (8, 10)


async def test_the_kernel_gets_what_the_old_policy_said(tmp_path: Path) -> None:
    trainer: Any = Trainer(tmp_path)
    batch = policy_batch(GROUPS, 6)
    loss = policy_loss("importance_sampling")
    for old_policy in (True, False):
        update = PolicyUpdate(trainer, None, loss, builtin=True, old_policy=old_policy, timeout=9.0)
        await (await update.submit(batch)).future
    assert trainer.log == [
        "forward 1",
        "await forward 1",
        "forward_backward 1",
        "await forward_backward 1",
        "forward_backward 2",
        "await forward_backward 2",
    ]
    (name, asked), (_, rolled_out) = trainer.batches
    assert name == "importance_sampling"
    first = {key: value.tolist() for key, value in asked[0].loss_fn_inputs.items()}
    # The old policy says -1 of every token, the sampler -0.5 and -1: the weights are e^-0.5 and 1.
    a = -(0.5**0.5)
    assert first["target_tokens"] == [2, 3, 4]
    assert first["logprobs"] == [-1, -1, -1]
    assert first["advantages"] == pytest.approx([0, a * np.exp(-0.5), a])
    second = {key: value.tolist() for key, value in rolled_out[0].loss_fn_inputs.items()}
    assert second["logprobs"] == [0, -0.5, -1]
    assert second["advantages"] == pytest.approx([0, a, a])


async def test_a_reference_is_asked_if_it_counts(tmp_path: Path) -> None:
    policy: Any = Trainer(tmp_path / "policy")
    reference: Any = Trainer(tmp_path / "reference")
    calls: list[Any] = []

    def custom(data: Any, loss_fn: Any, *, timeout: float) -> Any:
        calls.append((loss_fn, timeout))
        return policy._submit("custom", policy._output(data))

    policy.forward_backward_custom = custom
    batch = policy_batch(GROUPS, 6)
    for beta in (0.5, 0.0):
        loss = policy_loss("grpo", {"kl_beta": beta})
        update = PolicyUpdate(policy, reference, loss, builtin=False, old_policy=True, timeout=9.0)
        await (await update.submit(batch)).future
    asked = [entry for entry in policy.log if not entry.startswith("await")]
    assert asked == ["forward 1", "custom", "forward 2", "custom"]
    assert reference.log == ["forward 1", "await forward 1"]
    assert [timeout for _, timeout in calls] == [9.0, 9.0]
    assert [loss_fn.name for loss_fn, _ in calls] == ["grpo", "grpo"]


def test_how_far_the_trainer_is_from_the_sampler(tmp_path: Path) -> None:
    batch = policy_batch(GROUPS[:1], 6)
    output = Trainer(tmp_path)._output(batch.datums)  # -1 of every token
    d = np.array([-0.5, 0.0]), np.array([-0.5, 0.0, 0.5])
    assert batch.distance(output) == {
        "inference_diff": pytest.approx(np.mean([np.abs(each).mean() for each in d])),
        "inference_kld": pytest.approx(np.mean([(np.exp(each) - each - 1).mean() for each in d])),
    }
    output.loss_fn_outputs[0].clear()
    assert batch.distance(output) == {}


def test_what_a_step_tells_of_its_groups() -> None:
    same = group([1, 1])
    metrics = rollout_metrics(Collected([GROUPS[0]], [same, same], [ValueError()], 9), step=6)  # pyright: ignore[reportArgumentType]
    assert metrics == {
        "rollout/reward": 0.5,
        "rollout/raw_reward": pytest.approx(5 / 6),
        "rollout/accuracy": 0.5,
        "rollout/pass@1": pytest.approx(2.5 / 3),
        "rollout/pass@2": 1.0,
        "rollout/samples_completed": 2,
        "rollout/total_sampled": 6,
        "rollout/valid_prompt_groups": 1,
        "rollout/filter_drops": 2,
        "rollout/sample_fails": 1,
        "rollout/filter_reject_ratio": pytest.approx(2 / 3),
        "rollout/truncated_ratio": 0.5,
        "rollout/entropy": pytest.approx((0.75 + 1.0) / 2),
        "rollout/response_len/mean": 2.5,
        "rollout/response_len/median": 2.5,
        "rollout/response_len/max": 3,
        "rollout/response_len/min": 2,
        "version/sample_staleness_avg": 2,
        "version/sample_staleness_max": 2,
    }


def test_a_file_of_all_answers(tmp_path: Path) -> None:
    for _ in range(2):  # as a run that goes on writes it again
        write_trajectories(tmp_path / "deep" / "er", 12, GROUPS)
    lines = [json.loads(line) for line in (tmp_path / "deep" / "er" / "step_0012.jsonl").read_text().splitlines()]
    assert [(line["prompt_group"], line["completion_index"]) for line in lines] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert lines[1] == {
        "step": 12,
        "prompt_group": 0,
        "completion_index": 1,
        "line": 1,
        "prompt": [{"role": "user", "content": "?"}],
        "completion": "xxx",
        "reward": 1,
        "advantage": pytest.approx(0.5**0.5),
        "completion_len": 3,
        "truncated": True,
        "ground_truth": None,
    }
