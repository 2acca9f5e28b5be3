"""Completions of token ids: what is asked, and an answer read into aligned arrays. Pure.

Invariants
    * Every per-token list of an answer has a row for each token id that came back, or the answer is refused.
    * Of an echo, the prompt's ids are checked and taken off; the row of the very first token of a prompt, which nothing
      predicts, is dropped. With the whole prompt echoed, logprobs are aligned with `full_tokens[1:]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import msgspec

from fwasync._http.checks import require_finite
from fwasync._wire.completions import Completion, CompletionChoice, CompletionRequest, TokenRow
from fwasync.errors import ProtocolError, UsageError

__all__ = (
    "CompletionOptions",
    "CompletionReader",
    "SampledCompletion",
    "completion_request",
    "only_choice",
)


class CompletionOptions(msgspec.Struct, frozen=True, gc=False):
    """What a completion may be asked for; each is a keyword argument of the sampler's methods.

    Attributes:
        max_tokens: The most tokens of a completion.
        temperature: Of the sampling; 1 is the model's own distribution.
        top_p: Keep the likeliest tokens up to this mass; 1 keeps all.
        top_k: Keep so many of the likeliest tokens; 0 keeps all.
        stop: Strings, or token ids, that end a completion.
        seed: For the same completion each time; the i-th of a group has `seed + i`.
        logprobs: Return the logprob of each token, in nats.
        echo: Return the logprobs of the prompt too.
        echo_last: Return those of so many of the prompt's last tokens.
        include_routing_matrix: Return which experts each token was routed to, where the model has any.
        prompt_cache_key: Requests with the same key go where the prompt may be cached.
        max_seq_len: No prompt of so many tokens is sent, and no completion beyond it is kept.
        http_timeout: Seconds that one attempt may take, once it is sent; of a stream, each piece of it.
    """

    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: str | Sequence[str | int] | None = None
    seed: int | None = None
    logprobs: bool = False
    echo: bool = False
    echo_last: int | None = None
    include_routing_matrix: bool = False
    prompt_cache_key: str | None = None
    max_seq_len: int | None = None
    http_timeout: float = 600.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and math.isfinite(self.top_p)):
            require_finite("sampling", {"temperature": self.temperature, "top_p": self.top_p})
        if self.max_tokens < 0:
            raise UsageError(f"sampling: max_tokens is {self.max_tokens}; it must be at least 0")
        if self.echo_last is not None and self.echo_last < 0:
            raise UsageError(f"sampling: echo_last is {self.echo_last}; it must be at least 0")
        if self.temperature < 0:
            raise UsageError(f"sampling: temperature is {self.temperature}; it must not be negative")
        if not self.http_timeout > 0:
            raise UsageError(f"sampling: http_timeout is {self.http_timeout}; it must be positive")

    @property
    def full_distribution(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0

    def echoed(self, prompt_len: int) -> int:
        """How many of a prompt's last tokens come back with the completion."""
        return prompt_len if self.echo else min(self.echo_last or 0, prompt_len)


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """A completion with the prompt that it continues.

    Attributes:
        text: The completion's text; of an echo, with the prompt's in front.
        full_tokens: Token ids of prompt and completion.
        prompt_len: How many of them are the prompt's.
        finish_reason: `"stop"`, `"length"` or `"error"`.
        completion_len: How many of them are the completion's.
        inference_logprobs: The model's own logprobs in nats, if asked for and told for every token: of the completion,
            with `echoed_prompt_logprob_count` of the prompt's last tokens in front.
        logprobs_echoed: Whether they cover the whole prompt but its first token: they are as long as `full_tokens[1:]`.
        sampling_logprobs: Logprobs under the distribution that was sampled from, in the same places.
        echoed_prompt_logprob_count: How many of the logprobs are the prompt's.
        routing_matrices: For each of the same places the experts in base64, `""` where untold; `None` if nowhere.
    """

    text: str
    full_tokens: list[int]
    prompt_len: int
    finish_reason: str = "unknown"
    completion_len: int = 0
    inference_logprobs: list[float] | None = None
    logprobs_echoed: bool = False
    sampling_logprobs: list[float | None] | None = None
    echoed_prompt_logprob_count: int = 0
    routing_matrices: list[str] | None = None

    @property
    def completion_tokens(self) -> list[int]:
        """Token ids of the completion."""
        return self.full_tokens[self.prompt_len :]

    @property
    def truncated(self) -> bool:
        """Whether it was ended by `max_tokens`."""
        return self.finish_reason == "length"


def completion_request(
    model: str, prompt: list[int], options: CompletionOptions, *, stop: list[str] | None, stream: bool
) -> CompletionRequest:
    """The message of one completion, the first of its group.

    Args:
        model: Full name of the deployment or model.
        prompt: Its token ids.
        options: What is asked for.
        stop: The strings that end it.
        stream: Whether it comes in pieces.
    """
    return CompletionRequest(
        model=model,
        prompt=prompt,
        n=1,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        # Told even where they truncate nothing: unset, the model's own configuration may truncate.
        top_p=options.top_p,
        top_k=options.top_k,
        stop=stop,
        seed=options.seed,
        stream=stream,
        echo=options.echo or None,
        echo_last=options.echo_last or None,
        logprobs=options.logprobs or None,
        raw_output=True,
        perf_metrics_in_response=True,
        include_routing_matrix=options.include_routing_matrix or None,
        prompt_cache_key=options.prompt_cache_key,
    )


class CompletionReader:
    """Puts a completion together from a choice, or from its pieces, and checks and aligns it.

    Args:
        prompt: The token ids that it continues.
        options: What was asked for.
    """

    __slots__ = ("_choice", "_logprobs", "_matrices", "_options", "_prompt", "_rows", "_sampling", "_texts")

    def __init__(self, prompt: list[int], options: CompletionOptions) -> None:
        self._prompt = prompt
        self._options = options
        self._choice = CompletionChoice()
        self._texts: list[str] = []
        self._rows = 0
        self._logprobs: list[float | None] = []
        self._sampling: list[float | None] = []
        self._matrices: list[str] = []

    @property
    def has_end(self) -> bool:
        """Whether the piece that ends a completion has come."""
        return self._choice.finish_reason is not None or self._choice.raw_output is not None

    def add(self, piece: CompletionChoice) -> None:
        """Take a choice in, or its next piece."""
        whole = self._choice
        self._texts.append(piece.text or "")
        if piece.finish_reason:
            whole.finish_reason = piece.finish_reason
        if piece.raw_output is not None:
            whole.raw_output = piece.raw_output
        if piece.token_ids:
            whole.token_ids = piece.token_ids
        if piece.prompt_token_ids:
            whole.prompt_token_ids = piece.prompt_token_ids
        if piece.logprobs is not None and piece.logprobs.content:
            self.add_rows(piece.logprobs.content)

    def add_rows(self, rows: Sequence[TokenRow]) -> None:
        """Take the next rows of its logprobs in."""
        self._rows += len(rows)
        if self._options.logprobs:
            self._logprobs += [row.logprob for row in rows]
            self._sampling += [row.sampling_logprob for row in rows]
        if self._options.include_routing_matrix:
            self._matrices += [row.routing_matrix or "" for row in rows]

    def completion(self) -> SampledCompletion:
        """All that was taken in as a completion.

        Raises:
            ProtocolError: It has no token ids, an echo is not the prompt's, or its lists disagree in length.
        """
        choice, options, prompt = self._choice, self._options, self._prompt
        raw = choice.raw_output
        ids = raw.completion_token_ids if raw is not None and raw.completion_token_ids is not None else choice.token_ids
        if ids is None:
            raise ProtocolError("completions: the answer has no token ids (raw_output.completion_token_ids)")
        echoed = options.echoed(len(prompt))
        if ids[:echoed] != prompt[len(prompt) - echoed :]:
            raise ProtocolError(
                f"completions: the answer's first {echoed} token ids must be the prompt's last ones, which were to be "
                "echoed; the service does not echo, or another prompt was answered"
            )
        if self._rows and self._rows != len(ids):
            raise ProtocolError(f"completions: the answer has {len(ids)} token ids and {self._rows} rows of logprobs")
        dropped = 1 if echoed and echoed == len(prompt) else 0
        inference, sampling = self._aligned_logprobs(dropped)
        matrices = self._matrices[dropped:]
        # The service may have expanded the prompt; it then says what it read. If it has not, the ids are shared with
        # the prompt's, of which a group would else hold as many copies as it has completions.
        read = (raw and raw.prompt_token_ids) or choice.prompt_token_ids
        read = prompt if not read or read == prompt else read
        return SampledCompletion(
            text="".join(self._texts),
            full_tokens=[*read, *ids[echoed:]],
            prompt_len=len(read),
            finish_reason=choice.finish_reason or "stop",
            completion_len=len(ids) - echoed,
            inference_logprobs=inference,
            logprobs_echoed=inference is not None and dropped == 1,
            sampling_logprobs=sampling,
            echoed_prompt_logprob_count=echoed - dropped if inference is not None else 0,
            routing_matrices=matrices if any(matrices) else None,
        )

    def _aligned_logprobs(self, dropped: int) -> tuple[list[float] | None, list[float | None] | None]:
        """The model's own logprobs and those of the sampling, each if told."""
        logprobs, sampling = self._logprobs[dropped:], self._sampling[dropped:]
        inference = cast("list[float]", logprobs) if logprobs and None not in logprobs else None
        if any(value is not None for value in sampling):
            return inference, sampling
        return inference, list(inference) if inference is not None and self._options.full_distribution else None


def only_choice(answer: Completion) -> CompletionChoice:
    """The one choice of an unstreamed answer.

    Raises:
        ProtocolError: There is none, or more than one.
    """
    choices = answer.choices or []
    if len(choices) != 1:
        raise ProtocolError(f"completions: the answer has {len(choices)} choices; one was asked for")
    return choices[0]
