"""Order, exactly-once and the life of models."""

from __future__ import annotations

import pytest

TOKENS = [5, 6, 7, 8]


def test_the_whole_way_of_a_training_run(service):
    model = service.model()
    first = service.run("/forward_backward", model.batch(1, TOKENS))
    record = first["loss_fn_outputs"][0]
    assert record["logprobs"]["shape"] == [4]
    assert first["metrics"]["loss:sum"] == pytest.approx(-sum(record["logprobs"]["data"]), abs=1e-4)
    out = service.run("/optim_step", model.body(2, adam_params={"learning_rate": 1e-2}, type="optim_step"))
    assert out["metrics"]["grad_norm"] > 0
    second = service.run("/forward", model.batch(3, TOKENS, backward=False))
    assert second["metrics"]["loss:sum"] < first["metrics"]["loss:sum"]
    saved = service.run("/save_weights", model.body(4, path="a"))
    assert saved == {"type": "save_weights", "path": f"tinker://{model.id}/weights/a"}
    model.step(5, TOKENS)
    loaded = service.run("/load_weights", model.body(7, path="a", optimizer=True))
    assert loaded["path"] == saved["path"]
    again = service.run("/forward", model.batch(8, TOKENS, backward=False))
    assert again == second
    assert "a" in service.http.get("/list_checkpoints").json()["checkpoints"]
    info = service.post("/weights_info", {"tinker_path": saved["path"]}).json()
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == (service.model_name, True, 4)


def test_with_and_without_the_optimizer_are_different_things(service):
    model = service.model()
    model.step(1, TOKENS)
    service.run("/save_weights", model.body(3, path="o"))
    model.step(4, [9, 8, 7])
    went_on = model.logprobs(TOKENS)
    after = {}
    for seq_id, optimizer in ((6, True), (9, False)):
        service.run("/load_weights", model.body(seq_id, path=f"tinker://{model.id}/weights/o", optimizer=optimizer))
        model.step(seq_id + 1, [9, 8, 7])
        after[optimizer] = model.logprobs(TOKENS)
    assert after[True] == went_on
    assert after[False] != went_on


def test_numbers_that_come_out_of_order_run_in_order(service):
    bodies = [
        ("/forward_backward", lambda m: m.batch(1, TOKENS)),
        ("/optim_step", lambda m: m.body(2, adam_params={"learning_rate": 1e-2})),
        ("/forward_backward", lambda m: m.batch(3, [9, 9, 1])),
        ("/optim_step", lambda m: m.body(4, adam_params={"learning_rate": 2e-2})),
        ("/forward", lambda m: m.batch(5, TOKENS, backward=False)),
    ]
    answers = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 3, 1, 0]):
        model = service.model()
        ids = {index: service.submit(bodies[index][0], bodies[index][1](model)) for index in order}
        answers.append([service.result(ids[index]) for index in range(5)])
    assert answers[0] == answers[1]


def test_a_repetition_is_the_same_operation(service):
    model = service.model()
    body = model.batch(1, TOKENS)
    ids = {service.submit("/forward_backward", body) for _ in range(3)}
    assert len(ids) == 1
    doubled = service.model()
    for seq_id in (1, 2):
        service.run("/forward_backward", doubled.batch(seq_id, TOKENS))
    norms = [
        service.run("/optim_step", m.body(n, adam_params={}))["metrics"]["grad_norm"]
        for m, n in ((model, 2), (doubled, 3))
    ]
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)
    assert service.submit("/forward_backward", body) in ids


def test_a_number_is_not_used_for_something_else(service):
    model = service.model()
    service.submit("/forward_backward", model.batch(1, TOKENS))
    response = service.post("/forward_backward", model.batch(1, [1, 2]))
    assert response.status_code == 409
    assert "seq_id 1 was already used by another request" in response.json()["detail"]
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("change", "status", "what"),
    [
        ({"loss_fn": "nonsense"}, 400, "unknown loss_fn 'nonsense'"),
        ({"data": []}, 400, "empty"),
        ({"data": [{"model_input": {"chunks": [{"tokens": ["x"]}]}, "loss_fn_inputs": {}}]}, 400, "datum 0"),
        ({"data": [{"model_input": {"chunks": [{"tokens": [2**80]}]}, "loss_fn_inputs": {}}]}, 400, "datum 0"),
        ({"loss_fn_config": {"beta": "high"}}, 400, "beta"),
        ({"data": 3}, 422, "$.forward_backward_input.data"),
    ],
)
def test_a_rejected_request_uses_up_its_number(service, change, status, what):
    model = service.model()
    later = service.submit("/forward", model.batch(2, TOKENS, backward=False))
    for _ in range(2):
        response = service.post("/forward_backward", model.batch(1, TOKENS, **change))
        assert response.status_code == status
        assert what in response.json()["detail"]
    assert "metrics" in service.result(later)
    assert service.post("/forward_backward", model.batch(1, TOKENS)).status_code == 409


def test_a_failed_operation_uses_up_its_number(service):
    model = service.model()
    failed = service.run("/optim_step", model.body(1, adam_params={}))
    assert failed["category"] == "user"
    assert "no gradient" in failed["error"]
    model.step(2, TOKENS)


def test_numbers_start_at_one(service):
    response = service.post("/optim_step", service.model().body(0, adam_params={}))
    assert response.status_code == 400
    assert "start at 1" in response.json()["detail"]


def test_an_unknown_normalization_is_refused(service):
    body = service.model().body(1, adam_params={}, grad_accumulation_normalization="per_moon")
    response = service.post("/optim_step", body)
    assert response.status_code == 400
    assert "num_loss_tokens" in response.json()["detail"]


def test_normalization_reaches_the_engine(service):
    norms = []
    for normalization in ("none", "num_loss_tokens"):
        model = service.model()
        service.run("/forward_backward", model.batch(1, TOKENS))
        body = model.body(2, adam_params={}, grad_accumulation_normalization=normalization)
        norms.append(service.run("/optim_step", body)["metrics"]["grad_norm"])
    assert norms[0] == pytest.approx(4 * norms[1], rel=1e-4)


def test_a_gap_says_what_is_missing(service):
    model = service.model()
    held = service.submit("/optim_step", model.body(4, adam_params={}))
    response = service.post("/retrieve_future", {"request_id": held})
    assert response.status_code == 408
    assert response.json() == {
        "type": "try_again",
        "request_id": held,
        "queue_state": "active",
        "queue_state_reason": "waiting for seq_id 1",
    }


def test_without_a_number_it_runs_after_what_is_held(service):
    model = service.model()
    untrained = model.logprobs(TOKENS)
    service.submit("/optim_step", model.body(2, adam_params={"learning_rate": 1e-2}))
    last = service.submit("/forward", model.batch(None, TOKENS, backward=False))
    service.submit("/forward_backward", model.batch(1, TOKENS))
    assert service.result(last)["loss_fn_outputs"][0]["logprobs"]["data"] != untrained


def test_two_tenants_do_not_touch_each_other(service):
    alone = service.model()
    expected = [alone.step(seq_id, TOKENS) for seq_id in (1, 3, 5)]
    one, other = service.model(), service.model()
    ids = []
    for seq_id in (1, 3, 5):
        for model, tokens in ((one, TOKENS), (other, [3, 1, 3])):
            service.submit("/forward_backward", model.batch(seq_id, tokens))
            body = model.body(seq_id + 1, adam_params={"learning_rate": 1e-2})
            ids.append((model, service.submit("/optim_step", body)))
    norms = [service.result(request_id)["metrics"]["grad_norm"] for model, request_id in ids if model is one]
    assert norms == expected
    assert one.logprobs(TOKENS) == alone.logprobs(TOKENS)


def test_a_name_is_saved_once_unless_overwritten(service):
    model = service.model()
    service.run("/save_weights", model.body(1, path="n"))
    failed = service.run("/save_weights", model.body(2, path="n"))
    assert failed["category"] == "user"
    assert "exists already" in failed["error"]
    model.step(3, TOKENS)
    expected = model.logprobs(TOKENS)
    assert "path" in service.run("/save_weights", model.body(5, path="n", overwrite=True))
    other = service.model()
    service.run("/load_weights", other.body(1, path=f"tinker://{model.id}/weights/n", optimizer=False))
    assert other.logprobs(TOKENS) == expected


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 200])
def test_names_that_are_no_names_are_refused(service, name):
    response = service.post("/save_weights", service.model().body(1, path=name))
    assert response.status_code == 400
    assert "cannot name a checkpoint" in response.json()["detail"]


@pytest.mark.parametrize("path", ["missing", "tinker://a:train:0/weights/b", "tinker://..:train:0/weights/b", "s3://b"])
def test_loading_what_is_not_there_fails(service, path):
    failed = service.run("/load_weights", service.model().body(1, path=path, optimizer=True))
    assert failed["category"] == "user"


def test_a_bare_name_means_this_model_only(service):
    model, other = service.model(), service.model()
    service.run("/save_weights", model.body(1, path="mine"))
    assert "error" in service.run("/load_weights", other.body(1, path="mine", optimizer=True))


def test_creation_is_known_by_its_number(service):
    body = {"session_id": service.session(), "model_seq_id": 3, "base_model": service.model_name}
    first = service.post("/create_model", body).json()
    assert first["model_id"] == f"{body['session_id']}:train:3"
    assert service.post("/create_model", body).json() == first
    response = service.post("/create_model", {**body, "lora_config": {"rank": 2}})
    assert response.status_code == 409


@pytest.mark.parametrize("lora_config", [None, {"rank": 0, "train_mlp": True}])
def test_no_adapter_means_every_parameter(service, lora_config):
    model = service.model(lora_config=lora_config)
    info = service.post("/get_info", {"model_id": model.id}).json()
    assert info["is_lora"] is False
    before = model.logprobs(TOKENS)
    model.step(1, TOKENS)
    assert model.logprobs(TOKENS) != before


def test_an_impossible_adapter_fails_and_says_so_ever_after(service):
    body = {"session_id": service.session(), "model_seq_id": 0, "base_model": service.model_name}
    body["lora_config"] = {"rank": -1}
    submitted = service.post("/create_model", body).json()
    assert service.result(submitted["request_id"])["category"] == "user"
    later = service.run("/optim_step", {"model_id": submitted["model_id"], "seq_id": 1, "adam_params": {}})
    assert "could not be created" in later["error"]


def test_a_base_only_reference_answers_forward(service):
    model = service.model(base_only=True, lora_config=None)
    assert len(model.logprobs(TOKENS)) == 4
    response = service.post("/forward_backward", model.batch(1, TOKENS))
    assert response.status_code == 400
    assert "base-only" in response.json()["detail"]


def test_an_unloaded_model_is_gone(service):
    model = service.model()
    before = service.submit("/forward", model.batch(1, TOKENS, backward=False))
    unload = service.submit("/unload_model", model.body())
    assert service.submit("/unload_model", model.body()) == unload
    assert service.result(unload) == {"type": "unload_model", "model_id": model.id}
    assert "metrics" in service.result(before)
    assert service.submit("/forward", model.batch(1, TOKENS, backward=False)) == before
    response = service.post("/forward", model.batch(2, TOKENS, backward=False))
    assert response.status_code == 404
    assert "was unloaded" in response.json()["detail"]


def test_what_is_held_when_its_session_ends_fails(service):
    model = service.model()
    held = service.submit("/optim_step", model.body(2, adam_params={}))
    service.post(f"/sessions/{model.session_id}/finish", {})
    failed = service.result(held)
    assert failed["category"] == "user"
    assert "seq_id 1" in failed["error"]
