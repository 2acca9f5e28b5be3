"""Tokens and weights are the template's: beside transformers, and by what a sampler would be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from fwasync.data.chat import ChatTokenizer
from fwasync.data.messages import Message, ToolCall
from fwasync.data.rendering import RenderRefusal
from unit.data.conftest import CHATML, MARKED, THINKING

Make = Callable[..., ChatTokenizer]

words = st.lists(st.sampled_from(["the", "fox", " ", "\n", "\n\n", "größer", "😀", "北京", "think", "'s", "  x", "é"]))
texts = words.map("".join)
chats = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts.filter(bool)),
    min_size=1,
    max_size=6,
)


asked = chats.map(lambda messages: [Message(m.role, f"a{m.content}") for m in messages])
"""No answer begins with white space, which could merge with the prompt's end."""


def answers(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == "assistant"]


def spans(tokenizer: ChatTokenizer, messages: Sequence[Message], trained: Sequence[int]) -> list[str]:
    """The texts of the stretches that have a weight."""
    tokens, weights = tokenizer.supervised(messages, trained)
    assert len(tokens) == len(weights)
    assert set(weights.tolist()) <= {0.0, 1.0}
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]])))
    return [tokenizer.decode_all(tokens[start:end]) for start, end in edges.reshape(-1, 2)]


def turns(*given: tuple[str, str]) -> list[Message]:
    return [Message(role, text) for role, text in given]


LONG = turns(
    ("system", "s"), ("user", "the"), ("assistant", "fox\n"), ("user", "x"), ("assistant", " dog"), ("user", "y")
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(messages=chats, prompt=st.booleans())
def test_tokens_are_those_of_transformers(
    messages: list[Message], prompt: bool, chat_tokenizer: Make, reference: Callable[..., Any]
) -> None:
    for template in (CHATML, MARKED, THINKING):
        tokenizer = chat_tokenizer(template)
        tokens = tokenizer.render(messages, add_generation_prompt=prompt)
        assert tokens == reference(template, messages, prompt=prompt)
        assert tokens == tokenizer.template_tokens(messages, add_generation_prompt=prompt)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(messages=chats.filter(answers))
def test_marked_weights_are_those_of_transformers(
    messages: list[Message], chat_tokenizer: Make, reference: Callable[..., Any]
) -> None:
    tokens, weights = chat_tokenizer(MARKED).supervised(messages, answers(messages))
    ids, mask = reference(MARKED, messages, mask=True)
    assert tokens.tolist() == ids
    assert weights.tolist() == mask


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(messages=asked.filter(answers), data=st.data())
def test_marks_and_rendering_show_the_same(messages: list[Message], data: st.DataObject, chat_tokenizer: Make) -> None:
    trained = data.draw(st.lists(st.sampled_from(answers(messages)), unique=True))
    marked, shown = (chat_tokenizer(template).supervised(messages, trained) for template in (MARKED, CHATML))
    assert marked[0].tolist() == shown[0].tolist()
    assert marked[1].tolist() == shown[1].tolist()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(messages=asked.filter(answers))
def test_before_an_answer_is_exactly_its_prompt(messages: list[Message], chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(CHATML)
    for index in answers(messages):
        tokens, weights = tokenizer.supervised(messages, [index])
        start, *_, end = np.flatnonzero(weights).tolist()
        assert tokens[:start].tolist() == tokenizer.render(messages[:index], add_generation_prompt=True)
        assert tokenizer.decode_all(tokens[start : end + 1]) == f"{messages[index].content}<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_what_is_asked_for_has_a_weight(chat_tokenizer: Make, template: str) -> None:
    tokenizer = chat_tokenizer(template)
    assert spans(tokenizer, LONG, [2, 4]) == ["fox\n<|im_end|>", " dog<|im_end|>"]
    assert spans(tokenizer, LONG, [4]) == [" dog<|im_end|>"]
    assert spans(tokenizer, LONG, [2]) == ["fox\n<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_end|>", "<|im_start|>é<|im_end|>\n", "<|im_<|im_end|>end|>"])
def test_an_answer_that_spells_special_tokens_is_trained_on_as_text(
    chat_tokenizer: Make, template: str, text: str
) -> None:
    tokenizer = chat_tokenizer(template)
    messages = turns(("user", text), ("assistant", text), ("user", "x"), ("assistant", f"y{text}"))
    assert spans(tokenizer, messages, [1, 3]) == [f"{text}<|im_end|>", f"y{text}<|im_end|>"]
    tokens, _ = tokenizer.supervised(messages, [1, 3])
    markers = [token for token in tokens.tolist() if token in (0, 1)]
    assert markers == [0, 1] * 4


def test_offsets_without_white_space_mark_the_same(bpe: Tokenizer, chat_tokenizer: Make) -> None:
    trimming = Tokenizer.from_str(bpe.to_str())
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = turns(("user", "x"), ("assistant", " \n\n "), ("user", " "), ("assistant", " é the\n"))
    found = ChatTokenizer(trimming, MARKED, {}).supervised(messages, [1, 3])
    expected = chat_tokenizer(MARKED).supervised(messages, [1, 3])
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(messages=chats, text=texts.filter(bool))
def test_a_last_answer_follows_its_prompt_whatever_it_begins_with(
    messages: list[Message], text: str, chat_tokenizer: Make
) -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokens, weights = tokenizer.supervised([*messages, Message("assistant", text)], [len(messages)])
    start, *_, end = np.flatnonzero(weights).tolist()
    assert tokens[:start].tolist() == tokenizer.render(messages, add_generation_prompt=True)
    assert tokenizer.decode_all(tokens[start : end + 1]) == f"{text}<|im_end|>"


def test_an_earlier_answer_that_merges_with_its_prompt_is_refused(chat_tokenizer: Make) -> None:
    messages = turns(("user", "x"), ("assistant", "\n\nfox"), ("user", "y"), ("assistant", "\n\n<|im_end|>"))
    with pytest.raises(
        RenderRefusal, match=r"white space at the end of its prompt becomes another .* comes '\\n', and then"
    ):
        chat_tokenizer(CHATML).supervised(messages, [1, 3])
    assert spans(chat_tokenizer(CHATML), messages, [3]) == ["\n\n<|im_end|><|im_end|>"]


def test_past_thinking_is_refused_until_the_row_is_split(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(THINKING)
    messages = [
        Message("user", "the"),
        Message("assistant", "fox", thinking="quick"),
        Message("user", "dog"),
        Message("assistant", "lazy", thinking="brown"),
    ]
    with pytest.raises(RenderRefusal, match=r"writes it differently .* split the row") as caught:
        tokenizer.supervised(messages, [1, 3])
    assert caught.value.field == "messages[1]"
    assert spans(tokenizer, messages, [3]) == ["<think>\nbrown\n</think>\n\nlazy<|im_end|>"]
    assert spans(tokenizer, messages[:2], [1]) == ["<think>\nquick\n</think>\n\nfox<|im_end|>"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Message("assistant", "fox", thinking="quick"), "does not write what the assistant thinks"),
        (Message("assistant", "fox", tool_calls=(ToolCall("get_weather", {}),)), "not write what the assistant calls"),
    ],
)
def test_what_no_template_writes_is_refused(chat_tokenizer: Make, answer: Message, told: str) -> None:
    messages = [Message("user", "the"), answer]
    for template in (MARKED, CHATML.replace("message.tool_calls", "[]")):
        with pytest.raises(RenderRefusal, match=told) as caught:
            chat_tokenizer(template).supervised(messages, [1])
        assert caught.value.field == "messages[1]"
        assert chat_tokenizer(template).render(messages)


def test_tools_and_their_calls_reach_the_template(chat_tokenizer: Make, reference: Callable[..., Any]) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "description": "<|im_end|>"}}
    call = ToolCall("get_weather", {"city": "Ulm", "unit": ["C"]}, "call_1")
    messages = [
        Message("user", "the"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "21", tool_call_id="call_1", name="get_weather"),
        Message("assistant", "temperature 21"),
    ]
    tokenizer = chat_tokenizer(CHATML)
    assert spans(tokenizer, messages, [1, 3])[0] == (
        '<call>{"name": "get_weather", "arguments": {"city": "Ulm", "unit": ["C"]}}</call><|im_end|>'
    )
    assert tokenizer.render(messages) == reference(CHATML, messages)
    tokens = tokenizer.render(messages, tools=[tool])
    assert tokenizer.decode_all(tokens) == tokenizer.decode_all(reference(CHATML, messages, tools=[tool]))
    assert tokens.count(1) == 1 + len(messages)  # a tool's text is no marker


def test_a_template_that_marks_something_else_is_refused(chat_tokenizer: Make) -> None:
    once = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    with pytest.raises(RenderRefusal, match=r"marks 1 answers with .* and there are 2"):
        chat_tokenizer(once).supervised(LONG, [2])


def test_variables_reach_the_template(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer("{{ 'no' if enable_thinking is false else 'yes' }}", enable_thinking=False)
    assert tokenizer.decode(tokenizer.render(LONG)) == "no"


def test_the_characters_of_the_marks_are_refused_in_texts(chat_tokenizer: Make) -> None:
    with pytest.raises(RenderRefusal, match=r"U\+FDD0"):
        chat_tokenizer(MARKED).render(turns(("user", "a\ufdd0b")))


def test_text_is_encoded_as_it_stands(chat_tokenizer: Make) -> None:
    assert chat_tokenizer(CHATML).encode("<|im_start|><|im_end|>") == [0, 1]
