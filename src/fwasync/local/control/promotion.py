"""What a job's trainer has saved, as a list, and its promotion to a model.

Invariants
    * A promoted model is a copy: it stays when its checkpoint, its job or its session goes.
    * A model is there as a whole or not at all, and never changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import anyio.to_thread
import msgspec

from fwasync._wire.control import (
    ControlCheckpoint,
    ControlCheckpointList,
    LongOperation,
    Model,
    PromoteRequest,
    Promotion,
    encode,
)
from fwasync.local.control.models import Models
from fwasync.local.control.names import engine_name, id_of, page_of, resource, timestamp
from fwasync.local.control.records import ModelRecord, Shelves
from fwasync.local.control.snapshots import Snapshots, is_delta
from fwasync.local.engine.api import Engine, EngineError
from fwasync.local.refusal import Refused
from fwasync.local.weights import Saved

__all__ = ("PromotionDesk",)

_OPERATION = "promote-"


class PromotionDesk:
    """Lists checkpoints and promotes them.

    Args:
        shelves: The records.
        snapshots: What was saved.
        models: What is there to train on.
        engine: Tells what a snapshot holds.
        root: Where the weights of promoted models go, in a directory each.
        clock: Tells the time in seconds since the epoch.
    """

    def __init__(
        self,
        shelves: Shelves,
        snapshots: Snapshots,
        models: Models,
        engine: Engine,
        root: Path,
        clock: Callable[[], float],
    ) -> None:
        self._shelves = shelves
        self._snapshots = snapshots
        self._models = models
        self._engine = engine
        self._root = root
        self._clock = clock
        self._under_way: set[str] = set()

    async def checkpoints(self, job_id: str, query: Mapping[str, str]) -> ControlCheckpointList:
        """What the trainer of a job has saved, oldest first; also of a job that was deleted.

        Raises:
            Refused: There never was such a job.
        """
        name = self._job(job_id)
        sessions = self._snapshots.sessions([job_id])
        saved = await anyio.to_thread.run_sync(self._snapshots.saved, sessions)
        page, token = page_of(saved, query)
        rows = await anyio.to_thread.run_sync(lambda: [self._row(name, entry) for entry in page])
        return ControlCheckpointList(checkpoints=rows, next_page_token=token)

    def _job(self, job_id: str) -> str:
        if self._shelves.jobs.find(job_id) is None:
            raise Refused(404, f"there is no {resource('rlorTrainerJobs', job_id)}")
        return resource("rlorTrainerJobs", job_id)

    def _row(self, job: str, saved: Saved) -> ControlCheckpoint:
        time = timestamp(saved.time.timestamp())
        return ControlCheckpoint(
            name=f"{job}/checkpoints/{saved.path.name}",
            create_time=time,
            update_time=time,
            checkpoint_type=f"CHECKPOINT_TYPE_{self._type(saved)}",
            promotable=_promotable(saved),
        )

    def _type(self, saved: Saved) -> str:
        if saved.path.kind == "sampler_weights":
            return "INFERENCE_ARC_V2" if is_delta(saved) else "INFERENCE_BASE"
        try:
            lora = self._engine.snapshot_info(saved.directory).lora
        except EngineError:
            lora = None  # it was removed just now
        return "TRAINING" if lora is None else "TRAINING_LORA"

    # -- promotion ---------------------------------------------------------------------------------

    async def promote(self, job_id: str | None, checkpoint: str, message: PromoteRequest) -> Promotion:
        """Make a model of a snapshot.

        Args:
            job_id: Whose it is, if the path of the request says so.
            checkpoint: Its name.
            message: The request.

        Raises:
            Refused: There is no such snapshot (404), it cannot be promoted (400), or the model is there (409).
        """
        model_id = id_of("models", message.output_model)
        sessions = self._snapshots.sessions(self._candidates(job_id, message))
        saved = await anyio.to_thread.run_sync(self._find, sessions, checkpoint)
        if self._shelves.models.find(model_id) is not None or model_id in self._under_way:
            raise Refused(409, f"{resource('models', model_id)} exists already: choose another output_model")
        self._under_way.add(model_id)
        try:
            engine_model = await anyio.to_thread.run_sync(self._copy, saved, model_id, message.base_model)
            model = self._put(model_id, engine_model)
        except FileNotFoundError:
            raise Refused(404, f"{saved.path} was removed while it was copied") from None
        finally:
            self._under_way.discard(model_id)
        if message.async_promotion:
            return Promotion(operation=_operation(model_id, model))
        return Promotion(model=model)

    def _candidates(self, job_id: str | None, message: PromoteRequest) -> list[str]:
        told = job_id or (message.trainer_job_id and id_of("rlorTrainerJobs", message.trainer_job_id))
        if told:
            self._job(told)
            return [told]
        jobs = self._shelves.jobs.all()
        if message.hot_load_deployment_id:
            deployment = id_of("deployments", message.hot_load_deployment_id)
            jobs = [job for job in jobs if job.resource.hot_load_deployment_id == deployment]
        return [job.id for job in jobs]

    def _find(self, sessions: Collection[str], checkpoint: str) -> Saved:
        found = [entry for entry in self._snapshots.saved(sessions) if entry.path.name == checkpoint]
        if not found:
            raise Refused(404, f"there is no checkpoint {checkpoint!r} of that trainer job")
        # A checkpoint to resume from may have the same name.
        saved = next((entry for entry in reversed(found) if _promotable(entry)), found[-1])
        if saved.path.kind != "sampler_weights":
            raise Refused(400, f"{checkpoint} is a training checkpoint: promote what save_weights_for_sampler saved")
        if is_delta(saved):
            raise Refused(400, f"{checkpoint} was saved as a delta: promote one that was saved in full")
        return saved

    def _copy(self, saved: Saved, model_id: str, base_model: str | None) -> str:
        engine_model = self._engine.snapshot_info(saved.directory).base_model
        if base_model is not None and engine_name(base_model) != engine_model:
            raise Refused(400, f"{saved.path.name} is of {engine_model}, and base_model is {base_model}")
        target, new = self._root / model_id, self._root / f".new-{model_id}"
        for leftover in (target, new):
            shutil.rmtree(leftover, ignore_errors=True)
        self._root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(saved.directory, new)
        new.rename(target)
        return engine_model

    def _put(self, model_id: str, engine_model: str) -> Model:
        now = self._clock()
        base = self._models.of_engine(engine_model)
        model = msgspec.structs.replace(base, name=resource("models", model_id), create_time=timestamp(now))
        self._shelves.models.put(ModelRecord(id=model_id, created=now, resource=model, engine_model=engine_model))
        return model

    def operation(self, operation_id: str) -> LongOperation:
        """A promotion that was asked for with `async_promotion`.

        Raises:
            Refused: There was none of that name.
        """
        model_id = operation_id.removeprefix(_OPERATION)
        record = self._shelves.models.find(model_id) if model_id != operation_id else None
        if record is None:
            raise Refused(404, f"there is no {resource('operations', operation_id)}")
        return _operation(model_id, record.resource)


def _promotable(saved: Saved) -> bool:
    return saved.path.kind == "sampler_weights" and not is_delta(saved)


def _operation(model_id: str, model: Model) -> LongOperation:
    name = resource("operations", f"{_OPERATION}{model_id}")
    return LongOperation(name=name, done=True, response=msgspec.Raw(encode(model)))
