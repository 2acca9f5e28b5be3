"""Waiting for trainers and deployments: what states mean, how long, and how it ends."""

from __future__ import annotations

import anyio
import httpx
import pytest

from fwasync import errors
from fwasync.config import DeployConfig, TrainerJobConfig
from fwasync.config.launch import Progress
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.states import judge_deployment, judge_job, short_state
from fwasync.control.trainer_jobs import AsyncTrainerJobManager
from fwasync.control.waiting import Clock, poll_delay
from fwasync.testing import virtual_time
from unit.control.fake_plane import KEY, MODEL, ORIGIN, FakePlane

RUNNING = "JOB_STATE_RUNNING"


@pytest.mark.parametrize(
    ("states", "settling", "action"),
    [
        (["JOB_STATE_RUNNING"], False, "check"),
        (["JOB_STATE_CREATING", "VALIDATING", "JOB_STATE_IDLE", "SOMETHING_NEW", "", None], False, "wait"),
        (["FAILED", "CANCELLED", "PAUSED", "COMPLETED", "CANCELLING", "EXPIRED", "DELETING"], False, "failed"),
        (["FAILED", "CANCELLED", "PAUSED", "COMPLETED", "CANCELLING", "EXPIRED", "DELETING"], True, "wait"),
        (["DELETED", "ARCHIVED"], True, "failed"),
    ],
)
def test_states_of_jobs(states: list[str | None], settling: bool, action: str) -> None:
    assert {judge_job(state, settling=settling).action for state in states} == {action}


def test_waiting_for_machines_is_told_from_getting_ready() -> None:
    assert [judge_job(f"JOB_STATE_{s}").queued for s in ("PENDING", "RE_QUEUEING", "CREATING")] == [True, True, False]
    clock = Clock.start(0.0, timeout=10.0)
    clock = clock.seen(4.0, queued=True, timeout=10.0, pending_timeout=1000.0)
    assert clock == Clock(1004.0, queued=True)
    assert clock.seen(500.0, queued=True, timeout=10.0, pending_timeout=1000.0) == clock
    assert clock.seen(900.0, queued=False, timeout=10.0, pending_timeout=1000.0) == Clock(910.0, queued=False)


def test_states_of_deployments() -> None:
    for state in ("READY", "CREATING", "UPDATING"):
        assert judge_deployment(state, most_replicas=0).action == "failed"
        assert judge_deployment(state, most_replicas=1) == judge_deployment(state)
    states = ["READY", "CREATING", "UPDATING", None, "FAILED", "DELETING", "DELETED"]
    assert [judge_deployment(state).action for state in states] == ["ready", "check", "wait", "wait"] + ["failed"] * 3
    assert (short_state("JOB_STATE_RUNNING"), short_state("STATE_UNSPECIFIED")) == ("RUNNING", "UNSPECIFIED")


def test_pauses_rise_to_their_cap_and_scatter() -> None:
    longest = [poll_delay(n, cap_s=5.0, jitter=0.0) for n in range(1, 12)]
    assert longest == sorted(longest)
    assert (longest[0], longest[-1]) == (0.5, 5.0)
    assert poll_delay(10_000, cap_s=5.0, jitter=0.999) > 2.5


@virtual_time
async def test_a_trainer_comes_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fwasync")
    plane = FakePlane()
    plane.jobs["j"] = ["JOB_STATE_CREATING", "JOB_STATE_PENDING", "JOB_STATE_CREATING", RUNNING]
    plane.unhealthy = 2
    seen: list[Progress] = []
    async with plane.client() as client:
        endpoint = await AsyncTrainerJobManager(client).wait_for_ready("j", on_progress=seen.append)
    assert endpoint.base_url == f"{ORIGIN}/training/v1/rlorTrainerJobs/acme/j"
    assert (endpoint.job_id, endpoint.job_name) == ("j", "accounts/acme/rlorTrainerJobs/j")
    assert [p.state for p in seen] == ["CREATING", "PENDING", "CREATING", "RUNNING", "RUNNING", "RUNNING"]
    assert seen[-2].message == "its healthz answers 503"
    assert 0 == seen[0].elapsed_s < seen[-1].elapsed_s < 10
    # What has changed is logged.
    assert [message.partition(": after")[0] for message in caplog.messages] == [
        *(f"trainer job j is {state}" for state in ("CREATING", "PENDING", "CREATING")),
        "trainer job j is RUNNING: its healthz answers 503",
        "trainer job j is RUNNING",
    ]
    assert plane.calls[-1] == "GET /training/v1/rlorTrainerJobs/acme/j/api/v1/healthz"


@virtual_time
async def test_a_failed_job_fails_at_once_with_its_reason() -> None:
    plane = FakePlane()
    answer = {"name": "accounts/acme/rlorTrainerJobs/j", "state": "JOB_STATE_FAILED", "status": {"message": "OOM"}}
    plane.rules.append(lambda request: (200, answer) if request.url.path.endswith("/j") else None)
    async with plane.client() as client:
        with pytest.raises(errors.TrainerJobFailedError, match=r"trainer job j is FAILED: OOM: .*resume it") as caught:
            await AsyncTrainerJobManager(client).wait_for_ready("j")
    assert (caught.value.resource, caught.value.state) == ("trainer job j", "FAILED")
    assert anyio.current_time() == 0


@virtual_time
async def test_time_in_the_queue_counts_apart() -> None:
    plane = FakePlane()
    async with plane.client() as client:
        jobs = AsyncTrainerJobManager(client)
        plane.jobs["j"] = ["JOB_STATE_PENDING"]
        with pytest.raises(errors.ProvisioningTimeoutError, match=r"PENDING.*5000 s allowed for waiting for machines"):
            await jobs.wait_for_ready("j", timeout_s=10, pending_timeout_s=5000)
        assert anyio.current_time() == pytest.approx(5000)
        plane.jobs["j"] = ["JOB_STATE_PENDING", "JOB_STATE_CREATING"]
        with pytest.raises(TimeoutError, match=r"CREATING.*10 s allowed for getting ready") as caught:
            await jobs.wait_for_ready("j", timeout_s=10, pending_timeout_s=5000)
        assert anyio.current_time() == pytest.approx(5010, abs=1)
        assert isinstance(caught.value, errors.ProvisioningTimeoutError)
        assert caught.value.state == "CREATING"


@virtual_time
async def test_a_deadline_ends_a_request_that_is_never_answered() -> None:
    plane = FakePlane()
    plane.jobs["j"] = [RUNNING]
    async with plane.client() as client:
        await client.account_id()
        plane.latency = 1e6
        with pytest.raises(errors.ProvisioningTimeoutError, match="is not seen yet"):
            await AsyncTrainerJobManager(client).wait_for_ready("j", timeout_s=7)
    assert anyio.current_time() == pytest.approx(7)


@virtual_time
async def test_a_cancelled_wait_stops_at_once_and_touches_nothing() -> None:
    plane = FakePlane(latency=0.1)
    plane.jobs["j"] = ["JOB_STATE_CREATING"]
    async with plane.client() as client:
        with anyio.move_on_after(33.3) as scope:
            await AsyncTrainerJobManager(client).wait_for_ready("j")
    assert scope.cancelled_caught
    assert anyio.current_time() == pytest.approx(33.3)
    assert plane.alive == {"j"}
    assert {call.partition(" ")[0] for call in plane.calls} == {"GET"}


@virtual_time
async def test_a_gateway_that_refuses_the_key_ends_the_wait() -> None:
    plane = FakePlane()
    plane.jobs["j"] = [RUNNING]
    plane.rules.append(lambda request: (401, {"message": f"{KEY}?"}) if "healthz" in request.url.path else None)
    async with plane.client() as client:
        with pytest.raises(errors.AuthenticationError, match=r"the trainer of job j .*\*\*\*\?"):
            await AsyncTrainerJobManager(client).wait_for_ready("j")


@virtual_time
async def test_a_trainer_that_breaks_connections_is_waited_for() -> None:
    plane = FakePlane()
    plane.jobs["j"] = [RUNNING]
    breaks = 3

    def rule(request: httpx.Request) -> None:
        nonlocal breaks
        if "healthz" in request.url.path and breaks:
            breaks -= 1
            raise httpx.ReadError("reset")

    plane.rules.append(rule)
    seen: list[Progress] = []
    async with plane.client() as client:
        await AsyncTrainerJobManager(client).wait_for_existing("j", on_progress=seen.append)
    assert [p.message for p in seen] == ["its healthz does not answer (reset)"] * 3 + [""]


@pytest.mark.parametrize("state", ["FAILED", "PAUSED", "CANCELLED", "COMPLETED"])
def test_a_pre_empted_trainer_is_resumed_once(state: str) -> None:
    @virtual_time
    async def run() -> None:
        plane = FakePlane()
        plane.jobs["j"] = ["JOB_STATE_CANCELLING", f"JOB_STATE_{state}"]
        async with plane.client() as client:
            endpoint = await AsyncTrainerJobManager(client).reconnect_and_wait("j")
        assert endpoint.job_id == "j"
        assert [call for call in plane.calls if call.startswith("POST")] == [
            "POST /v1/accounts/acme/rlorTrainerJobs/j:resume"
        ]

    run()


@virtual_time
async def test_a_trainer_is_created_or_resumed_and_waited_for() -> None:
    plane = FakePlane()
    plane.jobs["old"] = ["JOB_STATE_PAUSED", "JOB_STATE_PAUSED", "JOB_STATE_CREATING", RUNNING]
    resumed = (200, {"name": "accounts/acme/rlorTrainerJobs/old"})
    plane.rules.append(lambda request: resumed if request.url.path.endswith(":resume") else None)
    seen: list[Progress] = []
    async with plane.client() as client:
        jobs = AsyncTrainerJobManager(client)
        new = await jobs.create_and_wait(TrainerJobConfig(base_model=MODEL, requested_job_id="new"), timeout_s=60)
        old = await jobs.resume_and_wait("old", timeout_s=60, poll_interval_s=0.25, on_progress=seen.append)
        with pytest.raises(errors.UsageError, match="poll_interval_s is 0"):
            await jobs.wait_for_ready("old", poll_interval_s=0)
        plane.jobs["old"] = ["JOB_STATE_PAUSED"]
        with pytest.raises(errors.TrainerJobFailedError, match=r"^the-name is PAUSED"):
            await jobs.wait_for_ready("old", "the-name")
    assert (new.job_id, old.job_id) == ("new", "old")
    # What was just resumed may still be shown as it was, for a while.
    assert [progress.state for progress in seen] == ["PAUSED", "PAUSED", "CREATING", "RUNNING"]
    assert anyio.current_time() < 10
    posts = [call.partition("?")[0].rpartition("/")[2] for call in plane.calls if call.startswith("POST")]
    assert posts == ["rlorTrainerJobs", "old:resume"]


@virtual_time
async def test_a_running_trainer_is_not_resumed() -> None:
    plane = FakePlane()
    plane.jobs["j"] = ["JOB_STATE_RE_QUEUEING", RUNNING]
    async with plane.client() as client:
        await AsyncTrainerJobManager(client).reconnect_and_wait("j")
    assert not [call for call in plane.calls if call.startswith("POST")]


@virtual_time
async def test_a_trainer_that_does_not_come_back_fails_after_it_was_resumed() -> None:
    plane = FakePlane()
    plane.jobs["j"] = ["JOB_STATE_FAILED"]
    plane.rules.append(lambda request: (400, {"message": "no"}) if request.method == "POST" else None)
    seen: list[Progress] = []
    async with plane.client() as client:
        with pytest.raises(errors.TrainerJobFailedError, match="trainer job j is FAILED"):
            await AsyncTrainerJobManager(client).reconnect_and_wait("j", on_progress=seen.append)
    assert 30 <= anyio.current_time() < 40
    assert "not resumed" in seen[0].message
    assert len([call for call in plane.calls if call.startswith("POST")]) == 1


@virtual_time
async def test_a_deployment_comes_up() -> None:
    plane = FakePlane()
    plane.deployments["d"] = ["UPDATING", "READY"]
    async with plane.client() as client:
        info = await AsyncDeploymentManager(client).wait_for_ready("d")
    assert (info.state, info.inference_model) == ("READY", "accounts/acme/deployments/d")


@virtual_time
async def test_a_deployment_may_serve_while_its_state_lags_behind() -> None:
    plane = FakePlane()
    plane.deployments["d"] = ["CREATING"]
    plane.serving = False
    seen: list[Progress] = []

    def notice(progress: Progress) -> None:
        seen.append(progress)
        plane.serving = len(seen) == 3

    async with plane.client() as client:
        info = await AsyncDeploymentManager(client).wait_for_ready("d", on_progress=notice)
    assert info.state == "READY"
    assert [p.state for p in seen] == ["CREATING"] * 3 + ["READY"]
    assert [p.message for p in seen] == ["its completions answer 425"] * 3 + [""]
    assert plane.seen[-1].content == (
        b'{"model":"accounts/acme/deployments/d","prompt":[1,2],"max_tokens":4,"temperature":0.0}'
    )


@virtual_time
async def test_a_deployment_that_is_scaled_to_zero_is_not_waited_for() -> None:
    plane = FakePlane()
    zero = {"name": "accounts/acme/deployments/d", "state": "READY", "maxReplicaCount": 0, "baseModel": MODEL}
    plane.rules.append(lambda request: (200, zero) if request.url.path.endswith("/deployments/d") else None)
    async with plane.client() as client:
        deployments = AsyncDeploymentManager(client)
        assert (await deployments.get("d")).max_replica_count == 0
        with pytest.raises(
            errors.DeploymentFailedError, match=r"deployment d is READY: it is scaled to zero .*`update`"
        ):
            await deployments.wait_for_ready("d")
        with pytest.raises(errors.DeploymentFailedError, match="scaled to zero"):
            async with DeployConfig(deployment_id="d").launch(deployments, base_model=MODEL):
                raise AssertionError
    assert not [request for request in plane.seen if request.method != "GET"]


@virtual_time
async def test_a_deployment_that_failed_or_is_gone() -> None:
    plane = FakePlane()
    plane.deployments["d"] = ["FAILED"]
    async with plane.client() as client:
        with pytest.raises(errors.DeploymentFailedError, match=r"deployment d is FAILED: .*delete it"):
            await AsyncDeploymentManager(client).wait_for_ready("d")
        with pytest.raises(errors.NotFoundError):
            await AsyncDeploymentManager(client).wait_for_ready("e")
