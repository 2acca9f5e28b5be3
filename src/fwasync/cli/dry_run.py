"""`fwasync train sft --dry-run`: everything is checked that can be without starting or spending anything."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from fwasync import AsyncServiceClient
from fwasync.cli.failures import CommandError
from fwasync.cli.local_service import require_local
from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Chat
from fwasync.data.supervised import tokenize
from fwasync.errors import AuthenticationError, FwasyncError, TransportError, UsageError
from fwasync.recipes import sft

if TYPE_CHECKING:
    from fwasync.cli.train_sft import Where

__all__ = ("check",)


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
    for name, value in config.model_dump(exclude={"log_path", "data"}).items():
        print(f"  {name:<15} {'default' if value is None else value}")
    print(f"{config.data}: {len(chats)} rows")
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

        def measure(tokenizer: ChatTokenizer = model.tokenizer, limit: int = limit) -> None:
            nonlocal rows
            found = tokenize(config.data, chats, tokenizer, max_seq_len=limit)
            rows = len(found.rows)
            print(f"tokens: {found.tokens:,}, of which {found.trained_tokens:,} are trained on")
            print(found.describe_too_long() or f"no row has more than {limit} tokens")

        await anyio.to_thread.run_sync(measure)
    steps = config.total_steps(rows)
    print(f"{steps:,} steps of {config.batch_size} rows: {config.consumed_rows(rows) / rows:.2f} passes over the data")
    checkpoints = 1 + ((steps - 1) // config.save_every if config.save_every else 0)
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
