"""The local service, as commands use it: imported when it is needed, with a clear word if it is not installed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import TYPE_CHECKING

from fwasync.cli.failures import CommandError

if TYPE_CHECKING:
    from fwasync.local import LocalService

__all__ = ("launch_local", "require_local")


def require_local() -> None:
    """Check that what the local service needs is installed.

    Raises:
        CommandError: It is not.
    """
    needed = [line.split(";")[0] for line in requires("fwasync") or () if _is_of_extra(line, "local")]
    names = [name.split(">")[0].split("[")[0].split("=")[0].strip() for name in needed]
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise CommandError(f"the local service needs {', '.join(missing)}: pip install 'fwasync[local]'")


@asynccontextmanager
async def launch_local(data_dir: Path | None, *, port: int = 0) -> AsyncGenerator[LocalService, None]:
    """Run the local service; see `fwasync.local.launch`.

    Raises:
        CommandError: It is not installed, or does not start.
    """
    require_local()
    from fwasync.local import LocalServiceError, launch

    try:
        async with launch(data_dir, port=port) as running:
            yield running
    except LocalServiceError as error:
        raise CommandError(str(error)) from error


def _is_of_extra(line: str, extra: str) -> bool:
    return line.replace("'", '"').replace(" ", "").endswith(f'extra=="{extra}"')


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
