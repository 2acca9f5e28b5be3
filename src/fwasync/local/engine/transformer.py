"""The decoder: forward pass, and its hand-written backward pass.

Every loss served here is a function of the logprobs of given targets, so the backward pass needs
one input, dL/dlogprobs, whatever the loss is.

Invariants
    * Activations live in the `Tape` that a forward pass returns; the weights are only read.
    * Sequences in a batch are padded on the right. Attention is causal, so no real position ever
      sees the padding, and padding whose dL/dlogprobs is zero adds nothing to any gradient.
    * With `isolated=True` each sequence goes through matrix products of its own: its values are
      bit for bit those that it has alone.

Shapes: B sequences of N tokens, T = B * N rows, d hidden, H query heads, V = kv heads,
G = H / V, h head size, f feed-forward size. `[R, d]` stands for `[T, d]`, or `[B, N, d]` when
isolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fwasync.local.engine.primitives import (
    log_partition,
    normalize,
    normalize_backward,
    rotary_table,
    rotate,
    sigmoid,
    softmax_inplace,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from fwasync.local.engine.api import IntArray
    from fwasync.local.engine.architecture import Architecture, FloatArray, LayerWeights, Weights

__all__ = ("HeadTape", "LayerTape", "Tape", "Transformer")


@dataclass(frozen=True, slots=True)
class LayerTape:
    """What one layer keeps for its backward pass; `keys` and `values` are `[B, V, N, h]`."""

    input_hat: FloatArray
    input_scale: FloatArray
    attention_in: FloatArray
    qk_hat: FloatArray
    qk_scale: FloatArray
    queries: FloatArray
    keys: FloatArray
    values: FloatArray
    probabilities: FloatArray
    attended: FloatArray
    context: FloatArray
    ffn_hat: FloatArray
    ffn_scale: FloatArray
    ffn_in: FloatArray
    gate_sigmoid: FloatArray
    gate_silu: FloatArray
    up: FloatArray
    product: FloatArray


@dataclass(frozen=True, slots=True)
class Tape:
    """A forward pass: its tokens `[B, N]`, its layers, and the final hidden rows `[R, d]`."""

    tokens: IntArray
    layers: list[LayerTape]
    final_hat: FloatArray
    final_scale: FloatArray
    hidden: FloatArray


@dataclass(frozen=True, slots=True)
class HeadTape:
    """Softmax probabilities `[T, vocabulary]` and the targets `[T, K]` taken from them."""

    probabilities: FloatArray
    targets: IntArray


class Transformer:
    """The mathematics of one architecture in one floating type; holds no weights."""

    def __init__(self, architecture: Architecture, dtype: npt.DTypeLike = np.float32) -> None:
        self.architecture = architecture
        self.cosine, self.sine = rotary_table(
            architecture.context, architecture.head_dim, architecture.rope_theta, dtype
        )
        self.attention_scale = float(architecture.head_dim**-0.5)

    def forward(self, weights: Weights, tokens: IntArray, *, isolated: bool = False) -> Tape:
        """Read tokens `[B, N]` and return the tape whose `hidden` feeds the output head."""
        eps = self.architecture.norm_eps
        x = weights.embedding[tokens if isolated else tokens.reshape(-1)]
        tapes: list[LayerTape] = []
        for layer in weights.layers:
            x, tape = self._layer_forward(layer, x, tokens.shape)
            tapes.append(tape)
        final_hat, final_scale = normalize(x, eps)
        return Tape(tokens, tapes, final_hat, final_scale, final_hat * weights.final_norm)

    def target_logprobs(self, weights: Weights, tape: Tape, targets: IntArray) -> tuple[FloatArray, HeadTape]:
        """Log-softmax of the logits at `targets` `[T, K]`; returns `[T, K]` and the head's tape."""
        logits = tape.hidden.reshape(len(targets), -1) @ weights.unembedding.T
        logits -= log_partition(logits)
        logprobs = np.take_along_axis(logits, targets, axis=1)
        return logprobs, HeadTape(np.exp(logits, out=logits), targets)

    def backward(
        self,
        weights: Weights,
        gradients: Weights,
        tape: Tape,
        head: HeadTape,
        logprob_gradient: FloatArray,
    ) -> None:
        """Add to `gradients` what dL/dlogprobs `[T, K]` implies. The head's tape is used up."""
        logit_gradient = head.probabilities
        logit_gradient *= -logprob_gradient.sum(axis=1, keepdims=True)
        rows = np.arange(len(head.targets))
        for column, gradient in zip(head.targets.T, logprob_gradient.T, strict=True):
            logit_gradient[rows, column] += gradient
        gradients.unembedding[...] += logit_gradient.T @ tape.hidden
        dx = _gain_backward(
            logit_gradient @ weights.unembedding,
            tape.final_hat,
            tape.final_scale,
            weights.final_norm,
            gradients.final_norm,
        )
        for layer, layer_gradients, layer_tape in zip(
            reversed(weights.layers), reversed(gradients.layers), reversed(tape.layers), strict=True
        ):
            self._ffn_backward(layer, layer_gradients, layer_tape, dx)
            self._attention_backward(layer, layer_gradients, layer_tape, dx, tape.tokens.shape)
        _scatter_rows(gradients.embedding, tape.tokens.reshape(-1), dx)

    def _layer_forward(
        self, layer: LayerWeights, x: FloatArray, shape: tuple[int, ...]
    ) -> tuple[FloatArray, LayerTape]:
        arch = self.architecture
        batch, length = shape
        heads, kv_heads, head_dim = arch.heads, arch.kv_heads, arch.head_dim
        qk_heads, group = heads + kv_heads, arch.heads_per_kv

        input_hat, input_scale = normalize(x, arch.norm_eps)
        attention_in = input_hat * layer.input_norm
        qkv = (attention_in @ layer.qkv.T).reshape(batch, length, qk_heads + kv_heads, head_dim)
        qk_hat, qk_scale = normalize(qkv[:, :, :qk_heads], arch.norm_eps)
        rotated = rotate(
            qk_hat * self.qk_gain(layer),
            self.cosine[:length, None],
            self.sine[:length, None],
        )
        queries = (
            rotated[:, :, :heads]
            .reshape(batch, length, kv_heads, group, head_dim)
            .transpose(0, 2, 3, 1, 4)
            .reshape(batch, kv_heads, group * length, head_dim)
        )
        queries *= self.attention_scale
        keys = rotated[:, :, heads:].transpose(0, 2, 1, 3)
        values = qkv[:, :, qk_heads:].transpose(0, 2, 1, 3)
        scores = queries @ keys.swapaxes(2, 3)
        scores += np.tile(np.triu(np.full((length, length), -np.inf, x.dtype), 1), (group, 1))
        probabilities = softmax_inplace(scores)
        attended = probabilities @ values
        context = (
            attended.reshape(batch, kv_heads, group, length, head_dim)
            .transpose(0, 3, 1, 2, 4)
            .reshape(*x.shape[:-1], heads * head_dim)
        )
        x = x + context @ layer.attention_out.T

        ffn_hat, ffn_scale = normalize(x, arch.norm_eps)
        ffn_in = ffn_hat * layer.ffn_norm
        gate_up = ffn_in @ layer.gate_up.T
        gate, up = gate_up[..., : arch.ffn_size], gate_up[..., arch.ffn_size :]
        gate_sigmoid = sigmoid(gate)
        gate_silu = gate * gate_sigmoid
        product = gate_silu * up
        x += product @ layer.down.T
        return x, LayerTape(
            input_hat=input_hat,
            input_scale=input_scale,
            attention_in=attention_in,
            qk_hat=qk_hat,
            qk_scale=qk_scale,
            queries=queries,
            keys=keys,
            values=values,
            probabilities=probabilities,
            attended=attended,
            context=context,
            ffn_hat=ffn_hat,
            ffn_scale=ffn_scale,
            ffn_in=ffn_in,
            gate_sigmoid=gate_sigmoid,
            gate_silu=gate_silu,
            up=up,
            product=product,
        )

    def qk_gain(self, layer: LayerWeights) -> FloatArray:
        """The norm gains of all query heads, then all key heads: `[H + V, h]`."""
        arch = self.architecture
        gains = np.stack((layer.q_norm, layer.k_norm))
        return np.repeat(gains, (arch.heads, arch.kv_heads), axis=0)

    def _ffn_backward(self, layer: LayerWeights, gradients: LayerWeights, tape: LayerTape, dx: FloatArray) -> None:
        """Carry `dx` (changed in place) from the layer's output to its feed-forward input."""
        ffn = self.architecture.ffn_size
        gradients.down[...] += dx.T @ tape.product
        d_product = dx @ layer.down
        d_gate_up = np.empty((len(dx), 2 * ffn), dx.dtype)
        np.multiply(d_product, tape.gate_silu, out=d_gate_up[:, ffn:])
        # silu'(z) = s + z s (1 - s), with s = sigmoid(z)
        slope = 1 - tape.gate_sigmoid
        slope *= tape.gate_silu
        slope += tape.gate_sigmoid
        slope *= tape.up
        np.multiply(d_product, slope, out=d_gate_up[:, :ffn])
        gradients.gate_up[...] += d_gate_up.T @ tape.ffn_in
        dx += _gain_backward(
            d_gate_up @ layer.gate_up,
            tape.ffn_hat,
            tape.ffn_scale,
            layer.ffn_norm,
            gradients.ffn_norm,
        )

    def _attention_backward(
        self,
        layer: LayerWeights,
        gradients: LayerWeights,
        tape: LayerTape,
        dx: FloatArray,
        shape: tuple[int, ...],
    ) -> None:
        """Carry `dx` (changed in place) from the attention's output to the layer's input."""
        arch = self.architecture
        batch, length = shape
        heads, kv_heads, head_dim = arch.heads, arch.kv_heads, arch.head_dim
        qk_heads, group = heads + kv_heads, arch.heads_per_kv

        gradients.attention_out[...] += dx.T @ tape.context
        d_attended = (
            (dx @ layer.attention_out)
            .reshape(batch, length, kv_heads, group, head_dim)
            .transpose(0, 2, 3, 1, 4)
            .reshape(batch, kv_heads, group * length, head_dim)
        )
        # softmax': ds = p (dp - sum(dp p)); the sum equals that of d_attended * attended
        d_scores = d_attended @ tape.values.swapaxes(2, 3)
        d_scores -= np.einsum("...i,...i->...", d_attended, tape.attended)[..., None]
        d_scores *= tape.probabilities

        d_rotated = np.empty((batch, length, qk_heads, head_dim), dx.dtype)
        d_queries = d_scores @ tape.keys
        d_queries *= self.attention_scale
        d_rotated[:, :, :heads].reshape(batch, length, kv_heads, group, head_dim)[...] = d_queries.reshape(
            batch, kv_heads, group, length, head_dim
        ).transpose(0, 3, 1, 2, 4)
        d_rotated[:, :, heads:] = (d_scores.swapaxes(2, 3) @ tape.queries).transpose(0, 2, 1, 3)
        d_gained = rotate(d_rotated, self.cosine[:length, None], -self.sine[:length, None])
        d_gains = np.einsum("bnhi,bnhi->hi", d_gained, tape.qk_hat)
        gradients.q_norm[...] += d_gains[:heads].sum(axis=0)
        gradients.k_norm[...] += d_gains[heads:].sum(axis=0)
        d_gained *= self.qk_gain(layer)

        d_qkv = np.empty((batch, length, qk_heads + kv_heads, head_dim), dx.dtype)
        d_qkv[:, :, :qk_heads] = normalize_backward(d_gained, tape.qk_hat, tape.qk_scale)
        d_values = tape.probabilities.swapaxes(2, 3) @ d_attended
        d_qkv[:, :, qk_heads:] = d_values.transpose(0, 2, 1, 3)
        d_qkv_rows = d_qkv.reshape(batch * length, -1)
        gradients.qkv[...] += d_qkv_rows.T @ tape.attention_in
        dx += _gain_backward(
            d_qkv_rows @ layer.qkv,
            tape.input_hat,
            tape.input_scale,
            layer.input_norm,
            gradients.input_norm,
        )


def _gain_backward(
    gradient: FloatArray,
    normalized: FloatArray,
    scale: FloatArray,
    gain: FloatArray,
    gain_gradient: FloatArray,
) -> FloatArray:
    """Backward of `normalize(x) * gain`; `gradient` is overwritten."""
    gain_gradient += np.einsum("ti,ti->i", gradient, normalized)
    gradient *= gain
    return normalize_backward(gradient, normalized, scale)


def _scatter_rows(table: FloatArray, indices: IntArray, rows: FloatArray) -> None:
    """table[indices[i]] += rows[i], by sorting: several times faster than `np.add.at`."""
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    table[ordered[starts]] += np.add.reduceat(rows[order], starts, axis=0)
