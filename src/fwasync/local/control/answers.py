"""The answer to a completion, whole or as events, token by token. Pure.

Invariants
    * The events of an answer, put together, are the whole.
    * A choice has as many rows of logprobs as token ids, an echo included; the very first token of a prompt has no
      prediction, and its row says 0.
    * Texts are what the bytes of the tokens spell, special tokens left out; a character that is cut is told with its
      last byte.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fwasync._wire.completions import (
    DONE,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Logprobs,
    Usage,
    WholeCompletion,
    WholeRawOutput,
    WholeTokenRow,
    encode_event,
)
from fwasync._wire.messages import encode
from fwasync.local.engine.api import SampledToken

__all__ = ("Asked", "EventWriter", "completion_of")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request with its prompt as ids, and how many of its last tokens come back with the answer."""

    message: CompletionRequest
    prompt: list[int]
    echoed: int
    completion_id: str
    created: int

    @property
    def keeps_nothing(self) -> bool:
        """Whether no sampled token is wanted: only the echo is."""
        return self.message.max_tokens == 0


class _ChoiceWriter:
    """One choice as it grows."""

    def __init__(self, asked: Asked, index: int, prompt_logprobs: Sequence[float | None]) -> None:
        self._asked = asked
        self._index = index
        self._spell = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._rows: list[WholeTokenRow] = []
        self._told = 0
        self.sampled = 0
        start = len(asked.prompt) - asked.echoed
        echo = zip(asked.prompt[start:], prompt_logprobs[start:], strict=True) if asked.echoed else ()
        for token, logprob in echo:
            is_last = asked.keeps_nothing and len(self._rows) == asked.echoed - 1
            self._row(token, logprob or 0.0, None, is_last=is_last)

    def add(self, token: SampledToken) -> None:
        """Take a sampled token in."""
        if self._asked.keeps_nothing:
            return
        self.sampled += 1
        self._row(token.token, token.logprob, token.sampling_logprob, is_last=token.stop_reason is not None)

    def untold(self) -> list[WholeTokenRow]:
        """The rows since it was asked last."""
        rows = self._rows[self._told :]
        self._told = len(self._rows)
        return rows

    def end(self, finish_reason: str) -> CompletionChoice:
        """What ends the choice: everything but its text and its rows."""
        message, prompt = self._asked.message, self._asked.prompt
        tokens = [row.token_id for row in self._rows if row.token_id is not None]
        raw = WholeRawOutput(
            prompt_token_ids=prompt, prompt_fragments=prompt, completion=self._text, completion_token_ids=tokens
        )
        return CompletionChoice(
            index=self._index,
            text="",
            finish_reason="length" if self._asked.keeps_nothing else finish_reason,
            raw_output=raw if message.raw_output else None,
            prompt_token_ids=prompt if message.return_token_ids else None,
            token_ids=tokens if message.return_token_ids else None,
        )

    def whole(self, finish_reason: str) -> CompletionChoice:
        """The choice, all of whose tokens were taken in."""
        choice = self.end(finish_reason)
        choice.text = self._text
        choice.logprobs = Logprobs(content=self._rows) if self._asked.message.logprobs else None
        return choice

    def _row(self, token: int, logprob: float, drawn: float | None, *, is_last: bool) -> None:
        own = bytes([token]) if token < 256 else b""
        text = self._spell.decode(own, final=is_last)
        self._rows.append(
            WholeTokenRow(
                token=text,
                bytes=list(own),
                logprob=logprob,
                sampling_logprob=drawn,
                text_offset=len(self._text),
                token_id=token,
            )
        )
        self._text += text


class _ChoiceWriters:
    """All choices of an answer as they grow."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._writers: dict[int, _ChoiceWriter] = {}
        self._prompt_logprobs: Sequence[float | None] = ()

    def add(self, token: SampledToken) -> _ChoiceWriter:
        """Take a sampled token in; returns the choice that it belongs to."""
        self._prompt_logprobs = token.prompt_logprobs or self._prompt_logprobs
        writer = self._writers.get(token.sample)
        if writer is None:
            writer = self._writers[token.sample] = _ChoiceWriter(self._asked, token.sample, self._prompt_logprobs)
        writer.add(token)
        return writer

    @property
    def sampled(self) -> int:
        """How many tokens were sampled."""
        return sum(writer.sampled for writer in self._writers.values())


def completion_of(asked: Asked, tokens: Iterable[SampledToken], metrics: dict[str, str]) -> Completion:
    """The whole answer, of all tokens that were sampled for it."""
    writers = _ChoiceWriters(asked)
    choices: list[CompletionChoice] = []
    for token in tokens:
        writer = writers.add(token)
        if token.stop_reason is not None:
            choices.append(writer.whole(token.stop_reason))
    choices.sort(key=lambda choice: choice.index)
    return _message(asked, choices, writers.sampled, metrics)


class EventWriter:
    """The events of an answer, as its tokens come: one for each token, one that ends each choice, and the end.

    Args:
        asked: The request.
        metrics: Tells the metrics, at the end.
    """

    def __init__(self, asked: Asked, metrics: Callable[[], dict[str, str]]) -> None:
        self._asked = asked
        self._metrics = metrics
        self._writers = _ChoiceWriters(asked)
        self._left = asked.message.n or 1

    @property
    def is_complete(self) -> bool:
        """Whether all choices have ended."""
        return not self._left

    def write(self, token: SampledToken) -> bytes:
        """What is to be sent when a token has come."""
        writer = self._writers.add(token)
        with_logprobs = self._asked.message.logprobs
        choices = [
            CompletionChoice(
                index=token.sample, text=row.token, logprobs=Logprobs(content=[row]) if with_logprobs else None
            )
            for row in writer.untold()
        ]
        if token.stop_reason is not None:
            self._left -= 1
            choices.append(writer.end(token.stop_reason))
        events = [_message(self._asked, [choice]) for choice in choices]
        if self.is_complete:
            events[-1] = _message(self._asked, choices[-1:], self._writers.sampled, self._metrics())
        written = b"".join(encode_event(encode(event)) for event in events)
        return written + encode_event(DONE) if self.is_complete else written


def _message(
    asked: Asked, choices: list[CompletionChoice], sampled: int | None = None, metrics: dict[str, str] | None = None
) -> Completion:
    prompt, usage = len(asked.prompt), None
    if sampled is not None:
        usage = Usage(prompt_tokens=prompt, completion_tokens=sampled, total_tokens=prompt + sampled)
    return WholeCompletion(
        id=asked.completion_id,
        object="text_completion",
        created=asked.created,
        model=asked.message.model,
        choices=choices,
        usage=usage,
        perf_metrics=dict(metrics) if metrics and asked.message.perf_metrics_in_response else None,
    )
