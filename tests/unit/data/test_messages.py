"""Messages: the many ways in which they are written, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fwasync.data.messages import Message, ToolCall, normalize_messages, read_messages, read_tools
from fwasync.errors import UsageError

SAY: dict[str, Any] = {"role": "assistant", "content": "x"}
CALL = ToolCall("f", {"a": [1, "é"]}, "call_1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "user", "content": None}, Message("user", "")),
        ({"role": "developer", "content": "be brief"}, Message("developer", "be brief")),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            Message("user", "ab"),
        ),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "b"}]},
            Message("assistant", "b", thinking="t"),
        ),
        (SAY | {"reasoning_content": "c"}, Message("assistant", "x", thinking="c")),
        (SAY | {"reasoning_content": "c", "reasoning": "r"}, Message("assistant", "x", thinking="r")),
        (SAY | {"reasoning": "r", "thinking": "t"}, Message("assistant", "x", thinking="t")),
        (SAY | {"reasoning": None, "reasoning_content": "c"}, Message("assistant", "x", thinking="c")),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "part"}], "thinking": "key"},
            Message("assistant", "", thinking="part"),
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "args": {"a": [1, "é"]}, "id": "call_1"}]},
            Message("assistant", "", tool_calls=(CALL,)),
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": '{"a": [1, "é"]}'}},
                    {"function": {"name": "g", "arguments": {}}},
                    {"name": "h"},
                ],
            },
            Message("assistant", "", tool_calls=(CALL, ToolCall("g", {}), ToolCall("h", {}))),
        ),
        (
            {"role": "tool", "content": "21", "tool_call_id": "call_1", "name": "f"},
            Message("tool", "21", tool_call_id="call_1", name="f"),
        ),
        (SAY | {"weight": 0}, Message("assistant", "x", trainable=False)),
        (SAY | {"weight": 1.0}, Message("assistant", "x", trainable=True)),
        (SAY | {"weight": 0, "trainable": True}, Message("assistant", "x", trainable=True)),
        (SAY | {"weight": None, "trainable": None, "name": None, "tool_calls": None}, Message("assistant", "x")),
    ],
)
def test_every_way_of_writing_comes_to_one(given: dict[str, Any], expected: Message) -> None:
    assert normalize_messages([given]) == (expected,)


@pytest.mark.parametrize(
    ("given", "field", "reason"),
    [
        (SAY | {"reasoning": 3}, "messages[0].reasoning", "it is a number; it must be a string"),
        (SAY | {"thinking": "t", "reasoning_content": []}, "messages[0].reasoning_content", "it is a list"),
        (SAY | {"weight": 0.5}, "messages[0].weight", "0.5 is not a weight of a message; it must be 0 or 1"),
        (SAY | {"weight": True}, "messages[0].weight", "True is not a weight"),
        (SAY | {"weight": "1"}, "messages[0].weight", "'1' is not a weight"),
        (SAY | {"trainable": 1}, "messages[0].trainable", "it is a number; it must be true or false"),
        (SAY | {"name": 1}, "messages[0].name", "it is a number"),
        (SAY | {"function_call": {}}, "messages[0].function_call", "it is not understood; a message has content, name"),
        (SAY | {"tool_calls": {}}, "messages[0].tool_calls", "it is an object; it must be a list"),
        (SAY | {"tool_calls": [{}]}, "messages[0].tool_calls[0]", "it names no tool"),
        (SAY | {"tool_calls": ["f"]}, "messages[0].tool_calls[0]", "it names no tool"),
        (SAY | {"tool_calls": [{"name": "f", "args": "{"}]}, "messages[0].tool_calls[0]", "its arguments must be"),
        (SAY | {"tool_calls": [{"name": "f", "args": "[1]"}]}, "messages[0].tool_calls[0]", "its arguments must be"),
        (SAY | {"tool_calls": [{"name": "f", "id": 1}]}, "messages[0].tool_calls[0].id", "it is a number"),
        ({"role": "user", "content": "x", "thinking": "t"}, "messages[0]", "only the assistant thinks and calls tools"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]",
            "it is not a part of type 'text' or 'thinking'; others, images too, are not read",
        ),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]", "it is not a part of type"),
        ({"role": "assistant", "content": []}, "messages[0].content", "the assistant's answer is empty"),
    ],
)
def test_what_is_not_understood_is_refused(given: dict[str, Any], field: str, reason: str) -> None:
    _, faults = read_messages([given], "messages")
    assert [name for name, _ in faults] == [field]
    assert faults[0][1].startswith(reason)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        normalize_messages([{"role": "bot", "content": 1}, SAY, "x"])
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "messages[0].role",
        "messages[0].content",
        "messages[2]",
    ]


def test_the_form_of_the_openai_api_comes_back() -> None:
    messages = (
        Message("assistant", "x", thinking="t", tool_calls=(CALL,)),
        Message("tool", "21", tool_call_id="call_1", name="f"),
    )
    written = [message.to_openai() for message in messages]
    assert json.loads(written[0]["tool_calls"][0]["function"]["arguments"]) == CALL.arguments
    assert normalize_messages(json.loads(json.dumps(written))) == messages


def test_tools_are_objects_in_a_list() -> None:
    assert read_tools(None, "tools") == ((), [])
    assert read_tools([{"name": "f"}], "tools") == (({"name": "f"},), [])
    assert read_tools({}, "tools")[1] == [("tools", "it is an object; it must be a list of tools")]
