"""Which positions of a datum a policy loss speaks about, and what is known of them.

Position j of a datum's arrays predicts token j + 1 of its sequence (`fwasync.data.datums`), so the response of a
prompt of P tokens starts at position max(0, P - 1). A position is **active** if it is in the response and, where the
datum has a `loss_mask`, that is above 0.5. Everything else (prompts, tool output, padding) enters no loss, no metric
and no check.

Invariants
    * Shapes: N is the number of a datum's positions, C of its response, T of its active positions; T <= C <= N.
    * All arrays are float64 and finite. Nothing is padded: logprobs that are missing are an error that names the
      sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fwasync.data.alignment import response_start
from fwasync.errors import DatumError

if TYPE_CHECKING:
    from fwasync.types import Datum

__all__ = ("ActiveTokens", "Logprobs", "PolicyInputs", "active_tokens", "check_finite")

Floats = npt.NDArray[np.floating[Any]]
Logprobs = Sequence[Sequence[float]] | Sequence[Floats]
"""Of each sample, one for each position of its datum, in nats."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyInputs:
    """What a policy loss needs beside the datums and the policy's logprobs: one entry for each datum, in order.

    Attributes:
        advantages: Of each sample; each of its active tokens gets it.
        reference_logprobs: Of the reference model, `[N]` for each; `None` or empty is without a reference.
        prompt_len: Prompt tokens P of each sample, or one number for all.
        sampler_logprobs: Of the deployment that sampled, in the positions of the datum: `[N]` or more, 0 for the
            prompt, as `align_sample_logprobs` gives them.
        old_policy_logprobs: Of a forward pass just before the update, `[N]`. `None` takes the sampler's for it: the
            anchor is then the rollout, and the TIS ratio is 1.
        staleness: Optimizer steps between the weights that sampled and those that learn, for `decoupled`.

    Raises:
        DatumError: The numbers of entries differ, or an advantage is not finite.
    """

    advantages: Sequence[float] | Floats
    reference_logprobs: Logprobs | None
    prompt_len: int | Sequence[int]
    sampler_logprobs: Logprobs
    old_policy_logprobs: Logprobs | None = None
    staleness: Sequence[int] | None = None

    def __post_init__(self) -> None:
        count = len(self.advantages)
        given = {
            "prompt lengths": self.prompt_len if isinstance(self.prompt_len, Sequence) else None,
            "samples' sampler logprobs": self.sampler_logprobs,
            "samples' old-policy logprobs": self.old_policy_logprobs,
            "samples' reference logprobs": self.reference_logprobs if self.has_reference else None,
            "values of staleness": self.staleness,
        }
        for what, values in given.items():
            if values is not None and len(values) != count:
                raise DatumError(f"there are {count} advantages, so {count} {what} are expected; got {len(values)}")
        check_finite("a policy loss", "advantages", np.asarray(self.advantages, np.float64))

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference model."""
        return self.reference_logprobs is not None and len(self.reference_logprobs) > 0

    def prompt_length(self, index: int) -> int:
        """Prompt tokens of a sample."""
        return self.prompt_len[index] if isinstance(self.prompt_len, Sequence) else self.prompt_len

    def anchor(self, index: int) -> Floats:
        """The old policy's logprobs of a sample, in the positions of its datum."""
        rows = self.sampler_logprobs if self.old_policy_logprobs is None else self.old_policy_logprobs
        return np.asarray(rows[index], np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class ActiveTokens:
    """What is known of one sample's active tokens.

    Attributes:
        positions: Theirs in the datum, int64 `[T]`; T may be 0.
        response: Positions of the response, C.
        old_policy: Logprobs `[T]`.
        sampler: Logprobs `[T]`.
        reference: Logprobs `[T]`, if there is a reference.
    """

    positions: npt.NDArray[np.int64]
    response: int
    old_policy: Floats
    sampler: Floats
    reference: Floats | None


def active_tokens(
    label: str, inputs: PolicyInputs, data: Sequence[Datum], lengths: Sequence[int]
) -> list[ActiveTokens]:
    """Find the active tokens of each datum.

    Args:
        label: The loss's name, for errors.
        inputs: One entry for each datum.
        data: The datums; `loss_mask` is read where there is one.
        lengths: N of each datum.

    Raises:
        DatumError: Not as many datums as entries, or logprobs that do not fit a datum or are not finite.
    """
    count = len(inputs.advantages)
    if len(data) != count or len(lengths) != count:
        raise DatumError(f"{label}: there are {len(data)} datums and {count} advantages; each datum needs one")
    if not count:
        raise DatumError(f"{label}: the batch is empty")
    return [_active(label, inputs, index, datum, n) for index, (datum, n) in enumerate(zip(data, lengths, strict=True))]


def _active(label: str, inputs: PolicyInputs, index: int, datum: Datum, length: int) -> ActiveTokens:
    where = f"{label}: sample {index}"
    prompt = inputs.prompt_length(index)
    if prompt < 0:
        raise DatumError(f"{where}: its prompt_len is {prompt}")
    start = response_start(prompt)
    positions = np.arange(start, max(start, length))
    mask = datum.loss_fn_inputs.get("loss_mask")
    if mask is not None:
        values = mask.to_numpy()
        if values.shape != (length,):
            raise DatumError(f"{where}: its loss_mask has shape {values.shape}, its target_tokens ({length},)")
        positions = positions[values[start:] > 0.5]
    if not len(positions):  # nothing of it is used, so nothing of it needs to be there
        nothing = np.zeros(0)
        return ActiveTokens(positions, max(0, length - start), nothing, nothing, nothing)

    sampler = np.asarray(inputs.sampler_logprobs[index], np.float64)
    if not len(sampler):
        raise DatumError(
            f"{where}: its list of inference logprobs is empty; ask the sampler for the logprobs of what it samples"
        )
    if len(sampler) < length:
        raise DatumError(f"{where}: at least {length} inference logprobs are needed, got {len(sampler)}")
    old_policy = inputs.anchor(index)
    if inputs.old_policy_logprobs is not None and old_policy.shape != (length,):
        raise DatumError(f"{where}: exactly {length} old-policy logprobs are needed, got {old_policy.size}")
    reference = None
    if inputs.reference_logprobs is not None and inputs.has_reference:
        reference = np.asarray(inputs.reference_logprobs[index], np.float64)
        if reference.shape != (length,):
            raise DatumError(f"{where}: exactly {length} reference logprobs are needed, got {reference.size}")
        reference = reference[positions]
        check_finite(where, "reference logprobs", reference, positions)
    active = ActiveTokens(positions, length - start, old_policy[positions], sampler[positions], reference)
    check_finite(where, "old-policy logprobs", active.old_policy, positions)
    check_finite(where, "inference logprobs", active.sampler, positions)
    return active


def check_finite(where: str, what: str, values: Floats, positions: npt.NDArray[np.int64] | None = None) -> None:
    """Raise DatumError for the first value that is NaN or infinite, naming its position."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        place = int(bad[0] if positions is None else positions[bad[0]])
        raise DatumError(f"{where}: {what}[{place}] is {values[bad[0]]}")
