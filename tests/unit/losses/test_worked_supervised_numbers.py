"""The supervised and the preference losses on examples worked through by hand."""

from __future__ import annotations

import math

import pytest

from fwasync.losses import (
    make_batch_dpo_loss_fn,
    make_batch_orpo_loss_fn,
    make_batch_sft_loss_fn,
    make_batch_weighted_sft_loss_fn,
    make_sft_loss_fn,
)
from fwasync.losses.supervised import perplexity
from unit.losses.cases import apply, datum

CHOSEN, REJECTED = [-1, -0.5, -0.2, -0.3], [-1, -0.5, -1.2, -0.9]
REF_CHOSEN, REF_REJECTED = [-1, -0.5, -0.4, -0.5], [-1, -0.5, -1.0, -0.8]


def approx(expected):
    return pytest.approx(expected, abs=1e-6)


def test_sft_of_one_sample_has_the_first_response_token_in_it() -> None:
    done = apply(make_sft_loss_fn(2, [1, 2, 3, 4]), [CHOSEN])
    assert done.loss == approx(1 / 3)
    assert done.gradients == [approx([0, -1 / 3, -1 / 3, -1 / 3])]
    assert done.metrics == approx({"ce_loss": 1 / 3, "ppl": math.exp(1 / 3), "response_tokens": 3})
    # the cookbook's older slice, which begins one token later
    assert apply(make_sft_loss_fn(3), [CHOSEN]).metrics == approx(
        {"ce_loss": 0.25, "ppl": math.exp(0.25), "response_tokens": 2}
    )


@pytest.mark.parametrize("start", [0, 1])
def test_a_response_may_start_with_the_sequence(start) -> None:
    assert apply(make_sft_loss_fn(start), [CHOSEN]).loss == approx(0.5)


def test_sft_of_a_batch_is_a_mean_over_tokens_not_over_samples() -> None:
    done = apply(make_batch_sft_loss_fn([2, 1]), [CHOSEN, [-0.7, -0.1]])
    assert done.loss == approx(0.36)
    assert done.gradients == [approx([0, -0.2, -0.2, -0.2]), approx([-0.2, -0.2])]
    assert done.metrics == approx(
        {"ce_loss": 0.36, "ce_loss_sum": 1.8, "ppl": math.exp(0.36), "response_tokens": 5, "batch_size": 2}
    )


def weighted(microbatch_sizes=None, masks=((0, 1, 1), (1, 1)), rows=((-0.1, -0.2, -0.3), (-0.4, -0.5))):
    data = [datum(len(mask), weights=mask) for mask in masks]
    return apply(make_batch_weighted_sft_loss_fn(microbatch_sizes), rows, data)


def test_weighted_sft() -> None:
    done = weighted()
    assert done.loss == approx(0.35)
    assert done.gradients == [approx([0, -0.25, -0.25]), approx([-0.25, -0.25])]
    told = {"ce_loss": 0.35, "ce_loss_sum": 1.4, "weighted_tokens": 4, "microbatch_count": 1, "batch_size": 2}
    assert {name: done.metrics[name] for name in told} == approx(told)
    assert weighted(masks=((0, 0, 1, 0), (0, 1, 1)), rows=((0, 0, -0.3, 0), (0, -0.3, -0.5))).loss == approx(1.1 / 3)
    assert weighted(masks=((0, 3, 1), (0, 0))).loss == approx((3 * 0.2 + 0.3) / 4)


def test_microbatches_add_their_own_means() -> None:
    done = weighted([1, 1])
    assert done.loss == approx(0.25 + 0.45)
    assert done.gradients == [approx([0, -0.5, -0.5]), approx([-0.5, -0.5])]
    assert done.metrics["microbatch_count"] == 2
    assert done.metrics["ce_loss"] == approx(0.35)
    assert weighted([2]).loss == approx(0.35)


def test_perplexity_overflows_to_infinity_and_keeps_nan() -> None:
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def dpo(pairs: int = 1, start: int = 2, microbatch_sizes=None):
    loss_fn = make_batch_dpo_loss_fn(
        [REF_CHOSEN] * pairs, [REF_REJECTED] * pairs, [start] * pairs, 0.1, microbatch_sizes=microbatch_sizes
    )
    return apply(loss_fn, [CHOSEN, REJECTED] * pairs)


@pytest.mark.parametrize(("start", "first"), [(2, 1), (3, 2)])  # 3 is the cookbook's older slice of 2
def test_dpo(start, first) -> None:
    done = dpo(start=start)
    assert done.loss == approx(0.6587596)
    slope = [0.0] * first + [0.04825072] * (4 - first)
    assert done.gradients == [approx([-x for x in slope]), approx(slope)]
    assert done.metrics == approx(
        {
            "dpo_loss": 0.6587596,
            "margin": 0.7,
            "accuracy": 1,
            "chosen_reward": 0.04,
            "rejected_reward": -0.03,
            "batch_pairs": 1,
        }
    )


def test_dpo_is_a_mean_over_pairs_and_a_sum_over_microbatches() -> None:
    assert dpo(2).loss == approx(0.6587596)
    assert dpo(3, microbatch_sizes=[1, 2]).loss == approx(2 * 0.6587596)
    assert dpo(3, microbatch_sizes=[1, 2]).metrics["dpo_loss"] == approx(0.6587596)


def test_orpo_is_a_sum_over_pairs() -> None:
    done = apply(make_batch_orpo_loss_fn([2]), [CHOSEN, REJECTED])
    assert done.loss == approx(0.5855621)
    assert done.metrics == approx(
        {
            "orpo_loss": 0.5855621,
            "sft_loss": 1 / 3,
            "or_loss": 0.2522287,
            "log_odds_ratio": 1.2486553,
            "accuracy": 1,
            "chosen_avg_lp": -1 / 3,
            "rejected_avg_lp": -0.8666667,
            "orpo_lambda": 1,
            "batch_pairs": 1,
        }
    )
    twice = apply(make_batch_orpo_loss_fn([2, 2]), [CHOSEN, REJECTED] * 2)
    assert twice.loss == approx(1.1711242)
    assert twice.metrics["orpo_loss"] == approx(0.5855621)
    assert twice.gradients == [approx(row) for row in done.gradients * 2]


def test_orpo_without_lambda_is_supervised_learning_of_the_chosen() -> None:
    done = apply(make_batch_orpo_loss_fn([2], 0.0), [CHOSEN, REJECTED])
    assert done.loss == approx(1 / 3)
    assert done.gradients[1] == [0, 0, 0, 0]


@pytest.mark.parametrize("certain", [0.0, -1e-9, -60.0, -1e4])
def test_orpo_survives_what_is_certain_or_impossible(certain) -> None:
    done = apply(make_batch_orpo_loss_fn([1]), [[certain] * 3, [-1.0] * 3])
    assert math.isfinite(done.loss)
    assert all(math.isfinite(value) for row in done.gradients for value in row)
    assert done.gradients[0] == approx([-1 / 3] * 3)  # the odds are held, supervised learning goes on
