"""A tokenizer with real merges, trained here, and templates that do what those of well-known models do."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fwasync.data.chat import ChatTokenizer
from fwasync.data.messages import Message

CORPUS = [
    "the quick brown fox jumps over the lazy dog\n\n" * 4,
    "user\n\nassistant\nsystem\ntool\nfunction get_weather city temperature answer question think\n" * 4,
    '{"name": "get_weather", "arguments": {"city": "Ulm"}}\n' * 4,
    "Grüße, größer, naïve café, 北京, 😀😀 " * 4,
]

CHATML = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '</call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Each message between markers, and nothing that is written is ever changed."""

MARKED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
"""The same, and it marks what the assistant says."""

THINKING = """\
{%- set ns = namespace(asked=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.index0 > ns.asked %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Thinking is written after the last question only; what was thought before is dropped."""


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer(bpe: Tokenizer) -> Callable[..., ChatTokenizer]:
    @functools.cache
    def make(template: str, **variables: Any) -> ChatTokenizer:
        return ChatTokenizer(bpe, template, {"eos_token": "<|im_end|>"}, variables)

    return make


@pytest.fixture(scope="session")
def reference(bpe: Tokenizer) -> Callable[..., Any]:
    """What transformers makes of a template: its tokens, and with `mask` those that the template marks."""
    with warnings.catch_warnings():
        # transformers and what it imports deprecate parts of themselves.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")

    def apply(
        template: str, messages: Sequence[Message], *, prompt: bool = False, tools: Any = None, mask: bool = False
    ):
        rows = [message.to_openai() for message in messages]
        for row, message in zip(rows, messages, strict=True):
            for written, call in zip(row.get("tool_calls", ()), message.tool_calls, strict=True):
                written["function"]["arguments"] = call.arguments
        out = tokenizer.apply_chat_template(
            rows,
            chat_template=template,
            add_generation_prompt=prompt,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=mask,
        )
        return (out["input_ids"], out["assistant_masks"]) if mask else out["input_ids"]

    return apply
