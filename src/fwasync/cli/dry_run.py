"""`fwasync train sft --dry-run`: everything is checked that can be without starting or spending anything."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import numpy as np

from fwasync import AsyncServiceClient
from fwasync.cli.failures import CommandError
from fwasync.cli.local_service import require_local
from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Chat
from fwasync.errors import AuthenticationError, FwasyncError, TransportError, UsageError
from fwasync.recipes import sft
from fwasync.recipes.batches import Batches
from fwasync.recipes.rows import load_rows

if TYPE_CHECKING:
    from fwasync.cli.train_sft import Where

__all__ = ("check",)

_SHOWN = {
    "base_model",
    "lora_rank",
    "learning_rate",
    "batch_size",
    "epochs",
    "max_steps",
    "seed",
    "max_seq_len",
    "grad_clip_norm",
    "dcp_save_interval",
}


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of the base model without creating anything."""

    max_seq_len: int | None
    tokenizer: ChatTokenizer | None
    note: str


async def check(config: sft.Config, chats: Sequence[Chat], where: Where) -> None:
    """Print what a run would do.

    Raises:
        FwasyncError: What is certain to fail.
    """
    for name, value in config.model_dump(include=_SHOWN).items():
        print(f"  {name:<15} {'default' if value is None else value}")
    print(f"{config.dataset}: {len(chats)} rows")
    model = await (_remote(where, config) if where.base_url else anyio.to_thread.run_sync(_local, config))
    if model.note:
        print(model.note)
    rows = len(chats)
    if model.tokenizer is None:
        print("tokens: not known without the model's tokenizer; rows that are too long would be left out, and told")
    else:
        limit = config.max_seq_len or model.max_seq_len
        if limit is None:
            raise UsageError(f"the service does not tell the context length of {config.base_model}; set --max-seq-len")

        found = (await load_rows(config.dataset, model.tokenizer, chats=chats)).limited(limit)
        kept = found.chosen(range(len(found.rows)))
        rows = len(kept)
        trained = sum(int(np.count_nonzero(row.weights)) for row in kept)
        print(f"tokens: {sum(len(row.tokens) for row in kept):,}, of which {trained:,} are trained on")
        print(found.describe_dropped() or f"no row has more than {limit} tokens")
    order = Batches([True] * rows, config.batch_size, epochs=config.epochs, seed=config.seed)
    steps = min(order.steps(), config.max_steps or sys.maxsize)
    passes = next(islice(order.after(), steps - 1, None)).consumed / rows
    print(f"{steps:,} steps of {config.batch_size} rows: {passes:.2f} passes over the data")
    checkpoints = 1 + ((steps - 1) // config.dcp_save_interval if config.dcp_save_interval else 0)
    service = where.base_url or "a local service, started for the run"
    kind = f"a LoRA adapter of rank {config.lora_rank} on" if config.lora_rank else "all parameters of"
    print(f"It would train {kind} {config.base_model} at {service},")
    print(f"and create {config.log_path} with config.json, metrics.jsonl, report.html and {checkpoints} checkpoint(s).")
    print("Nothing was started or spent.")


def _local(config: sft.Config) -> _Model:
    require_local()
    from fwasync.local.engine import EngineError, NumpyEngine
    from fwasync.local.tokenizer import save_tokenizer

    models = NumpyEngine().models
    if config.base_model not in models:
        raise CommandError(f"unknown base_model {config.base_model!r}; the local service has: {', '.join(models)}")
    if config.lora_rank:
        from fwasync.local.engine import Lora

        try:
            NumpyEngine().trainer(config.base_model, Lora(rank=config.lora_rank))
        except EngineError as error:
            raise CommandError(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="fwasync-") as directory:
        save_tokenizer(Path(directory))
        tokenizer = ChatTokenizer.load(directory)
    return _Model(models[config.base_model].max_context_length, tokenizer, "")


async def _remote(where: Where, config: sft.Config) -> _Model:
    try:
        async with AsyncServiceClient(where.base_url, where.api_key) as service:
            models = (await service.get_server_capabilities()).supported_models
    except AuthenticationError:
        raise
    except TransportError as error:
        return _Model(config.max_seq_len, None, f"the service was not asked: {error}")
    lengths = {model.model_name: model.max_context_length for model in models}
    if config.base_model not in lengths:
        names = ", ".join(name for name in lengths if name)
        raise CommandError(f"unknown base_model {config.base_model!r}; the service at {where.base_url} has: {names}")
    try:
        tokenizer = await anyio.to_thread.run_sync(ChatTokenizer.load, config.base_model)
    except FwasyncError as error:
        return _Model(lengths[config.base_model], None, str(error))
    return _Model(lengths[config.base_model], tokenizer, "")
