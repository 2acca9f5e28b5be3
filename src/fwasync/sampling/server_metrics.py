"""What a deployment tells about a request besides its answer, and what was measured here. Pure.

The names are those of the body's `perf_metrics`; as response headers they carry the prefix `fireworks-`. The body is
believed before the headers. What cannot be read is `None`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from fwasync._http.faults import request_id_of
from fwasync.sampling.aimd import Observation

__all__ = ("ServerMetrics", "read_metrics")

_PREFIX = "fireworks-"


class ServerMetrics(msgspec.Struct, frozen=True, gc=False):
    """One attempt at a request. Durations are in seconds; `None` is what was not told.

    Attributes:
        http_status_code: The answer's status; `None` if there was no answer.
        retry_attempt: How many attempts at the same request came before.
        client_latency: Measured here, from the sending to the end of the answer.
        client_ttft: Measured here, to the first piece; of streamed answers only.
        num_concurrent_requests: At the service, this one included.
        prefill_queue_duration: In the queue before the prefill.
        generation_queue_duration: In the queue before the generation.
        server_ttft: To the first token, at the service.
        server_processing_time: Of the whole, at the service.
        prompt_tokens: Length of the prompt.
        cached_prompt_tokens: How many of them needed no prefill.
        completion_tokens: How many tokens came back.
        response_request_id: The service's id of the request.
        error: Why there was no answer.
    """

    http_status_code: int | None = None
    retry_attempt: int = 0
    client_latency: float | None = None
    client_ttft: float | None = None
    num_concurrent_requests: int | None = None
    prefill_queue_duration: float | None = None
    generation_queue_duration: float | None = None
    server_ttft: float | None = None
    server_processing_time: float | None = None
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    completion_tokens: int | None = None
    response_request_id: str | None = None
    error: str | None = None

    def observation(self) -> Observation:
        """What a concurrency controller learns from it."""
        return Observation(
            self.http_status_code,
            self.prefill_queue_duration,
            self.retry_attempt,
            self.prompt_tokens or 0,
            self.cached_prompt_tokens or 0,
            ttft_s=self.client_ttft,
            latency_s=self.client_latency,
            tokens=self.completion_tokens or 0,
        )


def read_metrics(
    headers: Mapping[str, str],
    perf_metrics: Mapping[str, str | int | float] | None = None,
    *,
    status: int,
    retry: int,
    latency_s: float,
    ttft_s: float | None = None,
    completion_tokens: int | None = None,
) -> ServerMetrics:
    """The metrics of an attempt that was answered.

    Args:
        headers: The answer's, with lower-case names.
        perf_metrics: Those in its body, if any.
        status: Its status.
        retry: How many attempts came before.
        latency_s: Seconds that it took, measured here.
        ttft_s: Seconds to its first piece, if it was streamed.
        completion_tokens: As its usage tells.
    """
    told = perf_metrics or {}
    return ServerMetrics(
        http_status_code=status,
        retry_attempt=retry,
        client_latency=latency_s,
        client_ttft=ttft_s,
        num_concurrent_requests=_count(told, headers, "num-concurrent-requests"),
        prefill_queue_duration=_number(told, headers, "prefill-queue-duration"),
        generation_queue_duration=_number(told, headers, "generation-queue-duration"),
        server_ttft=_number(told, headers, "server-time-to-first-token"),
        server_processing_time=_number(told, headers, "server-processing-time"),
        prompt_tokens=_count(told, headers, "prompt-tokens"),
        cached_prompt_tokens=_count(told, headers, "cached-prompt-tokens"),
        completion_tokens=completion_tokens,
        response_request_id=request_id_of(headers),
    )


def _number(told: Mapping[str, str | int | float], headers: Mapping[str, str], name: str) -> float | None:
    for value in (told.get(name), headers.get(_PREFIX + name), headers.get(name)):
        if value is None:
            continue
        try:
            number = float(value)
        except ValueError:
            continue
        if 0.0 <= number < math.inf:
            return number
    return None


def _count(told: Mapping[str, str | int | float], headers: Mapping[str, str], name: str) -> int | None:
    number = _number(told, headers, name)
    return None if number is None else int(number)
