"""The answer to a completion, whole or as events. Pure.

Invariants
    * A choice has as many rows of logprobs as token ids, an echo included; the very first token of a prompt has no
      prediction, and its row says 0.
    * Texts are what the bytes of the tokens spell, special tokens left out; a character that is cut is told with its
      last byte.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from fwasync._wire.completions import (
    DONE,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Logprobs,
    RawOutput,
    TokenRow,
    Usage,
    encode_event,
)
from fwasync._wire.messages import SampledSequenceMessage, SampleResult, encode

__all__ = ("Asked", "completion_of", "events_of")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request with its prompt as ids, and how many of its last tokens come back with the answer."""

    message: CompletionRequest
    prompt: list[int]
    echoed: int
    completion_id: str
    created: int

    @property
    def full_distribution(self) -> bool:
        """Whether samples were drawn from the model's own distribution."""
        message = self.message
        temperature = 1.0 if message.temperature is None else message.temperature
        return temperature == 1.0 and message.top_p in (None, 1.0) and (message.top_k or 0) <= 0


def _rows(asked: Asked, tokens: list[int], logprobs: Sequence[float]) -> list[TokenRow]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rows: list[TokenRow] = []
    offset = 0
    for index, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        own = bytes([token]) if token < 256 else b""
        text = decoder.decode(own, final=index == len(tokens) - 1)
        drawn = logprob if asked.full_distribution and index >= asked.echoed else None
        rows.append(
            TokenRow(
                token=text,
                bytes=list(own),
                logprob=logprob,
                sampling_logprob=drawn,
                text_offset=offset,
                token_id=token,
            )
        )
        offset += len(text)
    return rows


def _choice(
    asked: Asked, index: int, sequence: SampledSequenceMessage, prompt_logprobs: Sequence[float | None]
) -> CompletionChoice:
    message, echoed = asked.message, asked.echoed
    kept = 0 if message.max_tokens == 0 else len(sequence.tokens)
    start = len(asked.prompt) - echoed
    tokens = asked.prompt[start:] + sequence.tokens[:kept]
    before = [value or 0.0 for value in prompt_logprobs[start:]] if echoed else []
    rows = _rows(asked, tokens, [*before, *(sequence.logprobs or [0.0] * kept)[:kept]])
    text = "".join(row.token or "" for row in rows)
    raw = RawOutput(
        prompt_token_ids=asked.prompt, prompt_fragments=asked.prompt, completion=text, completion_token_ids=tokens
    )
    return CompletionChoice(
        index=index,
        text=text,
        finish_reason=sequence.stop_reason if kept else "length",
        logprobs=Logprobs(content=rows),
        raw_output=raw if message.raw_output else None,
        prompt_token_ids=asked.prompt if message.return_token_ids else None,
        token_ids=tokens if message.return_token_ids else None,
    )


def completion_of(asked: Asked, result: SampleResult, metrics: dict[str, str]) -> Completion:
    """The whole answer; its choices have rows of logprobs even if none were asked for."""
    choices = [
        _choice(asked, index, sequence, result.prompt_logprobs or []) for index, sequence in enumerate(result.sequences)
    ]
    sampled = sum(len((choice.logprobs and choice.logprobs.content) or []) - asked.echoed for choice in choices)
    prompt = len(asked.prompt)
    return Completion(
        id=asked.completion_id,
        object="text_completion",
        created=asked.created,
        model=asked.message.model,
        choices=choices,
        usage=Usage(prompt_tokens=prompt, completion_tokens=sampled, total_tokens=prompt + sampled),
        perf_metrics=dict(metrics) if asked.message.perf_metrics_in_response else None,
    )


def events_of(asked: Asked, whole: Completion) -> bytes:
    """The answer as events: one for each token, one that ends each choice, and the end."""
    parts: list[bytes] = []
    choices = whole.choices or []
    for number, choice in enumerate(choices):
        rows = (choice.logprobs and choice.logprobs.content) or []
        for row in rows:
            told = Logprobs(content=[row]) if asked.message.logprobs else None
            parts.append(_event(whole, CompletionChoice(index=choice.index, text=row.token, logprobs=told)))
        end = CompletionChoice(
            index=choice.index,
            text="",
            finish_reason=choice.finish_reason,
            raw_output=choice.raw_output,
            prompt_token_ids=choice.prompt_token_ids,
            token_ids=choice.token_ids,
        )
        parts.append(_event(whole, end, last=number == len(choices) - 1))
    return b"".join([*parts, encode_event(DONE)])


def _event(whole: Completion, choice: CompletionChoice, *, last: bool = False) -> bytes:
    return encode_event(
        encode(
            Completion(
                id=whole.id,
                object=whole.object,
                created=whole.created,
                model=whole.model,
                choices=[choice],
                usage=whole.usage if last else None,
                perf_metrics=whole.perf_metrics if last else None,
            )
        )
    )
