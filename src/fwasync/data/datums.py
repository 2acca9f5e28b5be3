"""Datums: tokens and what is to be learnt from them, aligned the way that trainers expect.

**The shift.** A trainer is given `model_input` of N tokens and, for each of its positions, the token that should come
next. Position j of every loss input therefore speaks about token j + 1 of the sequence. For the sequence
`[p0 p1 c0 c1]`, of which p is a prompt and c its completion:

| position | 0 | 1 | 2 |
|---|---|---|---|
| `model_input` | p0 | p1 | c0 |
| `target_tokens` | p1 | c0 | c1 |
| supervised `weights` `[0 0 1 1]` | 0 | 1 | 1 |
| `logprobs` of the sampler | 0 | log q(c0) | log q(c1) |
| `advantages` A | 0 | A | A |

So N is one less than the number of tokens, and the first completion token is predicted at position P - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fwasync.errors import DatumError

if TYPE_CHECKING:
    from fwasync.types import Datum

__all__ = ("masked_policy_datum", "policy_datum", "supervised_datum")

Tokens = Sequence[int] | npt.NDArray[Any]
Numbers = Sequence[float] | npt.NDArray[Any]


def supervised_datum(tokens: Tokens, weights: Numbers) -> Datum:
    """A datum for `cross_entropy`.

    Args:
        tokens: The sequence, `[L]` with L of at least 2.
        weights: What each of its tokens counts, `[L]`; that of the first is not used, since nothing predicts it.

    Returns:
        A datum of N = L - 1 positions, with `target_tokens` int64 and `weights` float32.

    Raises:
        DatumError: Too few tokens, or not as many weights.
    """
    ids = np.asarray(tokens, np.int64)
    if len(ids) != len(weights):
        raise DatumError(f"there are {len(ids)} tokens and {len(weights)} weights; each token needs one")
    return _datum(ids, {"weights": np.asarray(weights, np.float32)[1:]})


def policy_datum(
    prompt_tokens: Tokens, completion_tokens: Tokens, sampler_logprobs: Numbers, advantage: float
) -> Datum:
    """A datum for `importance_sampling` and the other policy losses of a service.

    Args:
        prompt_tokens: `[P]`, at least one.
        completion_tokens: `[C]`, at least one.
        sampler_logprobs: `[C]`, in nats, of the weights that sampled.
        advantage: Of the completion; each of its tokens gets it.

    Returns:
        A datum of N = P + C - 1 positions, with `target_tokens` int64, and `logprobs` and `advantages` float32 that
        are 0 in the first P - 1 positions.

    Raises:
        DatumError: No prompt, no completion, or not as many logprobs as completion tokens.
    """
    if len(prompt_tokens) == 0 or len(completion_tokens) == 0:
        raise DatumError("a policy datum needs at least one prompt token and one completion token")
    if len(sampler_logprobs) != len(completion_tokens):
        raise DatumError(
            f"there are {len(completion_tokens)} completion tokens and {len(sampler_logprobs)} sampler logprobs; "
            "each token needs one"
        )
    prompt = len(prompt_tokens)
    ids = np.concatenate([np.asarray(prompt_tokens, np.int64), np.asarray(completion_tokens, np.int64)])
    logprobs = np.zeros(len(ids), np.float32)
    logprobs[prompt:] = sampler_logprobs
    return masked_policy_datum(ids, logprobs, np.arange(len(ids)) >= prompt, advantage)


def masked_policy_datum(
    tokens: Tokens, sampler_logprobs: Numbers, mask: npt.NDArray[np.bool_], advantage: float
) -> Datum:
    """A datum for the policy losses of a service, of a sequence in which sampled tokens and others alternate.

    Args:
        tokens: The sequence, `[L]` with L of at least 2.
        sampler_logprobs: `[L]`, in nats; read where `mask` is true.
        mask: `[L]`, true on the tokens that were sampled.
        advantage: Each sampled token gets it.

    Returns:
        A datum of N = L - 1 positions, with `target_tokens` int64, and `logprobs` and `advantages` float32 that are 0
        wherever the target was not sampled.

    Raises:
        DatumError: Too few tokens, lengths that disagree, or not one sampled token that is predicted by another.
    """
    ids = np.asarray(tokens, np.int64)
    if not len(ids) == len(sampler_logprobs) == len(mask):
        raise DatumError(
            f"there are {len(ids)} tokens, {len(sampler_logprobs)} sampler logprobs and a mask of {len(mask)}; "
            "each token needs one of each"
        )
    targets = np.asarray(mask, np.bool_)[1:]
    if not targets.any():
        raise DatumError("no token after the first was sampled, so a policy loss has nothing to learn from")
    logprobs = np.where(targets, np.asarray(sampler_logprobs, np.float32)[1:], np.float32(0))
    return _datum(ids, {"logprobs": logprobs, "advantages": targets * np.float32(advantage)})


def _datum(ids: npt.NDArray[np.int64], inputs: dict[str, npt.NDArray[np.float32]]) -> Datum:
    from fwasync.types import Datum, ModelInput, TensorData

    if len(ids) < 2:
        raise DatumError(f"a sequence of {len(ids)} tokens has nothing to predict; it needs at least 2")
    arrays = {"target_tokens": ids[1:], **inputs}
    return Datum(
        model_input=ModelInput.from_ints(ids[:-1].tolist()),
        loss_fn_inputs={name: TensorData.from_numpy(array) for name, array in arrays.items()},
    )
