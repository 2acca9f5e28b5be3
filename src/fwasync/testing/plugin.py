"""The pytest plugin: the fixture `fwasync_service`, for sync tests and for async ones of any plugin.

pytest imports this module whenever it starts, so everything else is imported when the fixture is used.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from fwasync.testing.blocking import ScriptedService

__all__ = ("fwasync_service",)


@pytest.fixture
def fwasync_service(tmp_path: Path) -> Generator[ScriptedService, None, None]:
    """A local trainer service with an empty data directory, without faults until the test sets some."""
    from fwasync.testing.blocking import blocking_local_service

    with blocking_local_service(data_dir=tmp_path / "fwasync-service") as service:
        yield service
