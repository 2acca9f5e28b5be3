"""Reduction and normalization: two knobs that multiply, and the pairs that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from fwasync import GradAccNormalization, errors
from fwasync.local.engine import Adam, Example
from fwasync.losses import (
    POLICY_LOSSES,
    LossFn,
    PolicyInputs,
    Reduction,
    check_normalization,
    make_batch_dpo_loss_fn,
    make_batch_orpo_loss_fn,
    make_batch_sft_loss_fn,
    make_batch_weighted_sft_loss_fn,
    make_grpo_loss_fn,
    make_sft_loss_fn,
    policy_loss,
)
from unit.local.engine_cases import micro_trainer
from unit.losses.cases import apply, datum

TOKENS, SEQUENCES, NONE = GradAccNormalization


@pytest.mark.parametrize(
    ("reduction", "allowed"),
    [
        (Reduction.SUM, {TOKENS, SEQUENCES, NONE}),
        (Reduction.SUM_PAIRS, {SEQUENCES, NONE}),
        (Reduction.MEAN_TOKENS, {NONE}),
        (Reduction.MEAN_SEQUENCES, {NONE}),
        (Reduction.MEAN_PAIRS, {NONE}),
    ],
)
def test_what_goes_together(reduction, allowed) -> None:
    assert check_normalization(reduction, None) is None
    assert check_normalization(str(reduction), "NONE") == "none"
    for normalization in GradAccNormalization:
        if normalization in allowed:
            assert check_normalization(reduction, normalization) == str(normalization)
        else:
            with pytest.raises(
                errors.UsageError, match=r"divide the gradient twice: the loss is a (mean|sum) .* already"
            ):
                check_normalization(reduction, normalization)


def test_unknown_reductions_and_normalizations_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="reduction is 'max'; it must be one of sum, "):
        check_normalization("max", None)
    with pytest.raises(errors.UsageError, match="num_loss_tokens"):
        check_normalization(Reduction.SUM, "tokens")


@pytest.mark.parametrize(
    ("loss_fn", "reduction"),
    [
        (make_sft_loss_fn(1), Reduction.MEAN_TOKENS),
        (make_batch_sft_loss_fn([1]), Reduction.MEAN_TOKENS),
        (make_batch_weighted_sft_loss_fn(), Reduction.MEAN_TOKENS),
        (make_batch_dpo_loss_fn([[0.0]], [[0.0]], [1]), Reduction.MEAN_PAIRS),
        (make_batch_orpo_loss_fn([1]), Reduction.SUM_PAIRS),
        (make_grpo_loss_fn([1.0], None, 1, [[0.0]], [[0.0]], kl_beta=0), Reduction.SUM),
        *[(policy_loss(name), Reduction.SUM) for name in POLICY_LOSSES],
    ],
)
def test_every_loss_declares_its_reduction(loss_fn, reduction) -> None:
    assert loss_fn.reduction is reduction


# What the two knobs do, on a model


def gradient(loss_fn: LossFn | None, normalization: str | None, batches=None, data=None) -> np.ndarray:
    """What the optimizer is given for accumulated batches; without a loss, those of the built-in cross entropy."""
    trainer = micro_trainer()
    for batch in batches or [data or DATA]:
        weights = [each.loss_fn_inputs["weights"].to_numpy() for each in batch]
        if loss_fn is not None:
            forward = trainer.forward(examples(batch, weights), "cross_entropy")
            slopes = apply(loss_fn, [output["logprobs"].tolist() for output in forward.outputs], batch).gradients
            weights = [-np.array(row, np.float32) for row in slopes]
        trainer.forward_backward(examples(batch, weights), "cross_entropy")
    before = trainer.parameters.flat.copy()
    trainer.optim_step(PLAIN, normalization)  # type: ignore[arg-type]
    return before - trainer.parameters.flat


PLAIN = Adam(learning_rate=1e6, beta1=0.0, beta2=0.0, eps=1e6)
"""Adam that takes the gradient as it is: beside such an eps, its own norm is nothing."""


def examples(batch, weights) -> list[Example]:
    return [example(each, row) for each, row in zip(batch, weights, strict=True)]


def example(each, weights) -> Example:
    targets = each.loss_fn_inputs["target_tokens"].to_numpy()
    return Example(np.array(each.model_input.to_ints()), {"target_tokens": targets, "weights": weights})


DATA = [datum(3, weights=[0, 1, 1]), datum(2, weights=[1, 1])]


def close(one, other, factor=1.0) -> bool:
    return bool(np.allclose(one, factor * other, rtol=1e-4, atol=1e-7))


def test_a_mean_is_a_sum_divided_once_and_dividing_twice_is_too_small_by_the_number_of_tokens() -> None:
    mean = make_batch_weighted_sft_loss_fn()
    once = gradient(mean, "none")
    assert close(gradient(None, "num_loss_tokens"), once)
    assert not close(gradient(mean, "num_loss_tokens"), once)
    assert close(gradient(mean, "num_loss_tokens"), once, 1 / 4)


def test_sequences_divide_a_sum_by_their_number() -> None:
    assert close(gradient(None, "num_sequences"), gradient(None, "none"), 1 / 2)


def test_means_of_accumulated_batches_add_as_microbatches_do() -> None:
    mean = make_batch_weighted_sft_loss_fn()
    together = gradient(make_batch_weighted_sft_loss_fn([1, 1]), None)
    assert close(gradient(mean, None, batches=[[each] for each in DATA]), together)
    assert not close(gradient(mean, None), together)


def test_the_local_service_counts_tokens_that_have_a_gradient() -> None:
    """Three tokens are active, and one of them is clipped: the divisor is 2."""
    policy = [-9.0, -1.0, -0.5, -2.0]
    inputs = PolicyInputs([1.0], None, 2, [[0, -1.3, -0.4, -1.5]], [[-9, -1.2, -0.5, -1.5]])
    loss_fn = policy_loss("grpo", {"kl_beta": 0}).custom(inputs)
    slopes = apply(loss_fn, [policy]).gradients[0]
    assert slopes == pytest.approx([0, 0, -0.904837, -0.606531], abs=1e-6)
    halved = [-slope / 2 for slope in slopes]
    assert halved == pytest.approx([0, 0, 0.452418, 0.303266], abs=1e-6)
    carrier = [datum(4, weights=[-slope for slope in slopes])]
    assert close(
        gradient(None, "num_loss_tokens", data=carrier), gradient(None, "none", data=[datum(4, weights=halved)])
    )
