"""The byte-level tokenizer and its chat template."""

from __future__ import annotations

import warnings

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from fwasync.local.tokenizer import (
    ASSISTANT_ID,
    END_ID,
    END_OF_TEXT_ID,
    SPECIAL_TOKENS,
    STOP_TOKEN_IDS,
    SYSTEM_ID,
    TOOL_ID,
    USER_ID,
    VOCAB_SIZE,
    build_tokenizer,
    save_tokenizer,
)

TEXTS = ["", "31524", "two  spaces\n\ttab", "naïve Ωμέγα 日本語", "👩‍🚀🏳️‍🌈", "\x00\x01\x7f\x00", "<|user", " "]


@pytest.mark.parametrize("text", TEXTS)
def test_a_token_is_a_byte_and_text_survives_the_round_trip(text):
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_ids_that_the_constants_say():
    tokenizer = build_tokenizer()
    named = {
        "<|endoftext|>": END_OF_TEXT_ID,
        "<|system|>": SYSTEM_ID,
        "<|user|>": USER_ID,
        "<|assistant|>": ASSISTANT_ID,
        "<|end|>": END_ID,
        "<|tool|>": TOOL_ID,
    }
    assert {name: tokenizer.token_to_id(name) for name in named} == named
    assert [tokenizer.id_to_token(256 + index) for index in range(8)] == list(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert VOCAB_SIZE % 8 == 0
    assert set(STOP_TOKEN_IDS) == {END_ID, END_OF_TEXT_ID}


def test_bytes_that_are_no_text_decode_to_the_replacement_character():
    assert build_tokenizer().decode([0xFF, 0x41, 0xC3]) == "\ufffdA\ufffd"


def test_untrusted_text_can_be_kept_from_spelling_special_tokens():
    tokenizer = build_tokenizer()
    assert tokenizer.encode("<|end|>").ids == [END_ID]
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<|end|>").ids == list(b"<|end|>")


def test_the_saved_file_loads_as_an_equal_tokenizer(tmp_path):
    directory = tmp_path / "made" / "on demand"
    save_tokenizer(directory)
    loaded = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "<|user|>héllo\x00<|end|>"
    assert loaded.encode(text).ids == build_tokenizer().encode(text).ids
    assert loaded.get_vocab() == build_tokenizer().get_vocab()


@pytest.fixture(scope="module")
def auto_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    with warnings.catch_warnings():
        # transformers and what it imports deprecate parts of themselves.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory)


def test_transformers_loads_it_with_the_same_ids(auto_tokenizer):
    for text in TEXTS:
        ids = auto_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == list(text.encode())
        assert auto_tokenizer.decode(ids) == text
    assert auto_tokenizer.eos_token_id == END_ID
    assert auto_tokenizer.pad_token_id == END_OF_TEXT_ID
    assert len(auto_tokenizer) == VOCAB_SIZE


def test_the_chat_template_writes_role_content_end(auto_tokenizer):
    messages = [
        {"role": "system", "content": "Sort.\n"},
        {"role": "user", "content": " 315 "},
        {"role": "assistant", "content": "135"},
        {"role": "tool", "content": ""},
    ]
    text = auto_tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == ("<|system|>Sort.\n<|end|><|user|> 315 <|end|><|assistant|>135<|end|><|tool|><|end|>")
    ids = auto_tokenizer.apply_chat_template(messages[1:2], add_generation_prompt=True)["input_ids"]
    assert ids == [USER_ID, *b" 315 ", END_ID, ASSISTANT_ID]


def test_the_chat_template_refuses_an_unknown_role(auto_tokenizer):
    with pytest.raises(TemplateError, match="unknown role robot: use system, user, assistant"):
        auto_tokenizer.apply_chat_template([{"role": "robot", "content": "x"}])
