"""Sampling sessions, snapshots and samples."""

from __future__ import annotations

import pytest

TOKENS = [5, 6, 7, 8]


class Sampler:
    """One sampling session."""

    def __init__(self, service, sampling_id: str) -> None:
        self.service, self.id, self.number = service, sampling_id, 0

    def body(self, *, seq_id: int | None = None, **params):
        self.number += 1
        count = params.pop("num_samples", 1)
        extra = {name: params.pop(name) for name in ("prompt_logprobs", "topk_prompt_logprobs") if name in params}
        return {
            "sampling_session_id": self.id,
            "seq_id": self.number if seq_id is None else seq_id,
            "num_samples": count,
            "prompt": {"chunks": [{"tokens": TOKENS[:2]}, {"tokens": TOKENS[2:], "type": "encoded_text"}]},
            "sampling_params": {"max_tokens": 6, "seed": 1, **params},
            **extra,
        }

    def tokens(self, **params) -> list[list[int]]:
        result = self.service.run("/asample", self.body(**params))
        return [sequence["tokens"] for sequence in result["sequences"]]


@pytest.fixture
def open_sampler(service):
    def open_sampler(**source):
        body = {"session_id": service.session(), "sampling_session_seq_id": 4, **source}
        response = service.post("/create_sampling_session", body)
        assert response.status_code == 200, response.text
        return Sampler(service, response.json()["sampling_session_id"])

    return open_sampler


def test_samples_have_logprobs_and_names(service, open_sampler):
    sampler = open_sampler(base_model=service.model_name)
    body = sampler.body(num_samples=3, prompt_logprobs=True, topk_prompt_logprobs=2)
    submitted = service.post("/asample", body).json()
    assert len(set(submitted["sample_sequence_ids"])) == 3
    result = service.result(submitted["request_id"])
    assert len(result["sequences"]) == 3
    for sequence in result["sequences"]:
        assert sequence["stop_reason"] in ("stop", "length")
        assert len(sequence["tokens"]) == len(sequence["logprobs"])
    assert result["prompt_logprobs"][0] is None
    assert [len(entry or ()) for entry in result["topk_prompt_logprobs"]] == [0, 2, 2, 2]


def test_a_seed_repeats_a_sample(service, open_sampler):
    sampler = open_sampler(base_model=service.model_name)
    assert sampler.tokens(seed=5) == sampler.tokens(seed=5)
    assert sampler.tokens(seed=5, max_tokens=20) != sampler.tokens(seed=6, max_tokens=20)


def test_a_stop_ends_the_sequence(service, open_sampler):
    sampler = open_sampler(base_model=service.model_name)
    [free] = sampler.tokens(max_tokens=20)
    third = next(token for token in free[2:] if token not in free[:2])
    assert third < 256
    cut = free[: free.index(third) + 1]
    assert sampler.tokens(max_tokens=20, stop=[third]) == [cut]
    if third < 128:
        assert sampler.tokens(max_tokens=20, stop=chr(third)) == [cut]
        assert sampler.tokens(max_tokens=20, stop=[chr(third)]) == [cut]


def test_a_repeated_sample_is_the_same_sample(service, open_sampler):
    sampler = open_sampler(base_model=service.model_name)
    body = sampler.body(seed=None)
    first = service.post("/asample", body).json()
    assert service.post("/asample", body).json() == first
    response = service.post("/asample", sampler.body(seq_id=body["seq_id"], seed=99))
    assert response.status_code == 409


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prompt": {"chunks": [{"data": "x", "format": "png"}]}}, "not text"),
        ({"sampling_params": {"stop": ""}}, "empty"),
        ({"num_samples": 10**9}, "num_samples"),
        ({"num_samples": 0}, "num_samples"),
        ({"sampling_session_id": None}, "base_model"),
    ],
)
def test_a_bad_sample_is_refused(service, open_sampler, change, what):
    sampler = open_sampler(base_model=service.model_name)
    response = service.post("/asample", {**sampler.body(), **change})
    assert response.status_code == 400
    assert what in response.json()["detail"]


def test_an_impossible_sample_fails(service, open_sampler):
    sampler = open_sampler(base_model=service.model_name)
    failed = service.run("/asample", sampler.body(temperature=-1.0))
    assert failed["category"] == "user"


def test_a_large_prompt_is_read_too(service, open_sampler):
    sampler = open_sampler(base_model=service.model_name)
    body = sampler.body()
    body["prompt"] = {"chunks": [{"tokens": [1] * 20_000}]}
    assert "context" in service.run("/asample", body)["error"]


def test_named_snapshots_stay_as_they_were(service, open_sampler):
    model = service.model()
    model.step(1, TOKENS)
    body = model.body(3, path="s", checkpoint_type="base")
    path = service.run("/save_weights_for_sampler", body)["path"]
    assert path == f"tinker://{model.id}/sampler_weights/s"
    sampler = open_sampler(model_path=path)
    before = sampler.tokens(max_tokens=30)
    for seq_id in (4, 6, 8):
        model.step(seq_id, [200, 201, 202])
    assert sampler.tokens(max_tokens=30) == before
    assert open_sampler(model_path=path).tokens(max_tokens=30) == before
    later = service.run("/save_weights_for_sampler", model.body(10, path="later", checkpoint_type="delta"))
    assert open_sampler(model_path=later["path"]).tokens(max_tokens=30) != before
    info = service.http.get(f"/samplers/{sampler.id}").json()
    assert info == {"sampler_id": sampler.id, "base_model": service.model_name, "model_path": path}
    assert "error" in service.run("/save_weights_for_sampler", model.body(11, path="s"))


def test_the_sampler_agrees_with_the_trainer(service, open_sampler):
    model = service.model()
    model.step(1, TOKENS)
    path = service.run("/save_weights_for_sampler", model.body(3, path="s"))["path"]
    result = service.run("/asample", open_sampler(model_path=path).body(prompt_logprobs=True))
    assert result["prompt_logprobs"][1:] == pytest.approx(model.logprobs(TOKENS)[:-1], abs=1e-4)


def test_an_unnamed_snapshot_is_a_sampling_session(service):
    model = service.model()
    model.step(1, TOKENS)
    made = service.run("/save_weights_for_sampler", model.body(3, sampling_session_seq_id=0))
    assert set(made) == {"type", "sampling_session_id"}
    # A repetition after a lost answer comes under a new session number in older clients.
    repeated = service.run("/save_weights_for_sampler", model.body(3, sampling_session_seq_id=1))
    assert repeated == made
    sampler = Sampler(service, made["sampling_session_id"])
    before = sampler.tokens(max_tokens=30)
    model.step(4, [200, 201, 202])
    assert sampler.tokens(max_tokens=30) == before
    taken = service.post("/save_weights_for_sampler", model.body(6, sampling_session_seq_id=0))
    assert taken.status_code == 409
    model.step(7, TOKENS)


def test_unnamed_snapshots_end_with_their_session(service):
    model, other = service.model(), service.model()
    for seq_id in (1, 2):
        service.run("/save_weights_for_sampler", model.body(seq_id, sampling_session_seq_id=seq_id))
    unnamed = service.data_dir / "unnamed"
    before = len(list(unnamed.iterdir()))
    service.post(f"/sessions/{model.session_id}/finish", {})
    # It is done on the training thread, which takes things in turn.
    other.logprobs(TOKENS)
    assert len(list(unnamed.iterdir())) == before - 2


def test_a_snapshot_needs_a_name_or_a_number(service):
    response = service.post("/save_weights_for_sampler", service.model().body(1))
    assert response.status_code == 400
    assert "sampling_session_seq_id" in response.json()["detail"]


def test_sampling_sessions_are_known_by_their_number(service):
    body = {"session_id": service.session(), "sampling_session_seq_id": 0, "base_model": service.model_name}
    first = service.post("/create_sampling_session", body).json()
    assert service.post("/create_sampling_session", body).json() == first
    other = service.post("/create_sampling_session", {**body, "base_model": "fwasync/qwen3-small"})
    assert other.status_code == 409


@pytest.mark.parametrize(
    ("source", "status", "what"),
    [
        ({}, 400, "base_model"),
        ({"base_model": "other/model"}, 400, "unknown base_model"),
        ({"model_path": "tinker://a:train:0/sampler_weights/b"}, 404, "no snapshot"),
        ({"model_path": "tinker://a:train:0/weights/b"}, 400, "training checkpoint"),
        ({"model_path": "/etc/passwd"}, 400, "not a path"),
    ],
)
def test_what_cannot_be_sampled_is_refused(service, source, status, what):
    body = {"session_id": service.session(), "sampling_session_seq_id": 0, **source}
    response = service.post("/create_sampling_session", body)
    assert response.status_code == status
    assert what in response.json()["detail"]


def test_an_unknown_sampling_session_is_not_found(service):
    assert service.http.get("/samplers/ours").status_code == 404
    body = {"sampling_session_id": "ours", "seq_id": 0, "prompt": {"chunks": []}, "sampling_params": {}}
    assert service.post("/asample", body).status_code == 404


def test_many_samplers_answer_at_once(service, open_sampler):
    model = service.model()
    samplers = [open_sampler(base_model=service.model_name)]
    for seq_id in range(1, 7):
        path = service.run("/save_weights_for_sampler", model.body(seq_id, path=f"s{seq_id}"))["path"]
        samplers.append(open_sampler(model_path=path))
    ids = [service.submit("/asample", sampler.body(num_samples=2)) for sampler in samplers]
    results = [service.result(request_id)["sequences"] for request_id in ids]
    # An adapter begins as nothing, so all of these weights are the same.
    assert [[entry["tokens"] for entry in result] for result in results] == [
        [entry["tokens"] for entry in results[0]]
    ] * len(results)
