"""The training and sampling engine of the local service.

`api` says what an engine is; `NumpyEngine` is the one that needs nothing but numpy. Below it:
`architecture` (shapes, layout, initial weights), `transformer` (forward and backward), `losses`,
`batching`, `parameters` (full or adapter), `optimizer`, `trainer`; `decoder`, `choosing`,
`sampler`; `storage`.
"""

from __future__ import annotations

from fwasync.local.engine.api import (
    Adam,
    BaseModel,
    Engine,
    EngineError,
    Example,
    Lora,
    LossResult,
    Normalization,
    SampledSequence,
    SampledToken,
    Sampler,
    SampleRequest,
    SampleResult,
    SnapshotInfo,
    Trainer,
)
from fwasync.local.engine.numpy_engine import NumpyEngine

__all__ = (
    "Adam",
    "BaseModel",
    "Engine",
    "EngineError",
    "Example",
    "Lora",
    "LossResult",
    "Normalization",
    "NumpyEngine",
    "SampleRequest",
    "SampleResult",
    "SampledSequence",
    "SampledToken",
    "Sampler",
    "SnapshotInfo",
    "Trainer",
)
