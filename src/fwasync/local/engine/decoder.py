"""Reading prompts and decoding one token at a time for many rows, each row on its own.

Invariant: a row's bits do not depend on its batch mates, on how many there are, or on its slot.
Matrix products over several rows would break that: a BLAS kernel treats a row by its place in
the tile (measured: blocks of 16 rows and more give equal rows unequal last bits). So
    * decoding multiplies `[n, 1, d]` by a matrix, which numpy carries out row by row; at these
      sizes it costs about twice the one big product, and is a small part of a step;
    * a prompt is read by products of its own (`isolated`), shared by all of its samples;
    * attention reads the cache up to a width that depends on the row's own length only, and rows
      of equal width go together.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fwasync.local.engine.primitives import normalize, rotate, sigmoid, softmax_inplace
from fwasync.local.engine.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from fwasync.local.engine.api import IntArray
    from fwasync.local.engine.architecture import Architecture, FloatArray, LayerWeights, Weights

__all__ = ("Decoder", "KeyValueCache", "Prefill")

_WIDTH_STEP = 64
_PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt of P tokens that was read.

    Keys and values are `[layers, V, P, h]`, `hidden` (the head's input) is `[P, d]`, `logits` of
    the token to come `[vocabulary]`.
    """

    keys: FloatArray
    values: FloatArray
    hidden: FloatArray
    logits: FloatArray

    @property
    def length(self) -> int:
        """Number of prompt tokens."""
        return len(self.hidden)


class KeyValueCache:
    """Keys and values of every slot, `[layers, slots, V, context, h]`.

    It starts as zeros, because what a mask hides is still multiplied (by zero).
    """

    def __init__(self, architecture: Architecture, slots: int) -> None:
        shape = (
            architecture.layers,
            slots,
            architecture.kv_heads,
            architecture.context,
            architecture.head_dim,
        )
        self.keys = np.zeros(shape, np.float32)
        self.values = np.zeros(shape, np.float32)

    def fill(self, slot: int, prefill: Prefill) -> None:
        """Start a slot with a prompt."""
        self.keys[:, slot, :, : prefill.length] = prefill.keys
        self.values[:, slot, :, : prefill.length] = prefill.values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for array in (self.keys, self.values):
            array[:, target, :, :length] = array[:, source, :, :length]


@dataclass(frozen=True, slots=True)
class _WidthGroup:
    """Rows whose attention reads the same cache width, and `[rows, width]` of what they skip."""

    rows: slice | IntArray
    width: int
    hidden_from: npt.NDArray[np.bool_]


class Decoder:
    """One set of weights, ready to read prompts and to decode."""

    def __init__(self, architecture: Architecture, weights: Weights) -> None:
        self._architecture = architecture
        self._weights = weights
        self._transformer = Transformer(architecture)
        self._qk_gains = [self._transformer.qk_gain(layer) for layer in weights.layers]

    def prefill(self, prompts: Sequence[IntArray]) -> list[Prefill]:
        """Read prompts; those of equal length go together to save time, not to share bits."""
        results: dict[int, Prefill] = {}
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[len(prompt)].append(index)
        for length, indices in by_length.items():
            size = max(1, _PREFILL_TOKENS // length)
            for start in range(0, len(indices), size):
                chosen = indices[start : start + size]
                read = self._prefill_block(np.stack([prompts[index] for index in chosen]))
                results.update(zip(chosen, read, strict=True))
        return [results[index] for index in range(len(prompts))]

    def _prefill_block(self, tokens: IntArray) -> Iterator[Prefill]:
        tape = self._transformer.forward(self._weights, tokens, isolated=True)
        last = np.ascontiguousarray(tape.hidden[:, -1:])
        logits = last @ self._weights.unembedding.T
        keys = np.stack([layer.keys for layer in tape.layers])
        values = np.stack([layer.values for layer in tape.layers])
        for row in range(len(tokens)):
            yield Prefill(keys[:, row], values[:, row], tape.hidden[row], logits[row, 0])

    def prompt_logits(self, prefill: Prefill) -> FloatArray:
        """Logits after every prompt token, `[P, vocabulary]`."""
        return prefill.hidden @ self._weights.unembedding.T

    def decode(self, cache: KeyValueCache, tokens: IntArray, positions: IntArray) -> FloatArray:
        """Read one token at each of the slots 0..n-1 and return the logits `[n, vocabulary]`.

        `positions` are the tokens' places, that is, the number of cached positions before them.
        """
        arch, weights = self._architecture, self._weights
        groups = _width_groups(positions)
        angles = (
            self._transformer.cosine[positions][:, None],
            self._transformer.sine[positions][:, None],
        )
        x = weights.embedding[tokens.reshape(-1, 1)]
        for index, layer in enumerate(weights.layers):
            context = self._attend(cache, index, layer, x, positions, angles, groups)
            x = x + context @ layer.attention_out.T
            ffn_hat, _ = normalize(x, arch.norm_eps)
            gate_up = (ffn_hat * layer.ffn_norm) @ layer.gate_up.T
            gate, up = gate_up[..., : arch.ffn_size], gate_up[..., arch.ffn_size :]
            x += (gate * sigmoid(gate) * up) @ layer.down.T
        final_hat, _ = normalize(x, arch.norm_eps)
        return ((final_hat * weights.final_norm) @ weights.unembedding.T)[:, 0]

    def _attend(
        self,
        cache: KeyValueCache,
        index: int,
        layer: LayerWeights,
        x: FloatArray,
        positions: IntArray,
        angles: tuple[FloatArray, FloatArray],
        groups: list[_WidthGroup],
    ) -> FloatArray:
        """Write this token's keys and values, then mix the cached values: `[n, 1, H h]`."""
        arch = self._architecture
        rows, qk_heads = len(x), arch.heads + arch.kv_heads
        input_hat, _ = normalize(x, arch.norm_eps)
        qkv = (input_hat * layer.input_norm) @ layer.qkv.T
        qkv = qkv.reshape(rows, qk_heads + arch.kv_heads, arch.head_dim)
        qk_hat, _ = normalize(qkv[:, :qk_heads], arch.norm_eps)
        rotated = rotate(qk_hat * self._qk_gains[index], *angles)
        keys, values = cache.keys[index], cache.values[index]
        slots = np.arange(rows)
        keys[slots, :, positions] = rotated[:, arch.heads :]
        values[slots, :, positions] = qkv[:, qk_heads:]

        queries = rotated[:, : arch.heads] * self._transformer.attention_scale
        queries = queries.reshape(rows, arch.kv_heads, arch.heads_per_kv, arch.head_dim)
        context = np.empty(queries.shape, x.dtype)
        for group in groups:
            group_keys = keys[group.rows, :, : group.width]
            scores = queries[group.rows] @ group_keys.swapaxes(2, 3)
            np.copyto(scores, -np.inf, where=group.hidden_from[:, None, None])
            context[group.rows] = softmax_inplace(scores) @ values[group.rows, :, : group.width]
        return context.reshape(rows, 1, -1)


def _width_groups(positions: IntArray) -> list[_WidthGroup]:
    """Group rows by the multiple of 64 that holds their positions, this step's included."""
    widths = (positions // _WIDTH_STEP + 1) * _WIDTH_STEP
    groups: list[_WidthGroup] = []
    for width in map(int, np.unique(widths)):
        members = np.flatnonzero(widths == width)
        # A slice reads the cache in place, where an index array would copy it.
        rows = slice(0, len(positions)) if len(members) == len(positions) else members
        hidden_from = np.arange(width) > positions[members, None]
        groups.append(_WidthGroup(rows, width, hidden_from))
    return groups
