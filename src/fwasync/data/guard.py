"""`TextGuard`: rendered text to tokens, so that only the template writes special tokens.

Where a message spells a special token, such as `<|end|>`, a stand-in takes the token's place before the template sees
the message: a character that no message has. It is written out again when the rendered text is encoded, as plain text.

Special tokens cut a text: what is between them is encoded by itself, and remembered, because to find the weights of a
conversation it is rendered again and again, each time a little longer. Tokenizers for which that would make a
difference are found out, and get whole texts.

Invariants
    * Text of a message never becomes a special token.
    * Text without stand-ins gets exactly the tokens that the tokenizer gives to the whole of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, cast

from tokenizers import Encoding, Tokenizer

__all__ = ("StandIns", "TextGuard", "map_texts")

StandIns = dict[str, str]
"""For special tokens that are spelt somewhere, longest first: their stand-ins."""

Offsets = list[tuple[int, int]]

_REMEMBERED = 1024
"""Texts between special tokens: more than a conversation has."""


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {map_texts(key, change): map_texts(item, change) for key, item in items}
    if isinstance(value, Sequence):
        return [map_texts(item, change) for item in cast("Sequence[Any]", value)]
    return value


class TextGuard:
    """The special tokens of a tokenizer, kept apart from text that spells them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = {id: token for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special)
        self._ids = {token.content: id for id, token in special.items()}
        self._plain_cut = not any(token.normalized or token.lstrip or token.rstrip for token in special.values())
        texts = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._encode_between = lru_cache(_REMEMBERED)(self._encode_plain)

    def stand_ins(self, texts: Sequence[str]) -> StandIns:
        """A stand-in for each special token that is spelt in the texts."""
        if self._special is None:
            return {}
        spelt = {match for text in texts for match in self._special.findall(text)}
        used = set("".join(texts)) if spelt else set[str]()
        private = (chr(code) for code in range(0xE000, 0xF900))
        free = (character for character in private if character not in used)
        return dict(zip(sorted(spelt, key=len, reverse=True), free, strict=False))

    def encode(self, text: str, stand_ins: StandIns) -> list[int]:
        """The tokens of rendered text."""
        if not stand_ins and not self.is_cut:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._encode_cut(text, stand_ins)

    def encode_with_offsets(self, text: str, stand_ins: StandIns) -> tuple[list[int], Offsets]:
        """The tokens of rendered text, and of which characters each is: from its first to behind its last."""
        names = str.maketrans({stand_in: token for token, stand_in in stand_ins.items()})
        ids: list[int] = []
        offsets: Offsets = []
        for encoding, piece, start in self._pieces(text, stand_ins):
            written = [index for index, character in enumerate(piece) for _ in character.translate(names)]
            written.append(len(piece))
            ids += encoding.ids
            reached = 0
            for first, last in encoding.offsets:  # some tokenizers leave white space out of them
                reached, begin = max(reached, last), min(first, reached)
                offsets.append((start + written[begin], start + written[max(last, begin + 1) - 1] + 1))
        return ids, offsets

    def _pieces(self, text: str, stand_ins: StandIns) -> Iterator[tuple[Encoding, str, int]]:
        """Text in pieces that are encoded one by one, and where they begin: all of it, if nothing stands in."""
        if not stand_ins or self._special is None:
            yield self._tokenizer.encode(text, add_special_tokens=False), text, 0
            return
        names = str.maketrans({stand_in: token for token, stand_in in stand_ins.items()})
        start = 0
        for match in self._special.finditer(text):
            piece = text[start : match.start()]
            yield self._plain.encode(piece.translate(names), add_special_tokens=False), piece, start
            yield self._tokenizer.encode(match[0], add_special_tokens=False), match[0], match.start()
            start = match.end()
        yield self._plain.encode(text[start:].translate(names), add_special_tokens=False), text[start:], start

    def _encode_cut(self, text: str, stand_ins: StandIns) -> list[int]:
        assert self._special is not None, "without special tokens nothing is cut"
        names = str.maketrans({stand_in: token for token, stand_in in stand_ins.items()})
        ids: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            ids += self._encode_between(text[start : match.start()].translate(names))
            ids.append(self._ids[match[0]])
            start = match.end()
        return ids + self._encode_between(text[start:].translate(names))

    def _encode_plain(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids if text else []

    @cached_property
    def is_cut(self) -> bool:
        """Whether special tokens cut a text: some tokenizers treat its beginning differently, or space beside them."""
        if self._special is None or not self._plain_cut:
            return False
        marker = next(iter(self._ids))
        probe = f"a b{marker}a  b\n\n{marker}\n\n a{marker} {marker}{marker}é"
        return self._encode_cut(probe, {}) == self._tokenizer.encode(probe, add_special_tokens=False).ids

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer, to which special tokens are text like any other."""
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain
