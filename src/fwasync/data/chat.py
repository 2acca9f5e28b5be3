"""`ChatTokenizer`: messages to tokens, as a model's own chat template has it, and back.

Only `tokenizers` and Jinja are used; transformers is not needed.

Invariants
    * Text of a message never becomes a special token. Where a message spells one (`<|end|>`), its characters are
      encoded as the plain text that they are; only the template writes special tokens.
    * Every other conversation gets exactly the tokens of the rendered text as a whole.
    * Weights are found by rendering: what the assistant adds to the conversation before it is what is trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fwasync.data.jsonl import Chat, Message, Problem
from fwasync.data.template import ChatTemplate, TemplateRefusal
from fwasync.errors import DatasetError, UsageError

__all__ = ("ChatTokenizer",)

_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTokenizer:
    """A tokenizer with its chat template. Made by `load`.

    Args:
        tokenizer: The tokenizer.
        template: Jinja source of the chat template.
        names: The tokens that the tokenizer's configuration names, such as `eos_token`.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, names: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template, names)
        self._names = names
        special = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._special_ids = frozenset(special)
        texts = sorted(special.values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """Load a tokenizer.

        This blocks while it reads: on an event loop, call it through `anyio.to_thread.run_sync`.

        Args:
            name: A directory with tokenizer.json and a chat template (chat_template.jinja or in
                tokenizer_config.json), or a name on the Hugging Face hub whose files are in the local cache.

        Raises:
            UsageError: It is neither, or a file of it cannot be used.
        """
        directory = _directory(str(name))
        path = directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"{path} is not a tokenizer that can be read: {error}") from error
        template, names = _configuration(directory)
        return cls(tokenizer, template, names)

    @property
    def stop_tokens(self) -> list[int]:
        """The ids that end an answer."""
        token = self._names.get("eos_token")
        found = None if token is None else self._tokenizer.token_to_id(token)
        return [] if found is None else [found]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
        """The tokens of a conversation.

        Args:
            messages: The conversation.
            add_generation_prompt: End with what invites the assistant to speak.

        Raises:
            TemplateRefusal: The template does not take this conversation.
        """
        contents = [message.content for message in messages]
        stand_ins = self._stand_ins(contents)
        for token, stand_in in stand_ins.items():
            contents = [content.replace(token, stand_in) for content in contents]
        rows = [{"role": message.role, "content": text} for message, text in zip(messages, contents, strict=True)]
        text = self._template.render(rows, add_generation_prompt=add_generation_prompt)
        if not stand_ins:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._encode_guarded(text, {stand_in: token for token, stand_in in stand_ins.items()})

    def decode(self, tokens: Sequence[int] | npt.NDArray[Any], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens)

    def supervised(self, chat: Chat) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The tokens of a chat, and which of them are trained on.

        Returns:
            Tokens int64 `[L]`, and weights float32 `[L]`: 1 on what the assistant says and on the marker that ends
            it, 0 on everything else.

        Raises:
            DatasetError: The template refuses the chat, or writes the beginning of a conversation differently when
                more follows, so that it is not known which tokens are the assistant's.
        """
        try:
            tokens = self.render(chat.messages)
            weights = np.zeros(len(tokens), np.float32)
            for index, message in enumerate(chat.messages):
                if message.role != "assistant":
                    continue
                before = self.render(chat.messages[:index], add_generation_prompt=True)
                last = index + 1 == len(chat.messages)
                after = tokens if last else self.render(chat.messages[: index + 1])
                if after[: len(before)] != before or tokens[: len(after)] != after:
                    reason = (
                        "the chat template writes what comes before the answer differently once the answer is there; "
                        "split the row so that this is its last message"
                    )
                    raise _refusal(chat, f"messages[{index}]", reason)
                weights[len(before) : self._answer_end(after, len(before))] = 1
        except TemplateRefusal as error:
            raise _refusal(chat, "messages", str(error)) from error
        return np.asarray(tokens, np.int64), weights

    def _answer_end(self, tokens: list[int], start: int) -> int:
        """Where an answer ends: after its end marker, before white space that the template adds to it."""
        end = len(tokens)
        while end > start and tokens[end - 1] not in self._special_ids:
            end -= 1
        if end == start or self._tokenizer.decode(tokens[end:]).strip():
            return len(tokens)
        return end

    def _stand_ins(self, contents: Sequence[str]) -> dict[str, str]:
        """For each special token that the contents spell, longest first: a character that none of them has."""
        if self._special is None:
            return {}
        spelt = {match for content in contents for match in self._special.findall(content)}
        used = set("".join(contents)) if spelt else set[str]()
        private = (chr(code) for code in range(0xE000, 0xF900))
        free = (character for character in private if character not in used)
        return dict(zip(sorted(spelt, key=len, reverse=True), free, strict=False))

    def _encode_guarded(self, text: str, tokens: dict[str, str]) -> list[int]:
        """Encode rendered text: special tokens as they are written, their stand-ins as the text of `tokens`."""
        assert self._special is not None, "without special tokens nothing needs a stand-in"
        names = str.maketrans(tokens)
        ids: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            ids += self._plain.encode(text[start : match.start()].translate(names), add_special_tokens=False).ids
            ids += self._tokenizer.encode(match[0], add_special_tokens=False).ids
            start = match.end()
        return ids + self._plain.encode(text[start:].translate(names), add_special_tokens=False).ids

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer, to which special tokens are text like any other."""
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain


def _refusal(chat: Chat, field: str, reason: str) -> DatasetError:
    problem = Problem(chat.line, field, reason)
    return DatasetError(str(problem), problems=(problem,))


def _directory(name: str) -> Path:
    path = Path(name)
    if (path / "tokenizer.json").is_file():
        return path
    if path.is_dir():
        raise UsageError(f"{path} has no tokenizer.json")
    if path.is_absolute() or name.startswith("."):
        raise UsageError(f"there is no tokenizer directory {path}")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise UsageError(
            f"tokenizer {name!r} is neither a directory nor in the Hugging Face cache of this machine; fetch it once: "
            f"hf download {name} tokenizer.json tokenizer_config.json chat_template.jinja"
        )
    return Path(cached).parent


def _configuration(directory: Path) -> tuple[str, dict[str, str]]:
    """The chat template's source and the named tokens of a tokenizer directory."""
    path = directory / "tokenizer_config.json"
    try:
        config = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
        source = directory / "chat_template.jinja"
        template: Any = source.read_text(encoding="utf-8") if source.is_file() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise UsageError(f"the configuration of the tokenizer in {directory} cannot be read: {error}") from error
    if isinstance(template, list):
        entries = cast("list[dict[str, str]]", template)
        template = next((entry["template"] for entry in entries if entry.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UsageError(f"the tokenizer in {directory} has no chat template, so it cannot render chats")
    named = {name: config.get(name) for name in _NAMED_TOKENS}
    texts = {
        name: cast("dict[str, str]", token)["content"] if isinstance(token, dict) else token
        for name, token in named.items()
        if token
    }
    return template, texts
