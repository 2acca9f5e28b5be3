"""What the recipes on preferences have in common: their configuration, their rows, and how a batch is trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import anyio.to_thread
from pydantic import Field

from fwasync import AsyncTrainingClient
from fwasync.data.chat import ChatTokenizer
from fwasync.data.loading import source_name
from fwasync.data.pairs import Pair, preference_batch
from fwasync.data.preference import read_preference
from fwasync.errors import UsageError
from fwasync.losses import LossFn
from fwasync.recipes.loop import LoopConfig, Submitted
from fwasync.recipes.plan import Plan
from fwasync.recipes.rows import TrainingRows, count_rows, describe_parity, load_pairs
from fwasync.training.custom_loss import require_torch

__all__ = ("PairsConfig", "dry_run", "limited", "read", "submit_pairs")


class PairsConfig(LoopConfig):
    """What the configurations of these recipes have in common."""

    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False, description="After the warm-up.")
    epochs: int = Field(default=1, ge=1, description="Passes over the pairs.")
    batch_size: int = Field(default=4, ge=1, description="Pairs of a step. The last step of a pass may have fewer.")
    max_pairs: int | None = Field(
        default=None, ge=1, description="The file is used up to so many pairs that can be trained on."
    )

    def problems(self) -> list[str]:
        """What keeps the run from being started, as sentences."""
        found = super().problems()
        try:
            require_torch()
        except UsageError as error:
            found.append(f"{error}.")
        return found


async def read(config: PairsConfig, tokenizer: ChatTokenizer) -> list[TrainingRows[Pair]]:
    """The pairs of the data set; for `open_loop`."""
    return [await load_pairs(config.dataset, tokenizer, renderer_name=config.renderer_name)]


def limited(config: PairsConfig, data: list[TrainingRows[Pair]], max_seq_len: int) -> list[TrainingRows[Pair]]:
    """Those of them that are trained on; for `open_loop`."""
    return [part.limited(max_seq_len).first(config.max_pairs) for part in data]


async def submit_pairs(
    config: PairsConfig, client: AsyncTrainingClient, pairs: Sequence[Pair], loss_fn: LossFn
) -> Submitted:
    """Submit a step on pairs; what the loss measures is among the metrics of its result."""
    datums = await anyio.to_thread.run_sync(preference_batch, pairs)
    future = client.forward_backward_custom(datums, loss_fn, timeout=config.step_timeout_s)
    return Submitted(future, sum(datum.model_input.length for datum in datums), lambda _: {})


async def dry_run(config: PairsConfig, *, tokenizer: ChatTokenizer | None, max_seq_len: int | None) -> list[str]:
    """Read and tokenize the pairs, and count the steps; nothing is started.

    Args:
        config: What would be done.
        tokenizer: The model's, if it can be had.
        max_seq_len: The model's context length, if it is known.

    Returns:
        What was found, in lines.

    Raises:
        UsageError: The configuration or the data cannot be trained on.

    **Cancellation:** nothing remains.
    """
    config.check()
    limit = config.longest(max_seq_len)
    if tokenizer is None:
        count = await count_rows(config.dataset, read_preference)
        usable, told = [True] * count, "tokens: not known without the model's tokenizer"
        return [f"{source_name(config.dataset)}: {count} rows", told, *Plan.of(config, usable).describe(config)]
    (rows,) = limited(config, await read(config, tokenizer), limit or sys.maxsize)
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in rows.kept())
    return [
        f"{source_name(config.dataset)}: {len(rows.rows)} rows, {sum(rows.usable)} pairs to train on",
        f"tokens: {tokens:,}, on both sides",
        rows.describe_dropped() or (f"no side has more than {limit} tokens" if limit else "no row is left out so far"),
        await describe_parity(config.dataset, tokenizer, renderer_name=config.renderer_name),
        *Plan.of(config, rows.usable).describe(config),
    ]
