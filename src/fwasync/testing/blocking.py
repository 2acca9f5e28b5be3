"""The local service with scripted faults, for tests that are not async, and for those of any async plugin.

Invariants
    * The thread and the event loop that it runs on are its own, and end with it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from anyio.from_thread import BlockingPortal, start_blocking_portal

from fwasync.testing.service import AsyncScriptedService, local_service

if TYPE_CHECKING:
    from fwasync._wire.fault_reports import AppliedOperation, FaultReport, SamplingLoad
    from fwasync._wire.faults import FaultPlan

__all__ = ("ScriptedService", "blocking_local_service")


class ScriptedService:
    """The blocking twin of `AsyncScriptedService`: the same names, without `await`.

    In an async test its calls hold the event loop up for the milliseconds that they take (`restart`: about a second).
    """

    def __init__(self, service: AsyncScriptedService, portal: BlockingPortal) -> None:
        self._service = service
        self._portal = portal

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"

    @property
    def base_url(self) -> str:
        """What to give to a client as `base_url`; a restart keeps it."""
        return self._service.base_url

    @property
    def api_key(self) -> str:
        """What to give to a client as `api_key`; a restart keeps it."""
        return self._service.api_key

    @property
    def data_dir(self) -> Path:
        """Where checkpoints, snapshots, the tokenizer and the log are."""
        return self._service.data_dir

    def set_faults(self, plan: FaultPlan) -> None:
        """See `AsyncScriptedService.set_faults`."""
        self._portal.call(self._service.set_faults, plan)

    def fired(self) -> FaultReport:
        """See `AsyncScriptedService.fired`."""
        return self._portal.call(self._service.fired)

    def effects(self) -> dict[str, list[AppliedOperation]]:
        """See `AsyncScriptedService.effects`."""
        return self._portal.call(self._service.effects)

    def sampling(self) -> SamplingLoad:
        """See `AsyncScriptedService.sampling`."""
        return self._portal.call(self._service.sampling)

    def release(self, request_id: str | None = None, *, resource: str | None = None) -> int:
        """See `AsyncScriptedService.release`."""
        return self._portal.call(partial(self._service.release, request_id, resource=resource))

    def kill(self) -> None:
        """See `AsyncScriptedService.kill`."""
        self._portal.call(self._service.kill)

    def restart(self) -> None:
        """See `AsyncScriptedService.restart`."""
        self._portal.call(self._service.restart)


@contextmanager
def blocking_local_service(
    faults: FaultPlan | None = None, data_dir: Path | None = None
) -> Generator[ScriptedService, None, None]:
    """The blocking twin of `local_service`."""
    with start_blocking_portal() as portal:
        running = portal.call(partial(local_service, faults, data_dir))
        with portal.wrap_async_context_manager(running) as service:
            yield ScriptedService(service, portal)
