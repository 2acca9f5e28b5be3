"""fwasync: train language models through remote trainer services, async all the way.

Names are looked up on first use, so that `import fwasync` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fwasync._version import __version__

if TYPE_CHECKING:
    from fwasync import errors as errors
    from fwasync import types as types
    from fwasync._http.retry import RetryPolicy as RetryPolicy
    from fwasync.errors import FwasyncError as FwasyncError
    from fwasync.errors import OperationTimeoutError as OperationTimeoutError
    from fwasync.sampling.client import AsyncSamplingClient as AsyncSamplingClient
    from fwasync.service import AsyncServiceClient as AsyncServiceClient
    from fwasync.training.client import AsyncTrainingClient as AsyncTrainingClient
    from fwasync.training.client import resolve_checkpoint_path as resolve_checkpoint_path
    from fwasync.training.future import APIFuture as APIFuture
    from fwasync.training.normalization import GradAccNormalization as GradAccNormalization

__all__ = (
    "APIFuture",
    "AsyncSamplingClient",
    "AsyncServiceClient",
    "AsyncTrainingClient",
    "FwasyncError",
    "GradAccNormalization",
    "OperationTimeoutError",
    "RetryPolicy",
    "__version__",
    "errors",
    "resolve_checkpoint_path",
    "types",
)

_HOMES = {
    "APIFuture": "fwasync.training.future",
    "AsyncSamplingClient": "fwasync.sampling.client",
    "AsyncServiceClient": "fwasync.service",
    "AsyncTrainingClient": "fwasync.training.client",
    "FwasyncError": "fwasync.errors",
    "GradAccNormalization": "fwasync.training.normalization",
    "OperationTimeoutError": "fwasync.errors",
    "RetryPolicy": "fwasync._http.retry",
    "resolve_checkpoint_path": "fwasync.training.client",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "types"):
        return importlib.import_module(f"fwasync.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fwasync' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
