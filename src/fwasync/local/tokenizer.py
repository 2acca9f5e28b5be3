"""The byte-level tokenizer of the built-in base models, and its chat template.

Token i below 256 is the byte i; text needs no merges, no download and no unknown token, and any
string (emoji and NUL included) survives a round trip. Above the bytes come the special tokens.
The vocabulary is a multiple of eight long, which the two reserved tokens see to.

A conversation is written `<|role|>content<|end|>` for each message, and `<|assistant|>` where
the model is to speak. Two things to know: text that spells a special token is encoded as that
token (set `encode_special_tokens` on the tokenizer for text that is not trusted), and sampled
bytes need not be valid UTF-8 (`decode` replaces what is not).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

__all__ = (
    "ASSISTANT_ID",
    "CHAT_TEMPLATE",
    "END_ID",
    "END_OF_TEXT_ID",
    "SPECIAL_TOKENS",
    "STOP_TOKEN_IDS",
    "SYSTEM_ID",
    "TOOL_ID",
    "USER_ID",
    "VOCAB_SIZE",
    "build_tokenizer",
    "save_tokenizer",
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|tool|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
)
"""Special tokens in the order of their ids, from 256 upwards."""

END_OF_TEXT_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID, END_ID, TOOL_ID = range(256, 262)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
STOP_TOKEN_IDS = (END_ID, END_OF_TEXT_ID)
"""The end of a turn (the tokenizer's eos) and the end of a text (its padding)."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role ' ~ message['role'] ~ ': use system, user, assistant or tool') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
"""Jinja source; its environment must offer `raise_exception`, as the usual ones do."""

_MAX_LENGTH = 1_000_000


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte, by byte value.

    This is the alphabet which the ByteLevel pre-tokenizer emits: a byte that is a printable
    Latin-1 character stands for itself, the others take the code points from 256 upwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer; every call returns a new object with equal ids."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    # The stubs of tokenizers leave the element type of this list open.
    tokenizer.add_special_tokens(specials)  # pyright: ignore[reportUnknownMemberType]
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a directory.

    The directory is made if it is missing. The result loads with `Tokenizer.from_file` and with
    the `AutoTokenizer` of transformers, without a network.
    """
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL_TOKENS[END_ID - 256],
        "pad_token": SPECIAL_TOKENS[END_OF_TEXT_ID - 256],
        "padding_side": "right",
        "additional_special_tokens": [
            token for index, token in enumerate(SPECIAL_TOKENS, start=256) if index not in STOP_TOKEN_IDS
        ],
    }
    config_text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(config_text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
