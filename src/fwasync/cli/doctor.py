"""`fwasync doctor`: looks at everything that a run needs, one line for each thing, and changes nothing.

The most that it costs is one sampled token, and that only if a base model or a deployment is named.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from fwasync import AsyncDeploymentSampler, AsyncFireworksClient, AsyncServiceClient, RetryPolicy, __version__
from fwasync._http.client import Http, service_url
from fwasync._http.credentials import find_key, find_url
from fwasync._wire.codec import JSON, PROTOBUF
from fwasync.cli.failures import CommandError
from fwasync.cli.local_service import launch_local
from fwasync.cli.where import LOCAL_MODEL
from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Message
from fwasync.data.parity import compare_rows
from fwasync.errors import FwasyncError, NotFoundError, ProtocolError, UsageError
from fwasync.sampling.attempts import AttemptPolicy

__all__ = ("Patient", "run_doctor")

_FIREWORKS = "https://api.fireworks.ai"
_LEAST_FREE = 1 << 30
_REQUESTS = 5
# An empty batch as protobuf: what reads it passes over a field 100, and what takes it for JSON stumbles over its byte.
_UNKNOWN_FIELD = b"\xa2\x06\x01\xff"


@dataclass(frozen=True, slots=True)
class Patient:
    """What is looked at; as for `fwasync doctor`'s options."""

    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    base_model: str | None = None
    deployment: str | None = None
    tokenizer: str | None = None
    dataset: str | None = None
    renderer: str | None = None
    timeout: float = 20.0


class _Skipped(Exception):
    """There is nothing to look at, and that is no fault."""


@dataclass(slots=True)
class _Findings:
    timeout: float
    failed: int = 0

    async def look(self, what: str, at: Callable[[], Awaitable[str]]) -> bool:
        """Look at one thing and tell; whether it is well."""
        try:
            with anyio.fail_after(self.timeout):
                verdict, told = "ok", await at()
        except _Skipped as reason:
            verdict, told = "skip", str(reason)
        except TimeoutError as error:
            verdict, told = "FAIL", str(error) or f"no answer within {self.timeout:g} s"
        except (FwasyncError, OSError) as error:
            verdict, told = "FAIL", str(error)
        self.failed += verdict == "FAIL"
        print(_fitted(f"{verdict:<4}  {what:<14}  ", " ".join(told.split())), flush=True)
        return verdict == "ok"


async def run_doctor(patient: Patient) -> None:
    """Look at everything, and print what was found.

    Raises:
        CommandError: Something is not well.

    **Cancellation:** nothing remains.
    """
    findings = _Findings(patient.timeout)
    await findings.look("installation", _installation)
    await findings.look("disk", _disk)
    url = find_url(patient.base_url, os.environ, "FIREWORKS_BASE_URL", "TINKER_BASE_URL")
    if url is None and os.environ.get("FIREWORKS_API_KEY"):
        url = _FIREWORKS
    if url is not None:
        await _service(findings, patient, url)
    else:
        print("No service is named (--base-url, FWASYNC_BASE_URL): looking at one on this machine.", flush=True)
        await _local(findings, patient)
    if findings.failed:
        raise CommandError(f"{findings.failed} of these {'is' if findings.failed == 1 else 'are'} not well")


def _fitted(head: str, told: str) -> str:
    """A line; on a terminal in as many as it takes, one below the other."""
    if not sys.stdout.isatty():
        return head + told
    width = max(shutil.get_terminal_size().columns - len(head), 20)
    lines = textwrap.wrap(told, width, break_long_words=False, break_on_hyphens=False)
    return head + f"\n{' ' * len(head)}".join(lines)


async def _local(findings: _Findings, patient: Patient) -> None:
    """Look at a service that is started for it."""

    async def fails() -> str:
        raise failure

    try:
        async with launch_local(None) as local:
            model = patient.base_model or LOCAL_MODEL
            here = replace(patient, base_url=local.base_url, api_key=local.api_key, base_model=model)
            await _service(findings, here, local.base_url)
    except CommandError as error:
        failure = error
        await findings.look("local service", fails)


async def _service(findings: _Findings, patient: Patient, url: str) -> None:
    key = ""

    async def look_for_key() -> str:
        nonlocal key
        key = find_key(url, patient.api_key, os.environ)
        return f"found, for {service_url(url)}"

    if not await findings.look("key", look_for_key):
        return
    checkup = _Checkup(patient, url, key)
    trains = await findings.look("trainer API", checkup.trainer)
    if trains:
        await findings.look("wire", checkup.wire)
        await findings.look("latency", checkup.latency)
    await findings.look("account", partial(checkup.account, trains=trains))
    if await findings.look("tokenizer", checkup.tokenizer):
        await findings.look("rendering", checkup.rendering)
    await findings.look("sample", checkup.sample)


async def _installation() -> str:
    extras = [name for name in ("torch", "wandb") if importlib.util.find_spec(name)]
    beside = f", with {' and '.join(extras)}" if extras else ""
    return f"fwasync {__version__} on Python {platform.python_version()}, {platform.system()}{beside}"


async def _disk() -> str:
    def look() -> str:
        with tempfile.TemporaryFile(dir=Path.cwd()) as file:
            file.write(b"fwasync")
            file.flush()
        free = shutil.disk_usage(Path.cwd()).free
        if free < _LEAST_FREE:
            raise OSError(f"{Path.cwd()} has {free / 1e6:,.0f} MB left")
        return f"{Path.cwd()} can be written, and has {free / 1e9:,.1f} GB left"

    return await anyio.to_thread.run_sync(look, abandon_on_cancel=True)


class _Checkup:
    """The checks of one service."""

    def __init__(self, patient: Patient, url: str, key: str) -> None:
        self._patient, self._url, self._key = patient, url, key
        self._retry = RetryPolicy(budget_s=patient.timeout / 2)
        self._account = ""
        self._tokenizer: ChatTokenizer | None = None

    async def trainer(self) -> str:
        try:
            async with self._client() as service:
                models = (await service.get_server_capabilities()).supported_models
        except ProtocolError as error:
            if self._is_fireworks():
                raise _Skipped(f"{self._url} is a control plane; its trainers have URLs of their own") from None
            raise error from None
        names = [model.model_name for model in models if model.model_name]
        wanted = self._patient.base_model
        if wanted is not None and wanted not in names:
            raise NotFoundError(f"{self._url} does not have {wanted}; it has: {', '.join(names)}")
        return f"a session was opened and closed; models: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"

    async def wire(self) -> str:
        """In which forms batches are taken: empty ones are sent, of no model, so that nothing can come of them."""
        async with Http(self._url, self._key, retry=self._retry) as http:
            takes: list[str] = []
            for codec, body in ((JSON, b"{}"), (PROTOBUF, _UNKNOWN_FIELD)):
                answer = await http.attempt(
                    "POST", codec.path(backward=True), [body], content_type=codec.content_type, accept=codec.accept
                )
                if 400 <= answer.status < 500 and answer.status not in (401, 403, 404, 405, 415):
                    takes.append(codec.name)
        if not takes:
            raise ProtocolError("batches are taken neither as JSON nor as protobuf")
        return f"batches are taken as {' and '.join(takes)}"

    async def latency(self) -> str:
        taken: list[float] = []
        async with Http(self._url, self._key, retry=self._retry) as http:
            for _ in range(_REQUESTS + 1):
                began = anyio.current_time()
                await http.attempt("GET", "get_server_capabilities")
                taken.append(anyio.current_time() - began)
        first, *others = taken
        return f"{statistics.median(others) * 1e3:.1f} ms a request, {first * 1e3:.1f} ms with a new connection"

    async def account(self, *, trains: bool) -> str:
        try:
            async with AsyncFireworksClient(self._url, self._key, retry=self._retry) as fireworks:
                self._account = await fireworks.account_id()
        except (NotFoundError, ProtocolError) as error:
            if trains:
                raise _Skipped(f"{self._url} has no control plane") from None
            raise error from None
        return self._account

    async def tokenizer(self) -> str:
        name = self._patient.tokenizer
        if name is None:
            raise _Skipped("none is named (--tokenizer)")
        tokenizer = await anyio.to_thread.run_sync(ChatTokenizer.load, name, abandon_on_cancel=True)
        self._tokenizer = tokenizer
        count = len(tokenizer.render([Message("user", "Hello")], add_generation_prompt=True))
        return f"{name} is on this machine: a greeting has {count} tokens"

    async def rendering(self) -> str:
        """Whether what renders the rows makes the chat template's tokens of them."""
        patient = self._patient
        if patient.dataset is None:
            raise _Skipped("no rows are named (--dataset)")
        assert self._tokenizer is not None, "it was looked at before"
        parity = await compare_rows(patient.dataset, self._tokenizer, renderer=patient.renderer)
        if not parity.is_expected:
            raise UsageError(f"{patient.dataset}, {parity}")
        return f"{patient.dataset}{', ' if parity.failure else ': '}{parity}"

    async def sample(self) -> str:
        patient = self._patient
        if patient.deployment is not None:
            name = patient.deployment
            full = name if "/" in name else f"accounts/{self._account}/deployments/{name}"
            once = AttemptPolicy(attempts=1, hotload_max_retries=0)
            try:
                async with AsyncDeploymentSampler(self._url, full, self._key, attempts=once) as sampler:
                    (sampled,) = await sampler.sample_with_prompt_tokens([1], max_tokens=1)
            except NotFoundError as error:
                raise NotFoundError(f"{full}: {error}") from None
            return f"{full} gave a token: {sampled.text!r}"
        if patient.base_model is None:
            raise _Skipped("nothing is named that could be sampled (--base-model, --deployment)")
        from fwasync.types import ModelInput, SamplingParams

        prompt = ModelInput.from_ints([1])
        async with self._client() as service, service.create_sampling_client(base_model=patient.base_model) as sampler:
            response = await sampler.sample(prompt, 1, SamplingParams(max_tokens=1), timeout=patient.timeout)
        return f"{patient.base_model} gave token {list(response.sequences[0].tokens)}"

    def _client(self) -> AsyncServiceClient:
        return AsyncServiceClient(self._url, self._key, retry=self._retry)

    def _is_fireworks(self) -> bool:
        return (urlsplit(self._url).hostname or "").endswith("fireworks.ai")
