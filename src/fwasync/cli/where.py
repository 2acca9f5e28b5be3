"""Where a command trains: on a service that is named, or on a local one, started for the run."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fwasync import AsyncServiceClient
from fwasync.cli.local_service import launch_local
from fwasync.errors import UsageError

__all__ = ("LOCAL_MODEL", "Where")

LOCAL_MODEL = "fwasync/qwen3-tiny"
"""What a local service trains, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Where:
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

    @asynccontextmanager
    async def open(self, log_path: Path) -> AsyncGenerator[AsyncServiceClient]:
        """A client of it; a local one keeps what it saves in the directory of the run, under `service/`."""
        if self.base_url is not None:
            async with AsyncServiceClient(self.base_url, self.api_key) as service:
                yield service
            return
        async with (
            launch_local(log_path / "service") as local,
            AsyncServiceClient(local.base_url, local.api_key) as service,
        ):
            yield service
