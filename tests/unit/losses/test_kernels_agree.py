"""The two paths of a policy loss have one gradient: the kernel's, and the client's carried by the cross entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fwasync import types
from fwasync.local.engine import Adam, Example
from fwasync.losses import PolicyInputs, TISConfig, policy_loss
from unit.local.engine_cases import micro_trainer

CASES = [
    ("grpo", {"kl_beta": 0, "eps_clip": 0.05}, None),
    ("grpo", {"kl_beta": 0, "eps_clip_high": 0.0}, TISConfig(icepop_threshold=1.3)),
    ("importance_sampling", None, None),
    ("importance_sampling", {"ratio_log_cap": 0.2}, TISConfig(level="sequence")),
    ("dapo", {"eps_clip": 0.15, "eps_clip_high": 0.5}, TISConfig(cap=1.0)),
    ("dapo", {"eps_clip_c": 1.1}, None),
    ("dro", {"beta": 0.7}, None),
    ("gspo", {"clip_ratio_low": 0.02, "clip_ratio_high": 0.02}, None),
    ("gspo", {"seq_ratio_log_cap": 0.02}, TISConfig(cap=0.9)),
    ("cispo", {"eps_high": 0.05}, None),
]
PROMPTS, LENGTHS, ADVANTAGES = [3, 1, 4, 2, 9], [8, 5, 9, 6, 7], [1.0, -0.5, 0.0, -2.0, 1.5]


def batch() -> list[types.Datum]:
    """Four samples with something to learn, and one that is nothing but prompt."""
    rng = np.random.default_rng(5)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(rng.integers(0, 24, length).tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(rng.integers(0, 24, length)),
                "loss_mask": types.TensorData.from_numpy((rng.random(length) < 0.8).astype(np.float32)),
            },
        )
        for length in LENGTHS
    ]


def examples(data: list[types.Datum], **more: list[np.ndarray]) -> list[Example]:
    def inputs(index: int, each: types.Datum) -> dict[str, np.ndarray]:
        targets = each.loss_fn_inputs["target_tokens"].to_numpy()
        return {"target_tokens": targets} | {name: rows[index] for name, rows in more.items()}

    return [Example(np.array(each.model_input.to_ints()), inputs(i, each)) for i, each in enumerate(data)]


def logprobs(trainer, data: list[types.Datum]) -> list[np.ndarray]:
    zeros = [np.zeros(length, np.float32) for length in LENGTHS]
    return [each["logprobs"] for each in trainer.forward(examples(data, weights=zeros), "cross_entropy").outputs]


def moved_trainer(data: list[types.Datum]):
    """A trainer one step away from its old policy, in no direction that matters, and that policy's logprobs."""
    trainer = micro_trainer()
    old_policy = logprobs(trainer, data)
    rng = np.random.default_rng(7)
    weights = [rng.normal(size=length).astype(np.float32) for length in LENGTHS]
    trainer.forward_backward(examples(data, weights=weights), "cross_entropy")
    trainer.optim_step(Adam(learning_rate=0.01))
    return trainer, old_policy


def kernel_gradient(trainer, loss, inputs: PolicyInputs, data: list[types.Datum]) -> tuple[np.ndarray, float]:
    built = loss.builtin(inputs, data)
    fields = ("logprobs", "advantages")
    rows = {field: [each.loss_fn_inputs[field].to_numpy() for each in built.datums] for field in fields}
    result = trainer.forward_backward(examples(built.datums, **rows), built.loss_fn, built.loss_fn_config)
    return taken(trainer), result.metrics["loss:sum"]


def custom_gradient(trainer, loss, inputs: PolicyInputs, data: list[types.Datum]) -> tuple[np.ndarray, float]:
    leaves = [torch.tensor(row, requires_grad=True) for row in logprobs(trainer, data)]
    total, _ = loss.custom(inputs)(data, leaves)
    total.backward()
    weights = [-leaf.grad.numpy() for leaf in leaves if leaf.grad is not None]
    trainer.forward_backward(examples(data, weights=weights), "cross_entropy")
    return taken(trainer), total.item()


def taken(trainer) -> np.ndarray:
    gradient = trainer.gradient.copy()
    trainer.optim_step(Adam(learning_rate=0.0))
    return gradient


@pytest.mark.parametrize(("name", "settings", "tis"), CASES)
def test_one_gradient_on_both_paths(name, settings, tis) -> None:
    data = batch()
    trainer, old_policy = moved_trainer(data)
    noise = np.random.default_rng(6)
    sampler = [row + noise.normal(0, 0.2, len(row)) for row in old_policy]
    inputs, loss = PolicyInputs(ADVANTAGES, None, PROMPTS, sampler, old_policy), policy_loss(name, settings, tis)
    expected, value = kernel_gradient(trainer, loss, inputs, data)
    gradient, custom_value = custom_gradient(trainer, loss, inputs, data)
    assert np.linalg.norm(expected) > 0.1
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert custom_value == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_the_cases_tell_the_losses_apart() -> None:
    """The step is long enough that clips and caps bind: else surrogates would agree by chance."""
    data = batch()
    trainer, old_policy = moved_trainer(data)
    inputs = PolicyInputs(ADVANTAGES, None, PROMPTS, old_policy, old_policy)
    gradients = [kernel_gradient(trainer, policy_loss(*case), inputs, data)[0] for case in CASES]
    for i, one in enumerate(gradients):
        assert not any(np.allclose(one, other, rtol=1e-3, atol=1e-3) for other in gradients[:i]), CASES[i]
