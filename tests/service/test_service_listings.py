"""Training runs, checkpoints and sessions as lists, and what can be done to them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

TOKENS = [5, 6, 7, 8]
EVERYTHING = {"limit": 1000}


def get(service, path: str, **params):
    response = service.http.get(path, params=params)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_run_is_listed_with_what_was_saved_of_it(service):
    model = service.model(user_metadata={"who": "me"})
    model.step(1, TOKENS)
    kept = service.run("/save_weights", model.body(3, path="a", user_metadata={"step": "1"}))["path"]
    service.run("/save_weights", model.body(4, path="b"))
    shown = service.run("/save_weights_for_sampler", model.body(5, path="s"))["path"]
    run = get(service, f"/training_runs/{model.id}")
    assert (run["base_model"], run["is_lora"], run["lora_rank"]) == (service.model_name, True, 4)
    assert run["user_metadata"] == {"who": "me"}
    assert run["last_checkpoint"]["checkpoint_id"] == "weights/b"
    assert run["last_sampler_checkpoint"]["tinker_path"] == shown
    assert get(service, "/training_runs", limit=1)["training_runs"] == [run]
    entries = get(service, f"/training_runs/{model.id}/checkpoints")["checkpoints"]
    assert [entry["checkpoint_id"] for entry in entries] == ["sampler_weights/s", "weights/b", "weights/a"]
    assert [entry["checkpoint_type"] for entry in entries] == ["sampler", "training", "training"]
    oldest = entries[-1]
    assert (oldest["tinker_path"], oldest["user_metadata"]) == (kept, {"step": "1"})
    assert oldest["size_bytes"] > 1000
    assert abs(datetime.fromisoformat(oldest["time"]) - datetime.now(UTC)) < timedelta(minutes=10)
    assert all(entry in get(service, "/checkpoints", **EVERYTHING)["checkpoints"] for entry in entries)


def test_lists_come_in_pages(service):
    for _ in range(3):
        service.model()
    whole = get(service, "/training_runs", **EVERYTHING)
    names = [run["training_run_id"] for run in whole["training_runs"]]
    assert whole["cursor"] == {"offset": 0, "limit": 1000, "total_count": len(names)}
    page = get(service, "/training_runs", limit=2, offset=1)
    assert [run["training_run_id"] for run in page["training_runs"]] == names[1:3]
    assert page["cursor"] == {"offset": 1, "limit": 2, "total_count": len(names)}


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 10_000}, {"offset": -1}, {"limit": "many"}])
def test_impossible_pages_are_refused(service, params):
    for path in ("/training_runs", "/checkpoints", "/sessions"):
        response = service.http.get(path, params=params)
        assert response.status_code == 422
        assert "limit" in response.json()["detail"]


def test_a_run_without_anything_saved_is_there_while_its_session_is(service):
    model = service.model()
    assert get(service, f"/training_runs/{model.id}/checkpoints")["checkpoints"] == []
    service.post(f"/sessions/{model.session_id}/finish", {})
    for path in (f"/training_runs/{model.id}", f"/training_runs/{model.id}/checkpoints"):
        response = service.http.get(path)
        assert response.status_code == 404
        assert "no training run" in response.json()["detail"]


def test_a_saved_run_outlives_its_session_and_its_process(start, tmp_path):
    first = start(tmp_path)
    model = first.model()
    first.run("/save_weights", model.body(1, path="a"))
    first.post(f"/sessions/{model.session_id}/finish", {})
    before = get(first, f"/training_runs/{model.id}")
    first.close()
    second = start(tmp_path)
    assert get(second, f"/training_runs/{model.id}") == before
    assert (before["base_model"], before["lora_rank"]) == (second.model_name, 4)


def test_a_deleted_checkpoint_is_gone_and_a_sampler_in_use_is_told(service):
    model = service.model()
    path = service.run("/save_weights", model.body(1, path="a"))["path"]
    url = f"/training_runs/{model.id}/checkpoints/weights/a"
    assert service.http.delete(url).status_code == 200
    assert service.http.delete(url).status_code == 404
    assert "no checkpoint" in service.run("/load_weights", model.body(2, path=path, optimizer=True))["error"]
    assert service.run("/save_weights", model.body(3, path="a"))["path"] == path
    snapshot = service.run("/save_weights_for_sampler", model.body(4, path="s"))["path"]
    request = {"session_id": model.session_id, "sampling_session_seq_id": 0, "model_path": snapshot}
    sampler = service.post("/create_sampling_session", request).json()["sampling_session_id"]
    assert service.http.delete(f"/training_runs/{model.id}/checkpoints/sampler_weights/s").status_code == 200
    prompt = {"prompt": {"chunks": [{"tokens": TOKENS}]}, "sampling_params": {"max_tokens": 1}}
    failed = service.run("/asample", {"sampling_session_id": sampler, "seq_id": 0, **prompt})
    assert failed["category"] == "user"


def test_a_time_to_live_is_noted(service):
    model = service.model()
    service.run("/save_weights", model.body(1, path="a", ttl_seconds=7200))
    url = f"/training_runs/{model.id}/checkpoints"

    def hours_left() -> float:
        [entry] = get(service, url)["checkpoints"]
        return (datetime.fromisoformat(entry["expires_at"]) - datetime.now(UTC)) / timedelta(hours=1)

    assert 1.5 < hours_left() <= 2
    assert service.http.put(f"{url}/weights/a/ttl", json={"ttl_seconds": 36_000}).status_code == 200
    assert 9.5 < hours_left() <= 10
    assert service.http.put(f"{url}/weights/a/ttl", json={"ttl_seconds": None}).status_code == 200
    assert "expires_at" not in get(service, url)["checkpoints"][0]
    response = service.http.put(f"{url}/weights/a/ttl", json={"ttl_seconds": 60})
    assert (response.status_code, "3600" in response.json()["detail"]) == (400, True)
    assert service.http.put(f"{url}/weights/b/ttl", json={"ttl_seconds": 36_000}).status_code == 404
    assert service.post("/save_weights", model.body(2, path="c", ttl_seconds=60)).status_code == 400


@pytest.mark.parametrize("checkpoint", ["weights/..%2f..%2fapi_key", "other/a", "weights", "weights/a/b"])
def test_only_checkpoints_can_be_deleted(service, checkpoint):
    response = service.http.delete(f"/training_runs/x/checkpoints/{checkpoint}")
    assert response.status_code == 400
    assert "not a path of this service" in response.json()["detail"]


def test_a_session_tells_what_belongs_to_it(service):
    body = {"tags": [], "user_metadata": {"a": "b"}, "display_name": "mine", "sdk_version": "0"}
    session_id = service.post("/create_session", body).json()["session_id"]
    model_id = service.run(
        "/create_model", {"session_id": session_id, "model_seq_id": 0, "base_model": service.model_name}
    )["model_id"]
    request = {"session_id": session_id, "sampling_session_seq_id": 3, "base_model": service.model_name}
    sampler_id = service.post("/create_sampling_session", request).json()["sampling_session_id"]
    assert get(service, f"/sessions/{session_id}") == {
        "training_run_ids": [model_id],
        "sampler_ids": [sampler_id],
        "user_metadata": {"a": "b"},
        "display_name": "mine",
    }
    assert get(service, "/sessions", limit=1) == {"sessions": [session_id]}
    assert service.http.get("/sessions/other").status_code == 404
