"""Batches of datums: from either encoding of a request to the result of its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fwasync._wire.protobuf.batches import BatchHead
from fwasync._wire.tensors import Array, BatchMessage, ForwardBackwardResult, decode_batch
from fwasync.local.engine.api import EngineError, Example, LossResult
from fwasync.local.refusal import Unacceptable
from fwasync.local.results import Result, batch_result

__all__ = ("Batch", "check_finite", "from_json", "from_protobuf")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What forward and forward_backward work on."""

    examples: list[Example]
    loss_fn: str
    config: Mapping[str, float]

    def run(self, compute: Callable[[list[Example], str, Mapping[str, float]], LossResult]) -> Result:
        """Compute the loss.

        Args:
            compute: A trainer's `forward` or `forward_backward`.

        Raises:
            EngineError: It cannot be computed, or what came out is not finite.
        """
        result = compute(self.examples, self.loss_fn, self.config)
        check_finite(result.metrics)
        for index, record in enumerate(result.outputs):
            for name, array in record.items():
                if not np.isfinite(array).all():
                    raise EngineError(f"{name} of datum {index} is not finite")
        outputs: list[dict[str, Array]] = [dict(record) for record in result.outputs]
        return batch_result(ForwardBackwardResult(outputs, dict(result.metrics), self.loss_fn))


def from_json(message: BatchMessage, losses: Collection[str]) -> Batch:
    """Read a JSON batch.

    Raises:
        Unacceptable: It is empty, cannot be read, or asks for a loss that is not among `losses`.
    """
    _check(len(message.data), message.loss_fn, losses)
    return Batch(_examples(decode_batch(message.data)), message.loss_fn, _config(message.loss_fn_config))


def from_protobuf(head: BatchHead, losses: Collection[str]) -> Batch:
    """Read a protobuf batch; see `from_json`."""
    _check(len(head.data), head.loss_fn, losses)
    return Batch(_examples(head.datums()), head.loss_fn, _config(head.loss_fn_config))


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raise EngineError for a metric that JSON cannot say: clients stumble over what encoders write instead."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise EngineError(f"metric {name} is {value}")


def _check(count: int, loss_fn: str, losses: Collection[str]) -> None:
    if not count:
        raise Unacceptable("the batch is empty: send at least one datum")
    if loss_fn not in losses:
        raise Unacceptable(f"unknown loss_fn {loss_fn!r}; this service has: {', '.join(losses)}")


def _examples(data: Iterable[tuple[npt.NDArray[np.int64], dict[str, Array]]]) -> list[Example]:
    try:
        return [Example(tokens, inputs) for tokens, inputs in data]
    except ValueError as error:
        raise Unacceptable(str(error)) from None


def _config(config: Mapping[str, Any] | None) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in (config or {}).items():
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            raise Unacceptable(f"loss_fn_config[{name!r}] is {value!r}; this service takes numbers only")
        numbers[name] = float(value)
    return numbers
