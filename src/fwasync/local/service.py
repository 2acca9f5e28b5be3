"""The trainer service behind its HTTP face: wires sessions, models, samplers, futures and weights.

Invariants
    * Lives on one event loop; everything that computes or touches disks happens in threads.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from fwasync._wire.messages import (
    Capabilities,
    ModelData,
    ModelInfo,
    SupportedModel,
)
from fwasync.local.catalogue import Catalogue, LiveRun
from fwasync.local.control.completions import CompletionDesk
from fwasync.local.control.names import engine_name
from fwasync.local.control.plane import ControlPlane, Timing
from fwasync.local.engine.api import Engine
from fwasync.local.futures import FutureStore
from fwasync.local.models import Origin
from fwasync.local.operations import Operations
from fwasync.local.sampling import SamplingDesk
from fwasync.local.sessions import OWNER, Sessions
from fwasync.local.training import TrainingDesk
from fwasync.local.weights import WeightStore

__all__ = ("ServiceOptions", "TrainerService")


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What can be chosen about a service. Times in seconds.

    Attributes:
        long_poll_s: How long `retrieve_future` waits for a result.
        session_timeout_s: After this long without a sign of life a session is ended.
        timing: How long trainer jobs, deployments and hot-loads take.
    """

    long_poll_s: float = 20.0
    session_timeout_s: float = 600.0
    timing: Timing = field(default_factory=Timing)


class TrainerService:
    """Everything that the endpoints need. To be created on the event loop."""

    def __init__(self, engine: Engine, losses: Collection[str], root: Path, options: ServiceOptions) -> None:
        self.options = options
        self.tokenizer_directory = root / "tokenizer"
        self.futures = FutureStore()
        self.sessions = Sessions(time.monotonic)
        self._engine = engine
        self._store = WeightStore(root)
        self.catalogue = Catalogue(engine, self._store)
        self.samplers = SamplingDesk(engine, self._store, self.futures, self.sessions)
        self.control = ControlPlane(root, engine, self._store, options.timing, self.end_session)
        operations = Operations(self._store, losses, self.control.snapshots.checkpoint, self.control.models.promoted)
        self.training = TrainingDesk(engine, operations, self.futures, self.sessions, self.samplers)
        self.training.admit = self._admit
        self.completions = CompletionDesk(self.control.deployments, self.control.hot_load, self.samplers, self.futures)

    def begin_session(self, user_metadata: Mapping[str, Any] | None, display_name: str | None) -> str:
        """Begin a session, of the trainer job through whose gateway it is asked for; returns its id."""
        session_id, job_id = self.sessions.create(user_metadata, display_name), OWNER.get()
        if job_id is not None:
            self.control.jobs.bind(job_id, session_id)
        return session_id

    def base_model(self, name: str | None) -> str | None:
        """The engine's name of a base model, which may be given as the control plane calls it.

        Raises:
            Refused: The trainer job through whose gateway it is asked for trains another one.
        """
        job_id = OWNER.get()
        if name is None:
            return None
        name = engine_name(name)
        if job_id is not None:
            self.control.jobs.check_base_model(job_id, name)
        return name

    def _admit(self, origin: Origin) -> Origin:
        """A new model, held to what the trainer job was created for through whose gateway it is asked for.

        Raises:
            Refused: The job trains adapters of another rank.
        """
        job_id = OWNER.get()
        if job_id is None:
            return origin
        if not origin.base_only:
            self.control.jobs.check_rank(job_id, origin.lora.rank if origin.lora else 0)
        return replace(origin, forward_only=self.control.jobs.is_forward_only(job_id))

    def capabilities(self) -> Capabilities:
        """The base models."""
        return Capabilities(
            supported_models=[
                SupportedModel(
                    model_name=model.name,
                    max_context_length=model.max_context_length,
                    trainable=True,
                    sampleable=True,
                )
                for model in self._engine.models.values()
            ]
        )

    def model_info(self, model_id: str) -> ModelInfo:
        """What a model is made of.

        Raises:
            Refused: It is not here.
        """
        model = self.training.model(model_id)
        self.sessions.find(model.target.session_id)
        origin = model.origin
        name = origin.base_model.name
        return ModelInfo(
            model_id=model_id,
            model_data=ModelData(model_name=name, tokenizer_id=str(self.tokenizer_directory)),
            is_lora=origin.lora is not None,
            lora_rank=origin.lora.rank if origin.lora else None,
            model_name=name,
        )

    def live_runs(self) -> list[LiveRun]:
        """The models of the sessions that are open."""
        return [
            LiveRun(
                model.target.model_id,
                model.origin.base_model.name,
                model.origin.lora,
                model.last_request,
                model.origin.user_metadata,
            )
            for model in self.training.models()
        ]

    def end_session(self, session_id: str, why: str) -> None:
        """End a session: its models are unloaded, its sampling sessions closed, its samples stopped. Unknown ids are
        ignored.
        """
        self.sessions.remove(session_id)
        self.training.end_session(session_id, why)
        for directory in self.samplers.end_session(session_id, why):
            self.training.when_done(partial(self._store.remove, directory))

    async def watch_sessions(self) -> None:
        """End sessions that have fallen silent, for ever."""
        limit = self.options.session_timeout_s
        while True:
            await anyio.sleep(min(limit / 4, 10.0))
            for session_id in self.sessions.silent(limit):
                why = f"session {session_id} gave no sign of life for {limit:g} s and was ended"
                self.end_session(session_id, why)

    async def checkpoint_names(self) -> list[str]:
        """The names of all resumable checkpoints, oldest first; through a trainer job's gateway, of its own."""
        job_id = OWNER.get()
        if job_id is None:
            return await anyio.to_thread.run_sync(self._store.checkpoint_names)
        return await anyio.to_thread.run_sync(self.control.snapshots.checkpoint_names, job_id)
