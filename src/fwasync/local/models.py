"""Models: what they are created from, and what the event loop knows of them.

Invariants
    * A model is named after its session and its number there: clients compute that name themselves.
    * What creates a model is decided when it is asked for, and done on the training thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from fwasync._wire.messages import (
    CreateModelRequest,
    LoadWeightsRequest,
    LoraConfigMessage,
    Message,
    ModelCreated,
    OptimizerConfigMessage,
    WeightsLoaded,
)
from fwasync.local.engine.api import BaseModel, Engine, EngineError, Lora, SnapshotInfo, Trainer
from fwasync.local.operations import Target, Work
from fwasync.local.refusal import Refusal, Refused
from fwasync.local.results import Result, json_result
from fwasync.local.sequence import SequenceGate
from fwasync.local.weights import WeightsPath

__all__ = ("Model", "Origin", "Pending", "Receipt", "from_base_model", "from_checkpoint", "model_id_of", "request_id")

Receipt = str | Refusal


def request_id() -> str:
    """A new name for a future."""
    return f"req-{secrets.token_hex(12)}"


def model_id_of(session_id: str, number: int) -> str:
    """The name of a session's model."""
    return f"{session_id}:train:{number}"


@dataclass(slots=True, eq=False)
class Pending:
    """An accepted operation without a result. `ticket` is its place at the training thread, once it has one."""

    request_id: str
    work: Work
    unloads: bool = False
    ticket: int | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model is created from.

    `make` gives its trainer; `told` is the result of the request that asked for it. Of a `forward_only` trainer job it
    is never trained.
    """

    base_model: BaseModel
    lora: Lora | None
    make: Callable[[], Trainer]
    told: Message
    base_only: bool = False
    forward_only: bool = False
    user_metadata: Mapping[str, Any] | None = None

    def work(self, target: Target) -> Result:
        """Create the model; for the training thread."""
        try:
            target.trainer = self.make()
        except EngineError as error:
            target.gone = f"model {target.model_id} could not be created: {error}"
            raise
        return json_result(self.told)


@dataclass(slots=True, eq=False)
class Model:
    """A model as the event loop sees it."""

    target: Target
    origin: Origin
    digest: bytes
    create_request_id: str
    gate: SequenceGate[Pending, Receipt] = field(default_factory=SequenceGate[Pending, Receipt])
    last_request: datetime = field(default_factory=lambda: datetime.now(UTC))
    unload_request_id: str | None = None
    ended: str | None = None


def from_base_model(engine: Engine, message: CreateModelRequest) -> Origin:
    """What `create_model` asks for.

    Raises:
        Refused: The service has no such base model or optimizer.
    """
    base_model = _base_model(engine, message.base_model)
    _check_optimizer(message.optimizer_config)
    lora = None if message.base_only else _lora(message.lora_config)
    seed = message.lora_config.seed if message.lora_config else None
    return Origin(
        base_model,
        lora,
        lambda: engine.trainer(base_model.name, lora, seed=seed),
        ModelCreated(model_id=model_id_of(message.session_id, message.model_seq_id)),
        base_only=bool(message.base_only),
        user_metadata=message.user_metadata,
    )


def from_checkpoint(
    engine: Engine, message: LoadWeightsRequest, model_id: str, path: WeightsPath, directory: Path, info: SnapshotInfo
) -> Origin:
    """What `load_weights` without a model asks for.

    Args:
        engine: Makes the trainer.
        message: The request.
        model_id: The new model's name.
        path: The checkpoint's path.
        directory: Where it is.
        info: What it holds.

    Raises:
        Refused: The service has no such base model or optimizer, or the checkpoint is of another base model.
    """
    base_model = _base_model(engine, message.base_model or info.base_model)
    if base_model.name != info.base_model:
        raise Refused(400, f"load_weights: {path} is of {info.base_model}, and base_model is {base_model.name}")
    _check_optimizer(message.optimizer_config)
    optimizer = message.optimizer is True

    def make() -> Trainer:
        trainer = engine.trainer(base_model.name, info.lora)
        trainer.load(directory, optimizer=optimizer)
        return trainer

    told = WeightsLoaded(path=str(path), model_id=model_id)
    return Origin(base_model, info.lora, make, told, user_metadata=message.user_metadata)


def _base_model(engine: Engine, name: str) -> BaseModel:
    base_model = engine.models.get(name)
    if base_model is None:
        raise Refused(400, f"unknown base_model {name!r}; this service has: {', '.join(engine.models)}")
    return base_model


def _check_optimizer(config: OptimizerConfigMessage | None) -> None:
    if config is not None and config.type != "adamw":
        raise Refused(400, f"unknown optimizer {config.type!r}; this service has: adamw")


def _lora(config: LoraConfigMessage | None) -> Lora | None:
    if config is None or config.rank == 0:
        return None
    given = msgspec.structs.asdict(config)
    return Lora(**{name: value for name, value in given.items() if value is not None})
