"""A neutral server, and the harness such that it does not end the tests' process."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

import harness as harness_module
import pytest


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    def ended(measures: dict[str, Any]) -> NoReturn:
        raise AssertionError(f"it would have ended the process with {measures}")

    monkeypatch.setattr(harness_module, "report", ended)
    return harness_module


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with harness_module.server() as url:
        yield url
