"""From examples to padded micro-batches: everything is checked before anything is computed.

Invariants
    * The plan depends on the batch alone: examples sorted by length (ties in given order), cut
      where a block would exceed its token budget.
    * Padding repeats token 0 on the right and is marked in `valid`; it never reaches a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fwasync.local.engine.api import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fwasync.local.engine.api import BaseModel, Example, InputArray, IntArray
    from fwasync.local.engine.architecture import FloatArray
    from fwasync.local.engine.losses import Loss

__all__ = ("MicroBatch", "PreparedExample", "check_tokens", "micro_batches", "prepare")

_TARGETS = "target_tokens"
_TOKENS_PER_BLOCK = 512


@dataclass(frozen=True, slots=True)
class PreparedExample:
    """A checked example: tokens `[N]`, targets and float fields `[N, K]`.

    `target_shape` is the shape that the caller gave, `[N]` or `[N, K]`.
    """

    tokens: IntArray
    targets: IntArray
    fields: dict[str, FloatArray]
    target_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some examples in one padded block of B rows of N positions with K targets each.

    `tokens` is `[B, N]`; `targets`, `fields` and `valid` are `[B * N, K]`; `indices` are the
    examples' places in the whole batch.
    """

    indices: list[int]
    tokens: IntArray
    targets: IntArray
    fields: dict[str, FloatArray]
    valid: npt.NDArray[np.bool_]


def prepare(
    batch: Sequence[Example],
    loss: Loss,
    model: BaseModel,
    dtype: npt.DTypeLike,
    *,
    allow_surplus: bool,
) -> list[PreparedExample]:
    """Check a whole batch and bring its arrays into one form.

    `allow_surplus` lets inputs pass that the loss does not know. Raises EngineError naming the
    datum and the field.
    """
    if not batch:
        raise EngineError("the batch is empty: send at least one datum")
    return [
        _prepare_example(example, loss, model, dtype, f"datum {index}", allow_surplus)
        for index, example in enumerate(batch)
    ]


def _prepare_example(
    example: Example,
    loss: Loss,
    model: BaseModel,
    dtype: npt.DTypeLike,
    where: str,
    allow_surplus: bool,
) -> PreparedExample:
    check_tokens(example.tokens, model, f"{where}: model_input")
    _check_names(example.inputs, loss, where, allow_surplus)
    length = len(example.tokens)

    targets = example.inputs[_TARGETS]
    field = f"{where}: {_TARGETS}"
    if targets.ndim not in (1, 2) or (targets.ndim == 2 and not loss.several_targets):
        allowed = "[N] or [N, K]" if loss.several_targets else "[N]"
        raise EngineError(f"{field}: {loss.name} takes the shape {allowed}, got {targets.shape}")
    if len(targets) != length or targets.size == 0:
        raise EngineError(f"{field}: has shape {targets.shape}, but there are {length} tokens")
    _check_ids(targets, model, field)

    fields: dict[str, FloatArray] = {}
    for name in loss.inputs:
        values = example.inputs[name]
        if values.shape != targets.shape:
            raise EngineError(f"{where}: {name} has shape {values.shape}, but {_TARGETS} has {targets.shape}")
        if not np.isfinite(values).all():
            position = int(np.flatnonzero(~np.isfinite(values).reshape(length, -1).all(axis=1))[0])
            raise EngineError(f"{where}: {name} is not finite at position {position}")
        fields[name] = values.reshape(length, -1).astype(dtype)
    return PreparedExample(
        tokens=example.tokens,
        targets=targets.reshape(length, -1).astype(np.int64),
        fields=fields,
        target_shape=targets.shape,
    )


def check_tokens(tokens: InputArray, model: BaseModel, where: str) -> None:
    """Raise EngineError unless `tokens` is a usable, non-empty sequence for the model."""
    if tokens.ndim != 1 or len(tokens) == 0:
        raise EngineError(f"{where}: needs at least one token in one dimension")
    if len(tokens) > model.max_context_length:
        raise EngineError(
            f"{where}: {len(tokens)} tokens exceed the context of {model.name}, which is {model.max_context_length}"
        )
    _check_ids(tokens, model, where)


def _check_ids(ids: InputArray, model: BaseModel, where: str) -> None:
    if ids.dtype.kind != "i":
        raise EngineError(f"{where}: token ids must be int64, got {ids.dtype}")
    outside = (ids < 0) | (ids >= model.vocab_size)
    if outside.any():
        position = int(np.flatnonzero(outside.reshape(len(ids), -1).any(axis=1))[0])
        raise EngineError(
            f"{where}: token id {ids[outside][0]} at position {position} is outside the "
            f"vocabulary 0..{model.vocab_size - 1}"
        )


def _check_names(inputs: Mapping[str, InputArray], loss: Loss, where: str, allow_surplus: bool) -> None:
    expected = {_TARGETS, *loss.inputs}
    wanted = ", ".join(sorted(expected))
    if missing := sorted(expected - inputs.keys()):
        raise EngineError(f"{where}: loss_fn_inputs lacks {', '.join(missing)}; {loss.name} needs {wanted}")
    surplus = sorted(inputs.keys() - expected)
    if surplus and not allow_surplus:
        raise EngineError(
            f"{where}: loss_fn_inputs has {', '.join(surplus)}, unknown to {loss.name}, which takes {wanted}"
        )


def micro_batches(
    examples: Sequence[PreparedExample], tokens_per_block: int = _TOKENS_PER_BLOCK
) -> Iterator[MicroBatch]:
    """Cut the batch into padded blocks of at most `tokens_per_block` positions (or one row)."""
    block: list[int] = []
    for index in sorted(range(len(examples)), key=lambda place: len(examples[place].tokens)):
        if block and (len(block) + 1) * len(examples[index].tokens) > tokens_per_block:
            yield _pad(examples, block)
            block = []
        block.append(index)
    yield _pad(examples, block)


def _pad(examples: Sequence[PreparedExample], indices: list[int]) -> MicroBatch:
    chosen = [examples[index] for index in indices]
    rows, length = len(chosen), max(len(example.tokens) for example in chosen)
    width = max(example.targets.shape[1] for example in chosen)
    shape = (rows, length, width)
    tokens = np.zeros((rows, length), np.int64)
    targets = np.zeros(shape, np.int64)
    valid = np.zeros(shape, np.bool_)
    fields = {name: np.zeros(shape, values.dtype) for name, values in chosen[0].fields.items()}
    for row, example in enumerate(chosen):
        count, columns = example.targets.shape
        tokens[row, :count] = example.tokens
        targets[row, :count, :columns] = example.targets
        valid[row, :count, :columns] = True
        for name, values in example.fields.items():
            fields[name][row, :count, :columns] = values
    return MicroBatch(
        indices=indices,
        tokens=tokens,
        targets=targets.reshape(-1, width),
        fields={name: values.reshape(-1, width) for name, values in fields.items()},
        valid=valid.reshape(-1, width),
    )
