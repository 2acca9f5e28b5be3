"""Deployments: their life, their replicas, and which weights they serve.

    create -> CREATING -> READY | FAILED (a hurdle)
    another hotLoadTrainerJob -> UPDATING (replicas start anew) -> READY
    delete -> DELETED (hidden from lists; its id can be given again), or gone at once if it is `hard`

Invariants
    * A deployment follows one trainer job (`hotLoadTrainerJob`), or jobs follow it (`hotLoadDeploymentId`), never both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from fwasync._wire.control import Deployment, DeploymentList, Status
from fwasync.local.control.filters import matches
from fwasync.local.control.hurdles import Hurdle, Hurdles
from fwasync.local.control.models import Models
from fwasync.local.control.names import ACCOUNT, id_of, new_id, page_of, resource, timestamp
from fwasync.local.control.records import DeploymentRecord, JobRecord, Shelves
from fwasync.local.control.replicas import Replica, replicas_at, resized
from fwasync.local.control.shapes import Shapes
from fwasync.local.refusal import Refused

__all__ = ("DeploymentDesk", "deployment_state")

_KIND = "deployments"
_MOST_REPLICAS = 64
_STARTING = ("CREATING", "UPDATING")
_CHANGEABLE = (
    "annotations",
    "description",
    "display_name",
    "extra_args",
    "extra_values",
    "hot_load_trainer_job",
    "hot_load_transition_type",
    "max_replica_count",
    "min_replica_count",
)


def deployment_state(recorded: str, since: float, now: float, startup_s: float) -> str:
    """What a deployment is doing now; it entered the recorded state at `since`."""
    return "READY" if recorded in _STARTING and now >= since + startup_s else recorded


class DeploymentDesk:
    """Answers about deployments.

    Args:
        shelves: The records.
        models: What can be deployed.
        shapes: The shapes.
        startup_s: How long a deployment takes to start.
        clock: Tells the time in seconds since the epoch.
        hurdles: What keeps deployments from starting.
    """

    def __init__(
        self,
        shelves: Shelves,
        models: Models,
        shapes: Shapes,
        startup_s: float,
        clock: Callable[[], float],
        hurdles: Hurdles,
    ) -> None:
        self._shelves = shelves
        self._models = models
        self._shapes = shapes
        self._startup_s = startup_s
        self.clock = clock
        self._hurdles = hurdles

    def create(self, message: Deployment, query: Mapping[str, str]) -> Deployment:
        """Make a deployment.

        Raises:
            Refused: The id is taken (409), or the request is at fault (400).
        """
        name = new_id("deploymentId", query.get("deploymentId"))
        known = self._shelves.deployments.find(name)
        if known is not None and known.resource.state != "DELETED":
            raise Refused(409, f"{resource(_KIND, name)} exists already")
        if not message.base_model:
            raise Refused(400, "baseModel is missing: name the model to deploy")
        try:
            self._models.get(message.base_model)
        except Refused as error:
            raise Refused(400, f"baseModel: {error.refusal.detail}") from None
        now = self.clock()
        made = msgspec.structs.replace(
            message,
            name=resource(_KIND, name),
            state="CREATING",
            create_time=timestamp(now),
            min_replica_count=message.min_replica_count or 0,
            max_replica_count=1 if message.max_replica_count is None else message.max_replica_count,
            enable_hot_load=bool(message.enable_hot_load),
            region=message.placement.region if message.placement else message.region,
            deployment_shape=self._shape(message.deployment_shape),
        )
        self._check(made)
        record = DeploymentRecord(id=name, created=now, resource=made, since=now)
        self._shelves.deployments.put(record)
        self._hurdles.start("create_deployment", made.name or "")
        return self._show(record)

    def _shape(self, name: str | None) -> str | None:
        try:
            return self._shapes.deployment_shape(name).name if name else None
        except Refused as error:
            raise Refused(400, f"deploymentShape: {error.refusal.detail}") from None

    def _check(self, made: Deployment) -> None:
        least, most = made.min_replica_count or 0, made.max_replica_count or 0
        if not 0 <= least <= most <= _MOST_REPLICAS:
            raise Refused(
                400, f"minReplicaCount is {least} and maxReplicaCount {most}: 0 <= min <= max <= {_MOST_REPLICAS}"
            )
        if made.hot_load_transition_type not in (None, "", "ASYNC", "SYNC"):
            raise Refused(400, f"hotLoadTransitionType is {made.hot_load_transition_type!r}: use ASYNC or SYNC")
        if made.hot_load_trainer_job:
            self._check_trainer(made, made.hot_load_trainer_job)

    def _check_trainer(self, made: Deployment, job: str) -> None:
        found = self._shelves.jobs.find(id_of("rlorTrainerJobs", job))
        if found is None or found.resource.state == "JOB_STATE_DELETED":
            raise Refused(400, f"hotLoadTrainerJob: there is no {job}")
        followers = [entry.resource.name for entry in self._followers(id_of(_KIND, made.name or ""))]
        if found.resource.hot_load_deployment_id or followers:
            raise Refused(
                400,
                f"hotload flow mismatch: {', '.join(map(str, followers)) or job} follows a deployment "
                "(deployment-first); set exactly one of a job's hotLoadDeploymentId and a deployment's "
                "hotLoadTrainerJob (trainer-first)",
            )

    # -- reading -----------------------------------------------------------------------------------

    def record(self, name: str) -> DeploymentRecord:
        """A deployment's record, deleted or not, by its id.

        Raises:
            Refused: It is not here.
        """
        record = self._shelves.deployments.find(name)
        if record is None:
            raise Refused(404, f"there is no {resource(_KIND, name)}")
        return record

    def find(self, name: str) -> DeploymentRecord | None:
        """A deployment's record by its id, if it is here."""
        return self._shelves.deployments.find(name)

    def get(self, name: str) -> Deployment:
        """A deployment, deleted or not.

        Raises:
            Refused: It is not here.
        """
        return self._show(self.record(name))

    def list(self, query: Mapping[str, str]) -> DeploymentList:
        """The deployments that were not deleted, newest first."""
        shown = [self._show(record) for record in reversed(self._shelves.deployments.all())]
        there = [entry for entry in shown if entry.state != "DELETED"]
        wanted = query.get("filter", "")
        found = [entry for entry in there if matches(wanted, msgspec.to_builtins(entry))]
        page, token = page_of(found, query)
        return DeploymentList(deployments=page, next_page_token=token, total_size=len(found))

    def state(self, record: DeploymentRecord) -> str:
        """What a deployment is doing now."""
        hurdle = self._hurdle(record)
        if hurdle is not None:
            return hurdle.state
        return deployment_state(record.resource.state or "", record.since, self.clock(), self._startup_s)

    def _hurdle(self, record: DeploymentRecord) -> Hurdle | None:
        return self._hurdles.before(record.resource.name or "") if record.resource.state == "CREATING" else None

    def replicas(self, record: DeploymentRecord) -> list[Replica]:
        """The replicas as they are now; none while the deployment starts for the first time, failed or is deleted."""
        if self.state(record) in ("CREATING", "FAILED", "DELETED"):
            return []
        most = record.resource.max_replica_count or 0
        count = max(record.resource.min_replica_count or 0, min(most, 1))
        return replicas_at(resized(record.served, count), record.load, self.clock())

    def followers(self, record: DeploymentRecord) -> list[str]:
        """The ids of the jobs whose snapshots a deployment loads."""
        job = record.resource.hot_load_trainer_job
        return [id_of("rlorTrainerJobs", job)] if job else [entry.id for entry in self._followers(record.id)]

    def _followers(self, name: str) -> list[JobRecord]:
        return [entry for entry in self._shelves.jobs.all() if entry.resource.hot_load_deployment_id == name]

    def _show(self, record: DeploymentRecord) -> Deployment:
        bucket, hurdle = None, self._hurdle(record)
        said = "" if hurdle is None else hurdle.message
        if record.resource.enable_hot_load:
            job = record.resource.hot_load_trainer_job
            owner = f"trainer-{id_of('rlorTrainerJobs', job)}" if job else record.id
            bucket = f"local://rl-checkpoints/{ACCOUNT}/{owner}/"
        return msgspec.structs.replace(
            record.resource,
            state=self.state(record),
            status=Status(code="OK" if hurdle is None or not hurdle.fails else "INTERNAL", message=said),
            replica_count=len(self.replicas(record)),
            hot_load_bucket_url=bucket,
        )

    # -- changing ----------------------------------------------------------------------------------

    def change(self, name: str, message: Deployment, query: Mapping[str, str]) -> Deployment:
        """Change the fields that the mask names, or without a mask those that the message has.

        Raises:
            Refused: There is no such deployment, or it cannot be changed so.
        """
        record = self.record(name)
        if record.resource.state == "DELETED":
            raise Refused(404, f"{record.resource.name} was deleted")
        mask = query.get("updateMask")
        given = {field: getattr(message, field) for field in message.__struct_fields__}
        if mask is None:
            changes = {
                field: value
                for field, value in given.items()
                if value is not None and value != getattr(record.resource, field)
            }
        else:
            changes = {field: given.get(field) for field in mask.split(",")}
        if fixed := [field for field in changes if field not in _CHANGEABLE]:
            raise Refused(400, f"{', '.join(fixed)} cannot be changed; what can: {', '.join(_CHANGEABLE)}")
        changed = msgspec.structs.replace(record.resource, **changes)
        self._check(changed)
        self._take(record, changed)
        return self._show(record)

    def _take(self, record: DeploymentRecord, changed: Deployment) -> None:
        restarts = (changed.hot_load_trainer_job or None) != (record.resource.hot_load_trainer_job or None)
        record.served = [replica.current for replica in self.replicas(record)]
        if restarts:
            # The replicas come from another bucket now: they begin with the base model.
            record.served, record.load, record.paths = [], None, {}
            record.generation += 1
            record.since = self.clock()
            changed = msgspec.structs.replace(changed, state="UPDATING")
        record.resource = changed
        self._shelves.deployments.put(record)

    def delete(self, name: str, *, hard: bool) -> None:
        """Stop a deployment; once more is no error, unless it was `hard`: then it is gone.

        Raises:
            Refused: It is not here.
        """
        record = self.record(name)
        if hard:
            self._shelves.deployments.remove(record)
        elif record.resource.state != "DELETED":
            record.resource = msgspec.structs.replace(record.resource, state="DELETED")
            self._shelves.deployments.put(record)

    def save(self, record: DeploymentRecord) -> None:
        """Write a record that a hot-load has changed."""
        self._shelves.deployments.put(record)
