"""What every endpoint does alike: the key, bodies, errors, probes."""

from __future__ import annotations

import httpx
import pytest
import tokenizers


def test_healthz_needs_no_key(service):
    response = httpx.get(f"{service.ready['base_url']}/api/v1/healthz", timeout=100, trust_env=False)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "headers",
    [{}, {"X-API-Key": "tml-wrong"}, {"Authorization": "Bearer tml-wrong"}, {"Authorization": "Basic tml-test-key"}],
)
def test_without_the_key_nothing_is_told(service, headers):
    for path in ("/api/v1/get_server_capabilities", "/api/v1/nothing_here"):
        response = httpx.get(service.ready["base_url"] + path, headers=headers, timeout=100, trust_env=False)
        assert response.status_code == 401
        assert "API key" in response.json()["detail"]


def test_the_key_may_come_as_a_bearer_token(service):
    url = f"{service.ready['base_url']}/api/v1/get_server_capabilities"
    response = httpx.get(url, headers={"Authorization": f"Bearer {service.key}"}, timeout=100, trust_env=False)
    assert response.status_code == 200


def test_capabilities_list_the_base_models(service):
    models = service.http.get("/get_server_capabilities").json()["supported_models"]
    found = {model["model_name"]: model for model in models}
    assert found[service.model_name]["trainable"] is True
    assert found[service.model_name]["max_context_length"] > 0


def test_newer_clients_are_told_what_they_may_do(service):
    assert service.post("/client/config", {"sdk_version": "1"}).json() == {}
    assert service.post("/client/dynamic_config", {"sdk_version": "1"}).json() == {"sample_cancel_enabled": True}


def test_telemetry_is_accepted_and_ignored(service):
    assert service.post("/telemetry", {"events": []}).json() == {"status": "accepted"}


def test_an_unknown_path_says_whose_it_is(service):
    response = service.post("/nothing_here", {})
    assert response.status_code == 404
    assert "fwasync local trainer service" in response.json()["detail"]


def test_a_wrong_method_is_json_too(service):
    response = service.http.get("/create_session")
    assert response.status_code == 405
    assert "create_session" in response.json()["detail"]


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/create_model", b"{", "truncated"),
        ("/create_model", b'{"session_id":"s","base_model":"b"}', "model_seq_id"),
        ("/create_model", b'{"session_id":"s","base_model":"b","model_seq_id":"0"}', "$.model_seq_id"),
        ("/create_session", b'{"user_metadata":' + b'{"a":' * 50_000, "cannot be read"),
        ("/create_session", b'{"tags":["\xff"]}', "cannot be read"),
        ("/forward_backward", b"[1]", "object"),
        ("/forward_backward", b'{"seq_id":1}', "model_id"),
        ("/optim_step", b'{"model_id":"m","seq_id":"x","adam_params":{}}', "$.seq_id"),
        ("/asample", b'{"prompt":{},"sampling_params":{"max_tokens":"x"}}', "$.sampling_params.max_tokens"),
        ("/retrieve_future", b"", "request_id"),
        ("/session_heartbeat", b"{}", "session_id"),
    ],
)
def test_a_malformed_body_is_answered_with_the_place(service, path, body, where):
    response = service.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert where in response.json()["detail"]


@pytest.mark.parametrize(
    ("path", "headers", "what"),
    [
        ("/optim_step", {"Content-Type": "application/x-protobuf"}, "reads JSON here, not application/x-protobuf"),
        ("/forward_backward", {"Content-Type": "text/plain"}, "reads JSON or protobuf here, not text/plain"),
        ("/forward_backward", {"Content-Encoding": "gzip"}, "plain or zstd, not gzip"),
    ],
)
def test_other_encodings_are_refused(service, path, headers, what):
    response = service.http.post(path, content=b"x", headers=headers)
    assert response.status_code == 415
    assert what in response.json()["detail"]


def test_an_unknown_session_is_gone(service):
    assert service.post("/session_heartbeat", {"session_id": "ours"}).status_code == 410
    body = {"session_id": "ours", "model_seq_id": 0, "base_model": service.model_name}
    response = service.post("/create_model", body)
    assert response.status_code == 404
    assert "create a new session" in response.json()["detail"]


def test_a_live_session_may_beat(service):
    body = {"session_id": service.session(), "type": "session_heartbeat"}
    assert service.post("/session_heartbeat", body).json() == {"type": "session_heartbeat"}


def test_a_finished_session_takes_its_models_along(service):
    model = service.model()
    assert service.post(f"/sessions/{model.session_id}/finish", {"reason": {"type": "success"}}).status_code == 200
    assert service.post("/session_heartbeat", {"session_id": model.session_id}).status_code == 410
    assert service.post("/get_info", {"model_id": model.id}).status_code == 404


def test_an_unknown_model_is_told_what_to_do(service):
    for path in ("/optim_step", "/get_info", "/unload_model"):
        response = service.post(path, {"model_id": "s:train:0", "seq_id": 1, "adam_params": {}})
        assert response.status_code == 404
        assert "restarted" in response.json()["detail"]
        assert "load a checkpoint" in response.json()["detail"]


def test_an_unknown_base_model_is_told_which_there_are(service):
    body = {"session_id": service.session(), "model_seq_id": 0, "base_model": "other/model"}
    response = service.post("/create_model", body)
    assert response.status_code == 400
    assert service.model_name in response.json()["detail"]


def test_get_info_names_a_tokenizer_that_loads(service):
    model = service.model()
    info = service.post("/get_info", {"model_id": model.id}).json()
    assert info["model_data"]["model_name"] == service.model_name
    assert (info["is_lora"], info["lora_rank"]) == (True, 4)
    tokenizer = tokenizers.Tokenizer.from_file(f"{info['model_data']['tokenizer_id']}/tokenizer.json")
    assert tokenizer.encode("hé").ids == list("hé".encode())
