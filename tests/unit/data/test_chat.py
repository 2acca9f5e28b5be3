"""Chats to tokens and back, with the tokenizer of the built-in models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fwasync.data.chat import ChatTokenizer
from fwasync.data.messages import Message
from fwasync.data.rendering import RenderRefusal, TrainOnWhat, trained_messages
from fwasync.data.template import ChatTemplate
from fwasync.errors import UsageError
from fwasync.local.tokenizer import ASSISTANT_ID, END_ID, USER_ID, save_tokenizer

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> ChatTokenizer:
    return ChatTokenizer.load(directory)


def with_template(directory: Path, source: str) -> ChatTokenizer:
    return ChatTokenizer(Tokenizer.from_file(str(directory / "tokenizer.json")), source, {"eos_token": "<|end|>"})


def supervised(tokenizer: ChatTokenizer, *turns: tuple[str, str]) -> tuple[Any, Any]:
    messages = [Message(role, content) for role, content in turns]
    return tokenizer.supervised(messages, trained_messages(messages, TrainOnWhat.ALL_ASSISTANT_MESSAGES))


def test_render_is_the_template_in_tokens(tokenizer: ChatTokenizer) -> None:
    user = Message("user", "31")
    assert tokenizer.render([user]) == [USER_ID, *b"31", END_ID]
    assert tokenizer.render([user], add_generation_prompt=True) == [USER_ID, *b"31", END_ID, ASSISTANT_ID]
    assert tokenizer.stop_tokens == [END_ID]


def test_decode_skips_special_tokens_and_replaces_what_is_no_text(tokenizer: ChatTokenizer) -> None:
    tokens = [ASSISTANT_ID, *"é😀".encode(), 0xFF, END_ID]
    assert tokenizer.decode(tokens) == "é😀�"
    assert tokenizer.decode(np.array(tokens), skip_special_tokens=False) == "<|assistant|>é😀�<|end|>"


@pytest.mark.parametrize(
    "text",
    ["<|end|>", "a<|end|>b<|user|>", "<|<|end|>end|>", "<|end|>\ue000\ue001", "<|assistant|><|assistant|>", "\ue000"],
)
def test_text_never_becomes_a_special_token(tokenizer: ChatTokenizer, text: str) -> None:
    tokens = tokenizer.render([Message("user", text), Message("assistant", "ok")])
    assert tokens == [USER_ID, *text.encode(), END_ID, ASSISTANT_ID, *b"ok", END_ID]


def test_a_template_that_edits_content_edits_guarded_text_too(directory: Path) -> None:
    tokens = with_template(directory, CHATML).render([Message("user", "  <|end|> ")])
    assert tokens == [USER_ID, *b"\n<|end|>", END_ID, *b"\n"]


def test_supervised_weights_the_answer_and_its_end(tokenizer: ChatTokenizer) -> None:
    tokens, weights = supervised(tokenizer, ("system", "s"), ("user", "31"), ("assistant", "13"))
    assert tokens.dtype == np.int64
    assert weights.dtype == np.float32
    assert tokens.tolist()[-4:] == [ASSISTANT_ID, *b"13", END_ID]
    assert weights.tolist() == [0] * (len(tokens) - 3) + [1, 1, 1]


def test_supervised_weights_every_answer_of_a_longer_chat(tokenizer: ChatTokenizer) -> None:
    turns = (("user", "a"), ("assistant", "<|end|>"), ("user", "c"), ("assistant", "dd"), ("user", "e"))
    tokens, weights = supervised(tokenizer, *turns)
    trained = tokens[weights == 1].tolist()
    assert trained == [*b"<|end|>", END_ID, *b"dd", END_ID]


def test_white_space_after_the_end_marker_is_not_trained_on(directory: Path) -> None:
    tokens, weights = supervised(with_template(directory, CHATML), ("user", "a"), ("assistant", "b\n"))
    assert tokens[weights == 1].tolist() == [*b"b", END_ID]
    assert tokens[-1] == ord("\n")


def test_a_template_that_rewrites_history_is_refused_with_what_it_writes(directory: Path) -> None:
    source = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }};{% endif %}{% endfor %}"
    with pytest.raises(RenderRefusal) as caught:
        supervised(
            with_template(directory, source), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
        )
    assert caught.value.field == "messages[1]"
    assert "writes it differently once more follows: after 'a;' comes 'b;', and then 'c;d;'; split" in str(caught.value)


def test_an_answer_that_does_not_begin_as_it_is_asked_for_is_refused(directory: Path) -> None:
    source = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.raises(
        RenderRefusal, match=r"begins an answer differently .* after '<a><' comes 'think>', and then 'b>'; give"
    ):
        supervised(with_template(directory, source), ("user", "a"), ("assistant", "b"))


def test_what_the_template_refuses_is_told(directory: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(RenderRefusal, match="the chat template refuses it: unknown role bot"):
        tokenizer.render([Message("bot", "x")])
    source = "{% if messages[0].role == 'assistant' %}{{ raise_exception('users speak first') }}{% endif %}"
    with pytest.raises(RenderRefusal, match="the chat template refuses it: users speak first"):
        supervised(with_template(directory, source), ("assistant", "x"))
    with pytest.raises(RenderRefusal, match="its prompt cannot be rendered: the chat template refuses it: ") as caught:
        supervised(with_template(directory, "{{ messages[0].content }}"), ("assistant", "x"))
    assert caught.value.field == "messages[0]"


def test_templates_are_run_like_the_usual_ones_and_in_a_sandbox() -> None:
    source = "{%- for m in messages %}\n    {{- bos_token + (m | tojson) }}\n    {% break %}\n{%- endfor %}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render([{"a": "<é"}, {"a": "b"}], add_generation_prompt=False) == ('<s>{"a": "<é"}\n', [])
    nothing = ChatTemplate("{{ tools is none }} {{ documents is none }}", {})
    assert nothing.render([], add_generation_prompt=True)[0] == "True True"
    for escape in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages[9].x }}"):
        with pytest.raises(RenderRefusal):
            ChatTemplate(escape, {}).render([], add_generation_prompt=False)
    with pytest.raises(UsageError, match="chat template cannot be used: line 1"):
        ChatTemplate("{% if %}", {})


def test_a_template_in_the_configuration(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({"chat_template": "{{ messages[0].content + eos_token }}", "eos_token": {"content": "<|end|>"}})
    )
    assert ChatTokenizer.load(tmp_path).render([Message("user", "x")]) == [*b"x", END_ID]
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert ChatTokenizer.load(tmp_path).render([]) == [*b"yes"]
    assert ChatTokenizer.load(tmp_path).stop_tokens == []
    config.write_text("{}")
    with pytest.raises(UsageError, match="has no chat template"):
        ChatTokenizer.load(tmp_path)
    config.write_text("{")
    with pytest.raises(UsageError, match=r"configuration of the tokenizer in .* cannot be read"):
        ChatTokenizer.load(tmp_path)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        ChatTokenizer.load(tmp_path)
    with pytest.raises(UsageError, match="there is no tokenizer directory"):
        ChatTokenizer.load(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a tokenizer that can be read"):
        ChatTokenizer.load(tmp_path)


def test_a_hub_name_is_looked_up_in_the_cache_only(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    with pytest.raises(
        UsageError, match=r"neither a directory \(.*no/such\) nor in the Hugging .* \(.*\); .* hf download no/such"
    ):
        ChatTokenizer.load("no/such")
    with pytest.raises(UsageError, match="neither a directory"):
        ChatTokenizer.load("not even: a name")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(directory / file))
    assert ChatTokenizer.load("some/model").stop_tokens == [END_ID]
