"""`TextGuard`: rendered text to tokens, so that only the template writes special tokens.

Where a message spells a special token, such as `<|end|>`, a stand-in takes the token's place before the template sees
the message: a character that no message has. It is written out again when the rendered text is encoded, as plain text.

Invariants
    * Text of a message never becomes a special token.
    * Text without stand-ins gets exactly the tokens that the tokenizer gives to the whole of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from tokenizers import Encoding, Tokenizer

__all__ = ("StandIns", "TextGuard", "map_texts")

StandIns = dict[str, str]
"""For special tokens that are spelt somewhere, longest first: their stand-ins."""

Offsets = list[tuple[int, int]]


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
        special = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special)
        texts = sorted(special.values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

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
        if not stand_ins:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return [id for encoding, _, _ in self._pieces(text, stand_ins) for id in encoding.ids]

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

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer, to which special tokens are text like any other."""
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain
