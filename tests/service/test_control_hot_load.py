"""Snapshots of a job's trainer swapped into deployments, over HTTP."""

from __future__ import annotations

import pytest

from service.control_client import BASE, TOKENS, A

PATH = "/hot_load/v1/models/hot_load"
FULL = {"baseModel": BASE, "minReplicaCount": 1, "maxReplicaCount": 1, "enableHotLoad": True}


class Deployment:
    """A deployment with a trainer job of the same name, and a model of it."""

    def __init__(self, control, name: str, **fields) -> None:
        self.control, self.name, self.number = control, name, 0
        control.job(name)
        trainer = f"accounts/local/rlorTrainerJobs/{name}"
        control.post(f"{A}/deployments", {**FULL, "hotLoadTrainerJob": trainer, **fields}, deploymentId=name)
        self.gateway = control.gateway(name)
        self.model = self.gateway.model(base_model=BASE)

    def save(self, snapshot: str, kind: str = "base") -> str:
        self.number += 1
        body = self.model.body(self.number, path=snapshot, checkpoint_type=kind)
        return self.gateway.run("/save_weights_for_sampler", body)["path"]

    def headers(self) -> dict[str, str]:
        return {"fireworks-deployment": f"accounts/local/deployments/{self.name}", "fireworks-model": BASE}

    def load(self, identity: str, previous: str | None = None, status: int = 200, **more):
        body = {"identity": identity, "reset_prompt_cache": True, **more}
        if previous is not None:
            body["incremental_snapshot_metadata"] = {
                "previous_snapshot_identity": previous,
                "compression_format": "arc_v2",
                "checksum_format": "alder32",
            }
        response = self.control.http.post(PATH, json=body, headers=self.headers())
        assert response.status_code == status, response.text
        return response.json()

    def replicas(self):
        response = self.control.http.get(PATH, headers=self.headers())
        assert response.status_code == 200, response.text
        return response.json()["replicas"]


def test_snapshots_are_loaded_one_after_another(control):
    deployment = Deployment(control, "chain")
    [fresh] = deployment.replicas()
    assert (fresh["readiness"], fresh.get("current_snapshot_identity")) == (True, None)
    deployment.save("step-1-aabbccdd")
    deployment.load("step-1-aabbccdd")
    [replica] = deployment.replicas()
    assert replica["current_snapshot_identity"] == "step-1-aabbccdd"
    assert replica["readiness"] is True
    assert replica["loading_state"] == {"stage": "idle", "target_snapshot_identity": "step-1-aabbccdd"}
    assert replica["loaded_adapters"] == [{"identity": "step-1-aabbccdd", "status": "loaded"}]
    deployment.save("step-2-aabbccdd", "delta")
    deployment.load("step-2-aabbccdd", previous="step-1-aabbccdd")
    assert deployment.replicas()[0]["current_snapshot_identity"] == "step-2-aabbccdd"


def test_a_snapshot_is_known_by_its_path_too(control):
    deployment = Deployment(control, "by-path")
    path = deployment.save("s")
    deployment.load(path)
    assert deployment.replicas()[0]["current_snapshot_identity"] == path


def failure(deployment: Deployment, *args, **more) -> str:
    deployment.load(*args, **more)
    [replica] = deployment.replicas()
    assert replica["loading_state"]["stage"] == "error"
    assert replica["loading_state"]["target_snapshot_identity"] == args[0]
    assert replica["readiness"] is True
    return replica["loading_state"]["error_message"]


def test_a_delta_on_the_wrong_base_is_refused(control):
    deployment = Deployment(control, "wrong")
    deployment.save("one")
    assert "saved in full" in failure(deployment, "one", previous="zero")
    deployment.load("one")
    deployment.save("two", "delta")
    assert "announce its previous" in failure(deployment, "two")
    assert "serves one" in failure(deployment, "two", previous="zero")
    deployment.save("three", "delta")
    # It was computed against "two", which was never loaded.
    assert "computed against two" in failure(deployment, "three", previous="one")
    assert "no snapshot" in failure(deployment, "four")
    assert deployment.replicas()[0]["current_snapshot_identity"] == "one"
    deployment.load("two", previous="one")
    [replica] = deployment.replicas()
    assert (replica["current_snapshot_identity"], replica["loading_state"]["stage"]) == ("two", "idle")


def test_a_deployment_loads_what_its_own_trainer_saved(control):
    Deployment(control, "ours").save("secret")
    theirs = Deployment(control, "theirs")
    assert "no snapshot" in failure(theirs, "secret")


def test_a_deployment_comes_first_or_the_trainer(control):
    control.post(f"{A}/deployments", FULL, deploymentId="early")
    control.job("late", deploymentId="early")
    deployment = object.__new__(Deployment)
    deployment.control, deployment.name, deployment.number = control, "early", 0
    deployment.gateway = control.gateway("late")
    deployment.model = deployment.gateway.model(base_model=BASE)
    deployment.save("s")
    deployment.load("s")
    assert deployment.replicas()[0]["current_snapshot_identity"] == "s"


@pytest.mark.parametrize(
    ("headers", "body", "status", "what"),
    [
        ({"fireworks-deployment": ""}, {}, 400, "fireworks-deployment"),
        ({"fireworks-deployment": "accounts/local/deployments/no"}, {}, 404, "no accounts/local/deployments/no"),
        ({"fireworks-model": "accounts/fwasync/models/qwen3-small"}, {}, 400, "is of"),
        ({}, {"colour": 1}, 400, "Extra inputs are not permitted, field: 'colour'"),
        ({}, {"identity": 3}, 400, "identity"),
    ],
)
def test_a_bad_load_is_refused(control, headers, body, status, what):
    if control.http.get(f"{A}/deployments/strict").status_code == 404:
        control.post(f"{A}/deployments", FULL, deploymentId="strict")
    told = {"fireworks-deployment": "accounts/local/deployments/strict", "fireworks-model": BASE, **headers}
    response = control.http.post(PATH, json={"identity": "s", **body}, headers=told)
    assert response.status_code == status, response.text
    assert what in response.json()["error"]["message"]


def test_a_deployment_without_hot_load_loads_nothing(control):
    control.post(f"{A}/deployments", {**FULL, "enableHotLoad": False}, deploymentId="fixed")
    response = control.http.get(PATH, headers={"fireworks-deployment": "accounts/local/deployments/fixed"})
    assert response.status_code == 400
    assert "enableHotLoad" in response.json()["error"]["message"]


def test_replicas_swap_while_the_old_weights_are_served(begin):
    deployment = Deployment(begin(), "rolls", minReplicaCount=3, maxReplicaCount=3)
    deployment.save("old")
    deployment.load("old")
    deployment.save("new")
    deployment.control.service.close()
    deployment.control = begin(hot_load_s=3600)
    deployment.load("new")
    for replica in deployment.replicas():
        assert (replica["readiness"], replica["current_snapshot_identity"]) == (False, "old")
        assert replica["loading_state"] == {"stage": "loading", "target_snapshot_identity": "new"}
    deployment.control.service.close()
    deployment.control = begin()
    deployment.load("new")
    assert [replica["current_snapshot_identity"] for replica in deployment.replicas()] == ["new"] * 3
    assert len({replica["identity"] for replica in deployment.replicas()}) == 3


def test_a_deployment_that_starts_has_no_replicas(begin):
    control = begin(startup_s=3600)
    control.post(f"{A}/deployments", FULL, deploymentId="slow")
    headers = {"fireworks-deployment": "accounts/local/deployments/slow"}
    assert control.http.get(PATH, headers=headers).json() == {"replicas": []}
    assert control.http.post(PATH, json={"identity": "s"}, headers=headers).status_code == 425


def test_another_trainer_begins_anew(control):
    deployment = Deployment(control, "switch")
    deployment.save("s")
    deployment.load("s")
    before = deployment.replicas()[0]["identity"]
    control.job("next")
    change = {"hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/next"}
    control.patch(f"{A}/deployments/switch", change, updateMask="hot_load_trainer_job")
    [replica] = deployment.replicas()
    assert replica["identity"] != before
    assert "current_snapshot_identity" not in replica
    assert "no snapshot" in failure(deployment, "s")


def test_training_goes_on_after_a_load(control):
    deployment = Deployment(control, "trains")
    deployment.model.step(1, TOKENS)
    deployment.number = 2
    deployment.save("s")
    deployment.load("s")
    assert deployment.model.step(4, TOKENS) > 0
