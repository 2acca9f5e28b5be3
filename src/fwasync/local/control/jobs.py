"""Trainer jobs: their life, and who may use their gateways.

    create -> CREATING -> RUNNING | FAILED (unknown base model, or a hurdle)
    RUNNING --pre-emption--> FAILED | PAUSED | CANCELLED
    any but deleted --cancel--> CANCELLED;   FAILED, CANCELLED, PAUSED --resume--> CREATING
    any --delete--> DELETED: hidden from lists, readable by id, its checkpoints can still be promoted

Invariants
    * The id of a deleted job is not given again.
    * A session made through a job's gateway is known there only, and ends when the job stops running.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec

from fwasync._wire.control import Status, TrainerJob, TrainerJobList, TrainingConfig
from fwasync.local.control.filters import matches
from fwasync.local.control.hurdles import Hurdles
from fwasync.local.control.names import ACCOUNT, engine_name, id_of, new_id, page_of, resource, timestamp
from fwasync.local.control.records import JobRecord, Shelves
from fwasync.local.control.shapes import Shapes
from fwasync.local.refusal import Refused

__all__ = ("JobDesk", "job_state")

_KIND = "rlorTrainerJobs"
_RESUMABLE = ("JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_PAUSED")
_STARTING = ("JOB_STATE_CREATING", "JOB_STATE_PENDING")
_OK = Status(code="OK", message="")


def job_state(recorded: str, since: float, now: float, startup_s: float, problem: str | None) -> tuple[str, Status]:
    """What a job is doing now, and what it says of itself.

    Args:
        recorded: The state that it entered at `since`.
        since: Seconds since the epoch, as `now`.
        now: The time.
        startup_s: How long a job takes to start.
        problem: Why it cannot run, if so.
    """
    if recorded != "JOB_STATE_CREATING":
        return recorded, _OK
    if now < since + startup_s:
        return recorded, _OK
    if problem is not None:
        return "JOB_STATE_FAILED", Status(code="INVALID_ARGUMENT", message=problem)
    return "JOB_STATE_RUNNING", _OK


class JobDesk:
    """Answers about trainer jobs.

    Args:
        shelves: The records.
        base_models: The engine's names of the base models.
        shapes: The shapes.
        startup_s: How long a job takes to start.
        clock: Tells the time in seconds since the epoch.
        end_session: Ends a session, with a reason.
        hurdles: What keeps jobs from starting.
    """

    def __init__(
        self,
        shelves: Shelves,
        base_models: Collection[str],
        shapes: Shapes,
        startup_s: float,
        clock: Callable[[], float],
        end_session: Callable[[str, str], None],
        hurdles: Hurdles,
    ) -> None:
        self._shelves = shelves
        self._base_models = base_models
        self._shapes = shapes
        self._startup_s = startup_s
        self._clock = clock
        self._end_session = end_session
        self._hurdles = hurdles

    def create(self, message: TrainerJob, query: Mapping[str, str]) -> TrainerJob:
        """Make a job.

        Raises:
            Refused: The id is taken (409), or the request is at fault (400).
        """
        job_id = new_id("rlorTrainerJobId", query.get("rlorTrainerJobId"))
        name = resource(_KIND, job_id)
        if self._shelves.jobs.find(job_id) is not None:
            raise Refused(409, f"{name} exists already; its id is not given again, even after it was deleted")
        config = message.training_config
        if config is None or not config.base_model:
            raise Refused(400, "trainingConfig.baseModel is missing: name the model to train")
        deployment_id = self._deployment(query.get("deploymentId"), message.hot_load_deployment_id)
        shape = self._shape(query.get("trainingShape") or message.training_shape, config)
        now = self._clock()
        made = msgspec.structs.replace(
            message,
            name=name,
            state="JOB_STATE_CREATING",
            status=None,
            create_time=timestamp(now),
            update_time=timestamp(now),
            service_mode=True,
            keep_alive=bool(message.keep_alive),
            training_shape=shape,
            node_count=message.node_count or 1,
            forward_only=bool(message.forward_only),
            hot_load_deployment_id=deployment_id or "",
            direct_route_handle="",
        )
        record = JobRecord(id=job_id, created=now, resource=made, since=now)
        self._shelves.jobs.put(record)
        self._hurdles.start("create_trainer_job", name)
        return self._show(record)

    def _deployment(self, asked: str | None, told: str | None) -> str | None:
        given = {id_of("deployments", text) for text in (asked, told) if text}
        if len(given) > 1:
            raise Refused(400, f"deploymentId and hotLoadDeploymentId disagree: {', '.join(sorted(given))}")
        for name in given:
            record = self._shelves.deployments.find(name)
            if record is None or record.resource.state == "DELETED":
                raise Refused(400, f"there is no {resource('deployments', name)}: create it before the trainer job")
            if record.resource.hot_load_trainer_job:
                raise Refused(
                    400,
                    f"hotload flow mismatch: {resource('deployments', name)} follows a trainer "
                    f"({record.resource.hot_load_trainer_job}); set exactly one of its hotLoadTrainerJob "
                    "(trainer-first) and the job's hotLoadDeploymentId (deployment-first)",
                )
            return name
        return None

    def _shape(self, name: str | None, config: TrainingConfig) -> str | None:
        if not name:
            return None
        try:
            shape = self._shapes.training_shape(name)
        except Refused as error:
            raise Refused(400, f"trainingShape: {error.refusal.detail}") from None
        snapshot = shape.snapshot
        if snapshot is not None:
            if snapshot.base_model != config.base_model:
                raise Refused(400, f"{shape.name} is for {snapshot.base_model}, and baseModel is {config.base_model}")
            config.max_context_length = snapshot.max_supported_context_length
        return shape.name

    # -- reading -----------------------------------------------------------------------------------

    def record(self, job_id: str) -> JobRecord:
        """A job's record, deleted or not.

        Raises:
            Refused: There never was such a job.
        """
        record = self._shelves.jobs.find(job_id)
        if record is None:
            raise Refused(404, f"there is no {resource(_KIND, job_id)}")
        return record

    def get(self, job_id: str) -> TrainerJob:
        """A job, deleted or not.

        Raises:
            Refused: There never was such a job.
        """
        return self._show(self.record(job_id))

    def list(self, query: Mapping[str, str]) -> TrainerJobList:
        """The jobs that were not deleted, newest first."""
        shown = [self._show(record) for record in reversed(self._shelves.jobs.all())]
        there = [job for job in shown if job.state != "JOB_STATE_DELETED"]
        wanted = query.get("filter", "")
        found = [job for job in there if matches(wanted, msgspec.to_builtins(job))]
        page, token = page_of(found, query)
        return TrainerJobList(rlor_trainer_jobs=page, next_page_token=token, total_size=len(found))

    def _show(self, record: JobRecord) -> TrainerJob:
        state, status = self._state(record)
        return msgspec.structs.replace(record.resource, state=state, status=record.resource.status or status)

    def _state(self, record: JobRecord) -> tuple[str, Status]:
        config = record.resource.training_config
        wanted = (config and config.base_model) or ""
        problem = None
        if engine_name(wanted) not in self._base_models:
            problem = f"base model {wanted!r} is unknown; this service trains: {', '.join(self._base_models)}"
        recorded = record.resource.state or ""
        hurdle = self._hurdles.before(record.resource.name or "") if recorded == "JOB_STATE_CREATING" else None
        if hurdle is not None:
            return hurdle.state, Status(code="INTERNAL" if hurdle.fails else "OK", message=hurdle.message)
        return job_state(recorded, record.since, self._clock(), self._startup_s, problem)

    # -- changing ----------------------------------------------------------------------------------

    def resume(self, job_id: str) -> TrainerJob:
        """Start a job again that failed, was paused or cancelled; its sessions are gone, its checkpoints are not.

        Raises:
            Refused: There is no such job, or it is not one that can be resumed.
        """
        record = self.record(job_id)
        state, _ = self._state(record)
        if state not in _RESUMABLE:
            raise Refused(400, f"{record.resource.name} is {state}: only {' and '.join(_RESUMABLE)} can be resumed")
        self._enter(record, "JOB_STATE_CREATING")
        self._hurdles.start("resume_trainer_job", record.resource.name or "")
        return self._show(record)

    def cancel(self, job_id: str) -> TrainerJob:
        """Stop a job; once more is no error.

        Raises:
            Refused: There is no such job, or it was deleted.
        """
        record = self.record(job_id)
        if record.resource.state == "JOB_STATE_DELETED":
            raise Refused(400, f"{record.resource.name} was deleted and cannot be cancelled")
        self._stop(record, "JOB_STATE_CANCELLED")
        return self._show(record)

    def delete(self, job_id: str) -> None:
        """Stop a job and hide it; once more is no error.

        Raises:
            Refused: There never was such a job.
        """
        self._stop(self.record(job_id), "JOB_STATE_DELETED")

    def preempt(self, job_id: str, state: str, message: str) -> None:
        """Take the machines away from a job, if it runs; what its trainer held in memory is lost."""
        record = self._shelves.jobs.find(job_id)
        if record is not None and self._state(record)[0] == "JOB_STATE_RUNNING":
            self._stop(record, state, Status(code="UNAVAILABLE", message=message))

    def _stop(self, record: JobRecord, state: str, status: Status | None = None) -> None:
        if record.resource.state == state:
            return
        self._enter(record, state, status)
        for session_id in record.sessions:
            self._end_session(session_id, f"trainer job {record.resource.name} is {state}")

    def _enter(self, record: JobRecord, state: str, status: Status | None = None) -> None:
        record.since = self._clock()
        record.resource = msgspec.structs.replace(
            record.resource, state=state, status=status, update_time=timestamp(record.since)
        )
        self._shelves.jobs.put(record)

    # -- the gateway -------------------------------------------------------------------------------

    def admit(self, account: str, job_id: str) -> None:
        """Let a request through to a job's trainer.

        Raises:
            Refused: There is no such job or it has ended (404), or it is starting (503).
        """
        record = self._shelves.jobs.find(job_id) if account == ACCOUNT else None
        state = "" if record is None else self._state(record)[0]
        name = resource(_KIND, job_id, account)
        if state in _STARTING:
            raise Refused(503, f"{name} is still starting: ask for its state until it is JOB_STATE_RUNNING")
        if state != "JOB_STATE_RUNNING":
            raise Refused(404, f"no trainer runs for {name}: {f'it is {state}' if state else 'there is no such job'}")

    def bind(self, job_id: str, session_id: str) -> None:
        """Note a session that was made through a job's gateway."""
        record = self.record(job_id)
        record.sessions = [*record.sessions, session_id]
        self._shelves.jobs.put(record)

    def check_base_model(self, job_id: str, name: str) -> None:
        """Check that a job trains a base model.

        Raises:
            Refused: It trains another one.
        """
        config = self.record(job_id).resource.training_config
        trained = engine_name((config and config.base_model) or "")
        if name != trained:
            raise Refused(400, f"trainer job {job_id} trains {trained}, and base_model is {name}")

    def check_rank(self, job_id: str, rank: int) -> None:
        """Check that a job trains adapters of a rank; 0 is no adapter, but all parameters.

        A job's own rank is the largest that it has room for, as several models may share it.

        Raises:
            Refused: It does not.
        """
        config = self.record(job_id).resource.training_config
        most = (config and config.lora_rank) or 0
        if rank == most or 0 < rank < most:
            return
        trains = f"LoRA adapters of a rank up to {most}" if most else "all parameters"
        raise Refused(400, f"trainer job {job_id} trains {trains} (trainingConfig.loraRank), and rank is {rank}")

    def is_forward_only(self, job_id: str) -> bool:
        """Whether a job's models are never trained."""
        return bool(self.record(job_id).resource.forward_only)
