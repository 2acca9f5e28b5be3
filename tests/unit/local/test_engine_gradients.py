"""The backward pass against finite differences, and the model against another implementation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from fwasync.local.engine import Example, Lora
from fwasync.local.engine.losses import LOSSES, resolve_loss
from unit.local.engine_cases import MICRO, micro_trainer, ragged_batch

LOSS_NAMES = sorted(LOSSES)


def directional_error(trainer, batch, loss_fn, name, step=1e-5):
    """Relative difference between g.d and the central difference along d, d within one tensor."""
    parameters = trainer.parameters
    trainer.forward_backward(batch, loss_fn)
    gradient = parameters.layout.view(trainer.gradient, name)
    direction = np.random.default_rng(7).normal(size=gradient.shape)
    view = parameters.layout.view(parameters.flat, name)
    start = view.copy()

    def loss_at(distance):
        view[...] = start + distance * direction
        parameters.refresh()
        return trainer.forward(batch, loss_fn).metrics["loss:sum"]

    measured = (loss_at(step) - loss_at(-step)) / (2 * step)
    computed = float((gradient * direction).sum())
    assert abs(computed) > 1e-4, "the direction must have a slope worth comparing"
    return abs(measured - computed) / abs(computed)


@pytest.mark.parametrize("name", MICRO.layout(tied=True).shapes)
def test_every_weight_has_the_gradient_that_finite_differences_show(name):
    batch = ragged_batch("cross_entropy")
    assert directional_error(micro_trainer(), batch, "cross_entropy", name) < 1e-5


@pytest.mark.parametrize("name", micro_trainer(Lora(rank=2)).parameters.layout.shapes)
def test_every_adapter_matrix_has_the_gradient_that_finite_differences_show(name):
    batch = ragged_batch("importance_sampling")
    assert directional_error(micro_trainer(Lora(2)), batch, "importance_sampling", name) < 1e-5


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "cispo", "dro"])
def test_single_coordinates_agree_too(loss_fn):
    trainer = micro_trainer()
    batch = ragged_batch(loss_fn)
    if loss_fn == "cispo":  # its gradient is by definition not that of its value
        batch = [
            Example(e.tokens, {**e.inputs, "logprobs": o["logprobs"] + 50})
            for e, o in zip(batch, trainer.forward(batch, "importance_sampling").outputs, strict=True)
        ]
        config = {"clip_low_threshold": 0.5}  # every ratio is clipped to this constant
    else:
        config = None
    trainer.forward_backward(batch, loss_fn, config)
    flat = trainer.parameters.flat
    for index in np.random.default_rng(3).choice(len(flat), 12, replace=False):
        start, sums = flat[index], []
        for value in (start + 1e-5, start - 1e-5):
            flat[index] = value
            sums.append(trainer.forward(batch, loss_fn, config).metrics["loss:sum"])
        flat[index] = start
        measured = (sums[0] - sums[1]) / 2e-5
        assert measured == pytest.approx(trainer.gradient[index], rel=1e-5, abs=1e-8)


CONFIGS = {
    "cross_entropy": {},
    "importance_sampling": {"ratio_log_cap": 0.5},
    "ppo": {"clip_high_threshold": 1.0, "ratio_log_cap": 0.5},
    "dapo": {"clip_high_threshold": 1.28, "eps_clip_c": 1.5, "ratio_log_cap": 0.5},
    "gspo": {"seq_ratio_log_cap": 0.05},
    "cispo": {"ratio_log_cap": 0.5},
    "dro": {"beta": 0.3},
}


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("loss_fn", LOSS_NAMES)
def test_each_loss_gives_its_derivative_by_the_logprob(loss_fn, configured):
    rng = np.random.default_rng(0)
    loss, settings = resolve_loss(loss_fn, CONFIGS[loss_fn] if configured else None)
    logprobs = rng.normal(-2, 0.6, (40, 5, 1))
    inputs = {
        "weights": rng.normal(size=logprobs.shape),
        "logprobs": logprobs + rng.normal(0, 0.4, logprobs.shape),
        "advantages": rng.normal(size=logprobs.shape),
    }
    inputs["advantages"][rng.random(logprobs.shape) < 0.3] = 0
    if loss_fn == "gspo":  # its derivative is that of its value where the tokens of a sequence share their advantage
        inputs["advantages"] = np.where(inputs["advantages"] != 0, rng.normal(size=(40, 1, 1)), 0)

    def values(lp):
        if loss_fn == "cispo":  # the clipped ratio counts as a constant
            cap = settings["ratio_log_cap"]
            ratio = np.clip(np.exp(np.clip(logprobs - inputs["logprobs"], -cap, cap)), 0, 4)
            return -ratio * inputs["advantages"] * lp
        return loss.formula(lp, inputs, settings)[0]

    computed = loss.formula(logprobs, inputs, settings)
    assert np.count_nonzero(computed[1]) > 20, "there must be slopes worth comparing"
    for position in range(logprobs.shape[1]):  # of every sequence at once
        step = np.zeros_like(logprobs)
        step[:, position] = 1e-6
        measured = (values(logprobs + step) - values(logprobs - step)).sum(axis=(1, 2)) / 2e-6
        np.testing.assert_allclose(computed[1][:, position, 0], measured, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(computed[0], values(logprobs), rtol=1e-12)


def test_losses_have_the_values_of_their_formulas():
    lp, q = np.full((1, 3, 1), -1.0), np.array([[[-1.0], [-2.0], [-0.5]]])
    advantage = np.array([[[2.0], [1.0], [-3.0]]])
    inputs = {"logprobs": q, "advantages": advantage, "weights": advantage}
    ratio = np.array([1.0, math.e, math.exp(-0.5)])

    def values(name, **config):
        loss, settings = resolve_loss(name, config)
        terms, slopes = loss.formula(lp, inputs, settings)
        return terms[0, :, 0], slopes[0, :, 0]

    a = advantage[0, :, 0]
    np.testing.assert_allclose(values("cross_entropy"), (a, -a))
    np.testing.assert_allclose(values("importance_sampling"), (-ratio * a, -ratio * a))
    np.testing.assert_allclose(values("ppo")[0], [-2.0, -1.2, 3 * 0.8])
    np.testing.assert_allclose(values("ppo")[1], [-2.0, 0.0, 0.0])
    np.testing.assert_allclose(values("ppo", clip_high_threshold=3.0)[0][1], -math.e)
    np.testing.assert_allclose(values("cispo", clip_high_threshold=2.0)[0], [2.0, 2.0, -3 * ratio[2]])
    np.testing.assert_allclose(values("dro")[0], [2.0, 1 + 0.05 * 1.0, -3 + 0.05 * 0.25])
    np.testing.assert_allclose(values("ppo", clip_high_threshold=9.0, ratio_log_cap=0.25)[0][1], -math.exp(0.25))
    q[0, 2] = -5.0  # a ratio of e^4
    np.testing.assert_allclose(values("dapo")[0][2], 3 * math.exp(4))
    np.testing.assert_allclose(values("dapo", eps_clip_c=3.0), ([-2.0, -1.2, 9.0], [-2.0, 0.0, 0.0]))
    sequence = math.exp(5 / 3)
    np.testing.assert_allclose(values("gspo", clip_high_threshold=9.0)[0], -sequence * a)
    np.testing.assert_allclose(values("gspo"), ([-2.4, -1.2, 3 * sequence], [0, 0, 3 * sequence]))
    np.testing.assert_allclose(values("gspo", seq_ratio_log_cap=1.0)[0][2], 3 * math.e)


def test_a_position_without_an_advantage_has_no_part_in_a_policy_loss():
    rng = np.random.default_rng(0)
    lp, q = rng.normal(-2, 0.5, (2, 3, 4, 1))
    advantages = np.where(rng.random(lp.shape) < 0.5, 1.0, 0.0)
    for name in set(LOSS_NAMES) - {"cross_entropy"}:
        loss, settings = resolve_loss(name, None)
        terms = loss.formula(lp, {"logprobs": q, "advantages": advantages}, settings)
        elsewhere = np.where(advantages == 0, 7.0, q)
        others = loss.formula(lp, {"logprobs": elsewhere, "advantages": advantages}, settings)
        for one, other in zip(terms, others, strict=True):
            assert (one == other).all()
            assert (one[advantages == 0] == 0).all()


@pytest.mark.parametrize("loss_fn", ["dro", "gspo"])  # with a distance to the sampler, and along whole sequences
def test_padding_and_batch_mates_leave_no_trace(loss_fn):
    trainer = micro_trainer()
    batch = ragged_batch(loss_fn)
    together = trainer.forward_backward(batch, loss_fn)
    gradient = trainer.gradient.copy()
    alone = micro_trainer()
    singles = [alone.forward_backward([example], loss_fn) for example in batch]
    for output, single in zip(together.outputs, singles, strict=True):
        np.testing.assert_allclose(output["logprobs"], single.outputs[0]["logprobs"], rtol=1e-6)
    np.testing.assert_allclose(gradient, alone.gradient, rtol=1e-9, atol=1e-12)
    assert together.metrics["loss:sum"] == pytest.approx(sum(s.metrics["loss:sum"] for s in singles))


def test_several_targets_a_position_equal_as_many_single_ones():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 24, 6), rng.integers(0, 24, (6, 3))
    targets[2] = 5  # the same target thrice counts thrice
    weights = rng.normal(size=(6, 3)).astype(np.float32)
    soft, hard = micro_trainer(), micro_trainer()
    mate = ragged_batch("cross_entropy", (4,))
    result = soft.forward_backward(
        [Example(tokens, {"target_tokens": targets, "weights": weights}), *mate], "cross_entropy"
    )
    columns = [Example(tokens, {"target_tokens": targets[:, k], "weights": weights[:, k]}) for k in range(3)]
    expected = hard.forward_backward([*columns, *mate], "cross_entropy")
    assert result.outputs[0]["logprobs"].shape == (6, 3)
    assert result.outputs[1]["logprobs"].shape == (4,)
    for k in range(3):
        np.testing.assert_allclose(result.outputs[0]["logprobs"][:, k], expected.outputs[k]["logprobs"], rtol=1e-6)
    np.testing.assert_allclose(soft.gradient, hard.gradient, rtol=1e-9, atol=1e-12)
    assert result.metrics["tokens:sum"] == expected.metrics["tokens:sum"] == 22


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_the_exported_model_is_a_qwen3_to_transformers(tmp_path, lora):
    """Equal logprobs and gradients from an independent implementation (its norms are float32)."""
    import torch

    with warnings.catch_warnings():
        # transformers and what it imports deprecate parts of themselves.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from transformers import AutoModelForCausalLM

        trainer = micro_trainer(lora)
        trainer.export(tmp_path)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    batch = ragged_batch("cross_entropy")
    outputs = trainer.forward_backward(batch, "cross_entropy").outputs
    for example, output in zip(batch, outputs, strict=True):
        logits = reference(torch.from_numpy(example.tokens)[None]).logits[0]
        targets = torch.from_numpy(example.inputs["target_tokens"])[:, None]
        logprobs = logits.log_softmax(-1).gather(1, targets)[:, 0]
        np.testing.assert_allclose(output["logprobs"], logprobs.detach().numpy(), atol=5e-5)
        (-torch.from_numpy(example.inputs["weights"]) * logprobs).sum().backward()

    gradients = {name: weight.grad.numpy() for name, weight in reference.named_parameters()}
    layout = trainer.parameters.model_layout
    assert gradients.keys() == layout.shapes.keys()
    flat = np.concatenate([gradients[name].reshape(-1) for name in layout.shapes])
    expected = trainer.parameters.project(flat)
    assert np.linalg.norm(trainer.gradient - expected) < 1e-5 * np.linalg.norm(expected)
    assert np.abs(trainer.gradient - expected).max() < 1e-5 * np.abs(expected).max()
