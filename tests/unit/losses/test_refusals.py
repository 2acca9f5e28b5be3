"""What is refused, and that the message says which sample and why; and what is left out in silence on purpose."""

from __future__ import annotations

import math

import numpy as np
import pydantic
import pytest

from fwasync import errors
from fwasync.losses import (
    POLICY_LOSSES,
    CISPOConfig,
    DAPOConfig,
    DecoupledConfig,
    DROConfig,
    GRPOConfig,
    GSPOConfig,
    ImportanceSamplingConfig,
    PolicyInputs,
    ReinforceConfig,
    TISConfig,
    make_batch_dpo_loss_fn,
    make_batch_orpo_loss_fn,
    make_batch_sft_loss_fn,
    make_batch_weighted_sft_loss_fn,
    make_cispo_loss_fn,
    make_dapo_loss_fn,
    make_decoupled_loss_fn,
    make_dro_loss_fn,
    make_grpo_loss_fn,
    make_gspo_loss_fn,
    make_importance_sampling_loss_fn,
    make_reinforce_loss_fn,
    make_sft_loss_fn,
    policy_loss,
)
from unit.losses.cases import apply, datum

ROW = [-1.0, -2.0, -3.0]
NAN, INF = math.nan, math.inf

# Settings


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (TISConfig, {"cap": -1}),
        (TISConfig, {"cap": NAN}),
        (TISConfig, {"level": "batch"}),
        (TISConfig, {"icepop_threshold": 0.9}),
        (TISConfig, {"icepop_threshold": 2, "level": "sequence"}),
        (GRPOConfig, {"kl_beta": -0.1}),
        (GRPOConfig, {"eps_clip": -0.1}),
        (GRPOConfig, {"eps_clip_high": NAN}),
        (GRPOConfig, {"kl": "k2"}),
        (DAPOConfig, {"eps_clip_c": 1}),
        (DAPOConfig, {"eps_clip_c": 0}),
        (DAPOConfig, {"ratio_log_cap": -1}),
        (DROConfig, {"beta": -1}),
        (GSPOConfig, {"clip_ratio_low": -1}),
        (GSPOConfig, {"kl_beta": 0.001}),  # it had no effect
        (CISPOConfig, {"eps_high": -1}),
        (ImportanceSamplingConfig, {"ratio_log_cap": INF}),
        (ReinforceConfig, {"kl_beta": NAN}),
        (DecoupledConfig, {"behave_mode": "mask"}),
    ],
)
def test_settings_out_of_their_range(config, fields) -> None:
    with pytest.raises(pydantic.ValidationError):
        config(**fields)


def test_the_defaults() -> None:
    assert TISConfig().model_dump() == {"cap": 5.0, "level": "token", "icepop_threshold": None}
    assert {name: settings().model_dump() for name, settings in POLICY_LOSSES.items()} == {
        "grpo": {"kl_beta": 0.001, "eps_clip": 0.2, "eps_clip_high": None, "kl": "k3"},
        "importance_sampling": {"ratio_log_cap": 20.0},
        "dapo": {"eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": None, "ratio_log_cap": 20.0},
        "dro": {"beta": 0.05},
        "gspo": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "seq_ratio_log_cap": 10.0},
        "cispo": {"eps_low": 0.2, "eps_high": 0.28, "ratio_log_cap": 20.0},
        "reinforce": {"kl_beta": 0.0, "kl": "k3"},
        "decoupled": {"eps_clip": 0.2, "eps_clip_high": None, "behave_cap": 5.0, "behave_mode": "token_truncate"},
    }


# The registry


def test_an_unknown_loss_is_answered_with_the_nearest() -> None:
    with pytest.raises(errors.UsageError, match=r"no policy loss 'grp'; did you mean 'grpo'\? They are: grpo, "):
        policy_loss("grp")
    with pytest.raises(errors.UsageError, match="no policy loss 'xyz'; they are: grpo, "):
        policy_loss("xyz")


def test_settings_of_another_loss_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="dapo takes DAPOConfig, got CISPOConfig"):
        policy_loss("dapo", CISPOConfig())
    with pytest.raises(pydantic.ValidationError, match="did you mean 'eps_clip'"):
        policy_loss("dapo", {"eps_cilp": 0.1})
    with pytest.raises(errors.UsageError, match=r"reinforce .* takes no TIS weights"):
        policy_loss("reinforce", tis=TISConfig())


@pytest.mark.parametrize(
    ("made", "name", "settings"),
    [
        (
            make_grpo_loss_fn([1.0], [ROW], 1, [ROW], [ROW], kl_beta=0.3, eps_clip=0),
            "grpo",
            {"kl_beta": 0.3, "eps_clip": 0},
        ),
        (
            make_importance_sampling_loss_fn([1.0], [ROW], 1, [ROW], [ROW], ratio_log_cap=0),
            "importance_sampling",
            {"ratio_log_cap": 0},
        ),
        (make_dapo_loss_fn([1.0], [ROW], 1, [ROW], [ROW], dapo_config=DAPOConfig(eps_clip=0)), "dapo", {"eps_clip": 0}),
        (make_dro_loss_fn([1.0], [ROW], 1, [ROW], [ROW], dro_config=DROConfig(beta=1)), "dro", {"beta": 1}),
        (
            make_gspo_loss_fn([1.0], [ROW], 1, [ROW], [ROW], gspo_config=GSPOConfig(clip_ratio_low=0)),
            "gspo",
            {"clip_ratio_low": 0},
        ),
        (
            make_cispo_loss_fn([1.0], [ROW], 1, [ROW], [ROW], cispo_config=CISPOConfig(eps_low=0)),
            "cispo",
            {"eps_low": 0},
        ),
        (make_reinforce_loss_fn([1.0], [ROW], 1, [ROW], kl_beta=0.3), "reinforce", {"kl_beta": 0.3}),
        (
            make_decoupled_loss_fn([1.0], [ROW], 1, [ROW], [3], decoupled_config=DecoupledConfig(eps_clip=0)),
            "decoupled",
            {"eps_clip": 0},
        ),
    ],
)
def test_the_cookbooks_names_are_the_same_losses(made, name, settings) -> None:
    inputs = PolicyInputs([1.0], [ROW], 1, [ROW], [ROW], [3])
    policy = [-1.3, -1.9, -3.2]
    assert apply(made, [policy]) == apply(policy_loss(name, settings).custom(inputs), [policy])


# Batches


def inputs(count: int = 1, **fields) -> PolicyInputs:
    given = {
        "advantages": [1.0] * count,
        "reference_logprobs": None,
        "prompt_len": 2,
        "sampler_logprobs": [ROW] * count,
        "old_policy_logprobs": [ROW] * count,
    }
    return PolicyInputs(**{**given, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_len": [2]}, "there are 2 advantages, so 2 prompt lengths are expected; got 1"),
        ({"sampler_logprobs": [ROW] * 3}, "2 samples' sampler logprobs are expected; got 3"),
        ({"old_policy_logprobs": [ROW]}, "2 samples' old-policy logprobs are expected; got 1"),
        ({"reference_logprobs": [ROW]}, "2 samples' reference logprobs are expected; got 1"),
        ({"staleness": [1]}, "2 values of staleness are expected; got 1"),
        ({"advantages": [1.0, NAN]}, r"advantages\[1\] is nan"),
    ],
)
def test_entries_that_do_not_match_are_refused_when_they_are_given(fields, message) -> None:
    with pytest.raises(errors.DatumError, match=message):
        inputs(2, **fields)


def test_a_penalty_without_a_reference_is_refused_when_the_loss_is_made() -> None:
    for reference in (None, []):
        with pytest.raises(errors.UsageError, match=r"GRPO: kl_beta is 0\.001, and there are no reference logprobs"):
            policy_loss("grpo").custom(inputs(reference_logprobs=reference))
    with pytest.raises(errors.UsageError, match="DECOUPLED needs the staleness of each sample"):
        policy_loss("decoupled").custom(inputs())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler_logprobs": [[], ROW]}, "DAPO: sample 0: its list of inference logprobs is empty"),
        ({"sampler_logprobs": [ROW, ROW[:2]]}, "sample 1: at least 3 inference logprobs are needed, got 2"),
        ({"old_policy_logprobs": [ROW, ROW[:2]]}, "sample 1: exactly 3 old-policy logprobs are needed, got 2"),
        ({"old_policy_logprobs": [ROW, [*ROW, 0.0]]}, "sample 1: exactly 3 old-policy logprobs are needed, got 4"),
        ({"reference_logprobs": [ROW, []]}, "sample 1: exactly 3 reference logprobs are needed, got 0"),
        ({"prompt_len": [2, -1]}, "sample 1: its prompt_len is -1"),
        ({"sampler_logprobs": [ROW, [0, NAN, -1]]}, r"DAPO: sample 1: inference logprobs\[1\] is nan"),
        ({"old_policy_logprobs": [ROW, [0, -1, -INF]]}, r"sample 1: old-policy logprobs\[2\] is -inf"),
        ({"reference_logprobs": [ROW, [0, -1, INF]]}, r"sample 1: reference logprobs\[2\] is inf"),
    ],
)
@pytest.mark.parametrize("path", ["custom", "builtin"])
def test_logprobs_that_do_not_fit_name_their_sample(path, fields, message) -> None:
    loss, given = policy_loss("dapo"), inputs(2, **fields)
    with pytest.raises(errors.DatumError, match=message):
        if path == "custom":
            apply(loss.custom(given), [ROW, ROW])
        else:
            loss.builtin(given, [datum(3), datum(3)])


def test_the_name_in_a_message_is_the_losses() -> None:
    with pytest.raises(errors.DatumError, match=r"^importance_sampling: sample 0"):
        apply(policy_loss("importance_sampling").custom(inputs(sampler_logprobs=[[]])), [ROW])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_policy_that_is_not_finite_names_sample_and_position(name, bad) -> None:
    settings = {"kl_beta": 0} if name == "grpo" else None
    loss_fn = policy_loss(name, settings).custom(inputs(2, staleness=[1, 1]))
    with pytest.raises(errors.DatumError, match=rf"sample 1: policy logprobs\[2\] is {bad}"):
        apply(loss_fn, [ROW, [-1.0, -2.0, bad]])


def test_what_is_not_active_may_hold_anything() -> None:
    wild = [NAN, -1.0, INF, -2.0]
    given = PolicyInputs([1.0], [wild], 2, [[*wild, 7.0]], [wild])
    done = apply(policy_loss("grpo").custom(given), [wild], [datum(4, mask=[1, 1, 0, 1])])
    assert done.loss == pytest.approx(-2)
    assert done.gradients == [pytest.approx([0, -1, 0, -1])]
    assert all(map(math.isfinite, done.metrics.values()))


def test_a_sample_without_active_tokens_is_left_out() -> None:
    given = inputs(3, prompt_len=[9, 2, 2], sampler_logprobs=[[], ROW, []], old_policy_logprobs=[[], ROW, []])
    loss, data = policy_loss("dapo"), [datum(3), datum(3), datum(3, mask=[1, 0, 0])]
    done = apply(loss.custom(given), [ROW] * 3, data)
    alone = apply(loss.custom(inputs()), [ROW])
    assert done.loss == alone.loss
    assert done.gradients == [[0, 0, 0], alone.gradients[0], [0, 0, 0]]
    assert done.metrics == {**alone.metrics, "total_resp_tokens": 4, "mask_ratio": 0.5}
    built = loss.builtin(given, data)
    assert built is not None
    assert [not each.loss_fn_inputs["advantages"].to_numpy().any() for each in built.datums] == [True, False, True]


def test_a_batch_without_any_active_token_has_a_gradient_of_zero() -> None:
    done = apply(policy_loss("dapo").custom(inputs()), [ROW], [datum(3, mask=[0, 0, 0])])
    assert (done.loss, done.gradients) == (0, [[0, 0, 0]])
    assert done.metrics == {"active_tokens": 0, "total_resp_tokens": 2}


def test_batches_that_do_not_fit_are_refused() -> None:
    loss_fn = policy_loss("dapo").custom(inputs())
    with pytest.raises(errors.DatumError, match="DAPO: there are 2 datums and 1 advantages"):
        apply(loss_fn, [ROW, ROW])
    with pytest.raises(errors.DatumError, match=r"sample 0: its loss_mask has shape \(2,\), its target_tokens \(3,\)"):
        apply(loss_fn, [ROW], [datum(3, mask=[1, 1])])
    with pytest.raises(errors.DatumError, match="DAPO: sample 0: a policy loss takes one target for each position"):
        apply(loss_fn, [[ROW, ROW, ROW]])
    with pytest.raises(errors.DatumError, match="DAPO: the batch is empty"):
        policy_loss("dapo").builtin(inputs(0), [])


def test_without_an_old_policy_the_anchor_is_the_rollout() -> None:
    policy = [-1.0, -2.2, -2.9]
    anchored = apply(policy_loss("dapo").custom(inputs(old_policy_logprobs=None)), [policy])
    assert anchored == apply(policy_loss("dapo").custom(inputs()), [policy])
    assert anchored.metrics["tis/weight_mean"] == 1
    built = policy_loss("dapo").builtin(inputs(old_policy_logprobs=None, sampler_logprobs=[[*ROW, 0.0]]), [datum(3)])
    assert built is not None
    assert built.datums[0].loss_fn_inputs["logprobs"].to_numpy().tolist() == ROW


def test_arrays_do_as_lists() -> None:
    arrays = PolicyInputs(np.ones(1), np.array([ROW]), [2], np.array([ROW]), np.array([ROW]))  # type: ignore[arg-type]
    lists = inputs(reference_logprobs=[ROW])
    policy = [-1.0, -2.2, -2.9]
    assert apply(policy_loss("grpo").custom(arrays), [policy]) == apply(policy_loss("grpo").custom(lists), [policy])


# Supervised and preference losses


@pytest.mark.parametrize(
    ("loss_fn", "rows", "data", "message"),
    [
        (make_sft_loss_fn(1), [ROW, ROW], None, "SFT: one response_start make a batch of 1; got 2"),
        (make_sft_loss_fn(1, [1, 2]), [ROW], None, "2 target_tokens and 3 logprobs"),
        (make_sft_loss_fn(4), [ROW], None, "sample 0: response_start 4 leaves nothing of its 3 positions"),
        (make_sft_loss_fn(1), [[ROW, ROW]], None, r"sample 0: this loss takes one target .* got \(2, 3\)"),
        (make_sft_loss_fn(3), [[0, 0, NAN]], None, r"sample 0: policy logprobs\[2\] is nan"),
        (make_batch_sft_loss_fn([1]), [ROW, ROW], None, "SFT: 1 response_starts make a batch of 1; got 2"),
        (make_batch_sft_loss_fn([]), [], None, "SFT: the batch is empty"),
        (make_batch_sft_loss_fn([1, 2]), [ROW, [NAN, -INF]], None, r"sample 1: policy logprobs\[1\] is -inf"),
        (make_batch_weighted_sft_loss_fn(), [ROW], None, "sample 0 has no weights"),
        (make_batch_weighted_sft_loss_fn(), [ROW], [datum(3, weights=[1, 1])], r"weights have shape \(2,\)"),
        (make_batch_weighted_sft_loss_fn(), [ROW], [datum(3, weights=[1, 1, NAN])], r"sample 0: weights\[2\] is nan"),
        (
            make_batch_weighted_sft_loss_fn([1, 1]),
            [ROW, ROW],
            [datum(3, weights=[1, 1, 1]), datum(3, weights=[0, 0, 0])],
            "weights of samples 1 to 1 sum to 0",
        ),
        (
            make_batch_weighted_sft_loss_fn([1, 2]),
            [ROW, ROW],
            [datum(3, weights=[1, 1, 1])] * 2,
            "microbatch_sizes sum to 3, but the batch has 2",
        ),
        (
            make_batch_weighted_sft_loss_fn(),
            [[-1, -INF, NAN]],
            [datum(3, weights=[1, 0, 1])],
            r"sample 0: policy logprobs\[2\] is nan",
        ),
        (make_batch_dpo_loss_fn([ROW], [ROW], [1]), [ROW], None, "DPO: 1 pairs make a batch of 2; got 1"),
        (
            make_batch_dpo_loss_fn([ROW], [ROW[:2]], [1]),
            [ROW, ROW],
            None,
            "pair 0, rejected: 3 reference logprobs are needed, got 2",
        ),
        (
            make_batch_dpo_loss_fn([ROW], [ROW], [4]),
            [ROW, ROW],
            None,
            "pair 0, chosen: response_start 4 leaves nothing",
        ),
        (
            make_batch_dpo_loss_fn([ROW], [[0, 0, NAN]], [2]),
            [ROW, ROW],
            None,
            r"pair 0, rejected: reference logprobs\[2\] is nan",
        ),
        (
            make_batch_dpo_loss_fn([ROW], [ROW], [2]),
            [ROW, [0, 0, INF]],
            None,
            r"pair 0, rejected: policy logprobs\[2\] is inf",
        ),
        (make_batch_orpo_loss_fn([1]), [ROW], None, "ORPO: 1 pairs make a batch of 2; got 1"),
        (make_batch_orpo_loss_fn([2]), [[0, NAN], ROW], None, r"pair 0, chosen: policy logprobs\[1\] is nan"),
    ],
)
def test_supervised_batches(loss_fn, rows, data, message) -> None:
    with pytest.raises(errors.DatumError, match=message):
        apply(loss_fn, rows, data)


def test_unweighted_tokens_may_hold_anything() -> None:
    done = apply(make_batch_weighted_sft_loss_fn(), [[NAN, -1.0, INF]], [datum(3, weights=[0, 2, 0])])
    assert (done.loss, done.gradients) == (1, [[0, -1, 0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_batch_weighted_sft_loss_fn([]), "microbatch_sizes must be a list of positive numbers"),
        (lambda: make_batch_weighted_sft_loss_fn([1, 0]), r"positive numbers, got \[1, 0\]"),
        (lambda: make_batch_dpo_loss_fn([ROW], [ROW], [1], 0.0), "DPO: beta must be a finite number above 0, got 0"),
        (lambda: make_batch_dpo_loss_fn([ROW], [ROW], [1], NAN), "got nan"),
        (lambda: make_batch_dpo_loss_fn([ROW], [], [1]), "1 response_starts, 1 chosen and 0 rejected"),
        (lambda: make_batch_dpo_loss_fn([ROW], [ROW], [1], microbatch_sizes=[0]), "positive numbers"),
        (lambda: make_batch_orpo_loss_fn([]), "at least one pair"),
        (lambda: make_batch_orpo_loss_fn([1], -1.0), "orpo_lambda must be a finite number of at least 0, got -1"),
    ],
)
def test_supervised_settings_are_checked_when_the_loss_is_made(make, message) -> None:
    with pytest.raises(errors.UsageError, match=message):
        make()
