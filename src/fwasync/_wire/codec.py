"""The two forms of the large messages behind one interface: JSON, which every service reads, and protobuf."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from fwasync._wire import messages, protobuf, tensors
from fwasync._wire.messages import SampleResult
from fwasync._wire.protobuf import batches, results, samples
from fwasync._wire.tensors import Array

if TYPE_CHECKING:
    from tinker.types import ModelInput

__all__ = ("ACCEPT_ALL", "JSON", "PROTOBUF", "Codec", "decode_outputs", "decode_sample")

ACCEPT_ALL = f"{protobuf.CONTENT_TYPE}, application/json"


class _EncodeBatch(Protocol):
    def __call__(
        self,
        data: Iterable[tuple[ModelInput, Mapping[str, Array]]],
        *,
        backward: bool,
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None,
    ) -> Iterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Codec:
    """How batches are sent.

    Attributes:
        name: `"json"` or `"protobuf"`.
        content_type: Of the request.
        accept: What results may come in.
        forward_path: Where a forward without backward goes; forward_backward always goes to its own path.
        encode_batch: The start of a body, a piece for each datum (see `tensors.encode_batch`).
        encode_batch_end: Its end, from the model's id and the number.
    """

    name: str
    content_type: str
    accept: str
    forward_path: str
    encode_batch: _EncodeBatch
    encode_batch_end: Callable[[str, int], bytes]

    def path(self, *, backward: bool) -> str:
        """Where a batch goes, below `/api/v1`."""
        return "forward_backward" if backward else self.forward_path


JSON = Codec("json", "application/json", "application/json", "forward", tensors.encode_batch, tensors.encode_batch_end)

PROTOBUF = Codec(
    "protobuf",
    protobuf.CONTENT_TYPE,
    protobuf.CONTENT_TYPE,
    "forward_backward",
    batches.encode_batch,
    batches.encode_batch_end,
)


def decode_outputs(content_type: str, body: bytes) -> tuple[str, dict[str, float], Iterator[dict[str, Array]]]:
    """Type, metrics and records of a result of forward or forward_backward; the records come a datum a step.

    Raises:
        ValueError: The body is no such result; also while the records are read.
    """
    if protobuf.CONTENT_TYPE in content_type:
        return results.decode_outputs(body)
    try:
        envelope = messages.decode(body, tensors.ForwardBackwardEnvelope)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    return envelope.loss_fn_output_type or "", dict(envelope.metrics or {}), tensors.decode_outputs(envelope)


def decode_sample(content_type: str, body: bytes) -> SampleResult:
    """A result of asample.

    Raises:
        ValueError: The body is no such result.
    """
    if protobuf.CONTENT_TYPE in content_type:
        return samples.decode_sample(body)
    try:
        return messages.decode(body, SampleResult)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
