"""Deployments and their life, over HTTP."""

from __future__ import annotations

import pytest

from service.control_client import BASE, A

SHAPE = "accounts/fwasync/deploymentShapes/qwen3-tiny"
FULL = {"baseModel": BASE, "minReplicaCount": 1, "maxReplicaCount": 1, "enableHotLoad": True}


def deploy(control, name, *, status=200, **fields):
    return control.post(f"{A}/deployments", {**FULL, **fields}, status, deploymentId=name)


def test_a_deployment_is_created_shown_and_listed(control):
    made = deploy(control, "dep", deploymentShape=SHAPE, placement={"region": "US_OHIO_1"}, acceleratorType=None)
    assert made["name"] == "accounts/local/deployments/dep"
    assert made["state"] == "READY"
    assert made["deploymentShape"] == f"{SHAPE}/versions/v1"
    assert (made["region"], made["replicaCount"]) == ("US_OHIO_1", 1)
    assert made["hotLoadBucketUrl"] == "local://rl-checkpoints/local/dep/"
    assert control.get(f"{A}/deployments/dep") == made
    assert made in control.get(f"{A}/deployments")["deployments"]
    assert "exists already" in deploy(control, "dep", status=409)["error"]["message"]
    assert control.post(f"{A}/deployments", FULL)["name"] != control.post(f"{A}/deployments", FULL)["name"]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"baseModel": None}, "baseModel"),
        ({"baseModel": "accounts/fireworks/models/qwen3-8b"}, "no model"),
        ({"deploymentShape": "accounts/fireworks/deploymentShapes/ds"}, "no shape"),
        ({"minReplicaCount": 2}, "minReplicaCount"),
        ({"hotLoadTransitionType": "LATER"}, "ASYNC or SYNC"),
        ({"hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/nobody"}, "nobody"),
        ({"hotLoadTrainerJob": "accounts/acme/rlorTrainerJobs/nobody"}, "not the name"),
    ],
)
def test_a_bad_deployment_is_refused(control, fields, what):
    assert what in deploy(control, "bad", status=400, **fields)["error"]["message"]
    control.get(f"{A}/deployments/bad", 404)


def test_a_deployment_is_scaled(control):
    deploy(control, "scaled", maxReplicaCount=3, minReplicaCount=2)
    path = f"{A}/deployments/scaled"
    assert control.get(path)["replicaCount"] == 2
    assert control.patch(path, {"maxReplicaCount": 0, "minReplicaCount": 0})["replicaCount"] == 0
    masked = control.patch(path, {"maxReplicaCount": 1, "description": "x"}, updateMask="max_replica_count")
    assert (masked["replicaCount"], masked.get("description")) == (1, None)
    refused = control.patch(path, {"baseModel": "x"}, 400)
    assert "base_model cannot be changed" in refused["error"]["message"]
    control.patch(path, {}, 400, updateMask="no_such_field")
    control.patch(f"{A}/deployments/none", {}, 404)


def test_a_deleted_deployment_can_be_made_again(control):
    path = f"{A}/deployments/again"
    deploy(control, "again")
    control.delete(path)
    control.delete(path)
    assert control.get(path)["state"] == "DELETED"
    assert path.removeprefix("/v1/") not in [d["name"] for d in control.get(f"{A}/deployments")["deployments"]]
    control.patch(path, {"maxReplicaCount": 0}, 404)
    assert deploy(control, "again")["state"] == "READY"
    control.delete(path, ignoreChecks="true", hard="true")
    control.get(path, 404)
    control.delete(path, 404)


def test_a_trainer_and_a_deployment_are_bound_one_way(control):
    control.job("first")
    first = "accounts/local/rlorTrainerJobs/first"
    made = deploy(control, "follows", hotLoadTrainerJob=first)
    assert made["hotLoadBucketUrl"] == "local://rl-checkpoints/local/trainer-first/"
    mixed = control.job("mixed", status=400, deploymentId="follows")
    assert "flow mismatch" in mixed["error"]["message"]
    deploy(control, "leads")
    assert control.job("second", deploymentId="leads")["hotLoadDeploymentId"] == "leads"
    change = {"hotLoadTrainerJob": first}
    crossed = control.patch(f"{A}/deployments/leads", change, 400, updateMask="hot_load_trainer_job")
    assert "flow mismatch" in crossed["error"]["message"]
    second = "accounts/local/rlorTrainerJobs/second"
    assert "flow mismatch" in deploy(control, "both", status=400, hotLoadTrainerJob=second)["error"]["message"]


def test_a_deployment_takes_its_time_and_survives_a_kill(begin):
    control = begin(startup_s=3600)
    made = deploy(control, "slow")
    assert (made["state"], made["replicaCount"]) == ("CREATING", 0)
    control.service.close()
    again = begin(startup_s=0)
    assert again.get(f"{A}/deployments/slow")["state"] == "READY"


def test_another_trainer_restarts_the_replicas(begin):
    control = begin()
    for name in ("one", "two"):
        control.job(name)
    deploy(control, "moves", hotLoadTrainerJob="accounts/local/rlorTrainerJobs/one")
    control.service.close()
    control = begin(startup_s=3600)
    change = {"hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/two", "hotLoadTransitionType": "ASYNC"}
    mask = "hot_load_trainer_job,hot_load_transition_type"
    changed = control.patch(f"{A}/deployments/moves", change, updateMask=mask)
    assert changed["state"] == "UPDATING"
    assert changed["hotLoadBucketUrl"].endswith("/trainer-two/")
