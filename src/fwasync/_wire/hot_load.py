"""The JSON messages of hot-loading, `POST` and `GET /hot_load/v1/models/hot_load`, for both directions.

The deployment and its base model travel in headers. A request with fields that are not known is refused.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from fwasync._wire.messages import Message, decode

__all__ = (
    "DEPLOYMENT_HEADER",
    "MODEL_HEADER",
    "PATH",
    "HotLoadAccepted",
    "HotLoadRequest",
    "HotLoadStatus",
    "IncrementalSnapshot",
    "LoadedAdapter",
    "LoadingState",
    "ReplicaStatus",
    "decode_strictly",
)

T = TypeVar("T")

PATH = "/hot_load/v1/models/hot_load"
MODEL_HEADER = "fireworks-model"
DEPLOYMENT_HEADER = "fireworks-deployment"


class IncrementalSnapshot(Message, forbid_unknown_fields=True):
    """What makes a load incremental. `alder32` is how the wire spells Adler-32."""

    previous_snapshot_identity: str
    compression_format: str | None = None
    checksum_format: str | None = None


class HotLoadRequest(Message, forbid_unknown_fields=True):
    """Load a snapshot: in full, or onto the one that is served."""

    identity: str
    reset_prompt_cache: bool | str | None = None
    incremental_snapshot_metadata: IncrementalSnapshot | None = None


class HotLoadAccepted(Message):
    """Answer of the POST; clients read nothing of it."""

    identity: str | None = None


class LoadingState(Message):
    """What a replica is about; of the stages only `error` has a meaning to clients."""

    stage: str | None = None
    target_snapshot_identity: str | None = None
    error_message: str | None = None


class LoadedAdapter(Message):
    """A snapshot that a replica has loaded."""

    identity: str
    status: str | None = None


class ReplicaStatus(Message):
    """One replica; `identity` is its own name."""

    identity: str | None = None
    current_snapshot_identity: str | None = None
    readiness: bool | None = None
    loading_state: LoadingState | None = None
    loaded_adapters: list[LoadedAdapter] | None = None
    supports_rdma_weight_sync: bool | None = None
    rdma_weight_sync_enabled: bool | None = None


class HotLoadStatus(Message):
    """Answer of the GET: every replica; none while the deployment starts."""

    replicas: list[ReplicaStatus]


_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")


def decode_strictly(data: bytes, type_: type[T]) -> T:
    """Decode a message that forbids unknown fields, and tell of one as the services do.

    Raises:
        msgspec.ValidationError: It is not such a message; an unknown field is an "Extra input".
        msgspec.DecodeError: It is not JSON.
    """
    try:
        return decode(data, type_)
    except msgspec.ValidationError as error:
        unknown = _UNKNOWN.match(str(error))
        if unknown is None:
            raise
        raise msgspec.ValidationError(f"Extra inputs are not permitted, field: '{unknown[1]}'") from None
