"""Where a command trains: on a service that is named, or on a local one, started for the run."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from fwasync import AsyncServiceClient, InfraConfig
from fwasync.cli.local_service import launch_local
from fwasync.errors import UsageError
from fwasync.recipes.trainers import Where

__all__ = ("LOCAL_MODEL", "Place", "wants_trainer_job")

LOCAL_MODEL = "fwasync/qwen3-tiny"
"""What a local service trains, unless told otherwise."""


def wants_trainer_job(config: BaseModel) -> bool:
    """Whether a recipe asks the control plane for its trainer."""
    infra = getattr(config, "infra", None)
    return isinstance(infra, InfraConfig) and infra.training_shape_id is not None


@dataclass(frozen=True, slots=True)
class Place:
    """The service to train on: one with this URL, or, without it, a local one for this run.

    Raises:
        UsageError: A key without a URL.
    """

    base_url: str | None
    api_key: str | None = field(repr=False)

    def __post_init__(self) -> None:
        if self.api_key and not self.base_url:
            raise UsageError("--api-key is for a service of yours: say which with --base-url")

    def __str__(self) -> str:
        return self.base_url or "a local service, started for the run"

    def is_local(self, config: BaseModel) -> bool:
        """Whether a local service is started for a recipe."""
        return self.base_url is None and not wants_trainer_job(config)

    @asynccontextmanager
    async def open(self, config: BaseModel, log_path: Path) -> AsyncGenerator[Where]:
        """Where the recipe trains; a local service keeps what it saves in the run's directory, under `service/`."""
        if not self.is_local(config):
            yield Where(self.base_url, self.api_key)
            return
        async with (
            launch_local(log_path / "service") as local,
            AsyncServiceClient(local.base_url, local.api_key) as service,
        ):
            yield Where(service=service)
