"""The local service with scripted faults, as an async context manager.

Invariants
    * The service ends with the `async with`, however that is left.
    * After a restart everything a client was given still holds: address, API key and data directory.
    * Nothing here blocks the event loop.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import msgspec

from fwasync._wire.fault_reports import (
    AppliedOperation,
    Effects,
    FaultReport,
    Released,
    ReleaseRequest,
    SamplingLoad,
)
from fwasync._wire.faults import FaultPlan
from fwasync._wire.messages import ServiceFault
from fwasync.errors import BadRequestError, ServiceUnreachableError

if TYPE_CHECKING:
    from fwasync.local import LocalService

__all__ = ("AsyncScriptedService", "local_service")

T = TypeVar("T")

_PATIENCE_S = 30.0


class AsyncScriptedService:
    """A running local service that fails as a plan says. Made by `local_service`.

    All its methods raise `ServiceUnreachableError` when the service is dead, but for `kill` and `restart`.
    """

    def __init__(self, data_dir: Path, port: int) -> None:
        self._data_dir = data_dir
        self._stack = AsyncExitStack()
        self._local: LocalService | None = None
        self._port = port

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"

    @property
    def base_url(self) -> str:
        """What to give to a client as `base_url`; a restart keeps it."""
        return self._running.base_url

    @property
    def api_key(self) -> str:
        """What to give to a client as `api_key`; a restart keeps it."""
        return self._running.api_key

    @property
    def data_dir(self) -> Path:
        """Where checkpoints, snapshots, the tokenizer and the log are."""
        return self._data_dir

    @property
    def _running(self) -> LocalService:
        assert self._local is not None, "made by `local_service`, which starts it"
        return self._local

    # -- faults ------------------------------------------------------------------------------------

    async def set_faults(self, plan: FaultPlan) -> None:
        """Begin a plan: counters start at zero, withheld results are let go, lost ones are found again.

        An empty plan, `FaultPlan()`, ends all faults. What was done stays done: a session stays evicted, a trainer job
        pre-empted or failed, and a replica stale until the next load.

        **Cancellation:** the plan may or may not be in force.
        """
        await self._ask("PUT", "faults", FaultReport, plan)

    async def fired(self) -> FaultReport:
        """What the plan has done since it began.

        **Cancellation:** nothing remains.
        """
        return await self._ask("GET", "faults", FaultReport)

    async def effects(self) -> dict[str, list[AppliedOperation]]:
        """What the service applied since it was started, by model id and in order: the truth about "exactly once".

        **Cancellation:** nothing remains.
        """
        return (await self._ask("GET", "effects", Effects)).models

    async def sampling(self) -> SamplingLoad:
        """What the service samples at this moment, after all that it was asked before: the truth about "cancelled".

        **Cancellation:** nothing remains.
        """
        return await self._ask("GET", "sampling", SamplingLoad)

    async def release(self, request_id: str | None = None, *, resource: str | None = None) -> int:
        """Let go what a fault holds up; returns how many there were.

        Args:
            request_id: The result that `SlowFuture` withholds.
            resource: The id of the trainer job or deployment that `StuckProvisioning` keeps from coming up. Without
                both, everything is let go.

        **Cancellation:** they may or may not have been let go.
        """
        return (await self._ask("POST", "release", Released, ReleaseRequest(request_id, resource))).released

    # -- life and death ----------------------------------------------------------------------------

    async def kill(self) -> None:
        """Let the service die as by `kill -9`; a dead one stays dead. What was not saved is lost.

        **Cancellation:** it dies all the same.
        """
        with anyio.CancelScope(shield=True):
            with contextlib.suppress(ServiceUnreachableError):
                await self._ask("POST", "kill", Released)
            await self._stack.aclose()

    async def restart(self) -> None:
        """Start the service again on its data directory, at the same address; one that lives is ended first.

        Sessions and models are gone, and so is the plan: it begins without faults.

        Raises:
            LocalServiceError: It did not start.

        **Cancellation:** the service may be dead.
        """
        from fwasync.local import launch

        await self.aclose()
        self._stack = AsyncExitStack()
        self._local = await self._stack.enter_async_context(launch(self._data_dir, port=self._port, faults=True))
        self._port = urlsplit(self._local.base_url).port or 0

    async def aclose(self) -> None:
        """End the service in order; `local_service` does it.

        **Cancellation:** it ends all the same.
        """
        await self._stack.aclose()

    # -- the admin API -----------------------------------------------------------------------------

    async def _ask(self, method: str, name: str, answer: type[T], message: msgspec.Struct | None = None) -> T:
        body = b"" if message is None else msgspec.json.encode(message)
        # Not our own client: what tells the truth about a test must not depend on what is tested.
        content = await anyio.to_thread.run_sync(_request, self._running, method, name, body, abandon_on_cancel=True)
        return msgspec.json.decode(content, type=answer)


def _request(service: LocalService, method: str, name: str, body: bytes) -> bytes:
    address = urlsplit(service.base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_PATIENCE_S)
    headers = {"X-API-Key": service.api_key, "Content-Type": "application/json"}
    try:
        connection.request(method, f"/admin/{name}", body, headers)
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServiceUnreachableError(
            f"the local service at {service.base_url} does not answer ({error or type(error).__name__}); "
            "if it was killed, restart() starts it again"
        ) from error
    finally:
        connection.close()
    if response.status != 200:
        detail = msgspec.json.decode(content, type=ServiceFault).detail
        raise BadRequestError(f"{method} /admin/{name}: {detail}", status=response.status)
    return content


@contextmanager
def _held_port() -> Generator[int, None, None]:
    """A port that nobody else is given while the service is dead; 0, which is any, where it cannot be held for it."""
    if sys.platform != "linux":
        yield 0
        return
    with socket.socket() as holder:  # which does not listen: who connects meanwhile is refused
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@asynccontextmanager
async def local_service(
    faults: FaultPlan | None = None, data_dir: Path | None = None
) -> AsyncGenerator[AsyncScriptedService, None]:
    """Run the local service with scripted faults for as long as the `async with` lasts.

    ```python
    plan = FaultPlan([Fault(Drop(after=True), "forward_backward", every=3)])
    async with local_service(plan) as service:
        async with AsyncServiceClient(service.base_url, service.api_key) as client:
            ...
    ```

    Args:
        faults: The plan to begin with; none is without faults.
        data_dir: Where the service keeps everything; by default a temporary directory, removed at the end.

    Raises:
        LocalServiceError: It did not start.

    **Cancellation:** the service is ended.
    """
    async with AsyncExitStack() as stack:
        if data_dir is None:
            temporary = anyio.TemporaryDirectory(prefix="fwasync-", ignore_cleanup_errors=True)
            data_dir = Path(await stack.enter_async_context(temporary))
        service = AsyncScriptedService(data_dir, stack.enter_context(_held_port()))
        stack.push_async_callback(service.aclose)
        await service.restart()
        if faults is not None:
            await service.set_faults(faults)
        yield service
