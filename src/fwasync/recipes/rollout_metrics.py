"""What one step's groups tell: metrics by the cookbook's names, and a file of all answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fwasync.recipes.collecting import Collected
from fwasync.recipes.groups import PromptGroup
from fwasync.rollout.pass_at_k import compute_pass_at_k
from fwasync.tracking.files import write_atomically

__all__ = ("rollout_metrics", "write_trajectories")

_CORRECT = 0.5


def rollout_metrics(collected: Collected, *, step: int) -> dict[str, float]:
    """The metrics of what was sampled for a step; all of kept groups, unless their names say otherwise.

    Args:
        collected: At least one group is kept.
        step: The optimizer steps that have made the weights that learn.
    """
    kept, filtered = collected.kept, collected.filtered
    answers = [answer for group in kept for answer in group.answers]
    rewards = np.array([answer.reward for answer in answers])
    lengths = np.array([len(answer.tokens) for answer in answers])
    raw = [reward for group in [*kept, *filtered] for reward in group.rewards]
    staleness = np.array([step - group.version for group in kept])
    surprises = [-float(answer.logprobs.mean()) for answer in answers if len(answer.logprobs)]
    size = len(kept[0].answers)
    return {
        "rollout/reward": float(rewards.mean()),
        "rollout/raw_reward": float(np.mean(raw)),
        "rollout/accuracy": float((rewards > _CORRECT).mean()),
        **compute_pass_at_k([group.rewards for group in [*kept, *filtered]], sorted({1, size})),
        "rollout/samples_completed": len(answers),
        "rollout/total_sampled": len(raw),
        # Each row that was taken is in one of these three, once.
        "rollout/valid_prompt_groups": len(kept),
        "rollout/filter_drops": len(filtered),
        "rollout/sample_fails": len(collected.failed),
        "rollout/filter_reject_ratio": len(filtered) / (len(kept) + len(filtered)),
        "rollout/truncated_ratio": float(np.mean([answer.truncated for answer in answers])),
        "rollout/entropy": float(np.mean(surprises)) if surprises else 0.0,
        "rollout/response_len/mean": float(lengths.mean()),
        "rollout/response_len/median": float(np.median(lengths)),
        "rollout/response_len/max": int(lengths.max()),
        "rollout/response_len/min": int(lengths.min()),
        "version/sample_staleness_avg": float(staleness.mean()),
        "version/sample_staleness_max": int(staleness.max()),
    }


def write_trajectories(directory: Path, step: int, groups: Sequence[PromptGroup]) -> None:
    """Write `step_<four digits>.jsonl`: a line for each answer that a step was trained on. This blocks.

    Raises:
        OSError: It cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = [orjson.dumps(line, default=str).decode() + "\n" for line in _lines(step, groups)]
    write_atomically(directory / f"step_{step:04d}.jsonl", "".join(lines))


def _lines(step: int, groups: Sequence[PromptGroup]) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt_group": number,
            "completion_index": index,
            "line": group.row.line,
            "prompt": [message.to_openai() for message in group.row.messages],
            "completion": answer.text,
            "reward": answer.reward,
            "advantage": float(advantage),
            "completion_len": len(answer.tokens),
            "truncated": answer.truncated,
            "ground_truth": group.row.ground_truth,
        }
        for number, group in enumerate(groups)
        for index, (answer, advantage) in enumerate(zip(group.answers, group.advantages, strict=True))
    ]
