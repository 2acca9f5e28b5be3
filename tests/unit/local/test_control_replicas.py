"""Who has which snapshot at what time."""

from __future__ import annotations

import pytest

from fwasync.local.control.deployments import deployment_state
from fwasync.local.control.jobs import job_state
from fwasync.local.control.records import Load
from fwasync.local.control.replicas import delta_problem, replicas_at, resized

LOAD = Load(identity="new", path="p", since=100.0, swap_s=10.0)


@pytest.mark.parametrize(
    ("now", "current"),
    [
        (100.0, ["old", None, "old"]),
        (110.0, ["new", None, "old"]),
        (125.0, ["new", "new", "old"]),
        (130.0, ["new"] * 3),
    ],
)
def test_replicas_swap_one_after_another(now, current):
    replicas = replicas_at(["old", None, "old"], LOAD, now)
    assert [replica.current for replica in replicas] == current
    assert [replica.loading for replica in replicas] == [entry != "new" for entry in current]
    assert {replica.target for replica in replicas} == {"new"}


def test_a_failed_load_changes_nothing():
    failed = Load(identity="new", path="", since=100.0, swap_s=10.0, error="why")
    [replica] = replicas_at(["old"], failed, 1e9)
    assert (replica.current, replica.target, replica.stage, replica.error) == ("old", "new", "error", "why")
    assert not replica.loading


def test_without_a_load_all_are_idle():
    assert [replica.stage for replica in replicas_at([None, "a"], None, 0.0)] == ["idle", "idle"]


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, ["a"]), (2, ["a", None]), (4, ["a", None, "a", "a"])])
def test_more_replicas_start_with_what_the_first_has(count, expected):
    assert resized(["a", None], count) == expected
    assert resized([], count) == [None] * count


@pytest.mark.parametrize(
    ("is_delta", "against", "announced", "serving", "what"),
    [
        (False, None, None, [None], None),
        (True, "a", "a", ["a", "a"], None),
        (True, "a", "tinker://m/sampler_weights/a", ["a"], None),
        (True, "a", None, ["a"], "announce"),
        (False, "a", "a", ["a"], "in full"),
        (True, "a", "a", ["a", "b"], "serves a, b"),
        (True, "a", "a", [None], "its base model"),
        (True, "b", "a", ["a"], "computed against b"),
    ],
)
def test_a_delta_fits_what_is_served(is_delta, against, announced, serving, what):
    problem = delta_problem(identity="x", is_delta=is_delta, made_against=against, announced=announced, serving=serving)
    if what is None:
        assert problem is None
    else:
        assert problem is not None
        assert what in problem


@pytest.mark.parametrize(
    ("recorded", "now", "problem", "state"),
    [
        ("JOB_STATE_CREATING", 9.9, None, "JOB_STATE_CREATING"),
        ("JOB_STATE_CREATING", 9.9, "why", "JOB_STATE_CREATING"),
        ("JOB_STATE_CREATING", 10.0, None, "JOB_STATE_RUNNING"),
        ("JOB_STATE_CREATING", 10.0, "why", "JOB_STATE_FAILED"),
        ("JOB_STATE_DELETED", 10.0, "why", "JOB_STATE_DELETED"),
    ],
)
def test_a_job_advances_with_time(recorded, now, problem, state):
    found, status = job_state(recorded, 5.0, now, 5.0, problem)
    assert found == state
    assert (status.message or None) == (problem if state == "JOB_STATE_FAILED" else None)


@pytest.mark.parametrize(
    ("recorded", "now", "state"),
    [
        ("CREATING", 9.9, "CREATING"),
        ("CREATING", 10.0, "READY"),
        ("UPDATING", 9.9, "UPDATING"),
        ("UPDATING", 10.0, "READY"),
        ("DELETED", 10.0, "DELETED"),
    ],
)
def test_a_deployment_advances_with_time(recorded, now, state):
    assert deployment_state(recorded, 5.0, now, 5.0) == state
