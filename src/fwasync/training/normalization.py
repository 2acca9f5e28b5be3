"""By what an accumulated gradient is divided before the optimizer sees it."""

from __future__ import annotations

from enum import Enum, StrEnum

from fwasync.errors import UsageError

__all__ = ("GradAccNormalization", "normalization_name")


class GradAccNormalization(StrEnum):
    """The choices of `optim_step(grad_accumulation_normalization=...)`.

    Losses are sums, and gradients of several batches add up; a division makes the step independent of how much was
    accumulated. Divide on one side only: a loss that is a mean already wants `NONE`.
    """

    NUM_LOSS_TOKENS = "num_loss_tokens"
    """By the number of tokens whose gradient is not zero."""
    NUM_SEQUENCES = "num_sequences"
    """By the number of datums whose gradient is not zero."""
    NONE = "none"
    """By nothing."""


def normalization_name(choice: GradAccNormalization | str | None) -> str | None:
    """The name on the wire of a choice in any spelling: an enum (ours or another SDK's) or a string in any case.

    Raises:
        UsageError: There is no such choice.
    """
    if choice is None:
        return None
    text = str(choice.value if isinstance(choice, Enum) else choice).strip().lower()
    known = [member.value for member in GradAccNormalization]
    if text not in known:
        raise UsageError(
            f"grad_accumulation_normalization is {choice!r}; it must be one of {', '.join(known)}, or None"
        )
    return text
