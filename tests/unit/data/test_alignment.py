"""What a sampler tells, beside the targets: always the completion's values at the completion's positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.data.alignment import align_routing_matrices, align_sample_logprobs, response_start
from fwasync.data.datums import policy_datum
from fwasync.errors import DatumError

sizes = st.integers(1, 20).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, 20), st.integers(0, p - 1)))


def test_where_a_response_starts() -> None:
    assert [response_start(prompt_len) for prompt_len in (0, 1, 2, 10)] == [0, 0, 1, 9]


def test_worked_examples() -> None:
    """A prompt of three tokens, a completion of two."""
    plain = align_sample_logprobs([-0.5, -0.25], prompt_len=3, completion_len=2)
    assert plain.tolist() == [0, 0, -0.5, -0.25]
    echoed = align_sample_logprobs([None, -3, -0.5, -0.25], prompt_len=3, completion_len=2, echoed_prompt_logprobs=2)
    assert echoed.tolist() == [0, -3, -0.5, -0.25]
    last = align_sample_logprobs([-3, -0.5, -0.25], prompt_len=3, completion_len=2, echoed_prompt_logprobs=1)
    assert last.tolist() == echoed.tolist()
    assert plain.dtype == np.float32


@given(size=sizes, data=st.data())
def test_as_many_as_targets_with_the_completion_last(size: tuple[int, int, int], data: st.DataObject) -> None:
    prompt_len, completion_len, echoed = size
    told = data.draw(st.lists(st.floats(-50, 0, width=32), min_size=completion_len, max_size=completion_len))
    before = data.draw(st.lists(st.none() | st.floats(-50, 0, width=32), min_size=echoed, max_size=echoed))
    aligned = align_sample_logprobs(
        before + told, prompt_len=prompt_len, completion_len=completion_len, echoed_prompt_logprobs=echoed
    )
    assert len(aligned) == prompt_len + completion_len - 1
    start = response_start(prompt_len)
    assert aligned[start:].tolist() == told
    assert aligned[start - echoed : start].tolist() == [value or 0.0 for value in before]
    assert not np.any(aligned[: start - echoed])
    if completion_len:
        datum = policy_datum([7] * prompt_len, [8] * completion_len, told, 1.0)
        assert datum.loss_fn_inputs["logprobs"].to_numpy()[start:].tolist() == told


@given(size=sizes, full=st.booleans())
def test_routing_matrices_are_as_many_as_inputs(size: tuple[int, int, int], full: bool) -> None:
    prompt_len, completion_len, echoed = size
    before, told = [f"p{n}" for n in range(echoed)], [f"c{n}" for n in range(completion_len)]
    arguments: Any = {
        "prompt_len": prompt_len,
        "completion_len": completion_len,
        "echoed_prompt_matrices": echoed,
        "mode": "full" if full else "completion_only",
    }
    if full and echoed < prompt_len - 1:
        with pytest.raises(DatumError, match="prompt tokens are missing; sample with echo=True"):
            align_routing_matrices(before + told, **arguments)
        return
    aligned = align_routing_matrices(before + told, **arguments)
    assert aligned == ([*before] if full else [""] * (prompt_len - 1)) + told


def test_no_matrices_stay_none() -> None:
    assert align_routing_matrices(None, prompt_len=3, completion_len=2) is None


@pytest.mark.parametrize(
    ("logprobs", "sizes", "told"),
    [
        ([-1.0], (0, 1, 0), "prompt_len is 0"),
        ([-1.0], (2, 2, 0), "there are 1 sampler logprobs; 2 completion tokens need 2"),
        ([-1.0] * 3, (2, 2, 0), "there are 3 sampler logprobs"),
        ([-1.0] * 2, (3, 2, 2), "there are 2 sampler logprobs; 2 completion tokens and 2 echoed prompt tokens need 4"),
        ([-1.0] * 4, (2, 2, 2), "a prompt of 2 tokens cannot have 2 echoed ones"),
        ([-1.0, None], (2, 2, 0), r"logprob of completion token 1 is None; .* \(1 of 2 have none\)"),
        ([None, -1.0, math.nan], (2, 2, 1), "logprob of completion token 1 is nan"),
        ([-math.inf, math.inf], (2, 2, 0), r"completion token 0 is -inf; .* \(2 of 2 have none\)"),
    ],
)
def test_what_does_not_fit_is_refused(logprobs: Any, sizes: tuple[int, int, int], told: str) -> None:
    prompt_len, completion_len, echoed = sizes
    with pytest.raises(DatumError, match=told):
        align_sample_logprobs(
            logprobs, prompt_len=prompt_len, completion_len=completion_len, echoed_prompt_logprobs=echoed
        )
    if all(value == -1.0 for value in logprobs):
        with pytest.raises(DatumError):
            align_routing_matrices(
                [""] * len(logprobs),
                prompt_len=prompt_len,
                completion_len=completion_len,
                echoed_prompt_matrices=echoed,
            )
