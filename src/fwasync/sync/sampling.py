"""The blocking twin of `AsyncSamplingClient`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fwasync.sampling.client import AsyncSamplingClient
from fwasync.sync.twin import Twin

if TYPE_CHECKING:
    from tinker.types import ModelInput, SampleResponse, SamplingParams

__all__ = ("SamplingClient",)

_TIMEOUT_S = 600.0


class SamplingClient(Twin[AsyncSamplingClient]):
    """The blocking twin of `AsyncSamplingClient`: the same names, parameters and defaults.

    Made by `ServiceClient.create_sampling_client`, entered with `with`. Any number of threads may call `sample` at the
    same time; for thousands of samples at a time use the async client, where each costs a task and not a thread.
    """

    @property
    def base_model(self) -> str | None:
        """The base model that it samples from, if not from a snapshot."""
        return self._client.base_model

    @property
    def model_path(self) -> str | None:
        """The snapshot that it samples from, if not from a base model."""
        return self._client.model_path

    @property
    def in_flight(self) -> int:
        """See `AsyncSamplingClient.in_flight`."""
        return self._client.in_flight

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        *,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        timeout: float | None = _TIMEOUT_S,
    ) -> SampleResponse:
        """See `AsyncSamplingClient.sample`."""
        return self._lease.run(
            self._client.sample,
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            timeout=timeout,
        )

    def compute_logprobs(self, prompt: ModelInput, *, timeout: float | None = _TIMEOUT_S) -> list[float | None]:
        """See `AsyncSamplingClient.compute_logprobs`."""
        return self._lease.run(self._client.compute_logprobs, prompt, timeout=timeout)
