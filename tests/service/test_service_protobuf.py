"""What newer clients do: batches and results as protobuf, packed bodies, models created from checkpoints."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import zstandard

from fwasync import types
from fwasync._wire.protobuf import CONTENT_TYPE, batches, results, samples
from fwasync.local.unpacking import unpacked

TOKENS = [72, 101, 108, 108, 111]
HEADERS = {"Content-Type": CONTENT_TYPE}


def body(
    model_id: str, seq_id: int, tokens: list[int] = TOKENS, *, backward: bool = True, loss_fn: str = "cross_entropy"
) -> bytes:
    inputs = {"target_tokens": np.array([*tokens[1:], 0]), "weights": np.ones(len(tokens), np.float32)}
    datum = (types.ModelInput.from_ints(tokens), inputs)
    pieces = batches.encode_batch([datum], backward=backward, loss_fn=loss_fn, loss_fn_config=None)  # pyright: ignore[reportArgumentType]
    return b"".join([*pieces, batches.encode_batch_end(model_id, seq_id)])


def send(service, content: bytes, path: str = "/forward_backward", **headers: str):
    return service.http.post(path, content=content, headers={**HEADERS, **headers})


def retrieve(service, request_id: str, accept: str = CONTENT_TYPE):
    while True:
        headers = {"Accept": accept}
        response = service.http.post("/retrieve_future", json={"request_id": request_id}, headers=headers)
        if response.status_code != 408:
            assert response.status_code == 200, response.text
            return response


def run(service, content: bytes, path: str = "/forward_backward"):
    response = send(service, content, path)
    assert response.status_code == 200, response.text
    return retrieve(service, response.json()["request_id"])


def read(response) -> tuple[dict[str, float], list[dict[str, np.ndarray]]]:
    assert response.headers["content-type"] == CONTENT_TYPE
    _, metrics, records = results.decode_outputs(response.content)
    return metrics, list(records)


def test_both_encodings_say_the_same_to_the_last_bit(service):
    first, second = service.model(), service.model()
    metrics, [record] = read(run(service, body(first.id, 1)))
    as_json = service.run("/forward_backward", second.batch(1, TOKENS))
    assert metrics == as_json["metrics"]
    for name, tensor in as_json["loss_fn_outputs"][0].items():
        assert np.array_equal(record[name], np.array(tensor["data"], np.float32))
    norms = [
        service.run("/optim_step", model.body(2, adam_params={}))["metrics"]["grad_norm"] for model in (first, second)
    ]
    assert norms[0] == norms[1] > 0


def test_a_result_comes_in_either_encoding_whatever_the_request_was(service):
    model = service.model()
    json_request = service.submit("/forward_backward", model.batch(1, TOKENS))
    protobuf_request = send(service, body(model.id, 2)).json()["request_id"]
    for request_id in (json_request, protobuf_request, json_request):
        _, [record] = read(retrieve(service, request_id, f"{CONTENT_TYPE}, application/json"))
        plain = retrieve(service, request_id, "application/json")
        assert plain.headers["content-type"] == "application/json"
        assert plain.json()["loss_fn_outputs"][0]["logprobs"]["data"] == pytest.approx(record["logprobs"].tolist())


def test_a_large_result_comes_in_either_encoding(service):
    model = service.model()
    batch = {"data": [service.datum([index % 256] * 50) for index in range(60)], "loss_fn": "cross_entropy"}
    request_id = service.submit("/forward", model.body(1, forward_input=batch))
    _, records = read(retrieve(service, request_id))
    assert len(retrieve(service, request_id).content) > 20_000
    plain = retrieve(service, request_id, "application/json").json()["loss_fn_outputs"]
    assert [len(record["logprobs"]["data"]) for record in plain] == [50] * 60
    assert np.array_equal(np.float32(plain[59]["logprobs"]["data"]), records[59]["logprobs"])


def test_forward_only_adds_no_gradient(service):
    model = service.model()
    run(service, body(model.id, 1, backward=False))
    run(service, body(model.id, 2), path="/forward")
    failed = service.run("/optim_step", model.body(3, adam_params={}))
    assert "no gradient" in failed["error"]


def test_a_repetition_is_the_same_operation_and_another_body_a_conflict(service):
    model = service.model()
    first = send(service, body(model.id, 1)).json()
    assert send(service, body(model.id, 1)).json() == first
    assert send(service, body(model.id, 1, [1, 2, 3])).status_code == 409
    assert service.post("/forward_backward", model.batch(1, TOKENS)).status_code == 409


def test_early_ones_wait_and_refused_ones_count(service):
    model = service.model()
    early = send(service, body(model.id, 2)).json()["request_id"]
    waiting = service.post("/retrieve_future", {"request_id": early})
    assert (waiting.status_code, waiting.json()["queue_state_reason"]) == (408, "waiting for seq_id 1")
    refused = send(service, body(model.id, 1, loss_fn="nonsense"))
    assert refused.status_code == 400
    assert "unknown loss_fn 'nonsense'" in refused.json()["detail"]
    read(retrieve(service, early))


@pytest.mark.parametrize(
    ("content", "status", "what"),
    [
        (b"\xff", 422, "cut short"),
        (b"", 400, "seq_id is 0"),
        (body("", 1), 404, "model '' is not here"),
        (body("m", 0), 400, "seq_id is 0"),
    ],
)
def test_what_has_no_model_or_number_is_refused(service, content, status, what):
    response = send(service, content)
    assert response.status_code == status
    assert what in response.json()["detail"]


def test_an_unreadable_datum_is_named(service):
    model = service.model()
    content = bytearray(body(model.id, 1))
    content[content.index(b"\x18\x02") + 1] = 77  # the dtype of the first tensor
    response = send(service, bytes(content))
    assert response.status_code == 400
    assert "datum 0: loss_fn_inputs['target_tokens']: unknown dtype 77" in response.json()["detail"]


def test_failures_and_waiting_are_json_also_where_protobuf_is_wanted(service):
    model = service.model()
    failed = run(service, body(model.id, 1, [1, 2, 999]))
    assert failed.headers["content-type"] == "application/json"
    assert failed.json()["category"] == "user"
    assert "token id 999" in failed.json()["error"]


def test_a_number_that_is_none_fails_the_operation(service):
    model = service.model()
    inputs = {"target_tokens": np.array(TOKENS), "weights": np.full(len(TOKENS), np.nan, np.float32)}
    datum = (types.ModelInput.from_ints(TOKENS), inputs)
    pieces = batches.encode_batch([datum], backward=True, loss_fn="cross_entropy", loss_fn_config=None)  # pyright: ignore[reportArgumentType]
    failed = run(service, b"".join([*pieces, batches.encode_batch_end(model.id, 1)])).json()
    assert "weights is not finite at position 0" in failed["error"]


def test_a_base_only_reference_takes_forwards(service):
    model = service.model(base_only=True, lora_config=None)
    _, [record] = read(run(service, body(model.id, 1, backward=False)))
    assert len(record["logprobs"]) == len(TOKENS)
    assert "answers forward" in send(service, body(model.id, 2)).json()["detail"]


def test_sparse_targets_are_made_dense(service):
    model = service.model()
    targets = {"dtype": "int64", "data": TOKENS[1:], "shape": [4, 9]}
    weights = {"dtype": "float32", "data": [1.0] * 4, "shape": [4, 9]}
    cells = {"sparse_crow_indices": [0, 1, 2, 3, 4], "sparse_col_indices": [8, 0, 3, 3]}
    datum = {
        "model_input": {"chunks": [{"tokens": TOKENS[:4]}]},
        "loss_fn_inputs": {"target_tokens": {**targets, **cells}, "weights": {**weights, **cells}},
    }
    batch = {"data": [datum], "loss_fn": "cross_entropy"}
    out = service.run("/forward", model.body(1, forward_input=batch))
    logprobs = np.array(out["loss_fn_outputs"][0]["logprobs"]["data"]).reshape(4, 9)
    assert logprobs[range(4), [8, 0, 3, 3]] == pytest.approx(model.logprobs(TOKENS)[:4], abs=1e-5)


# -- samples ---------------------------------------------------------------------------------------


@pytest.fixture
def sampler(service):
    request = {"session_id": service.session(), "sampling_session_seq_id": 0, "base_model": service.model_name}
    return service.post("/create_sampling_session", request).json()["sampling_session_id"]


def ask(sampler: str, seq_id: int = 0, tokens: list[int] = TOKENS, **fields):
    params = {"max_tokens": 3, "seed": 1, **fields.pop("sampling_params", {})}
    prompt = {"chunks": [{"tokens": tokens}]}
    return {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt, "sampling_params": params, **fields}


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1]])
def test_a_sample_comes_in_either_encoding(service, sampler, tokens):
    asked = ask(sampler, tokens=tokens, num_samples=2, prompt_logprobs=True, topk_prompt_logprobs=2)
    request_id = service.submit("/asample", asked)
    response = retrieve(service, request_id)
    assert response.headers["content-type"] == CONTENT_TYPE
    sample = samples.decode_sample(response.content)
    plain = retrieve(service, request_id, "application/json").json()
    assert [sequence.tokens for sequence in sample.sequences] == [each["tokens"] for each in plain["sequences"]]
    assert [sequence.logprobs for sequence in sample.sequences] == [each["logprobs"] for each in plain["sequences"]]
    assert sample.prompt_logprobs == plain["prompt_logprobs"]
    assert [len(entry or ()) for entry in plain["topk_prompt_logprobs"]] == [0, *[2] * (len(tokens) - 1)]
    assert [entry and [tuple(pair) for pair in entry] for entry in plain["topk_prompt_logprobs"]] == (
        sample.topk_prompt_logprobs
    )


def test_only_the_end_of_a_prompt_is_scored(service, sampler):
    whole = service.run("/asample", ask(sampler, prompt_logprobs=True))["prompt_logprobs"]
    end = service.run("/asample", ask(sampler, 1, prompt_logprobs=True, prompt_logprobs_last_n=2))["prompt_logprobs"]
    assert end[:3] == [None] * 3
    assert end[3:] == pytest.approx(whole[3:])


def test_an_empty_list_of_stops_turns_off_those_of_the_model(service, sampler):
    # Hot enough that each of many samples would meet a stop token of the model before the end of the context.
    hot = {"max_tokens": 300, "temperature": 5.0}
    stopped = service.run("/asample", ask(sampler, 0, num_samples=4, sampling_params=hot))["sequences"]
    free = service.run("/asample", ask(sampler, 1, num_samples=4, sampling_params={**hot, "stop": []}))["sequences"]
    assert "stop" in {sequence["stop_reason"] for sequence in stopped}
    assert [(len(sequence["tokens"]), sequence["stop_reason"]) for sequence in free] == [(300, "length")] * 4


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"topk_sample_logprobs": 2}, "does not do topk_sample_logprobs"),
        ({"prompt_alt_tokens_k": 1}, "does not do prompt_alt_tokens_k"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64"}}, "does not do target_prompt_logprobs"),
        ({"record_stability_info": True}, "does not do record_stability_info"),
        ({"prompt_logprobs_last_n": 2}, "needs prompt_logprobs"),
    ],
)
def test_what_cannot_be_had_of_a_sample_is_refused_and_not_ignored(service, sampler, fields, what):
    response = service.post("/asample", ask(sampler, **fields))
    assert response.status_code == 400
    assert what in response.json()["detail"]


# -- zstd ------------------------------------------------------------------------------------------


def test_a_packed_body_is_the_same_operation(service):
    model = service.model()
    packed = zstandard.compress(body(model.id, 1))
    first = send(service, packed, **{"Content-Encoding": "zstd"})
    assert first.status_code == 200
    assert send(service, body(model.id, 1)).json() == first.json()


@pytest.mark.parametrize("content", [b"not packed at all", zstandard.compress(b"x" * 1000)[:-3]])
def test_what_is_not_packed_is_refused(service, content):
    response = send(service, content, **{"Content-Encoding": "zstd"})
    assert response.status_code == 400
    assert "not zstd" in response.json()["detail"]


def test_a_small_body_may_not_become_an_enormous_one(service):
    packer = zstandard.ZstdCompressor().compressobj(size=2**40)
    enormous = packer.compress(b"x") + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    response = send(service, enormous, **{"Content-Encoding": "zstd"})
    assert response.status_code == 413
    assert str(2**40) in response.json()["detail"]
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"x")
    assert send(service, unsized, **{"Content-Encoding": "zstd"}).status_code == 415


def test_without_the_package_a_packed_body_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(Exception, match="pip install zstandard") as caught:
        unpacked(b"")
    assert caught.value.refusal.status == 415


# -- models from checkpoints -----------------------------------------------------------------------


@pytest.fixture
def checkpoint(service):
    """A trained model, and the path of its checkpoint."""
    model = service.model()
    model.step(1, TOKENS)
    return model, service.run("/save_weights", model.body(3, path="a"))["path"]


def creation(service, path: str, **fields):
    return {"session_id": service.session(), "model_seq_id": 5, "path": path, "optimizer": True, **fields}


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_model_is_created_from_a_checkpoint(service, checkpoint, optimizer):
    model, path = checkpoint
    request = creation(service, path, optimizer=optimizer, base_model=service.model_name, type="load_weights")
    submitted = service.post("/load_weights", request).json()
    model_id = f"{request['session_id']}:train:5"
    assert submitted["model_id"] == model_id
    assert service.result(submitted["request_id"]) == {"type": "load_weights", "path": path, "model_id": model_id}
    new = type(model)(service, model_id)
    assert new.logprobs(TOKENS) == model.logprobs(TOKENS)
    info = service.post("/get_info", {"model_id": model_id}).json()
    assert (info["is_lora"], info["lora_rank"]) == (True, 4)
    # Its numbers start at 1, and the moments of the optimizer came along or did not.
    new.step(1, TOKENS)
    model.step(4, TOKENS)
    assert (new.logprobs(TOKENS) == model.logprobs(TOKENS)) is optimizer


def test_a_repeated_creation_is_the_same_model(service, checkpoint):
    request = creation(service, checkpoint[1])
    first = service.post("/load_weights", request).json()
    assert service.post("/load_weights", request).json() == first
    assert service.post("/load_weights", {**request, "optimizer": False}).status_code == 409
    create = {"session_id": request["session_id"], "model_seq_id": 5, "base_model": service.model_name}
    assert service.post("/create_model", create).status_code == 409


@pytest.mark.parametrize(
    ("change", "status", "what"),
    [
        ({"path": "tinker://x/weights/y"}, 400, "no checkpoint tinker://x/weights/y"),
        ({"path": "y"}, 400, "not a path of this service"),
        ({"path": "tinker://x/sampler_weights/y"}, 400, "weights for a sampler"),
        ({"base_model": "other/model"}, 400, "unknown base_model"),
        ({"base_model": "fwasync/qwen3-small"}, 400, "is of fwasync/qwen3-tiny, and base_model is fwasync/qwen3-small"),
        ({"optimizer_config": {"type": "dimuon"}}, 400, "unknown optimizer 'dimuon'"),
        ({"session_id": "ours"}, 404, "create a new session"),
        ({"model_seq_id": None}, 422, "session_id and model_seq_id"),
        ({"path": 1}, 422, "$.path"),
    ],
)
def test_an_impossible_creation_is_refused(service, checkpoint, change, status, what):
    response = service.post("/load_weights", {**creation(service, checkpoint[1]), **change})
    assert response.status_code == status
    assert what in response.json()["detail"]


def test_a_malformed_load_into_a_model_still_counts_its_number(service):
    model = service.model()
    assert service.post("/load_weights", model.body(1, path=7)).status_code == 422
    service.run("/forward", model.batch(2, TOKENS, backward=False))


def test_a_damaged_checkpoint_makes_no_model(service, checkpoint):
    model, path = checkpoint
    directory = service.data_dir / "weights" / model.id.replace(":", "~") / "a"
    (directory / "first_moment.safetensors").write_bytes(b"damaged")
    request = creation(service, path)
    failed = service.run("/load_weights", request)
    assert "cannot read" in failed["error"]
    model_id = f"{request['session_id']}:train:5"
    after = service.run("/optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
    assert f"model {model_id} could not be created" in after["error"]


def test_other_optimizers_and_changing_samplers_are_refused(service):
    model = service.model(optimizer_config={"type": "adamw"})
    request = {"session_id": service.session(), "model_seq_id": 0, "base_model": service.model_name}
    response = service.post("/create_model", {**request, "optimizer_config": {"type": "dimuon", "version": 1}})
    assert (response.status_code, "adamw" in response.json()["detail"]) == (400, True)
    response = service.post("/save_weights_for_sampler", model.body(1, sampling_session_seq_id=0, kind="inflight"))
    assert response.status_code == 400
    assert "use snapshot" in response.json()["detail"]
