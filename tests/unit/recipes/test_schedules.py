"""Learning-rate schedules, at the points where their formulas can be read off."""

from __future__ import annotations

import math

import pydantic
import pytest

from fwasync.recipes.optimizer import grad_norm, remote_metrics
from fwasync.recipes.schedules import LRSchedule
from fwasync.types import ForwardBackwardOutput, OptimStepResponse


def rates(schedule: LRSchedule, total: int = 10) -> list[float]:
    return [round(schedule.rate(1.0, step, total), 6) for step in range(1, total + 1)]


def test_constant_with_a_warm_up() -> None:
    assert rates(LRSchedule(), 3) == [1, 1, 1]
    assert rates(LRSchedule(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(LRSchedule(warmup_ratio=0.2)) == [0.5] + [1] * 9


def test_linear_and_cosine_decay_from_the_warm_up_to_the_floor() -> None:
    assert rates(LRSchedule(type="linear", warmup_steps=2)) == [0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]
    assert rates(LRSchedule(type="linear", min_lr_ratio=0.5), 4) == [0.875, 0.75, 0.625, 0.5]
    cosine = rates(LRSchedule(type="cosine", min_lr_ratio=0.1), 4)
    assert cosine == [round(0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2, 6) for step in range(1, 5)]
    assert cosine[-1] == 0.1


def test_wsd_stays_and_then_decays() -> None:
    assert rates(LRSchedule(type="wsd")) == [1] * 9 + [0]
    half = {"type": "wsd", "decay_ratio": 0.5, "warmup_steps": 1}
    assert rates(LRSchedule(**half)) == [1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]
    root = rates(LRSchedule(**half, decay_type="sqrt", min_lr_ratio=0.2))
    assert root[5] == round(1 - math.sqrt(0.2) * 0.8, 6)
    assert root[-1] == 0.2
    assert rates(LRSchedule(type="wsd", decay_ratio=1.0, warmup_steps=8)) == [step / 8 for step in range(1, 9)] + [
        0.5,
        0,
    ]


def test_the_last_step_may_be_a_warm_up_and_there_may_be_more() -> None:
    assert LRSchedule(type="cosine", warmup_steps=4).rate(2.0, 4, 4) == 2.0
    assert LRSchedule(type="cosine", min_lr_ratio=0.5).rate(2.0, 9, 4) == 1.0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "either warmup_steps or warmup_ratio"),
        ({"type": "linear", "decay_ratio": 0.1}, "decay_ratio is for type 'wsd'"),
        ({"type": "cosine", "decay_type": "sqrt"}, "decay_type is for type 'wsd'"),
        ({"warmup_ratio": 1.0}, "less than 1"),
        ({"typ": "wsd"}, "did you mean 'type'"),
    ],
)
def test_what_cannot_be(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=told):
        LRSchedule.model_validate(wrong)


def test_what_the_trainer_tells() -> None:
    assert grad_norm(OptimStepResponse(metrics={"unclipped_grad_l2:mean": 3.0})) == {"train/grad_norm": 3.0}
    assert grad_norm(OptimStepResponse(metrics=None)) == {}
    output = ForwardBackwardOutput(loss_fn_output_type="", loss_fn_outputs=[], metrics={"loss:sum": 1.0, "step": 4.0})
    told = remote_metrics(output, OptimStepResponse(metrics={"grad_norm": 2.0, "step_id": 9.0}))
    assert told == {"train/loss:sum": 1.0, "train/grad_norm": 2.0}
