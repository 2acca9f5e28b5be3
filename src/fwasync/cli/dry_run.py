"""`fwasync train … --dry-run`: everything is checked that can be without starting or spending anything."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anyio.to_thread
from pydantic import BaseModel

from fwasync import AsyncServiceClient, DeployConfig, InfraConfig, WandBConfig
from fwasync.checkpoints.resume import find_resume
from fwasync.cli.failures import CommandError
from fwasync.cli.local_service import require_local
from fwasync.cli.recipes import Recipe
from fwasync.cli.where import Place, wants_trainer_job
from fwasync.data.chat import ChatTokenizer
from fwasync.errors import AuthenticationError, FwasyncError, TransportError
from fwasync.recipes.saving import describe_start
from fwasync.tracking.lock import DirectoryLock
from fwasync.tracking.settings import config_json

__all__ = ("check",)


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of the base model without creating anything."""

    max_seq_len: int | None
    tokenizer: ChatTokenizer | None
    note: str = ""


async def check(name: str, recipe: Recipe, config: BaseModel, place: Place) -> None:
    """Print what a run would do.

    Raises:
        FwasyncError: What is certain to fail.
    """
    settings = list(_flat(json.loads(config_json(config.model_dump()))))
    width = max(len(setting) for setting, _ in settings)
    told = [f"{name}, with these settings:", *(f"  {setting:<{width}} {value}" for setting, value in settings)]
    told += await _directory(config)
    model = await _model(config, place)
    if model.note:
        told.append(model.note)
    told += await recipe.dry_run(config, tokenizer=model.tokenizer, max_seq_len=model.max_seq_len)
    told += ["It would create:", *(f"  {line}" for line in _creations(config, place))]
    print("\n".join([*told, "Nothing was started or spent."]))


async def _directory(config: BaseModel) -> list[str]:
    """Where the run in its directory goes on, if it does; of a run that cannot use it, the reason is raised."""
    log_path: Path | None = getattr(config, "log_path", None)
    if log_path is None:
        return []
    await anyio.to_thread.run_sync(DirectoryLock(log_path).check)
    start = await find_resume(log_path, getattr(config, "init_from_checkpoint", None))
    return [] if start is None else [describe_start(start)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            shown = "unset" if value is None else value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{name}", shown


def _creations(config: BaseModel, place: Place) -> Iterator[str]:
    parts = {type(part): part for part in dict(config).values() if isinstance(part, BaseModel)}
    base_model, rank = getattr(config, "base_model", None), getattr(config, "lora_rank", 0)
    infra, deploy, wandb = (parts.get(kind) for kind in (InfraConfig, DeployConfig, WandBConfig))
    if isinstance(infra, InfraConfig) and infra.training_shape_id:
        yield f"a trainer job on {infra.training_shape_id}, removed in the end"
        if infra.ref_training_shape_id:
            yield f"a reference trainer on {infra.ref_training_shape_id}, removed in the end, if the recipe needs one"
        if isinstance(deploy, DeployConfig) and getattr(config, "is_synced", True):
            yield f"deployment {deploy.deployment_id or 'named after the model'}, removed in the end unless it exists"
    if base_model:
        yield f"{f'a LoRA adapter of rank {rank} on' if rank else 'a copy to train of'} {base_model}, at {place}"
    if isinstance(wandb, WandBConfig) and wandb.entity:
        yield f"a run at W&B: {wandb.entity}/{wandb.project or 'uncategorized'}"
    if getattr(config, "output_model_id", None):
        yield f"the model {getattr(config, 'output_model_id')}, of the last snapshot"  # noqa: B009
    yield f"{getattr(config, 'log_path', None)} with config.json, metrics.jsonl, checkpoints.jsonl and report.html"


async def _model(config: BaseModel, place: Place) -> _Model:
    base_model: str | None = getattr(config, "base_model", None)
    named = _tokenizer_name(config)
    if base_model is None or wants_trainer_job(config):
        tokenizer = await anyio.to_thread.run_sync(ChatTokenizer.load, named) if named else None
        return _Model(None, tokenizer, "the model's context length is known when its trainer is up")
    if place.base_url:
        return await _remote(place, base_model, named or base_model)
    return await anyio.to_thread.run_sync(_local, base_model, getattr(config, "lora_rank", 0), named)


def _tokenizer_name(config: BaseModel) -> str:
    deploy: object = getattr(config, "deployment", None)
    in_deployment = deploy.tokenizer_model if isinstance(deploy, DeployConfig) else None
    return getattr(config, "tokenizer_model", "") or in_deployment or ""


def _local(base_model: str, lora_rank: int, tokenizer_name: str) -> _Model:
    require_local()
    from fwasync.local.engine import EngineError, Lora, NumpyEngine
    from fwasync.local.tokenizer import save_tokenizer

    engine = NumpyEngine()
    if base_model not in engine.models:
        raise CommandError(f"unknown base_model {base_model!r}; the local service has: {', '.join(engine.models)}")
    if lora_rank:
        try:
            engine.trainer(base_model, Lora(rank=lora_rank))
        except EngineError as error:
            raise CommandError(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="fwasync-") as directory:
        save_tokenizer(Path(directory))
        tokenizer = ChatTokenizer.load(tokenizer_name or directory)
    return _Model(engine.models[base_model].max_context_length, tokenizer)


async def _remote(place: Place, base_model: str, tokenizer_name: str) -> _Model:
    try:
        async with AsyncServiceClient(place.base_url, place.api_key) as service:
            models = (await service.get_server_capabilities()).supported_models
    except AuthenticationError:
        raise
    except TransportError as error:
        return _Model(None, None, f"the service was not asked: {error}")
    lengths = {model.model_name: model.max_context_length for model in models}
    if base_model not in lengths:
        names = ", ".join(name for name in lengths if name)
        raise CommandError(f"unknown base_model {base_model!r}; the service at {place.base_url} has: {names}")
    try:
        tokenizer = await anyio.to_thread.run_sync(ChatTokenizer.load, tokenizer_name)
    except FwasyncError as error:
        return _Model(lengths[base_model], None, str(error))
    return _Model(lengths[base_model], tokenizer)
