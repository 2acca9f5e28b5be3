"""Datums for the tests of losses, and a loss applied in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fwasync import types
from fwasync.losses import LossFn


def datum(length: int, mask: Sequence[float] | None = None, weights: Sequence[float] | None = None) -> types.Datum:
    inputs: dict[str, Any] = {"target_tokens": types.TensorData.from_numpy(np.arange(1, length + 1))}
    for name, values in (("loss_mask", mask), ("weights", weights)):
        if values is not None:
            inputs[name] = types.TensorData.from_numpy(np.array(values, np.float32))
    return types.Datum(model_input=types.ModelInput.from_ints(list(range(length))), loss_fn_inputs=inputs)


@dataclass(frozen=True)
class Applied:
    loss: float
    gradients: list[list[float]]
    metrics: dict[str, float]


def apply(loss_fn: LossFn, logprobs: Sequence[Sequence[float]], data: list[types.Datum] | None = None) -> Applied:
    """Loss, gradients and metrics; every sample must get a gradient, as `forward_backward_custom` demands."""
    leaves = [torch.tensor(list(row), dtype=torch.float64, requires_grad=True) for row in logprobs]
    loss, metrics = loss_fn([datum(len(row)) for row in logprobs] if data is None else data, leaves)
    loss.backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return Applied(loss.item(), [leaf.grad.tolist() for leaf in leaves if leaf.grad is not None], dict(metrics))
