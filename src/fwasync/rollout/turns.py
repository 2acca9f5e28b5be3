"""One turn of the policy: tokens in, tokens out, from whichever kind of sampler there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from fwasync.errors import ProtocolError, UsageError

if TYPE_CHECKING:
    from fwasync.types import ModelInput, SampleResponse, SamplingParams

__all__ = ("DeploymentSampler", "PolicySampler", "SampledTokens", "Sampler", "sample_tokens")


class Sampler(Protocol):
    """What is asked of a sampling client."""

    async def sample(
        self, prompt: ModelInput, num_samples: int = 1, sampling_params: SamplingParams | None = None
    ) -> SampleResponse:
        """Completions of a prompt."""
        ...


class DeploymentSampler(Protocol):
    """A sampler whose weights are swapped beneath it: `AsyncDeploymentSampler`."""

    async def sample_with_prompt_tokens(self, prompt_token_ids: Sequence[int], n: int = 1, **options: Any) -> Any:
        """Completions of a prompt."""
        ...


PolicySampler = Sampler | DeploymentSampler
"""A sampler of either kind; that of immutable weights is an `AsyncSamplingClient`."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """A completion: its token ids, the sampler's logprob of each in nats, and whether it ended by itself."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    finished: bool


async def sample_tokens(
    sampler: PolicySampler,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    stop: Sequence[int] | str | None,
) -> SampledTokens:
    """Sample one completion.

    Raises:
        ProtocolError: The sampler returned no completion, or none with logprobs.
        UsageError: The prompt is empty.
        FwasyncError: What the sampler raises.

    **Cancellation:** that of the sampler.
    """
    if not prompt:
        raise UsageError("there is nothing to sample from: append a prompt first")
    if hasattr(sampler, "sample_with_prompt_tokens"):
        completions = await cast("DeploymentSampler", sampler).sample_with_prompt_tokens(
            prompt, 1, max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop or None, logprobs=True
        )
        if not completions:
            raise ProtocolError("the sampler returned no completion of a prompt")
        (completion,) = completions
        tokens, logprobs = completion.completion_tokens, completion.inference_logprobs
        finished = completion.finish_reason == "stop"
    else:
        from fwasync.types import ModelInput, SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop if stop is None or isinstance(stop, str) else list(stop) or None,
        )
        (sequence,) = (await cast("Sampler", sampler).sample(ModelInput.from_ints(list(prompt)), 1, params)).sequences
        tokens, logprobs, finished = sequence.tokens, sequence.logprobs, sequence.stop_reason == "stop"
    if logprobs is None and len(tokens):
        raise ProtocolError("the sampler returned no logprobs; policy losses need those of each sampled token")
    return SampledTokens(tokens, [] if logprobs is None else logprobs, finished)
