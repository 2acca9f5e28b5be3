"""The small functions that the training pass and the decoder share.

Each works on the last axis and treats every row by itself: no value depends on a neighbouring
row, on the number of rows, or on a row's place among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from fwasync.local.engine.architecture import FloatArray

__all__ = (
    "log_partition",
    "normalize",
    "normalize_backward",
    "rotary_table",
    "rotate",
    "sigmoid",
    "softmax_inplace",
)


def normalize(x: FloatArray, eps: float) -> tuple[FloatArray, FloatArray]:
    """Scale rows to a root mean square of one (RMSNorm without its gain).

    Returns the scaled rows `[..., n]` and the scales `[..., 1]`. Zhang and Sennrich, "Root Mean
    Square Layer Normalization", 2019.
    """
    mean_square = np.einsum("...i,...i->...", x, x) / x.shape[-1]
    scale = 1 / np.sqrt(mean_square + eps)
    return x * scale[..., None], scale[..., None]


def normalize_backward(gradient: FloatArray, normalized: FloatArray, scale: FloatArray) -> FloatArray:
    """Turn a gradient of `normalize`'s first result into the gradient of its input.

    With y = x s and s = (mean(x^2) + eps)^(-1/2): dx = s (dy - y mean(dy y)).
    """
    projection = np.einsum("...i,...i->...", gradient, normalized)
    projection /= gradient.shape[-1]
    result = gradient - normalized * projection[..., None]
    result *= scale
    return result


def rotary_table(length: int, head_dim: int, theta: float, dtype: npt.DTypeLike) -> tuple[FloatArray, FloatArray]:
    """Tabulate cosine and sine of the rotary angles, each `[length, head_dim / 2]`.

    Angle of position p in pair i: p * theta^(-2i / head_dim); Su et al., "RoFormer", 2021.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rotate(x: FloatArray, cosine: FloatArray, sine: FloatArray) -> FloatArray:
    """Turn the pairs (i, i + n/2) of the last axis by their angles; `-sine` turns them back."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    result = np.empty(x.shape, x.dtype)
    np.multiply(first, cosine, out=result[..., :half])
    result[..., :half] -= second * sine
    np.multiply(second, cosine, out=result[..., half:])
    result[..., half:] += first * sine
    return result


def sigmoid(x: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)), written with tanh, which cannot overflow."""
    result = np.tanh(x * 0.5)
    result *= 0.5
    result += 0.5
    return result


def softmax_inplace(scores: FloatArray) -> FloatArray:
    """Replace every row (last axis) by its softmax; returns the same array."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def log_partition(logits: FloatArray) -> FloatArray:
    """log(sum(exp(row))) of every row, `[..., 1]`."""
    peak = logits.max(axis=-1, keepdims=True)
    return peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
