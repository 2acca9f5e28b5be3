"""`DeploymentSampler`: the blocking twin of `AsyncDeploymentSampler`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, Unpack

from fwasync.sampling.deployment import AsyncDeploymentSampler, SamplingOptions
from fwasync.sampling.stream import CompletionPiece, CompletionStream
from fwasync.sync.portal import Lease
from fwasync.sync.twin import OpenTwin

if TYPE_CHECKING:
    from fwasync._http.transport import Transport
    from fwasync.sampling.attempts import AttemptPolicy
    from fwasync.sampling.completions import SampledCompletion
    from fwasync.sampling.concurrency import ConcurrencyController
    from fwasync.sampling.deployment import ChatTokenizer
    from fwasync.sampling.server_metrics import ServerMetrics

__all__ = ("DeploymentSampler", "SyncCompletionStream")

_END: Any = object()


class SyncCompletionStream:
    """The blocking twin of `CompletionStream`: an iterator of the pieces."""

    def __init__(self, stream: CompletionStream, lease: Lease[Any]) -> None:
        self._stream = stream
        self._lease = lease

    @property
    def is_complete(self) -> bool:
        """See `CompletionStream.is_complete`."""
        return self._stream.is_complete

    @property
    def completion(self) -> SampledCompletion:
        """See `CompletionStream.completion`."""
        return self._stream.completion

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> CompletionPiece:
        """The next piece; the errors are those of `CompletionStream`."""
        piece = self._lease.run(anext, self._stream, _END)
        if piece is _END:
            raise StopIteration
        return piece


class DeploymentSampler(OpenTwin[AsyncDeploymentSampler]):
    """The blocking twin of `AsyncDeploymentSampler`: the same names, parameters and defaults.

    ```python
    sampler = DeploymentSampler(deploy_mgr.inference_url, deployment.inference_model, api_key, tokenizer)
    group = sampler.sample_with_tokens(messages, n=8, max_tokens=256, logprobs=True)
    ```

    Any number of threads may sample at the same time; the `n` completions of a call run at the same time anyway. For
    thousands of prompts at a time use the async class, where each costs a task and not a thread.
    """

    def __init__(
        self,
        inference_url: str,
        model: str,
        api_key: str,
        tokenizer: ChatTokenizer | None = None,
        concurrency: ConcurrencyController | None = None,
        *,
        attempts: AttemptPolicy | None = None,
        additional_headers: Mapping[str, str] | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__(
            AsyncDeploymentSampler(
                inference_url,
                model,
                api_key,
                tokenizer,
                concurrency,
                attempts=attempts,
                additional_headers=additional_headers,
                transport=transport,
            )
        )

    @property
    def model(self) -> str:
        """Full name of what it samples from."""
        return self._client.model

    def drain_metrics(self) -> list[ServerMetrics]:
        """See `AsyncDeploymentSampler.drain_metrics`."""
        return self._lease.call(self._client.drain_metrics)

    def sample_with_tokens(
        self, messages: Sequence[Mapping[str, Any]], n: int = 1, **options: Unpack[SamplingOptions]
    ) -> list[SampledCompletion]:
        """See `AsyncDeploymentSampler.sample_with_tokens`."""
        return self._lease.run(self._client.sample_with_tokens, messages, n, **options)

    def sample_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], n: int = 1, **options: Unpack[SamplingOptions]
    ) -> list[SampledCompletion]:
        """See `AsyncDeploymentSampler.sample_with_prompt_tokens`."""
        return self._lease.run(self._client.sample_with_prompt_tokens, prompt_token_ids, n, **options)

    @contextmanager
    def stream_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], **options: Unpack[SamplingOptions]
    ) -> Generator[SyncCompletionStream]:
        """See `AsyncDeploymentSampler.stream_with_prompt_tokens`; the block and the loop are `with` and `for`."""
        lease = Lease(self._client.stream_with_prompt_tokens(prompt_token_ids, **options))
        try:
            yield SyncCompletionStream(lease.value, lease)
        except BaseException as error:
            lease.close(error)
            raise
        lease.close()
