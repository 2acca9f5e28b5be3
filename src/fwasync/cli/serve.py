"""`fwasync serve`: the local service in the foreground."""

from __future__ import annotations

from pathlib import Path

import anyio

from fwasync.cli.failures import CommandError
from fwasync.cli.local_service import launch_local

__all__ = ("run_serve",)

_CHECK_EVERY_S = 1.0


async def run_serve(*, data_dir: Path | None, port: int) -> None:
    """Serve until interrupted.

    Raises:
        CommandError: The service does not start, or has ended by itself.
    """
    async with launch_local(data_dir, port=port) as service:
        kept = "kept" if data_dir else "removed when this ends; --data-dir keeps it"
        print(f"The local trainer service is at {service.base_url} (process {service.pid}).")
        print("Point clients at it with:")
        print(f"  export FWASYNC_BASE_URL={service.base_url}")
        print(f"  export FWASYNC_API_KEY={service.api_key}")
        print(f"Data directory: {service.data_dir} ({kept})")
        print("Stop it with Ctrl-C.", flush=True)
        address, _, number = service.base_url.removeprefix("http://").rpartition(":")
        while True:
            await anyio.sleep(_CHECK_EVERY_S)
            try:
                await (await anyio.connect_tcp(address.strip("[]"), int(number))).aclose()
            except OSError:
                break
        log = service.data_dir / "service.log"
        raise CommandError(f"the local service has ended by itself; {log} may tell why")
