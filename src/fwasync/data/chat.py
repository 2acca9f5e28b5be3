"""`ChatTokenizer`: messages to tokens, as a model's own chat template has it, and back.

Only `tokenizers` and Jinja are used; transformers is not needed.

Invariants
    * Text of a message never becomes a special token. Where a message spells one (`<|end|>`), its characters are
      encoded as the plain text that they are; only the template writes special tokens.
    * Every other conversation gets exactly the tokens of the rendered text as a whole. If its last answer is trained
      on, it begins with exactly the tokens of that answer's prompt.
    * Weights are the template's: what stands between its `{% generation %}` marks; or, if it has none, what rendering
      shows that an answer adds to the very tokens of its prompt. Where that cannot be shown, the chat is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fwasync.data.guard import StandIns, TextGuard, map_texts
from fwasync.data.messages import Message
from fwasync.data.parity import first_divergence
from fwasync.data.rendering import RenderRefusal
from fwasync.data.template import MARKS, ChatTemplate, Span
from fwasync.data.tokenizer_files import find_tokenizer, read_configuration
from fwasync.errors import UsageError

__all__ = ("ChatTokenizer",)

Tools = Sequence[Mapping[str, Any]]
Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as text, the stand-ins in it, and where in it the template says that the assistant speaks."""

    text: str
    stand_ins: StandIns
    spans: list[Span]

    def written(self) -> str:
        """The text without stand-ins."""
        return self.text.translate(str.maketrans({stand_in: token for token, stand_in in self.stand_ins.items()}))


class ChatTokenizer:
    """A tokenizer with its chat template, and a `Renderer`. Made by `load`.

    Args:
        tokenizer: The tokenizer.
        template: Jinja source of the chat template.
        names: The tokens that the tokenizer's configuration names, such as `eos_token`.
        variables: What the template may use beside them, such as `enable_thinking`.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, names: Mapping[str, str], variables: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template, {**names, **(variables or {})})
        self._names = names
        self._guard = TextGuard(tokenizer)

    @classmethod
    def load(cls, name: str | Path, *, variables: Mapping[str, Any] | None = None) -> Self:
        """Load a tokenizer. Nothing is fetched from the network.

        This blocks while it reads: on an event loop, call it through `anyio.to_thread.run_sync`.

        Args:
            name: A directory with tokenizer.json and a chat template (chat_template.jinja or in
                tokenizer_config.json), or a name on the Hugging Face hub whose files are in the local cache.
            variables: What the template may use, such as `enable_thinking`.

        Raises:
            UsageError: It is neither, or a file of it cannot be used.
        """
        directory = find_tokenizer(str(name))
        path = directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"{path} is not a tokenizer that can be read: {error}") from error
        return cls(tokenizer, *read_configuration(directory), variables)

    @property
    def stop_tokens(self) -> list[int]:
        """The ids that end an answer."""
        token = self._names.get("eos_token")
        found = None if token is None else self._tokenizer.token_to_id(token)
        return [] if found is None else [found]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that is no message: special tokens are where it spells them, and nothing is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int] | npt.NDArray[Any], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens)

    def decode_all(self, tokens: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of tokens, special ones included."""
        return self.decode(tokens, skip_special_tokens=False)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = ()
    ) -> list[int]:
        """The tokens of a conversation.

        Args:
            messages: The conversation.
            add_generation_prompt: End with what invites the assistant to speak.
            tools: What the assistant may call.

        Raises:
            RenderRefusal: The template does not take this conversation.
        """
        rendered = self._rendered(messages, tools, add_generation_prompt=add_generation_prompt)
        return self._guard.encode(rendered.text, rendered.stand_ins)

    def template_tokens(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = ()
    ) -> list[int]:
        """What others make of the template: as `render`, but text that spells a special token becomes that token."""
        rows = [_row(message) for message in messages]
        return self.encode(self._template.render(rows, add_generation_prompt=add_generation_prompt, tools=tools)[0])

    def supervised(
        self, messages: Sequence[Message], trained: Collection[int], *, tools: Tools = ()
    ) -> tuple[npt.NDArray[np.int64], Weights]:
        """The tokens of a conversation, and which of them are trained on.

        Args:
            messages: The conversation.
            trained: The indices of those messages of the assistant that are trained on.
            tools: What the assistant may call.

        Returns:
            Tokens int64 `[L]`, and weights float32 `[L]`: 1 on what these messages say and on the marker that ends
            each, 0 on everything else.

        Raises:
            RenderRefusal: The template refuses the chat, or it is not known which tokens are an answer's: it writes the
                prompt of the answer, or the answer itself, differently once more follows.
        """
        rendered = self._rendered(messages, tools)
        if rendered.spans:
            return self._marked(rendered, messages, trained)
        prompts = {index: self._prompt(messages, index, tools) for index in sorted(trained)}
        tokens = self._whole(rendered, prompts.get(len(messages) - 1))
        weights = np.zeros(len(tokens), np.float32)
        for index, prompt in prompts.items():
            last = index + 1 == len(messages)
            answered = rendered if last else self._rendered(messages[: index + 1], tools)
            start = self._common(prompt, rendered, tokens, messages, index, "its prompt")
            end = len(tokens) if last else self._common(answered, rendered, tokens, messages, index, "it")
            _require_all(messages, index, answered, answered.text[len(prompt.text) :])
            weights[start : self._answer_end(tokens[:end], start)] = 1
        return np.asarray(tokens, np.int64), weights

    def _prompt(self, messages: Sequence[Message], index: int, tools: Tools) -> _Rendered:
        try:
            return self._rendered(messages[:index], tools, add_generation_prompt=True)
        except RenderRefusal as refusal:
            raise RenderRefusal(f"its prompt cannot be rendered: {refusal}", field=f"messages[{index}]") from None

    def _whole(self, rendered: _Rendered, prompt: _Rendered | None) -> list[int]:
        """The tokens of a conversation that begins with this prompt, if there is one.

        White space at the end of a prompt may become other tokens together with what follows. A sampler is shown the
        prompt's own, so they are what an answer is learnt after.
        """
        tokens = self._guard.encode(rendered.text, rendered.stand_ins)
        if prompt is None or not self._guard.is_cut or not rendered.written().startswith(prompt.written()):
            return tokens
        asked = self._guard.encode(prompt.text, prompt.stand_ins)
        if tokens[: len(asked)] == asked:
            return tokens
        return asked + self._guard.encode(rendered.text[len(prompt.text) :], rendered.stand_ins)

    def _rendered(self, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool = False) -> _Rendered:
        rows: Any = [_row(message) for message in messages]
        texts: list[str] = []

        def note(text: str) -> str:
            texts.append(text)
            return text

        map_texts([rows, tools], note)
        if any(mark in text for text in texts for mark in MARKS):
            raise RenderRefusal("it has a character that Unicode keeps from texts (U+FDD0 or U+FDD1)")
        stand_ins = self._guard.stand_ins(texts)
        if stand_ins:
            rows, tools = map_texts([rows, tools], lambda text: _guarded(text, stand_ins))
        text, spans = self._template.render(rows, add_generation_prompt=add_generation_prompt, tools=tools)
        return _Rendered(text, stand_ins, spans)

    def _marked(
        self, rendered: _Rendered, messages: Sequence[Message], trained: Collection[int]
    ) -> tuple[npt.NDArray[np.int64], Weights]:
        """Weights by the template's own marks: of every token with a character between them."""
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if len(rendered.spans) != len(answers):
            raise RenderRefusal(
                f"the chat template marks {len(rendered.spans)} answers with {{% generation %}}, and there are "
                f"{len(answers)}; it cannot be told which is which"
            )
        ids, offsets = self._guard.encode_with_offsets(rendered.text, rendered.stand_ins)
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        weights = np.zeros(len(ids), np.float32)
        for index, (start, end) in zip(answers, rendered.spans, strict=True):
            if index in trained:
                _require_all(messages, index, rendered, rendered.text[start:end])
                weights[(starts < end) & (ends > start)] = 1
        return np.asarray(ids, np.int64), weights

    def _common(
        self, part: _Rendered, whole: _Rendered, tokens: list[int], messages: Sequence[Message], index: int, what: str
    ) -> int:
        """How many tokens a part of the conversation has; those of the whole must begin with them."""
        ids = self._guard.encode(part.text, part.stand_ins)
        if tokens[: len(ids)] == ids:
            return len(ids)
        parted = first_divergence(ids, tokens, self.decode_all)
        assert parted is not None, "they differ"
        seen = f"after {parted.before!r} comes {parted.our_text!r}, and then {parted.their_text!r}"
        split = (
            "split the row, so that each answer is the last message of one (split=true), or train on the last one only"
        )
        if whole.written().startswith(part.written()):
            reason = f"white space at the end of {what} becomes another token with what follows: {seen}; {split}"
        elif index + 1 == len(messages):
            reason = (
                f"the chat template begins an answer differently than it asks for one: {seen}; give the message the "
                "thinking that it is asked for, or none, or use a renderer of your own"
            )
        else:
            reason = f"the chat template writes {what} differently once more follows: {seen}; {split}"
        raise RenderRefusal(reason, field=f"messages[{index}]")

    def _answer_end(self, tokens: list[int], start: int) -> int:
        """Where an answer ends: after its end marker, before white space that the template adds to it."""
        end = len(tokens)
        while end > start and tokens[end - 1] not in self._guard.special_ids:
            end -= 1
        if end == start or self._tokenizer.decode(tokens[end:]).strip():
            return len(tokens)
        return end


def _guarded(text: str, stand_ins: StandIns) -> str:
    for token, stand_in in stand_ins.items():
        text = text.replace(token, stand_in)
    return text


def _row(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: arguments are objects, thinking has the two names that are in use."""
    row = message.to_openai()
    if message.thinking:
        row["thinking"] = message.thinking
    for written, call in zip(row.get("tool_calls", ()), message.tool_calls, strict=True):
        written["function"]["arguments"] = call.arguments
        if call.id is None:
            del written["id"]
    return row


def _require_all(messages: Sequence[Message], index: int, rendered: _Rendered, answer: str) -> None:
    """What is to be trained on must be there: templates drop what they do not know, and thinking that is past."""
    message = messages[index]
    for what, text in (("thinks", message.thinking.strip()), *(("calls", call.name) for call in message.tool_calls)):
        if _guarded(text, rendered.stand_ins) not in answer:
            raise RenderRefusal(
                f"the chat template does not write what the assistant {what} here; leave it out, or, if it is written "
                "in last messages only, split the row, so that each answer is the last message of one (split=true)",
                field=f"messages[{index}]",
            )
