"""Bodies of groups, and answers of which only a part is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fwasync._wire.completions import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    Logprobs,
    LongCompletion,
    WholeCompletion,
    WholeRawOutput,
    WholeTokenRow,
    encode_group,
)
from fwasync._wire.messages import decode, encode

REQUEST = CompletionRequest(model="m", prompt=[1, 2, 3], max_tokens=4, seed=7)


def test_the_requests_of_a_group_differ_in_their_seeds_and_share_the_rest() -> None:
    bodies = encode_group(REQUEST, 3)
    sent = [decode(b"".join(body), CompletionRequest) for body in bodies]
    assert [each.seed for each in sent] == [7, 8, 9]
    for each in sent:
        each.seed = 7
        assert each == REQUEST
    assert bodies[0][0] is bodies[2][0]
    assert REQUEST.seed == 7


def test_a_group_without_a_seed_is_one_body() -> None:
    request = CompletionRequest(model="m", prompt=[1, 2, 3])
    bodies = encode_group(request, 3)
    assert [decode(b"".join(body), CompletionRequest) for body in bodies] == [request] * 3


def test_what_a_service_tells_is_read_as_far_as_it_is_needed() -> None:
    row = WholeTokenRow(token="a", bytes=[97], text_offset=0, token_id=97, logprob=-0.5, sampling_logprob=-0.25)
    raw = WholeRawOutput(prompt_token_ids=[1], prompt_fragments=[1], completion="a", completion_token_ids=[97])
    choice = CompletionChoice(text="a", finish_reason="stop", logprobs=Logprobs(content=[row]), raw_output=raw)
    told = encode(WholeCompletion(id="c1", object="text_completion", created=1, model="m", choices=[choice]))
    for name in (b'"token":"a"', b'"bytes":[97]', b'"text_offset":0', b'"prompt_fragments":[1]', b'"completion":"a"'):
        assert name in told
    (read,) = decode(told, Completion).choices or []
    (read_row,) = (read.logprobs and read.logprobs.content) or []
    assert (read_row.token_id, read_row.logprob, read_row.sampling_logprob) == (97, -0.5, -0.25)
    assert read.raw_output is not None
    assert (read.raw_output.prompt_token_ids, read.raw_output.completion_token_ids) == ([1], [97])


def long_answer(count: int, **more: Any) -> dict[str, Any]:
    """An answer whose tokens look like the end of a row, and whose texts look like rows."""
    tokens = ["a", "},", "},{", "}]", '"', "\\", '"logprobs":{"content":[', "é"]
    rows = [{"token": tokens[i % 8], "bytes": [1, 2], "token_id": i, "logprob": -i / 7, **more} for i in range(count)]
    raw = {"completion_token_ids": list(range(count)), "completion": "},{" * count}
    choice = {"text": '"logprobs":{"content":[{},' * 9, "logprobs": {"content": rows}, "raw_output": raw}
    return {"choices": [choice], "usage": {"completion_tokens": count}}


@pytest.mark.parametrize("count", [0, 1, 700, 3000])
@pytest.mark.parametrize("more", [{}, {"top_logprobs": []}, {"top_logprobs": [{"token": "},"}, {"token": "a"}] * 3}])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_long_answer_in_steps_is_the_answer(count: int, more: dict[str, Any], separators: tuple[str, str]) -> None:
    body = json.dumps(long_answer(count, **more), separators=separators).encode()
    long = LongCompletion(body)
    steps = list(long.rows())
    read = decode(long.rest(), Completion)
    assert read.choices is not None
    assert read.choices[0].logprobs is not None
    whole = decode(body, Completion)
    rows = [row for step in steps for row in step]
    read.choices[0].logprobs.content = rows + list(read.choices[0].logprobs.content or ())
    assert read == whole
    if count == 3000 and not more:
        assert len(steps) > 5
        assert len(rows) > 2500


@pytest.mark.parametrize("body", [b"", b"{", b'{"choices":[]}', b'{"logprobs":{"content":[{"token_id":1},{"token_id":'])
def test_what_is_no_long_answer_is_left_as_it_is(body: bytes) -> None:
    long = LongCompletion(body)
    rows = sum(map(len, long.rows()))
    assert long.rest() == (body if not rows else b'{"logprobs":{"content":[{"token_id":')
