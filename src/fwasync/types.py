"""The data types of training, handed on from `tinker.types`.

They are looked up on first use: importing tinker takes seconds where torch is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinker.types import AdamParams as AdamParams
    from tinker.types import Datum as Datum
    from tinker.types import EncodedTextChunk as EncodedTextChunk
    from tinker.types import ForwardBackwardOutput as ForwardBackwardOutput
    from tinker.types import GetInfoResponse as GetInfoResponse
    from tinker.types import GetServerCapabilitiesResponse as GetServerCapabilitiesResponse
    from tinker.types import LoadWeightsResponse as LoadWeightsResponse
    from tinker.types import ModelInput as ModelInput
    from tinker.types import OptimStepResponse as OptimStepResponse
    from tinker.types import SampledSequence as SampledSequence
    from tinker.types import SampleResponse as SampleResponse
    from tinker.types import SamplingParams as SamplingParams
    from tinker.types import SaveWeightsForSamplerResponse as SaveWeightsForSamplerResponse
    from tinker.types import SaveWeightsResponse as SaveWeightsResponse
    from tinker.types import TensorData as TensorData

__all__ = (
    "AdamParams",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "GetServerCapabilitiesResponse",
    "LoadWeightsResponse",
    "ModelInput",
    "OptimStepResponse",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "TensorData",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("tinker.types"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
