"""Datums: the alignment, by worked examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fwasync.data.datums import policy_datum, supervised_datum
from fwasync.errors import DatumError


def arrays(datum: Any) -> dict[str, np.ndarray]:
    return {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}


def test_supervised() -> None:
    datum = supervised_datum([10, 11, 20, 21], [0, 0, 1, 0.5])
    assert datum.model_input.to_ints() == [10, 11, 20]
    inputs = arrays(datum)
    assert inputs.keys() == {"target_tokens", "weights"}
    assert inputs["target_tokens"].tolist() == [11, 20, 21]
    assert inputs["weights"].tolist() == [0, 1, 0.5]
    assert inputs["target_tokens"].dtype == np.int64
    assert inputs["weights"].dtype == np.float32


def test_policy() -> None:
    """The example of the module: a prompt of two tokens and a completion of two."""
    datum = policy_datum([10, 11], [20, 21], [-0.5, -0.25], 2.0)
    assert datum.model_input.to_ints() == [10, 11, 20]
    inputs = arrays(datum)
    assert inputs.keys() == {"target_tokens", "logprobs", "advantages"}
    assert inputs["target_tokens"].tolist() == [11, 20, 21]
    assert inputs["logprobs"].tolist() == [0, -0.5, -0.25]
    assert inputs["advantages"].tolist() == [0, 2, 2]
    assert inputs["logprobs"].dtype == inputs["advantages"].dtype == np.float32


def test_the_shortest_policy_datum_has_one_position() -> None:
    inputs = arrays(policy_datum(np.array([7]), np.array([8]), np.array([-1.0]), -3.0))
    assert {name: values.tolist() for name, values in inputs.items()} == {
        "target_tokens": [8],
        "logprobs": [-1],
        "advantages": [-3],
    }


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: supervised_datum([1, 2], [1.0]), "2 tokens and 1 weights"),
        (lambda: supervised_datum([1], [1.0]), "a sequence of 1 tokens has nothing to predict"),
        (lambda: policy_datum([], [1], [-1.0], 1.0), "at least one prompt token"),
        (lambda: policy_datum([1], [], [], 1.0), "at least one prompt token and one completion token"),
        (lambda: policy_datum([1], [2, 3], [-1.0], 1.0), "there are 1 sampler logprobs; 2 completion tokens need 2"),
    ],
)
def test_what_cannot_be_a_datum(make: Any, told: str) -> None:
    with pytest.raises(DatumError, match=told):
        make()
