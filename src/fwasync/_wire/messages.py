"""The JSON messages of the trainer API, as typed structs for both directions.

A field that is `None` is neither sent nor expected. Tensors and datums are not here: they are large, and
`tensors` encodes and decodes them piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

__all__ = (
    "AdamParamsMessage",
    "AdapterLoaded",
    "CancelFutureRequest",
    "Capabilities",
    "Checkpoints",
    "ClientDynamicConfig",
    "CreateModelRequest",
    "CreateSamplingSessionRequest",
    "CreateSessionRequest",
    "FailedOperation",
    "GetInfoRequest",
    "Health",
    "LoadAdapterRequest",
    "LoadWeightsRequest",
    "LoraConfigMessage",
    "Message",
    "ModelCreated",
    "ModelData",
    "ModelInfo",
    "ModelUnloaded",
    "OptimStepRequest",
    "OptimStepResult",
    "OptimizerConfigMessage",
    "RetrieveFutureRequest",
    "SampleRequestMessage",
    "SampleResult",
    "SampledSequenceMessage",
    "SamplerWeightsSaved",
    "SamplingParamsMessage",
    "SamplingSessionCreated",
    "SaveWeightsForSamplerRequest",
    "SaveWeightsRequest",
    "ServiceFault",
    "SessionCreated",
    "SessionHeartbeat",
    "Submitted",
    "SupportedModel",
    "TryAgain",
    "UnloadModelRequest",
    "WeightsLoaded",
    "WeightsSaved",
    "decode",
    "encode",
)


T = TypeVar("T")


class Message(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Base of all messages: unset fields are left out, unknown fields are ignored."""


# -- probes and sessions ---------------------------------------------------------------------------


class Health(Message):
    """Answer of `GET /healthz`."""

    status: str


class SupportedModel(Message):
    """One model of `GET /get_server_capabilities`."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class Capabilities(Message):
    """Answer of `GET /get_server_capabilities`."""

    supported_models: list[SupportedModel]


class ClientDynamicConfig(Message):
    """Answer of `POST /client/dynamic_config`: what newer clients ask for again and again."""

    sample_cancel_enabled: bool | None = None


class CreateSessionRequest(Message, tag_field="type", tag="create_session"):
    """`POST /create_session`."""

    # T15-era servers require these three, so they are sent even when empty.
    tags: list[str] | msgspec.UnsetType = msgspec.UNSET
    user_metadata: dict[str, Any] | None = None
    sdk_version: str | None = None
    display_name: str | None = None


class SessionCreated(Message, tag_field="type", tag="create_session"):
    """Answer of `POST /create_session`."""

    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


class SessionHeartbeat(Message, tag_field="type", tag="session_heartbeat"):
    """`POST /session_heartbeat` and, without the id, its answer."""

    session_id: str | None = None


# -- models ----------------------------------------------------------------------------------------


class OptimizerConfigMessage(Message):
    """`optimizer_config` of newer clients; `adamw` is the default."""

    type: str


class LoraConfigMessage(Message):
    """`lora_config` of `create_model`; rank 0 asks for full-parameter training."""

    rank: int
    alpha: float | None = None
    seed: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class CreateModelRequest(Message, tag_field="type", tag="create_model"):
    """`POST /create_model`; answered by a future of `ModelCreated`."""

    session_id: str
    model_seq_id: int
    base_model: str
    lora_config: LoraConfigMessage | None = None
    base_only: bool | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfigMessage | None = None


class ModelCreated(Message, tag_field="type", tag="create_model"):
    """Result of `create_model`."""

    model_id: str


class GetInfoRequest(Message, tag_field="type", tag="get_info"):
    """`POST /get_info`; answered at once."""

    model_id: str


class ModelData(Message):
    """What a model is made of."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class ModelInfo(Message, tag_field="type", tag="get_info"):
    """Answer of `POST /get_info`."""

    model_id: str
    model_data: ModelData
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


class UnloadModelRequest(Message, tag_field="type", tag="unload_model"):
    """`POST /unload_model`; answered by a future of `ModelUnloaded`."""

    model_id: str


class ModelUnloaded(Message, tag_field="type", tag="unload_model"):
    """Result of `unload_model`."""

    model_id: str


# -- training operations ---------------------------------------------------------------------------


class AdamParamsMessage(Message):
    """`adam_params` of `optim_step`; what is absent has the API's default."""

    learning_rate: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    grad_clip_norm: float | None = None


class OptimStepRequest(Message, tag_field="type", tag="optim_step"):
    """`POST /optim_step`; answered by a future of `OptimStepResult`."""

    model_id: str
    adam_params: AdamParamsMessage
    seq_id: int | None = None
    grad_accumulation_normalization: str | None = None


class OptimStepResult(Message, tag_field="type", tag="optim_step"):
    """Result of `optim_step`."""

    metrics: dict[str, float] | None = None


class SaveWeightsRequest(Message, tag_field="type", tag="save_weights"):
    """`POST /save_weights`: resumable state; answered by a future of `WeightsSaved`."""

    model_id: str
    path: str | None = None
    seq_id: int | None = None
    ttl_seconds: int | None = None
    overwrite: bool | None = None
    user_metadata: dict[str, Any] | None = None


class WeightsSaved(Message, tag_field="type", tag="save_weights"):
    """Result of `save_weights`."""

    path: str


class LoadWeightsRequest(Message, tag_field="type", tag="load_weights"):
    """`POST /load_weights`; answered by a future of `WeightsLoaded`.

    With `model_id` and `seq_id` it is an operation of that model. With `session_id` and `model_seq_id` instead it
    creates a model from the checkpoint, and the last three fields are the new model's.
    """

    path: str
    model_id: str | None = None
    optimizer: bool | msgspec.UnsetType = msgspec.UNSET
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfigMessage | None = None


class WeightsLoaded(Message, tag_field="type", tag="load_weights"):
    """Result of `load_weights`."""

    path: str | None = None
    model_id: str | None = None


class SaveWeightsForSamplerRequest(Message, tag_field="type", tag="save_weights_for_sampler"):
    """`POST /save_weights_for_sampler`; a named snapshot, or an unnamed one with a sampling session."""

    model_id: str
    path: str | None = None
    sampling_session_seq_id: int | None = None
    seq_id: int | None = None
    checkpoint_type: str | None = None
    kind: str | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None


class SamplerWeightsSaved(Message, tag_field="type", tag="save_weights_for_sampler"):
    """Result of `save_weights_for_sampler`."""

    path: str | None = None
    sampling_session_id: str | None = None


class LoadAdapterRequest(Message, tag_field="type", tag="load_adapter"):
    """`POST /load_adapter` (FireTitan): LoRA weights only; answered by a future of `AdapterLoaded`."""

    model_id: str
    adapter_path: str
    seq_id: int | None = None


class AdapterLoaded(Message, tag_field="type", tag="load_adapter"):
    """Result of `load_adapter`."""

    model_id: str | None = None
    adapter_path: str | None = None


class Checkpoints(Message):
    """Answer of `GET /list_checkpoints`: the names of resumable checkpoints."""

    checkpoints: list[str]


# -- sampling --------------------------------------------------------------------------------------


class CreateSamplingSessionRequest(Message, tag_field="type", tag="create_sampling_session"):
    """`POST /create_sampling_session`, from a base model or from a snapshot's path."""

    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class SamplingSessionCreated(Message, tag_field="type", tag="create_sampling_session"):
    """Answer of `POST /create_sampling_session`."""

    sampling_session_id: str


class SamplingParamsMessage(Message):
    """`sampling_params` of `asample`; what is absent has the API's default."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str | int] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class SampleRequestMessage(Message, tag_field="type", tag="sample"):
    """`POST /asample`; answered by a future of `SampleResult`. `prompt` is a model input's JSON."""

    prompt: msgspec.Raw
    sampling_params: SamplingParamsMessage
    sampling_session_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    model_path: str | None = None
    num_samples: int | None = None
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int | None = None
    topk_sample_logprobs: int | None = None
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int | None = None
    record_stability_info: bool | None = None


class SampledSequenceMessage(Message):
    """One completion."""

    stop_reason: str
    tokens: list[int]
    logprobs: list[float] | None = None


class SampleResult(Message, tag_field="type", tag="sample"):
    """Result of `asample`."""

    sequences: list[SampledSequenceMessage]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None


# -- futures ---------------------------------------------------------------------------------------


class Submitted(Message):
    """Answer of every submit: the future's id. Some services number their futures with integers."""

    request_id: str | int
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class RetrieveFutureRequest(Message):
    """`POST /retrieve_future`: a long poll."""

    request_id: str | int
    allow_metadata_only: bool | None = None


class CancelFutureRequest(Message):
    """`POST /cancel_future`: stop a sample."""

    request_id: str | int


class TryAgain(Message, tag_field="type", tag="try_again"):
    """Not ready: poll again."""

    request_id: str | int | None = None
    queue_state: str | None = None
    queue_state_reason: str | None = None


class FailedOperation(Message):
    """The operation failed. `category` is `user`, `server` or `unknown`."""

    error: str
    category: str | None = None


class ServiceFault(Message):
    """The body of an error status; services spell its text in several ways."""

    detail: Any = None
    error: Any = None
    message: Any = None


_encoder = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """The message's JSON."""
    return _encoder.encode(message)


def decode(data: bytes | msgspec.Raw, type_: type[T]) -> T:
    """Decode and check a JSON message.

    Raises:
        msgspec.ValidationError: A required field is missing or has another type; the text names the path.
        msgspec.DecodeError: It is not JSON.
    """
    try:
        return msgspec.json.decode(data, type=type_)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"JSON that cannot be read: {error}") from None
