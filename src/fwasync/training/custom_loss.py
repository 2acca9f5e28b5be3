"""A user's loss on the client: logprobs become leaves, the loss becomes the weights of a linear surrogate.

The service's `cross_entropy` is linear in the logprobs, L = -Σ w·lp, so ∂L/∂lp = -w. Sending w = -∂(user's
loss)/∂lp therefore gives the model exactly the gradient of the user's loss. It takes a forward, the user's
function, and a forward_backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import anyio.to_thread
import numpy as np

from fwasync.errors import DatumError, ProtocolError, UsageError

if TYPE_CHECKING:
    import torch
    from tinker.types import Datum, ForwardBackwardOutput

__all__ = ("CustomLoss", "LossGradient", "forward_datums", "require_torch", "run_loss", "surrogate_datums")

CustomLoss = Callable[
    [list["Datum"], list["torch.Tensor"]],
    "tuple[torch.Tensor, Mapping[str, float]] | Awaitable[tuple[torch.Tensor, Mapping[str, float]]]",
]
"""`loss_fn(data, logprobs) -> (loss, metrics)`, sync or async.

`logprobs` holds one float32 tensor for each datum, of the shape of its `target_tokens`, with `requires_grad`.
`loss` is a scalar tensor that was computed from them.
"""


@dataclass(frozen=True, slots=True)
class LossGradient:
    """What the user's function gave.

    Attributes:
        loss: Its value.
        gradients: ∂loss/∂logprobs for each datum, float32, of the logprobs' shapes.
        metrics: The user's metrics.
    """

    loss: float
    gradients: list[np.ndarray[Any, np.dtype[np.float32]]]
    metrics: dict[str, float]


def require_torch() -> None:
    """Check that torch can be imported, without importing it.

    Raises:
        UsageError: It is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "forward_backward_custom computes your loss with torch, which is not installed: "
            "pip install 'fwasync[torch]' (on a machine without a GPU, take torch's CPU build)"
        )


def forward_datums(data: Sequence[Datum]) -> list[Datum]:
    """The datums of the forward pass: targets, and weights of zero where there are none.

    Raises:
        DatumError: A datum has no `target_tokens`.
    """
    from tinker.types import Datum, TensorData

    prepared: list[Datum] = []
    for index, datum in enumerate(data):
        targets = datum.loss_fn_inputs.get("target_tokens")
        if targets is None:
            raise DatumError(f"datum {index} of {len(data)}: a custom loss needs loss_fn_inputs['target_tokens']")
        weights = datum.loss_fn_inputs.get("weights")
        if weights is None:
            weights = TensorData.from_numpy(np.zeros(np.shape(targets.to_numpy()), dtype=np.float32))
        prepared.append(
            Datum(model_input=datum.model_input, loss_fn_inputs={"target_tokens": targets, "weights": weights})
        )
    return prepared


def surrogate_datums(data: Sequence[Datum], gradient: LossGradient) -> list[Datum]:
    """The datums of the backward pass, whose weights are the negative gradients."""
    from tinker.types import Datum, TensorData

    return [
        Datum(
            model_input=datum.model_input,
            loss_fn_inputs={
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": TensorData.from_numpy(-values),
            },
        )
        for datum, values in zip(data, gradient.gradients, strict=True)
    ]


async def run_loss(data: list[Datum], forward: ForwardBackwardOutput, loss_fn: CustomLoss) -> LossGradient:
    """Run the user's loss and its backward pass, off the event loop.

    A sync function runs in a worker thread; an async one is awaited on the loop, and only autograd goes to a
    thread.

    Raises:
        DatumError: The gradient is missing or not finite for a datum.
        UsageError: The function did not return `(scalar tensor, metrics)`.
    """
    if inspect.iscoroutinefunction(loss_fn) or inspect.iscoroutinefunction(type(loss_fn).__call__):
        leaves = await anyio.to_thread.run_sync(_leaves, data, forward)
        returned = await cast("Awaitable[Any]", loss_fn(data, leaves))
        return await anyio.to_thread.run_sync(_backward, returned, leaves)

    def run() -> LossGradient:  # in one visit to the thread: each costs as much as a small loss
        leaves = _leaves(data, forward)
        return _backward(loss_fn(data, leaves), leaves)

    return await anyio.to_thread.run_sync(run)


def _leaves(data: list[Datum], forward: ForwardBackwardOutput) -> list[torch.Tensor]:
    import torch

    leaves: list[torch.Tensor] = []
    if len(forward.loss_fn_outputs) != len(data):
        raise ProtocolError(f"forward: the service gave {len(forward.loss_fn_outputs)} results for {len(data)} datums")
    for datum, record in zip(data, forward.loss_fn_outputs, strict=True):
        shape = np.shape(datum.loss_fn_inputs["target_tokens"].to_numpy())
        if "logprobs" not in record or np.size(record["logprobs"].to_numpy()) != np.prod(shape):
            raise ProtocolError("forward: the service's result has no logprobs of the shape of target_tokens")
        values = np.asarray(record["logprobs"].to_numpy(), dtype=np.float32).reshape(shape)
        leaves.append(torch.from_numpy(values).requires_grad_())  # pyright: ignore[reportUnknownMemberType]  # torch
    return leaves


def _backward(returned: Any, leaves: list[torch.Tensor]) -> LossGradient:
    import torch

    try:
        loss, metrics = returned
        metrics = {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"the custom loss must return (loss, metrics), with metrics a dict of numbers: {error}"
        ) from error
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise UsageError("the custom loss must return a scalar torch tensor as its first value")
    if not loss.requires_grad:
        raise UsageError("the custom loss does not depend on the logprobs it was given; was it detached?")
    if not bool(torch.isfinite(loss).all()):
        raise DatumError(f"the custom loss is {loss.item()}; nothing was sent")
    loss.backward()  # pyright: ignore[reportUnknownMemberType]  # torch's own annotation is partial
    gradients: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    for index, leaf in enumerate(leaves):
        if leaf.grad is None:
            raise DatumError(
                f"the custom loss gives no gradient for datum {index} of {len(leaves)}: it does not use its logprobs. "
                "Leave the datum out of the batch, or multiply its logprobs by zero."
            )
        values = np.asarray(leaf.grad.detach().numpy(), dtype=np.float32)
        if not np.isfinite(values).all():
            raise DatumError(f"the custom loss's gradient for datum {index} is not finite; nothing was sent")
        gradients.append(values)
    return LossGradient(
        float(loss.item()),
        gradients,
        {str(name): float(value) for name, value in metrics.items()},
    )
