"""Datums: the alignment, by worked examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker.types import ImageChunk

from fwasync.data.alignment import response_start
from fwasync.data.datums import completion_datum, input_datum, masked_datum, policy_datum, supervised_datum
from fwasync.errors import DatumError
from fwasync.types import EncodedTextChunk, ModelInput


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


tokens_and_weights = st.lists(st.tuples(st.integers(0, 99), st.floats(0, 2, width=16)), min_size=2, max_size=30)


@given(pairs=tokens_and_weights, cut=st.none() | st.integers(2, 40), masked=st.booleans())
def test_every_position_speaks_of_the_next_token(pairs: list[tuple[int, float]], cut: int | None, masked: bool) -> None:
    tokens, weights = [token for token, _ in pairs], [weight for _, weight in pairs]
    datum = supervised_datum(tokens, weights, max_tokens=cut, include_loss_mask=masked)
    inputs = arrays(datum)
    assert datum.model_input.to_ints() == tokens[:cut][:-1]
    assert inputs["target_tokens"].tolist() == tokens[:cut][1:]
    assert inputs["weights"].tolist() == weights[:cut][1:]
    assert ("loss_mask" in inputs) == masked
    if masked:
        assert inputs["loss_mask"].tolist() == inputs["weights"].tolist()
        assert inputs["loss_mask"].dtype == np.float32
    counted = arrays(masked_datum(tokens, weights, max_tokens=cut))["weights"]
    assert counted.tolist() == [float(weight > 0) for weight in weights[:cut][1:]]
    text = ModelInput(chunks=[EncodedTextChunk(tokens=tokens[:1]), EncodedTextChunk(tokens=tokens[1:])])
    same = input_datum(text, weights, max_tokens=cut, include_loss_mask=masked)
    assert same.model_input.to_ints() == datum.model_input.to_ints()
    assert {name: values.tolist() for name, values in arrays(same).items()} == {
        name: values.tolist() for name, values in inputs.items()
    }


@given(prompt=st.lists(st.integers(0, 99), max_size=9), completion=st.lists(st.integers(0, 99), min_size=2, max_size=9))
def test_a_completion_is_weighted_from_where_the_response_starts(prompt: list[int], completion: list[int]) -> None:
    datum = completion_datum(prompt, completion)
    weights = arrays(datum)["weights"]
    start = response_start(len(prompt))
    assert [datum.model_input.to_ints()[0], *arrays(datum)["target_tokens"].tolist()] == prompt + completion
    assert weights.tolist() == [0.0] * start + [1.0] * (len(weights) - start)
    if prompt:
        assert arrays(datum)["target_tokens"][start:].tolist() == completion


def picture(expected_tokens: int | None) -> ImageChunk:
    return ImageChunk(data=b"", format="png", expected_tokens=expected_tokens)


def test_an_image_takes_its_slots_and_has_no_weight() -> None:
    """Two tokens, an image of three, two tokens: seven in all, so six positions."""
    sequence = ModelInput(chunks=[EncodedTextChunk(tokens=[5, 6]), picture(3), EncodedTextChunk(tokens=[7, 8])])
    datum = input_datum(sequence, [0, 0, 0, 0, 0, 1, 1])
    assert datum.model_input.length == 6
    assert [chunk.length for chunk in datum.model_input.chunks] == [2, 3, 1]
    assert arrays(datum)["target_tokens"].tolist() == [6, 0, 0, 0, 7, 8]
    assert arrays(datum)["weights"].tolist() == [0, 0, 0, 0, 1, 1]
    for cut, targets, shown in ((6, [6, 0, 0, 0, 7], [2, 3]), (5, [6], [1]), (4, [6], [1]), (2, [6], [1])):
        datum = input_datum(sequence, [0, 1, 0, 0, 0, 1, 1], max_tokens=cut)
        assert arrays(datum)["target_tokens"].tolist() == targets
        assert [chunk.length for chunk in datum.model_input.chunks] == shown
        assert len(arrays(datum)["weights"]) == len(targets) == datum.model_input.length


@pytest.mark.parametrize(
    ("chunks", "weights", "told"),
    [
        ([picture(None)], [0], "does not say how many tokens it takes"),
        ([picture(2), EncodedTextChunk(tokens=[1, 2])], [0, 1, 1, 1], "slots of an image have a weight"),
        ([picture(2), EncodedTextChunk(tokens=[1, 2])], [0, 0, 1], "there are 4 tokens and 3 weights"),
        ([EncodedTextChunk(tokens=[1]), picture(2)], [0, 0, 0], "a sequence of 1 tokens has nothing to predict"),
    ],
)
def test_what_cannot_be_a_datum_with_images(chunks: Any, weights: list[float], told: str) -> None:
    with pytest.raises(DatumError, match=told):
        input_datum(ModelInput(chunks=chunks), weights)
