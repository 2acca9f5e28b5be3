"""The messages about what a service keeps: training runs, their checkpoints, sessions, samplers.

A training run is a model, named by its id, for as long as the model or anything saved of it is there. Times are
texts as ISO 8601 has them, in UTC.
"""

from __future__ import annotations

from typing import Any

from fwasync._wire.messages import Message

__all__ = (
    "CheckpointEntry",
    "CheckpointList",
    "Cursor",
    "SamplerInfo",
    "SessionDetails",
    "SessionList",
    "TimeToLive",
    "TrainingRunEntry",
    "TrainingRunList",
    "WeightsInfo",
    "WeightsInfoRequest",
)


class Cursor(Message, omit_defaults=False):
    """Which part of a list this is."""

    offset: int
    limit: int
    total_count: int


class CheckpointEntry(Message):
    """A checkpoint (`training`) or a snapshot for a sampler (`sampler`)."""

    checkpoint_id: str
    checkpoint_type: str
    time: str
    tinker_path: str
    size_bytes: int | None = None
    public: bool | None = None
    expires_at: str | None = None
    user_metadata: dict[str, Any] | None = None


class CheckpointList(Message):
    """Answer of `GET /checkpoints` and of `GET /training_runs/{id}/checkpoints`, which has no cursor."""

    checkpoints: list[CheckpointEntry]
    cursor: Cursor | None = None


class TrainingRunEntry(Message):
    """Answer of `GET /training_runs/{id}`."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: str
    lora_rank: int | None = None
    last_checkpoint: CheckpointEntry | None = None
    last_sampler_checkpoint: CheckpointEntry | None = None
    user_metadata: dict[str, Any] | None = None


class TrainingRunList(Message):
    """Answer of `GET /training_runs`."""

    training_runs: list[TrainingRunEntry]
    cursor: Cursor


class TimeToLive(Message):
    """`PUT /training_runs/{id}/checkpoints/{checkpoint_id}/ttl`; `None` is for ever."""

    ttl_seconds: int | None = None


class SessionList(Message):
    """Answer of `GET /sessions`."""

    sessions: list[str]


class SessionDetails(Message):
    """Answer of `GET /sessions/{id}`: what belongs to a session."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None


class SamplerInfo(Message):
    """Answer of `GET /samplers/{sampling_session_id}`."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


class WeightsInfoRequest(Message):
    """`POST /weights_info`; answered at once."""

    tinker_path: str


class WeightsInfo(Message):
    """Answer of `POST /weights_info`: what a checkpoint or snapshot holds."""

    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
