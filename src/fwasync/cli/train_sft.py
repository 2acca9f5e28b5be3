"""`fwasync.recipes.sft`, as a recipe that is run by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio.to_thread

from fwasync import AsyncServiceClient
from fwasync.data.jsonl import read_chats
from fwasync.data.supervised import tokenize
from fwasync.recipes import sft
from fwasync.recipes.sft import Config
from fwasync.tracking.run import Run

if TYPE_CHECKING:
    from fwasync.data.chat import ChatTokenizer

__all__ = ("Config", "dry_run", "train")


async def train(config: Config, *, service: AsyncServiceClient, run: Run) -> sft.Result:
    """Fine-tune; see `fwasync.recipes.sft.train`."""
    return await sft.train(config, service=service, run=run)


async def dry_run(config: Config, *, tokenizer: ChatTokenizer | None, max_seq_len: int | None) -> Sequence[str]:
    """Read and tokenize the rows.

    Raises:
        DatasetError: They cannot be trained on.
    """

    def look() -> list[str]:
        chats = read_chats(config.data)
        lines, rows, limit = [f"{config.data}: {len(chats)} rows"], len(chats), config.max_seq_len or max_seq_len
        if tokenizer is None or limit is None:
            lines.append("tokens: not known without the model's tokenizer and context length")
        else:
            found = tokenize(config.data, chats, tokenizer, max_seq_len=limit)
            rows = len(found.rows)
            lines.append(f"tokens: {found.tokens:,}, of which {found.trained_tokens:,} are trained on")
            lines.append(found.describe_too_long() or f"no row has more than {limit} tokens")
        steps = config.total_steps(rows)
        passes = config.consumed_rows(rows) / rows
        checkpoints = 1 + ((steps - 1) // config.save_every if config.save_every else 0)
        lines.append(f"{steps:,} steps of {config.batch_size} rows: {passes:.2f} passes over the data")
        lines.append(f"{checkpoints} checkpoint(s)")
        return lines

    return await anyio.to_thread.run_sync(look, abandon_on_cancel=True)
