"""How a loss reduces its terms to one number, and which division of the gradient goes with that.

Two knobs multiply: the reduction inside of a loss, and `grad_accumulation_normalization` of `optim_step`. A mean that
is divided again trains with a gradient that is too small by the number of tokens, and nothing fails. So every loss
declares its reduction, and `check_normalization` refuses the pair before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from fwasync.errors import UsageError
from fwasync.training.normalization import GradAccNormalization, normalization_name

if TYPE_CHECKING:
    import torch

    from fwasync.types import Datum

__all__ = ("LossFn", "Reduction", "check_normalization")


class Reduction(StrEnum):
    """What a loss is of its terms."""

    SUM = "sum"
    """A sum over tokens: all policy losses, and the services' kernels."""
    SUM_PAIRS = "sum_pairs"
    """A sum over pairs, each of which is a mean over its tokens: ORPO."""
    MEAN_TOKENS = "mean_tokens"
    """A mean over the tokens of the batch: the supervised losses."""
    MEAN_SEQUENCES = "mean_sequences"
    """A mean over the sequences of the batch, for losses of one's own."""
    MEAN_PAIRS = "mean_pairs"
    """A mean over the pairs of the batch: DPO."""


@dataclass(frozen=True, slots=True)
class LossFn:
    """A loss for `forward_backward_custom` that tells its reduction.

    Attributes:
        name: As in metrics and errors.
        reduction: What the loss is of its terms.
        compute: `(data, logprobs) -> (loss, metrics)`, see `CustomLoss`.
    """

    name: str
    reduction: Reduction
    compute: Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, Mapping[str, float]]]

    def __call__(self, data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        """The loss, a scalar tensor, and its metrics."""
        return self.compute(data, logprobs)


_PER_TOKEN = "num_loss_tokens"
_ALREADY = {
    Reduction.MEAN_TOKENS: ("a mean over tokens already", {_PER_TOKEN, "num_sequences"}),
    Reduction.MEAN_SEQUENCES: ("a mean over sequences already", {_PER_TOKEN, "num_sequences"}),
    Reduction.MEAN_PAIRS: ("a mean over pairs already", {_PER_TOKEN, "num_sequences"}),
    Reduction.SUM_PAIRS: ("a sum of pairs that are means over tokens already", {_PER_TOKEN}),
    Reduction.SUM: ("", set[str]()),
}


def check_normalization(reduction: Reduction | str, normalization: GradAccNormalization | str | None) -> str | None:
    """Refuse to divide twice.

    Args:
        reduction: That of the loss.
        normalization: What `optim_step` is to be given; `None` leaves the choice to the service.

    Returns:
        The normalization's name on the wire.

    Raises:
        UsageError: The loss is divided already, or there is no such reduction or normalization.
    """
    try:
        what, refused = _ALREADY[Reduction(reduction)]
    except ValueError:
        raise UsageError(f"reduction is {reduction!r}; it must be one of {', '.join(Reduction)}") from None
    name = normalization_name(normalization)
    if name in refused:
        raise UsageError(
            f"grad_accumulation_normalization {name!r} would divide the gradient twice: the loss is {what}. "
            "Use 'none', or a loss that is a sum"
        )
    return name
