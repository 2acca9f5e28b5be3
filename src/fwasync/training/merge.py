"""Metrics of several chunks become those of one call: a pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ("merge_metrics",)


def merge_metrics(parts: Sequence[Mapping[str, float]], *, weights: Sequence[int]) -> dict[str, float]:
    """Merge metrics by the reduction that each name ends with.

    `name:sum`, `:min` and `:max` do what they say; `:mean` weighs each chunk by its datums; `:slack` is the
    largest value less the weighted mean; `:unique` keeps the first under its name and the others as `name_1`,
    `name_2` … Other names can be kept only when there is one chunk, and are dropped when there are several;
    so are names that a chunk lacks.

    Args:
        parts: Metrics of the chunks, in order.
        weights: Number of datums in each chunk.
    """
    if len(parts) == 1:
        return dict(parts[0])
    merged: dict[str, float] = {}
    for name in parts[0]:
        if not all(name in part for part in parts):
            continue
        values = [part[name] for part in parts]
        mean = sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1)
        match name.rpartition(":")[2]:
            case "sum":
                merged[name] = sum(values)
            case "min":
                merged[name] = min(values)
            case "max":
                merged[name] = max(values)
            case "mean":
                merged[name] = mean
            case "slack":
                merged[name] = max(values) - mean
            case "unique":
                merged[name] = values[0]
                merged.update({f"{name}_{i}": value for i, value in enumerate(values[1:], 1)})
            case _:
                pass
    return merged
