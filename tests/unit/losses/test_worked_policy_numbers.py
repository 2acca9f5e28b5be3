"""One response of three tokens, worked through by hand for every policy loss."""

from __future__ import annotations

import pytest

from fwasync.losses import (
    CISPOConfig,
    DAPOConfig,
    DecoupledConfig,
    GRPOConfig,
    GSPOConfig,
    PolicyInputs,
    ReinforceConfig,
    TISConfig,
    policy_loss,
    tis_weights,
)
from unit.losses.cases import apply, datum

POLICY = [-9.0, -1.0, -0.5, -2.0]
OLD_POLICY = [-9.0, -1.2, -0.5, -1.5]
SAMPLER = [0.0, -1.3, -0.4, -1.5]
REFERENCE = [-9.0, -1.1, -0.7, -1.9]


def inputs(advantage: float = 1.0) -> PolicyInputs:
    return PolicyInputs([advantage], [REFERENCE], 2, [SAMPLER], [OLD_POLICY])


def approx(expected):
    return pytest.approx(expected, abs=1e-5)


# name, settings, advantage, loss, gradient of the three tokens
WORKED = [
    ("grpo", {"kl_beta": 0}, 1, -2.837573, [0, -0.904837, -0.606531]),
    ("grpo", {"kl_beta": 0}, -1, 3.054696, [1.349859, 0.904837, 0]),
    ("grpo", {"kl_beta": 0.1, "kl": "value"}, 1, -2.817573, [0, -0.904837, -0.606531]),
    ("grpo", {"kl_beta": 0.1, "kl": "value"}, -1, 3.074696, [1.349859, 0.904837, 0]),
    ("grpo", {"kl_beta": 0.1}, 1, -2.834699, [0.009516, -0.886711, -0.617048]),
    ("grpo", {"kl_beta": 0.1}, -1, 3.057570, [1.359375, 0.922964, -0.010517]),
    ("importance_sampling", None, 1, -2.861227, [-1.349859, -0.904837, -0.606531]),
    ("importance_sampling", None, -1, 2.861227, [1.349859, 0.904837, 0.606531]),
    ("dapo", None, 1, -2.861227, [-1.349859, -0.904837, -0.606531]),
    ("dapo", None, -1, 3.054696, [1.349859, 0.904837, 0]),
    ("dapo", {"eps_clip_c": 1.1}, 1, -2.861227, [-1.349859, -0.904837, -0.606531]),
    ("dapo", {"eps_clip_c": 1.1}, -1, 2.920525, [0, 0.904837, 0]),
    ("dro", None, 1, 3.564839, [-1.095171, -0.904837, -1.025]),
    ("dro", None, -1, -3.550339, [1.115171, 0.904837, 0.975]),
    ("dro", None, 0, 0, [0, 0, 0]),
    ("gspo", None, 1, -2.723568, [-1, -0.818731, -0.904837]),
    ("gspo", None, -1, 2.723568, [1, 0.818731, 0.904837]),
    ("cispo", None, 1, 3.402277, [-1.349859, -0.904837, -0.8]),
    ("cispo", None, -1, -3.402277, [1.349859, 0.904837, 0.8]),
    ("reinforce", None, 1, -2.861227, [-1.349859, -0.904837, -0.606531]),
    ("reinforce", None, -1, 2.861227, [1.349859, 0.904837, 0.606531]),
    ("reinforce", {"kl_beta": 0.1, "kl": "value"}, 1, -2.841227, [-1.349859, -0.904837, -0.606531]),
    ("reinforce", {"kl_beta": 0.1, "kl": "value"}, -1, 2.881227, [1.349859, 0.904837, 0.606531]),
]


@pytest.mark.parametrize(("name", "settings", "advantage", "loss", "gradient"), WORKED)
def test_loss_and_gradient(name, settings, advantage, loss, gradient) -> None:
    done = apply(policy_loss(name, settings).custom(inputs(advantage)), [POLICY])
    assert done.loss == approx(loss)
    assert done.gradients == [approx([0, *gradient])]


METRICS = {
    "grpo": {"ppo_clip_frac": 2 / 3, "ppo_ratio_mean": 0.942644, "ppo_kl": 0.1, "mean_loss": -2.837573 / 3},
    "dapo": {"dapo_clip_frac": 1 / 3, "ppo_ratio_mean": 0.942644},
    "cispo": {"cispo_clip_frac": 1 / 3, "ppo_ratio_mean": 0.942644},
    "gspo": {"gspo_clip_frac": 0, "ppo_ratio_mean": 0.904837},
    "dro": {"dro_quad_penalty": 0.002417},
    "importance_sampling": {"is_ratio_mean": 0.942644},
    "reinforce": {"is_ratio_mean": 2.861227 / 3},
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name) -> None:
    settings = {"kl_beta": 0} if name == "grpo" else None
    metrics = apply(policy_loss(name, settings).custom(inputs()), [POLICY]).metrics
    common = {
        "mean_kl": 0.066667,
        "inference_diff": 0.3,
        "inference_kld": 0.053742,
        "active_tokens": 3,
        "total_resp_tokens": 3,
        "mask_ratio": 1,
    }
    if name != "reinforce":
        common |= {"tis/weight_mean": (1.105171 + 0.904837 + 1) / 3, "tis/clip_frac": 0}
    for metric, value in (common | METRICS[name]).items():
        assert metrics[metric] == approx(value), metric


def test_the_penalty_is_told_apart_from_the_advantage() -> None:
    metrics = apply(policy_loss("grpo", GRPOConfig(kl_beta=0.1)).custom(inputs()), [POLICY]).metrics
    assert metrics["mean_adv_loss"] == approx(-2.837573 / 3)
    assert metrics["mean_kl_penalty"] == approx((2.837573 - 2.834699) / 3)
    assert metrics["ref_kl"] == approx(metrics["mean_kl_penalty"] / 0.1)
    assert metrics["mean_loss"] == approx(-2.834699 / 3)


def test_a_mask_leaves_the_others_out_of_loss_and_metrics() -> None:
    loss_fn = policy_loss("grpo", GRPOConfig(kl_beta=0)).custom(inputs())
    done = apply(loss_fn, [POLICY], [datum(4, mask=[0, 1, 0, 1])])
    assert done.loss == approx(-1.932736)
    assert done.gradients == [approx([0, 0, 0, -0.606531])]
    assert done.metrics["mask_ratio"] == approx(2 / 3)
    assert done.metrics["active_tokens"] == 2


def test_zero_clips_are_settings_like_others() -> None:
    kernel = policy_loss("grpo", GRPOConfig(kl_beta=0, eps_clip_high=0.0)).kernel
    assert kernel is not None
    assert kernel.config == approx({"clip_low_threshold": 0.8, "clip_high_threshold": 1.0})
    kernel = policy_loss("gspo", GSPOConfig(clip_ratio_low=0.0, clip_ratio_high=0.0)).kernel
    assert kernel is not None
    assert kernel.config == approx({"clip_low_threshold": 1.0, "clip_high_threshold": 1.0, "seq_ratio_log_cap": 10.0})
    clipped = apply(policy_loss("dapo", DAPOConfig(eps_clip_high=0.0)).custom(inputs()), [POLICY])
    assert clipped.gradients == [approx([0, 0, -0.904837, -0.606531])]
    still = apply(policy_loss("cispo", CISPOConfig(eps_low=0, eps_high=0)).custom(inputs()), [POLICY])
    assert still.gradients == [approx([0, -1.105171, -0.904837, -1.0])]  # every ratio is 1, and w is left


# Weights


@pytest.mark.parametrize(
    ("config", "weights", "metrics"),
    [
        (TISConfig(), [1.105171, 0.904837, 1.0], {"tis/clip_frac": 0, "tis/weight_mean": 1.003336}),
        (TISConfig(cap=1.05), [1.05, 0.904837, 1.0], {"tis/clip_frac": 1 / 3}),
        (TISConfig(cap=0), [0, 0, 0], {"tis/clip_frac": 1, "tis/weight_mean": 0}),
        (TISConfig(level="sequence"), [1, 1, 1], {"tis/seq_ratio": 1, "tis/clip_frac": 0}),
        (TISConfig(icepop_threshold=1.1), [0, 0, 1], {}),
        (TISConfig(icepop_threshold=1.2), [1.105171, 0.904837, 1], {"tis/icepop_clip_frac": 0}),
        (TISConfig(icepop_threshold=1), [0, 0, 1], {"tis/icepop_clip_frac": 2 / 3, "tis/weight_mean": 1 / 3}),
    ],
)
def test_tis_weights(config, weights, metrics) -> None:
    import numpy as np

    got, told = tis_weights(np.array(OLD_POLICY[1:]), np.array(SAMPLER[1:]), config)
    assert got.tolist() == approx(weights)
    for name, value in metrics.items():
        assert told[name] == approx(value), name


# Decoupled: prox = inf / d + (1 - 1/d) π


@pytest.mark.parametrize(
    ("staleness", "config", "loss", "gradient", "metrics"),
    [
        # d = 0 and 1: the proximal policy is the sampler; ratios 1.349859, 0.904837, 0.606531, clipped to [0.8, 1.2]
        (0, {}, -(1.2 + 0.904837 + 0.606531), [0, -0.904837, -0.606531], {"alpha": 0, "behave_weight_mean": 1}),
        (1, {}, -(1.2 + 0.904837 + 0.606531), [0, -0.904837, -0.606531], {"alpha": 0, "ppo_clip_frac": 2 / 3}),
        # d = 3: ratios e^(.3/3), e^(-.1/3), e^(-.5/3), behaviour weights e^(.2), e^(-.2/3), e^(-1/3)
        (3, {}, -2.861227, [-1.349859, -0.904837, -0.606531], {"alpha": 2 / 3, "ppo_ratio_mean": 0.972955}),
        # ... of which the first is above a cap of 1.1: truncated, or masked
        (
            3,
            {"behave_cap": 1.1},
            -(1.1 * 1.105171 + 0.904837 + 0.606531),
            [-1.215688, -0.904837, -0.606531],
            {"behave_clip_frac": 1 / 3},
        ),
        (
            3,
            {"behave_cap": 1.1, "behave_mode": "token_mask"},
            -(0.904837 + 0.606531),
            [0, -0.904837, -0.606531],
            {"behave_clip_frac": 1 / 3, "behave_weight_mean": (0.935507 + 0.716531) / 3},
        ),
    ],
)
def test_decoupled(staleness, config, loss, gradient, metrics) -> None:
    batch = PolicyInputs([1.0], None, 2, [SAMPLER], staleness=[staleness])
    done = apply(policy_loss("decoupled", DecoupledConfig(**config)).custom(batch), [POLICY])
    assert done.loss == approx(loss)
    assert done.gradients == [approx([0, *gradient])]
    for name, value in metrics.items():
        assert done.metrics[f"decoupled/{name}"] == approx(value), name


# The datums of the service's kernels


def advantages(loss, batch, data):
    built = loss.builtin(batch, data)
    assert built is not None
    return built.datums[0].loss_fn_inputs["advantages"].to_numpy().tolist()


def test_the_advantages_of_builtin_datums() -> None:
    loss = policy_loss("importance_sampling")
    assert advantages(loss, inputs(2.0), [datum(4)]) == approx([0, 2.210342, 1.809675, 2.0])
    assert advantages(loss, inputs(2.0), [datum(4, mask=[0, 1, 0, 1])]) == approx([0, 2.210342, 0, 2.0])
    capped = policy_loss("importance_sampling", tis=TISConfig(cap=1.5))
    far = PolicyInputs([2.0], None, 2, [[0.0, -2.0, -2.0]], [[-1.0, -1.0, -1.5]])
    assert advantages(capped, far, [datum(3)]) == approx([0, 3, 3])


@pytest.mark.parametrize(
    ("name", "settings", "kernel", "config"),
    [
        ("grpo", {"kl_beta": 0}, "ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("importance_sampling", {"ratio_log_cap": 7}, "importance_sampling", {"ratio_log_cap": 7}),
        (
            "dapo",
            None,
            "ppo",
            {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28, "ratio_log_cap": 20},
        ),
        (
            "dapo",
            {"eps_clip_c": 3},
            "dapo",
            {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28, "ratio_log_cap": 20, "eps_clip_c": 3},
        ),
        ("dro", None, "dro", {"beta": 0.05}),
        ("gspo", None, "gspo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "seq_ratio_log_cap": 10}),
        ("cispo", None, "cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28, "ratio_log_cap": 20}),
    ],
)
def test_kernels_and_their_settings(name, settings, kernel, config) -> None:
    built = policy_loss(name, settings).builtin(inputs(), [datum(4, mask=[0, 1, 0, 1])])
    assert built is not None
    assert (built.loss_fn, built.loss_fn_config) == (kernel, approx(config))
    (only,) = built.datums
    assert set(only.loss_fn_inputs) == {"target_tokens", "logprobs", "advantages"}
    assert only.loss_fn_inputs["target_tokens"].to_numpy().tolist() == [1, 2, 3, 4]
    assert only.loss_fn_inputs["logprobs"].to_numpy().tolist() == approx(OLD_POLICY)
    assert only.model_input.to_ints() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "settings", "tis"),
    [
        ("grpo", GRPOConfig(kl_beta=0.1), None),  # no kernel knows of a reference
        ("gspo", None, TISConfig(icepop_threshold=2)),  # a token of the weight 0 would leave the mean
        ("dro", None, TISConfig(icepop_threshold=2)),  # … or be let go by its distance
        ("dro", None, TISConfig(cap=0)),
        ("reinforce", ReinforceConfig(), None),
        ("decoupled", DecoupledConfig(), None),
    ],
)
def test_what_no_kernel_computes_is_left_to_the_client(name, settings, tis) -> None:
    assert policy_loss(name, settings, tis).builtin(inputs(), [datum(4)]) is None
