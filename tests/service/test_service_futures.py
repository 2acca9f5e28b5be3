"""Long polls, results and cancellation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.conftest import Service

TOKENS = [5, 6, 7, 8]
# The larger model takes its time for so many tokens of so many samples.
ENDLESS = {"max_tokens": 1000, "temperature": 1.0, "seed": 3, "stop": []}


def sampler_of(service) -> str:
    body = {"session_id": service.session(), "sampling_session_seq_id": 0, "base_model": "fwasync/qwen3-small"}
    return service.post("/create_sampling_session", body).json()["sampling_session_id"]


def test_a_result_may_be_fetched_again(service):
    model = service.model()
    request_id = service.submit("/forward", model.batch(1, TOKENS, backward=False))
    assert service.result(request_id) == service.result(request_id)


def test_an_unknown_future_is_gone(service):
    for path in ("/retrieve_future", "/cancel_future"):
        response = service.post(path, {"request_id": "req-of-another-life"})
        assert response.status_code == 410
        assert "restarted" in response.json()["detail"]


def test_a_long_poll_ends_with_try_again(service):
    model = service.model()
    held = service.submit("/optim_step", model.body(2, adam_params={}))
    for _ in range(2):
        response = service.post("/retrieve_future", {"request_id": held, "allow_metadata_only": True})
        assert response.status_code == 408
        assert response.json()["type"] == "try_again"


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A service that holds a poll for as long as any test could take."""
    running = Service(tmp_path_factory.mktemp("patient"), long_poll_s=60)
    yield running
    running.close()


def test_a_long_poll_ends_when_the_result_is_there(patient):
    model = patient.model()
    held = patient.submit("/forward", model.batch(2, TOKENS, backward=False))
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(patient.post, "/retrieve_future", {"request_id": held})
        patient.submit("/forward", model.batch(1, TOKENS, backward=False))
        assert poll.result().status_code == 200


def test_a_client_that_leaves_a_poll_leaves_the_future_alone(patient):
    model = patient.model()
    held = patient.submit("/forward", model.batch(2, TOKENS, backward=False))
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            patient.http.post("/retrieve_future", json={"request_id": held}, timeout=0.05)
    patient.submit("/forward", model.batch(1, TOKENS, backward=False))
    assert "metrics" in patient.result(held)


def test_a_cancelled_sample_fails_and_frees_its_place(service):
    sampler = sampler_of(service)
    prompt = {"chunks": [{"tokens": [1, 2]}]}
    ids = [
        service.submit(
            "/asample",
            {"sampling_session_id": sampler, "seq_id": number, "prompt": prompt, "num_samples": 64}
            | {"sampling_params": ENDLESS},
        )
        for number in range(4)
    ]
    assert service.post("/cancel_future", {"request_id": ids[-1]}).json() == {}
    failed = service.result(ids[-1])
    assert "cancelled" in failed["error"]
    for request_id in ids[:-1]:
        service.post("/cancel_future", {"request_id": request_id})
    body = {"sampling_session_id": sampler, "seq_id": 9, "prompt": prompt, "sampling_params": {"max_tokens": 2}}
    done = service.submit("/asample", body)
    assert len(service.result(done)["sequences"][0]["tokens"]) <= 2
    assert service.post("/cancel_future", {"request_id": done}).json() == {}
    assert "sequences" in service.result(done)


def test_training_cannot_be_cancelled(service):
    model = service.model()
    held = service.submit("/optim_step", model.body(2, adam_params={}))
    response = service.post("/cancel_future", {"request_id": held})
    assert response.status_code == 400
    assert "takes effect" in response.json()["detail"]
