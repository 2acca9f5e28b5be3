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

from fwasync.data.alignment import align_sample_logprobs, response_start
from fwasync.errors import DatumError

if TYPE_CHECKING:
    from fwasync.types import Datum, ModelInput

__all__ = (
    "completion_datum",
    "input_datum",
    "masked_datum",
    "masked_policy_datum",
    "policy_datum",
    "supervised_datum",
)

Tokens = Sequence[int] | npt.NDArray[Any]
Numbers = Sequence[float] | npt.NDArray[Any]


def supervised_datum(
    tokens: Tokens, weights: Numbers, *, max_tokens: int | None = None, include_loss_mask: bool = False
) -> Datum:
    """A datum for `cross_entropy`.

    Args:
        tokens: The sequence, `[L]` with L of at least 2.
        weights: What each of its tokens counts, `[L]`; that of the first is not used, since nothing predicts it.
        max_tokens: Cut the sequence to so many, from its end.
        include_loss_mask: Give the weights once more as `loss_mask`, which policy losses read.

    Returns:
        A datum of N = L - 1 positions, with `target_tokens` int64 and `weights` float32.

    Raises:
        DatumError: Too few tokens, or not as many weights.
    """
    ids, values = np.asarray(tokens, np.int64), np.asarray(weights, np.float32)
    if len(ids) != len(values):
        raise DatumError(f"there are {len(ids)} tokens and {len(values)} weights; each token needs one")
    ids, values = ids[:max_tokens], values[:max_tokens]
    return _datum(ids, _weighted(values, include_loss_mask=include_loss_mask))


def masked_datum(
    tokens: Tokens, mask: Numbers, *, max_tokens: int | None = None, include_loss_mask: bool = False
) -> Datum:
    """As `supervised_datum`, with the weight 1 where the mask is above 0, and 0 elsewhere."""
    weights = np.asarray(mask) > 0
    return supervised_datum(tokens, weights, max_tokens=max_tokens, include_loss_mask=include_loss_mask)


def completion_datum(
    prompt_tokens: Tokens, completion_tokens: Tokens, *, max_tokens: int | None = None, include_loss_mask: bool = False
) -> Datum:
    """As `supervised_datum` of prompt `[P]` and completion `[C]`, with the weight 1 on each completion token."""
    ids = np.concatenate([np.asarray(prompt_tokens, np.int64), np.asarray(completion_tokens, np.int64)])
    mask = np.arange(len(ids)) >= len(prompt_tokens)
    return supervised_datum(ids, mask, max_tokens=max_tokens, include_loss_mask=include_loss_mask)


def input_datum(
    model_input: ModelInput, weights: Numbers, *, max_tokens: int | None = None, include_loss_mask: bool = False
) -> Datum:
    """As `supervised_datum`, for a sequence that has images too.

    An image counts as many tokens as it says that it takes (`expected_tokens`). In its slots the target is 0, and the
    weight must be.

    Args:
        model_input: The whole sequence, of L tokens.
        weights: What each of them counts, `[L]`.
        max_tokens: Cut the sequence to so many, from its end; an image is taken out whole, as where no text follows.
        include_loss_mask: Give the weights once more as `loss_mask`.

    Raises:
        DatumError: An image does not say how many tokens it takes, or has a weight; or as for `supervised_datum`.
    """
    from fwasync.types import EncodedTextChunk, ModelInput

    lengths = [_length(chunk) for chunk in model_input.chunks]
    if len(weights) != sum(lengths):
        raise DatumError(f"there are {sum(lengths)} tokens and {len(weights)} weights; each token needs one")
    kept: list[Any] = []
    left = sum(lengths) if max_tokens is None else max_tokens
    for chunk, length in zip(model_input.chunks, lengths, strict=True):
        if length <= left:
            kept.append(chunk)
        elif isinstance(chunk, EncodedTextChunk):
            kept.append(EncodedTextChunk(tokens=list(chunk.tokens)[:left]))
        left -= length
        if left <= 0:
            break
    while kept and not (isinstance(kept[-1], EncodedTextChunk) and kept[-1].tokens):
        kept.pop()  # nothing is predicted after it
    texts = [list(chunk.tokens) if isinstance(chunk, EncodedTextChunk) else None for chunk in kept]
    ids = [id for text, chunk in zip(texts, kept, strict=True) for id in (text or [0] * _length(chunk))]
    in_image = [text is None for text, chunk in zip(texts, kept, strict=True) for _ in range(_length(chunk))]
    values = np.asarray(weights, np.float32)[: len(ids)]
    if np.any(values[np.asarray(in_image, bool)]):
        raise DatumError("slots of an image have a weight; only text can be learnt")
    if kept:
        kept[-1] = EncodedTextChunk(tokens=list(kept[-1].tokens)[:-1])
    shown = ModelInput(chunks=[chunk for chunk in kept if _length(chunk)])
    return _datum(np.asarray(ids, np.int64), _weighted(values, include_loss_mask=include_loss_mask), shown)


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
        DatumError: No prompt, no completion, not as many logprobs as completion tokens, or one that is none.
    """
    if len(prompt_tokens) == 0 or len(completion_tokens) == 0:
        raise DatumError("a policy datum needs at least one prompt token and one completion token")
    logprobs = align_sample_logprobs(
        sampler_logprobs, prompt_len=len(prompt_tokens), completion_len=len(completion_tokens)
    )
    ids = np.concatenate([np.asarray(prompt_tokens, np.int64), np.asarray(completion_tokens, np.int64)])
    advantages = np.zeros(len(ids) - 1, np.float32)
    advantages[response_start(len(prompt_tokens)) :] = advantage
    return _datum(ids, {"logprobs": logprobs, "advantages": advantages})


def masked_policy_datum(
    tokens: Tokens,
    sampler_logprobs: Numbers,
    mask: npt.NDArray[np.bool_],
    advantage: float,
    *,
    include_loss_mask: bool = False,
) -> Datum:
    """A datum for policy losses, of a sequence in which sampled tokens and others alternate.

    Args:
        tokens: The sequence, `[L]` with L of at least 2.
        sampler_logprobs: `[L]`, in nats; read where `mask` is true.
        mask: `[L]`, true on the tokens that were sampled.
        advantage: Each sampled token gets it.
        include_loss_mask: Give the mask as `loss_mask` too, which the losses of `fwasync.losses` read.

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
    inputs = {"logprobs": logprobs, "advantages": targets * np.float32(advantage)}
    return _datum(ids, inputs | ({"loss_mask": targets.astype(np.float32)} if include_loss_mask else {}))


def _length(chunk: Any) -> int:
    """How many tokens a part of a sequence takes."""
    tokens = getattr(chunk, "tokens", None)
    length = getattr(chunk, "expected_tokens", None) if tokens is None else len(tokens)
    if length is None:
        raise DatumError("an image does not say how many tokens it takes; set its expected_tokens")
    return length


def _weighted(weights: npt.NDArray[np.float32], *, include_loss_mask: bool) -> dict[str, npt.NDArray[np.float32]]:
    shifted = weights[1:]
    return {"weights": shifted, "loss_mask": shifted} if include_loss_mask else {"weights": shifted}


def _datum(
    ids: npt.NDArray[np.int64], inputs: dict[str, npt.NDArray[np.float32]], model_input: ModelInput | None = None
) -> Datum:
    from fwasync.types import Datum, ModelInput, TensorData

    if len(ids) < 2:
        raise DatumError(f"a sequence of {len(ids)} tokens has nothing to predict; it needs at least 2")
    arrays = {"target_tokens": ids[1:], **inputs}
    return Datum(
        model_input=model_input or ModelInput.from_ints(ids[:-1].tolist()),
        loss_fn_inputs={name: TensorData.from_numpy(array) for name, array in arrays.items()},
    )
