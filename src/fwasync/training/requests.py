"""The small verbs: what each sends and what its caller gets. All values are checked here, at the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from fwasync._http.checks import require_finite
from fwasync._wire import messages
from fwasync._wire.messages import Message
from fwasync.errors import ProtocolError
from fwasync.training.normalization import GradAccNormalization, normalization_name
from fwasync.training.verbs import Admit, single

if TYPE_CHECKING:
    from tinker.types import AdamParams, LoadWeightsResponse, OptimStepResponse, SaveWeightsResponse

__all__ = ("SavedSnapshot", "load_adapter", "load_weights", "optim_step", "save_snapshot", "save_weights")


@dataclass(frozen=True, slots=True)
class SavedSnapshot:
    """A snapshot that was exported.

    Attributes:
        path: What the service calls it: for `create_sampling_client(model_path=...)`, hot-load and promotion.
        snapshot_name: The name that was asked for, with what the client added to make it its own.
    """

    path: str
    snapshot_name: str


def optim_step(
    model_id: str, adam_params: AdamParams, normalization: GradAccNormalization | str | None
) -> Admit[OptimStepResponse]:
    """Apply the accumulated gradient.

    Raises:
        UsageError: A parameter is not finite, or the normalization is unknown.
    """
    fields = adam_params.model_dump()
    require_finite("optim_step", fields)
    params = msgspec.convert(fields, messages.AdamParamsMessage)
    name = normalization_name(normalization)

    def request(number: int) -> Message:
        return messages.OptimStepRequest(
            model_id=model_id, seq_id=number, adam_params=params, grad_accumulation_normalization=name
        )

    def convert(result: messages.OptimStepResult) -> OptimStepResponse:
        from tinker.types import OptimStepResponse

        return OptimStepResponse(metrics=result.metrics)

    return single("optim_step", request, messages.OptimStepResult, convert)


def save_weights(model_id: str, name: str) -> Admit[SaveWeightsResponse]:
    """Save a checkpoint."""

    def request(number: int) -> Message:
        return messages.SaveWeightsRequest(model_id=model_id, path=name, seq_id=number)

    def convert(result: messages.WeightsSaved) -> SaveWeightsResponse:
        from tinker.types import SaveWeightsResponse

        return SaveWeightsResponse(path=result.path)

    return single("save_weights", request, messages.WeightsSaved, convert)


def load_weights(model_id: str, path: str, *, optimizer: bool) -> Admit[LoadWeightsResponse]:
    """Load a checkpoint."""

    def request(number: int) -> Message:
        return messages.LoadWeightsRequest(model_id=model_id, path=path, optimizer=optimizer, seq_id=number)

    def convert(result: messages.WeightsLoaded) -> LoadWeightsResponse:
        from tinker.types import LoadWeightsResponse

        return LoadWeightsResponse(path=result.path)

    return single("load_weights", request, messages.WeightsLoaded, convert)


def save_snapshot(model_id: str, name: str, checkpoint_type: str | None = None) -> Admit[SavedSnapshot]:
    """Export a snapshot."""

    def request(number: int) -> Message:
        return messages.SaveWeightsForSamplerRequest(
            model_id=model_id, path=name, seq_id=number, checkpoint_type=checkpoint_type
        )

    def convert(result: messages.SamplerWeightsSaved) -> SavedSnapshot:
        if result.path is None:
            raise ProtocolError("save_weights_for_sampler: the service gave no path for the snapshot")
        return SavedSnapshot(result.path, name)

    return single("save_weights_for_sampler", request, messages.SamplerWeightsSaved, convert)


def load_adapter(model_id: str, adapter_path: str) -> Admit[None]:
    """Load a LoRA adapter."""

    def request(number: int) -> Message:
        return messages.LoadAdapterRequest(model_id=model_id, adapter_path=adapter_path, seq_id=number)

    return single("load_adapter", request, messages.AdapterLoaded, lambda _: None)
