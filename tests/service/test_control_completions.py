"""Completions from deployments, over HTTP."""

from __future__ import annotations

import json
import math

import httpx
import numpy as np
import pytest

from fwasync._wire.completions import DONE, EventDecoder
from service.control_client import BASE, TOKENS, A, start_control
from service.test_control_hot_load import FULL, Deployment

PATH = "/inference/v1/completions"
MODEL = "accounts/local/deployments/dep"


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory):
    running = start_control(tmp_path_factory.mktemp("control"))
    running.post(f"{A}/deployments", FULL, deploymentId="dep")
    yield running
    running.close()
    running.service.close()


def ask(control, status=200, **fields):
    body = {"model": MODEL, "prompt": TOKENS, "max_tokens": 6, "seed": 1, "raw_output": True, **fields}
    response = control.http.post(PATH, json=body)
    assert response.status_code == status, response.text
    return response


def events(response: httpx.Response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    found = EventDecoder().feed(response.content)
    assert found.pop() == DONE
    return [json.loads(event) for event in found]


def test_a_completion_has_tokens_logprobs_and_metrics(control):
    response = ask(control, logprobs=True, perf_metrics_in_response=True)
    answer = response.json()
    [choice] = answer["choices"]
    ids = choice["raw_output"]["completion_token_ids"]
    rows = choice["logprobs"]["content"]
    assert [row["token_id"] for row in rows] == ids
    assert len(ids) == 6
    assert all(row["logprob"] == row["sampling_logprob"] < 0 for row in rows)
    assert "".join(row["token"] for row in rows) == choice["text"]
    assert choice["raw_output"]["prompt_token_ids"] == TOKENS
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    assert answer["perf_metrics"]["prompt-tokens"] == "4"
    assert response.headers["fireworks-prompt-tokens"] == "4"
    assert float(response.headers["fireworks-server-processing-time"]) > 0
    assert "logprobs" not in ask(control).json()["choices"][0]


@pytest.mark.parametrize("extra", [{}, {"echo": True}, {"n": 3}, {"n": 2, "echo_last": 2, "temperature": 0.5}])
def test_events_say_the_same_as_the_whole(control, extra):
    whole = ask(control, logprobs=True, **extra).json()
    pieces = events(ask(control, logprobs=True, stream=True, perf_metrics_in_response=True, **extra))
    assert pieces[-1]["usage"] == whole["usage"]
    assert pieces[-1]["perf_metrics"]["prompt-tokens"] == "4"
    for choice in whole["choices"]:
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        assert [piece["finish_reason"] for piece in own[:-1]] == [None] * (len(own) - 1)
        assert "".join(piece["text"] for piece in own) == choice["text"]
        rows = [row for piece in own for row in piece.get("logprobs", {}).get("content", [])]
        assert rows == choice["logprobs"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["raw_output"] == choice["raw_output"]


def test_an_echo_has_a_row_for_every_id(control):
    plain = ask(control).json()["choices"][0]["raw_output"]["completion_token_ids"]
    [choice] = ask(control, echo=True, logprobs=True).json()["choices"]
    assert choice["raw_output"]["completion_token_ids"] == TOKENS + plain
    rows = choice["logprobs"]["content"]
    assert [row["token_id"] for row in rows] == TOKENS + plain
    assert rows[0]["logprob"] == 0.0
    assert all(row["logprob"] < 0 for row in rows[1:])
    [last] = ask(control, echo_last=2, logprobs=True).json()["choices"]
    assert last["logprobs"]["content"][0]["logprob"] == rows[2]["logprob"]
    [only] = ask(control, echo=True, logprobs=True, max_tokens=0).json()["choices"]
    assert only["raw_output"]["completion_token_ids"] == TOKENS
    assert [row["logprob"] for row in only["logprobs"]["content"]] == [row["logprob"] for row in rows[:4]]


def test_seeds_repeat_and_samples_differ(control):
    def tokens(**fields):
        answer = ask(control, max_tokens=20, **fields).json()
        return [choice["raw_output"]["completion_token_ids"] for choice in answer["choices"]]

    assert tokens(seed=3, n=2) == tokens(seed=3, n=2, top_k=0, top_p=1.0)
    first, second = tokens(seed=3, n=2)
    assert first != second
    assert tokens(temperature=0, seed=1) == tokens(temperature=0, seed=2)


def test_a_stop_ends_it(control):
    free = ask(control, max_tokens=40).json()["choices"][0]["raw_output"]["completion_token_ids"]
    letter = next(token for token in free if token < 128)
    [choice] = ask(control, max_tokens=40, stop=[chr(letter)]).json()["choices"]
    assert choice["raw_output"]["completion_token_ids"] == free[: free.index(letter) + 1]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 0.5}, {"temperature": 2, "top_k": 5, "top_p": 0.7}]
)
def test_a_row_tells_the_logprob_of_the_distribution_that_was_drawn_from(control, settings):
    [choice] = ask(control, logprobs=True, **settings).json()["choices"]
    tokens = TOKENS + choice["raw_output"]["completion_token_ids"]
    body = {"prompt": {"chunks": [{"tokens": tokens}]}, "base_model": "fwasync/qwen3-tiny"}
    whole = control.service.run("/asample", {**body, "sampling_params": {"max_tokens": 1}, "topk_prompt_logprobs": 264})
    distributions = whole["topk_prompt_logprobs"][len(TOKENS) :]
    for row, best in zip(choice["logprobs"]["content"], distributions, strict=True):
        assert row["logprob"] == pytest.approx(dict(best)[row["token_id"]], abs=1e-4)
        if not settings["temperature"]:
            assert row["sampling_logprob"] == 0.0
            continue
        kept = best[: settings.get("top_k")]
        weights = np.exp([logprob / settings["temperature"] for _, logprob in kept])
        before = (np.cumsum(weights) - weights) / weights.sum()
        weights = weights[before < settings.get("top_p", 1)]
        place = [token for token, _ in kept].index(row["token_id"])
        assert row["sampling_logprob"] == pytest.approx(math.log(weights[place] / weights.sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "status", "what"),
    [
        ({"prompt": []}, 400, "empty"),
        ({"prompt": [9999]}, 400, "prompt"),
        ({"prompt": [2**70]}, 400, "prompt"),
        ({"prompt": [1] * 20_000}, 400, "context"),
        ({"n": 0}, 400, "n is 0"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"stop": ""}, 400, "stop"),
        ({"temperature": -1}, 400, "temperature"),
        ({"logprobs": 5}, 400, "bool"),
        ({"top_logprobs": 5}, 400, "top_logprobs"),
        ({"include_routing_matrix": True}, 400, "experts"),
        (
            {"routing_matrix_format": "parquet_v1"},
            400,
            "Extra inputs are not permitted, field: 'routing_matrix_format'",
        ),
        ({"model": "accounts/local/deployments/none"}, 404, "no deployment"),
        ({"model": BASE}, 404, "no deployment"),
    ],
)
def test_a_bad_request_is_refused(control, fields, status, what):
    assert what in ask(control, status, **fields).json()["error"]["message"]


def test_a_deployment_that_cannot_serve_says_425(control):
    control.post(f"{A}/deployments", {**FULL, "minReplicaCount": 0, "maxReplicaCount": 0}, deploymentId="zero")
    refused = ask(control, 425, model="accounts/local/deployments/zero").json()
    assert "maxReplicaCount" in refused["error"]["message"]


def test_a_hot_load_changes_what_is_sampled(control):
    deployment = Deployment(control, "swap")
    served = f"accounts/local/deployments/{deployment.name}"

    def logprobs():
        [choice] = ask(control, model=served, echo=True, logprobs=True).json()["choices"]
        return [row["logprob"] for row in choice["logprobs"]["content"][1:4]]

    before = logprobs()
    assert before == pytest.approx(deployment.model.logprobs(TOKENS)[:-1], abs=1e-4)
    deployment.model.step(1, TOKENS)
    deployment.number = 2
    deployment.save("s-aabbccdd")
    assert logprobs() == before
    deployment.load("s-aabbccdd")
    assert logprobs() == pytest.approx(deployment.model.logprobs(TOKENS)[:-1], abs=1e-4)
    assert logprobs() != pytest.approx(before, abs=1e-3)


def test_a_client_that_goes_away_leaves_nothing_running(control, deadline):
    small = {**FULL, "baseModel": "accounts/fwasync/models/qwen3-small"}
    control.post(f"{A}/deployments", small, deploymentId="small")
    # The most likely token again and again, up to the end of the context: four times that takes much longer than is
    # waited below.
    body = {"model": "accounts/local/deployments/small", "prompt": TOKENS, "max_tokens": 10**6, "n": 128}
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            control.http.post(PATH, json={**body, "temperature": 0}, timeout=0.3)
    for _ in deadline():
        metrics = ask(control, max_tokens=1, perf_metrics_in_response=True).json()["perf_metrics"]
        if metrics["num-concurrent-requests"] == "1":
            break
