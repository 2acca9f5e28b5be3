"""The result of an operation, and the two encodings that clients ask for.

Invariants
    * A result is kept in one encoding. The large ones, of batches and samples, are kept as protobuf: a third of
      the size, and made by copying. They become JSON whenever a client asks for that.
    * Whatever is kept can be said in JSON: numbers are finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fwasync._wire import tensors
from fwasync._wire.messages import FailedOperation, Message, SampleResult, encode
from fwasync._wire.protobuf.results import decode_outputs, encode_outputs
from fwasync._wire.protobuf.samples import decode_sample, encode_sample

__all__ = ("Result", "batch_result", "failed", "json_of", "json_result", "sample_result")


@dataclass(frozen=True, slots=True)
class Result:
    """A result's body, and what it is: JSON, or the protobuf of a batch's or a sample's result."""

    body: bytes
    form: Literal["json", "batch", "sample"] = "json"


def json_result(message: Message) -> Result:
    """A small result."""
    return Result(encode(message))


def failed(error: str, category: str) -> Result:
    """The result of a failed operation; `category` is `user` (the request is at fault) or `server`."""
    return json_result(FailedOperation(error=error, category=category))


def batch_result(result: tensors.ForwardBackwardResult) -> Result:
    """The result of forward or forward_backward."""
    return Result(b"".join(encode_outputs(result)), "batch")


def sample_result(result: SampleResult) -> Result:
    """The result of a sample."""
    return Result(encode_sample(result), "sample")


def json_of(result: Result) -> bytes:
    """The result as JSON; takes time where it is large."""
    if result.form == "json":
        return result.body
    if result.form == "sample":
        return encode(decode_sample(result.body))
    output_type, metrics, records = decode_outputs(result.body)
    return b"".join(tensors.encode_outputs(tensors.ForwardBackwardResult(list(records), metrics, output_type)))
