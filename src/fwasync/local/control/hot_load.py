"""Hot-loading: a deployment's replicas swap in a snapshot that its trainer has saved.

A snapshot is known by its name or by the path that saving it returned. What cannot be loaded is told by the stage
`error` of all replicas, which go on with what they serve.

Invariants
    * A new load begins with what each replica serves at that moment, even if an earlier load was under way.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio.to_thread

from fwasync._wire.hot_load import (
    HotLoadRequest,
    HotLoadStatus,
    LoadedAdapter,
    LoadingState,
    ReplicaStatus,
)
from fwasync.local.control.deployments import DeploymentDesk
from fwasync.local.control.models import Models
from fwasync.local.control.names import id_of
from fwasync.local.control.records import DeploymentRecord, Load
from fwasync.local.control.replicas import Replica, delta_problem
from fwasync.local.control.snapshots import Snapshots, is_delta
from fwasync.local.engine.api import Engine, EngineError
from fwasync.local.refusal import Refused
from fwasync.local.sampling_thread import Weights

__all__ = ("HotLoadDesk",)


def _as_it_is(_deployment: str, load: Load) -> Load:
    return load


class HotLoadDesk:
    """Answers about hot-loads, and tells the weights that a deployment serves.

    Attributes:
        alter: Gets each load that begins, and the id of its deployment; what it returns happens instead.
    """

    def __init__(
        self, deployments: DeploymentDesk, models: Models, snapshots: Snapshots, engine: Engine, swap_s: float
    ) -> None:
        self._swap_s = swap_s
        self._deployments = deployments
        self._models = models
        self._snapshots = snapshots
        self._engine = engine
        self.alter: Callable[[str, Load], Load] = _as_it_is

    def _record(self, deployment: str | None, model: str | None) -> DeploymentRecord:
        if not deployment:
            raise Refused(400, "the header fireworks-deployment is missing: name the deployment")
        record = self._deployments.record(id_of("deployments", deployment))
        resource = record.resource
        if resource.state == "DELETED":
            raise Refused(404, f"{resource.name} was deleted")
        if not resource.enable_hot_load:
            raise Refused(400, f"{resource.name} was created without enableHotLoad")
        if model and model != resource.base_model:
            raise Refused(400, f"fireworks-model is {model}, and {resource.name} is of {resource.base_model}")
        return record

    def status(self, deployment: str | None, model: str | None) -> HotLoadStatus:
        """The replicas of a deployment.

        Raises:
            Refused: It is not here, or is none that loads.
        """
        record = self._record(deployment, model)
        restarting = self._deployments.state(record) == "UPDATING"
        replicas = self._deployments.replicas(record)
        return HotLoadStatus(
            replicas=[
                _status(replica, f"{record.id}-{record.generation}-{index}", restarting=restarting)
                for index, replica in enumerate(replicas)
            ]
        )

    async def load(self, deployment: str | None, model: str | None, message: HotLoadRequest) -> None:
        """Begin to load a snapshot.

        Raises:
            Refused: The deployment is not here (404), not ready (425), or is none that loads (400).
        """
        record = self._record(deployment, model)
        self._check_ready(record)
        sessions = self._snapshots.sessions(self._deployments.followers(record))
        generation = record.generation
        found = await anyio.to_thread.run_sync(self._snapshots.find, sessions, message.identity)
        problem, path = None, ""
        serving = [replica.current for replica in self._deployments.replicas(record)]
        if found is None:
            problem = f"the trainer of this deployment has saved no snapshot {message.identity!r}"
        else:
            path = str(found.saved.path)
            metadata = message.incremental_snapshot_metadata
            problem = await self._model_problem(record, path) or delta_problem(
                identity=message.identity,
                is_delta=is_delta(found.saved),
                made_against=found.previous,
                announced=metadata.previous_snapshot_identity if metadata else None,
                serving=serving,
            )
        if record.generation != generation or self._deployments.find(record.id) is not record:
            raise Refused(409, f"{record.resource.name} was changed meanwhile: ask for its state and load again")
        now = self._deployments.clock()
        load = Load(identity=message.identity, path=path, since=now, swap_s=self._swap_s, error=problem)
        self._begin(record, load if problem else self.alter(record.id, load))

    def _check_ready(self, record: DeploymentRecord) -> None:
        state = self._deployments.state(record)
        if state != "READY":
            raise Refused(425, f"{record.resource.name} is {state}: wait until it is READY")
        if not self._deployments.replicas(record):
            raise Refused(425, f"{record.resource.name} has no replicas: raise its maxReplicaCount")

    async def _model_problem(self, record: DeploymentRecord, path: str) -> str | None:
        directory = self._snapshots.directory(path)
        try:
            info = await anyio.to_thread.run_sync(self._engine.snapshot_info, directory)
        except EngineError as error:
            return str(error)
        wanted = self._models.weights(record.resource.base_model or "").base_model
        return None if info.base_model == wanted else f"{path} is of {info.base_model}, the deployment of {wanted}"

    def _begin(self, record: DeploymentRecord, load: Load) -> None:
        record.served = [replica.current for replica in self._deployments.replicas(record)]
        record.load = load
        kept = {identity: record.paths[identity] for identity in record.served if identity is not None}
        record.paths = kept if load.error is not None else {**kept, load.identity: load.path}
        self._deployments.save(record)

    def weights(self, record: DeploymentRecord, turn: int) -> Weights:
        """What a deployment samples from now; where its replicas differ, they take turns.

        Raises:
            Refused: It is not ready (425), or has failed (404).
        """
        state = self._deployments.state(record)
        if state == "CREATING":
            raise Refused(425, f"{record.resource.name} is still starting")
        if state == "FAILED":
            raise Refused(404, f"{record.resource.name} has failed: delete it, and create it again")
        replicas = self._deployments.replicas(record)
        if not replicas:
            raise Refused(425, f"{record.resource.name} has no replicas: raise its maxReplicaCount")
        base = self._models.weights(record.resource.base_model or "")
        identity = replicas[turn % len(replicas)].current
        if identity is None:
            return base
        return Weights(base.base_model, self._snapshots.directory(record.paths[identity]))


def _status(replica: Replica, name: str, *, restarting: bool) -> ReplicaStatus:
    current = replica.current
    return ReplicaStatus(
        identity=name,
        current_snapshot_identity=current,
        readiness=not (restarting or replica.loading),
        loading_state=LoadingState(
            stage="loading" if restarting else replica.stage,
            target_snapshot_identity=replica.target,
            error_message=replica.error,
        ),
        loaded_adapters=[] if current is None else [LoadedAdapter(identity=current, status="loaded")],
        supports_rdma_weight_sync=False,
        rdma_weight_sync_enabled=False,
    )
