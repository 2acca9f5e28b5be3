"""Choosing the next token from logits, row by row, and how likely each choice was.

Every row brings its own settings and its own uniform number, so a choice depends on its row only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fwasync.local.engine.primitives import log_partition

if TYPE_CHECKING:
    import numpy.typing as npt

    from fwasync.local.engine.api import IntArray
    from fwasync.local.engine.architecture import FloatArray

__all__ = ("Choice", "Chosen", "choose", "uniform_stream")


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings of n rows, `[n]` each; see `SampleRequest` for their meaning."""

    temperature: npt.NDArray[np.float32]
    top_k: IntArray
    top_p: npt.NDArray[np.float64]
    uniform: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What n rows chose, `[n]` each.

    `logprobs` are the model's own, at temperature 1 without truncation; `sampling_logprobs` those of the distribution
    that the token was drawn from: the same numbers where that is the model's own, 0 at temperature 0.
    """

    tokens: IntArray
    logprobs: FloatArray
    sampling_logprobs: npt.NDArray[np.float64]


def uniform_stream(seed: int | None, sample: int, length: int) -> npt.NDArray[np.float64]:
    """Draw the uniform numbers of one sample: a longer stream begins with the shorter one."""
    entropy = None if seed is None else (seed % 2**64, sample)
    return np.random.default_rng(np.random.SeedSequence(entropy)).random(length)


def choose(logits: FloatArray, choice: Choice) -> Chosen:
    """Choose a token for each row of `[n, vocabulary]`.

    Temperature 0 takes the most likely token, the lowest id among equals. Otherwise the uniform
    number is looked up in the cumulative distribution (inverse transform sampling).
    """
    tokens = logits.argmax(axis=1)
    vocabulary: int = logits.shape[1]
    warm = choice.temperature > 0
    truncated = warm & (((choice.top_k > 0) & (choice.top_k < vocabulary)) | (choice.top_p < 1))
    # The weight of all that may be drawn, in units of the most likely token's: at temperature 0 that one only.
    total = np.ones(len(logits))
    plain = np.flatnonzero(warm & ~truncated)
    if len(plain):
        mass = np.cumsum(_weights(logits[plain], choice.temperature[plain]), 1, np.float64)
        total[plain] = mass[:, -1]
        tokens[plain] = _look_up(mass, choice.uniform[plain], total[plain])
    cut = np.flatnonzero(truncated)
    if len(cut):
        tokens[cut], total[cut] = _choose_truncated(
            logits[cut],
            Choice(choice.temperature[cut], choice.top_k[cut], choice.top_p[cut], choice.uniform[cut]),
        )
    chosen = np.take_along_axis(logits, tokens[:, None], axis=1)
    logprobs = (chosen - log_partition(logits))[:, 0]
    below = (chosen - logits.max(axis=1, keepdims=True))[:, 0].astype(np.float64)
    drawn = below / np.where(warm, choice.temperature, 1) - np.log(total)
    is_own = warm & ~truncated & (choice.temperature == 1)
    return Chosen(tokens, logprobs, np.where(is_own, logprobs, drawn))


def _choose_truncated(logits: FloatArray, choice: Choice) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """The tokens, and the weight of all that were left to draw from."""
    weights = _weights(logits, choice.temperature)
    order = np.argsort(-weights, axis=1, kind="stable")
    mass = np.cumsum(np.take_along_axis(weights, order, axis=1), 1, np.float64)
    vocabulary: int = logits.shape[1]
    rank = np.arange(vocabulary)
    limit = np.where(choice.top_k > 0, choice.top_k, vocabulary)
    last = np.minimum(limit, vocabulary) - 1
    rows = np.arange(len(logits))
    wanted = choice.top_p * mass[rows, last]
    # The tokens needed to reach the wanted mass: those before which it is not reached yet.
    before = np.concatenate((np.zeros((len(mass), 1)), mass[:, :-1]), axis=1)
    kept = (before < wanted[:, None]) & (rank <= last[:, None])
    last = np.count_nonzero(kept, axis=1) - 1
    total = mass[rows, last]
    ranks = np.minimum(_look_up(mass, choice.uniform, total), last)
    return order[rows, ranks], total


def _weights(logits: FloatArray, temperature: npt.NDArray[np.float32]) -> FloatArray:
    """Unnormalised probabilities: the largest is one."""
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to exp(-inf)
        scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature[:, None]
    return np.exp(scaled, out=scaled)


def _look_up(
    mass: npt.NDArray[np.float64],
    uniform: npt.NDArray[np.float64],
    total: npt.NDArray[np.float64],
) -> IntArray:
    """Index of the first cumulative mass above `uniform * total`."""
    found = np.count_nonzero(mass <= (uniform * total)[:, None], axis=1)
    return np.minimum(found, mass.shape[1] - 1)
