"""The process of the service: socket, signals, the line that says it is ready, and a prompt end.

Invariants
    * Only loopback addresses are served.
    * After a request to stop, long polls are answered and the process has ended within a second, even
      when a computation is in progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import anyio
import uvicorn
from starlette.middleware import Middleware
from starlette.routing import Route

from fwasync._wire.completions import PATH
from fwasync.local.app import build_app
from fwasync.local.control.gateway import Gateway
from fwasync.local.control.routes import control_routes
from fwasync.local.data_dir import DataDirError, api_key_of, claim
from fwasync.local.engine.api import Engine
from fwasync.local.service import ServiceOptions, TrainerService
from fwasync.local.tokenizer import save_tokenizer
from fwasync.local.weights import WeightStore

__all__ = ("ProcessOptions", "run_process")

# How long answers in progress may take after a request to stop.
_GRACE_S = 0.5
# The interpreter's default of 5 ms is paid by the event loop at every system call while another thread computes.
_SWITCH_INTERVAL_S = 0.0005


@dataclass(frozen=True, slots=True)
class ProcessOptions:
    """How to run the service. `data_dir=None` is a temporary directory; `port=0` a free port."""

    data_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    exit_with_parent: bool = False
    faults: bool = False
    service: ServiceOptions = field(default_factory=ServiceOptions)


class _CannotStart(Exception):
    """The service cannot start."""


def run_process(options: ProcessOptions, make_engine: Callable[[], Engine], losses: Collection[str]) -> NoReturn:
    """Serve until told to stop, then end the process: exit status 0, or 1 if it cannot start."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    temporary = options.data_dir is None
    root = Path(tempfile.mkdtemp(prefix="fwasync-")) if options.data_dir is None else options.data_dir.resolve()
    status = 0
    try:
        _prepare_and_serve(options, root, make_engine, losses)
    except (_CannotStart, DataDirError) as error:
        sys.stderr.write(f"fwasync.local: {error}\n")
        status = 1
    except KeyboardInterrupt:
        pass
    except BaseException:
        logging.getLogger(__name__).exception("the service failed")
        status = 1
    if temporary:
        shutil.rmtree(root, ignore_errors=True)
    # Not `sys.exit`: a computation in progress must not hold the process back, and nothing on disk depends on it.
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


def _prepare_and_serve(
    options: ProcessOptions, root: Path, make_engine: Callable[[], Engine], losses: Collection[str]
) -> None:
    lock = claim(root)
    try:
        api_key = api_key_of(root)
        listener, base_url = _listen(options.host, options.port)
        WeightStore(root).clean()
        save_tokenizer(root / "tokenizer")
        engine = make_engine()
        ready = json.dumps({"base_url": base_url, "data_dir": str(root), "pid": os.getpid()})
        anyio.run(_serve, options, root, engine, losses, api_key, listener, ready)
    finally:
        os.close(lock)


def _listen(host: str, port: int) -> tuple[socket.socket, str]:
    address = "127.0.0.1" if host == "localhost" else host
    try:
        version = ipaddress.ip_address(address)
    except ValueError:
        raise _CannotStart(f"{host!r} is not an address: use 127.0.0.1") from None
    if not version.is_loopback:
        raise _CannotStart(f"{host} is not a loopback address; this service is for this machine only")
    family = socket.AF_INET6 if version.version == 6 else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only where it sees TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        # Two sockets may be bound to one port; only one can listen.
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "another program uses it: choose another port, or 0 for any" if taken else str(error)
        raise _CannotStart(f"cannot listen on {host}:{port}: {why}") from None
    name = f"[{address}]" if version.version == 6 else address
    return listener, f"http://{name}:{listener.getsockname()[1]}"


class _Server(uvicorn.Server):
    """uvicorn's server, with our signals, and a line when it listens."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(self._ready + "\n")
        sys.stdout.flush()


async def _serve(
    options: ProcessOptions,
    root: Path,
    engine: Engine,
    losses: Collection[str],
    api_key: str,
    listener: socket.socket,
    ready: str,
) -> None:
    service = TrainerService(engine, losses, root, options.service)
    control = service.control
    routes = [*control_routes(control), Route(PATH, service.completions.complete, methods=["POST"])]
    layers = [Middleware(Gateway, jobs=control.jobs)]
    protocol = "httptools"
    if options.faults:
        protocol = _add_faults(service, routes, layers)
    app = build_app(service, api_key, routes, layers)
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
    )
    server = _Server(config, ready)
    stop = anyio.Event()
    _watch_for_the_end(stop, with_parent=options.exit_with_parent)

    async def end() -> None:
        await stop.wait()
        server.should_exit = True
        service.futures.close()
        await anyio.sleep(_GRACE_S)
        # Requests that are cut off now are no news.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.force_exit = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end)
        tasks.start_soon(service.watch_sessions)
        await server.serve([listener])
        tasks.cancel_scope.cancel()


def _add_faults(
    service: TrainerService, routes: list[Route], layers: list[Middleware]
) -> Literal["httptools"] | type[asyncio.Protocol]:
    from fwasync.local.fault_desk import FaultDesk
    from fwasync.local.fault_exchange import CuttableProtocol
    from fwasync.local.fault_layer import FaultLayer

    desk = FaultDesk(service)
    service.training.alter = desk.alter
    service.control.hurdles.decide = desk.hurdle
    service.control.hot_load.alter = desk.alter_load
    routes += desk.routes()
    layers.append(Middleware(FaultLayer, desk=desk))
    return CuttableProtocol


def _watch_for_the_end(stop: anyio.Event, *, with_parent: bool) -> None:
    loop = asyncio.get_running_loop()

    def ask_to_stop(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has stopped
            loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)

    def wait_for_parent() -> None:
        # A parent that dies, by whatever cause, closes its end of the pipe.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        ask_to_stop()

    if with_parent:
        threading.Thread(target=wait_for_parent, name="fwasync-parent", daemon=True).start()
