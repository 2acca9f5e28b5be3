"""Checkpoints of trainer jobs, and the models that they become, over HTTP."""

from __future__ import annotations

import pytest

from service.control_client import BASE, TOKENS, A
from service.test_control_completions import ask
from service.test_control_hot_load import FULL, Deployment

JOB = f"{A}/rlorTrainerJobs"


@pytest.fixture(scope="module")
def trained(control):
    """A job whose trainer has saved a base, a delta and a checkpoint, and was then deleted."""
    deployment = Deployment(control, "job")
    deployment.model.step(1, TOKENS)
    deployment.number = 2
    deployment.save("base-aabbccdd")
    deployment.save("delta-aabbccdd", "delta")
    deployment.gateway.run("/save_weights", deployment.model.body(5, path="step-1"))
    deployment.logprobs = deployment.model.logprobs(TOKENS)[:-1]
    control.delete(f"{JOB}/job")
    return deployment


def promote(control, checkpoint, model, status=200, **fields):
    body = {"output_model": f"accounts/local/models/{model}", "trainer_job_id": "accounts/local/rlorTrainerJobs/job"}
    return control.post(f"{A}/checkpoints/{checkpoint}:promote", {**body, **fields}, status)


def test_checkpoints_are_listed_oldest_first(control, trained):
    found = control.get(f"{JOB}/job/checkpoints", pageSize=200)
    rows = [
        (row["name"].rpartition("/")[2], row["checkpointType"].removeprefix("CHECKPOINT_TYPE_"), row["promotable"])
        for row in found["checkpoints"]
    ]
    assert rows == [
        ("base-aabbccdd", "INFERENCE_BASE", True),
        ("delta-aabbccdd", "INFERENCE_ARC_V2", False),
        ("step-1", "TRAINING_LORA", False),
    ]
    assert found["nextPageToken"] == ""
    first = control.get(f"{JOB}/job/checkpoints", pageSize=2)
    rest = control.get(f"{JOB}/job/checkpoints", pageSize=2, pageToken=first["nextPageToken"])
    assert first["checkpoints"] + rest["checkpoints"] == found["checkpoints"]
    control.get(f"{JOB}/never/checkpoints", 404)


def test_a_promoted_model_is_deployed_and_sampled(control, trained):
    model = promote(control, "base-aabbccdd", "mine", base_model=BASE)["model"]
    assert (model["name"], model["state"]) == ("accounts/local/models/mine", "READY")
    assert control.get("/v1/accounts/local/models/mine") == model
    assert model in control.get("/v1/accounts/local/models")["models"]
    control.post(f"{A}/deployments", {**FULL, "baseModel": model["name"]}, deploymentId="of-mine")
    answer = ask(control, model="accounts/local/deployments/of-mine", echo=True, logprobs=True).json()
    rows = answer["choices"][0]["logprobs"]["content"]
    assert [row["logprob"] for row in rows[1:4]] == pytest.approx(trained.logprobs, abs=1e-4)


def test_training_begins_from_the_adapter_of_a_promoted_model(control, trained):
    name = promote(control, "base-aabbccdd", "adapter")["model"]["name"]
    other = Deployment(control, "another-job")
    assert other.model.logprobs(TOKENS)[:-1] != pytest.approx(trained.logprobs, abs=1e-4)
    loaded = other.gateway.run("/load_adapter", other.model.body(1, adapter_path=name))
    assert loaded == {"type": "load_adapter", "model_id": other.model.id, "adapter_path": name}
    assert other.model.logprobs(TOKENS)[:-1] == pytest.approx(trained.logprobs, abs=1e-6)


def test_a_promotion_can_be_an_operation(control, trained):
    operation = promote(control, "base-aabbccdd", "later", async_promotion=True)["operation"]
    assert operation["done"] is True
    assert operation["response"]["name"] == "accounts/local/models/later"
    assert control.get(f"/v1/{operation['name']}") == operation
    control.get(f"{A}/operations/promote-never", 404)


def test_the_job_may_be_in_the_path_or_be_left_out(control, trained):
    body = {"output_model": "accounts/local/models/in-path"}
    assert control.post(f"{JOB}/job/checkpoints/base-aabbccdd:promote", body)["model"]["name"].endswith("/in-path")
    body = {"output_model": "accounts/local/models/left-out"}
    assert control.post(f"{A}/checkpoints/base-aabbccdd:promote", body)["model"]["name"].endswith("/left-out")


@pytest.mark.parametrize(
    ("checkpoint", "fields", "status", "what"),
    [
        ("nothing", {}, 404, "no checkpoint"),
        ("delta-aabbccdd", {}, 400, "saved in full"),
        ("step-1", {}, 400, "training checkpoint"),
        ("base-aabbccdd", {"output_model": "accounts/local/models/No Good"}, 400, "not the name"),
        ("base-aabbccdd", {"output_model": "accounts/acme/models/x"}, 400, "not the name"),
        ("base-aabbccdd", {"output_model": None}, 400, "output_model"),
        ("base-aabbccdd", {"base_model": "accounts/fwasync/models/qwen3-small"}, 400, "is of"),
        ("base-aabbccdd", {"trainer_job_id": "accounts/local/rlorTrainerJobs/never"}, 404, "never"),
    ],
)
def test_a_bad_promotion_is_refused(control, trained, checkpoint, fields, status, what):
    assert what in promote(control, checkpoint, "bad", status, **fields)["error"]["message"]
    control.get("/v1/accounts/local/models/bad", 404)


def test_a_model_is_made_once(control, trained):
    promote(control, "base-aabbccdd", "once")
    assert "exists already" in promote(control, "base-aabbccdd", "once", 409)["error"]["message"]
