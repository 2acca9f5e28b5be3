"""Messages: one normal form for the many ways in which chats are written down.

| written as | becomes |
|---|---|
| `content: null`, or none beside tool calls | `""` |
| `content` in parts of type `text` and `thinking` | their texts, joined: `content` and `thinking` |
| `thinking`, `reasoning`, `reasoning_content` beside the content | `thinking`; parts win, then keys in this order |
| `tool_calls` as OpenAI has them, or as `{name, args}` | `ToolCall`s with arguments as an object |
| `weight` 0 or 1 | `trainable`, where that is not given itself |

Invariants
    * What is not understood is refused, never dropped: it would ask for something that is not done.
    * All faults of a conversation are found, each with its field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from fwasync.errors import UsageError

__all__ = ("ROLES", "Fault", "Message", "ToolCall", "kind_of", "normalize_messages", "read_messages", "read_tools")

ROLES = ("system", "user", "assistant", "tool", "developer")

Fault = tuple[str, str]
"""A field, such as `messages[1].role`, and what is wrong with it."""

_REASONING = ("thinking", "reasoning", "reasoning_content")
_FIELDS = frozenset({"role", "content", *_REASONING, "tool_calls", "tool_call_id", "name", "trainable", "weight"})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the assistant."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat.

    Attributes:
        role: One of `ROLES`.
        content: Its text.
        thinking: What the assistant thought before it.
        tool_calls: What the assistant calls.
        tool_call_id: Of a tool's message: the call that it answers.
        name: Of a tool's message: the tool; of others: who speaks.
        trainable: Whether it is to be trained on, if that was said of it.
    """

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    trainable: bool | None = None

    def to_openai(self) -> dict[str, Any]:
        """The message as the OpenAI API has it: arguments are JSON, thinking is `reasoning_content`."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking:
            fields["reasoning_content"] = self.thinking
        if self.tool_calls:
            fields["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.name, "arguments": orjson.dumps(call.arguments).decode()},
                }
                for call in self.tool_calls
            ]
        named = {"tool_call_id": self.tool_call_id, "name": self.name}
        return fields | {key: value for key, value in named.items() if value is not None}


def normalize_messages(messages: Sequence[object]) -> tuple[Message, ...]:
    """Messages in the normal form, from dictionaries as they come from JSON.

    Raises:
        UsageError: Faulty ones; all that is wrong is told.
    """
    found, faults = read_messages(list(messages), "messages")
    if faults:
        raise UsageError("\n".join(f"{field}: {reason}" for field, reason in faults))
    return found


def read_messages(given: object, field: str) -> tuple[tuple[Message, ...], list[Fault]]:
    """Messages from decoded JSON, and what is wrong with them; `field` is what they are called in faults."""
    if not isinstance(given, list):
        return (), [(field, f"it is {kind_of(given)}; it must be a list")]
    if not given:
        return (), [(field, "it is empty")]
    messages: list[Message] = []
    faults: list[Fault] = []
    for index, item in enumerate(cast("list[object]", given)):
        found = list(_read_message(item, f"{field}[{index}]"))
        faults.extend(fault for fault in found if not isinstance(fault, Message))
        messages.extend(message for message in found if isinstance(message, Message))
    return tuple(messages), faults


def read_tools(given: object, field: str) -> tuple[tuple[dict[str, Any], ...], list[Fault]]:
    """The tools that a conversation may use, from decoded JSON: objects, handed to the chat template as they are."""
    if given is None:
        return (), []
    if not isinstance(given, list):
        return (), [(field, f"it is {kind_of(given)}; it must be a list of tools")]
    tools = cast("list[object]", given)
    faults = [
        (f"{field}[{index}]", f"it is {kind_of(tool)}; a tool is an object")
        for index, tool in enumerate(tools)
        if not isinstance(tool, dict)
    ]
    return tuple(cast("dict[str, Any]", tool) for tool in tools if isinstance(tool, dict)), faults


def kind_of(value: object) -> str:
    """What a value of decoded JSON is, in words."""
    if value is None:
        return "null"
    kinds = (
        (bool, "a boolean"),
        (int | float, "a number"),
        (str, "a string"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next(name for kind, name in kinds if isinstance(value, kind))


def _read_message(item: object, field: str) -> Iterator[Message | Fault]:
    """Either the message, or everything that is wrong with it."""
    if not isinstance(item, dict):
        yield field, f"it is {kind_of(item)}; it must be an object with role and content"
        return
    fields = cast("dict[str, Any]", item)
    faults: list[Fault] = []

    def fault(name: str, reason: str) -> None:
        faults.append((field + name, reason))

    role = fields.get("role")
    if "role" not in fields:
        fault(".role", "it is missing")
    elif role not in ROLES:
        fault(".role", f"{role!r} is not a role; use {', '.join(ROLES)}")
    calls = _read_calls(fields.get("tool_calls"), fault)
    text, thought = _read_content(fields, fault, optional=bool(calls))
    thinking = _first_reasoning(fields, fault) if thought is None else thought
    message = Message(
        role=role if isinstance(role, str) else "",
        content=text,
        thinking=thinking,
        tool_calls=calls,
        tool_call_id=_optional_text(fields, "tool_call_id", fault),
        name=_optional_text(fields, "name", fault),
        trainable=_read_trainable(fields, fault),
    )
    if role == "assistant" and not (faults or text or thinking or calls):
        fault(".content", "the assistant's answer is empty")
    if role != "assistant" and (thinking or calls):
        fault("", "only the assistant thinks and calls tools")
    for name in fields.keys() - _FIELDS:
        fault(f".{name}", f"it is not understood; a message has {', '.join(sorted(_FIELDS))}")
    if faults:
        yield from faults
    else:
        yield message


_Tell = Callable[[str, str], None]


def _read_content(fields: dict[str, Any], fault: _Tell, *, optional: bool) -> tuple[str, str | None]:
    """The text of a message, and what its parts think, if they do."""
    content = fields.get("content")
    if "content" not in fields and not optional:
        fault(".content", "it is missing")
    if content is None or isinstance(content, str):
        return content or "", None
    if not isinstance(content, list):
        fault(".content", f"it is {kind_of(content)}; it must be a string, or a list of parts")
        return "", None
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for index, part in enumerate(cast("list[object]", content)):
        given = cast("dict[str, object]", part) if isinstance(part, dict) else {}
        kind = given.get("type")
        if kind not in ("text", "thinking"):
            fault(
                f".content[{index}]", "it is not a part of type 'text' or 'thinking'; others, images too, are not read"
            )
        elif not isinstance(text := given.get(kind), str):
            fault(f".content[{index}].{kind}", f"it is {kind_of(text)}; it must be a string")
        else:
            texts[kind].append(text)
    return "".join(texts["text"]), "".join(texts["thinking"]) or None


def _first_reasoning(fields: dict[str, Any], fault: _Tell) -> str:
    given = {name: fields[name] for name in _REASONING if fields.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            fault(f".{name}", f"it is {kind_of(value)}; it must be a string")
    return next((value for value in given.values() if isinstance(value, str)), "")


def _optional_text(fields: dict[str, Any], name: str, fault: _Tell) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    fault(f".{name}", f"it is {kind_of(value)}; it must be a string")
    return None


def _read_trainable(fields: dict[str, Any], fault: _Tell) -> bool | None:
    trainable, weight = fields.get("trainable"), fields.get("weight")
    if trainable is not None and not isinstance(trainable, bool):
        fault(".trainable", f"it is {kind_of(trainable)}; it must be true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        fault(".weight", f"{weight!r} is not a weight of a message; it must be 0 or 1")
    return trainable if isinstance(trainable, bool) else None if weight is None else bool(weight)


def _read_calls(given: object, fault: _Tell) -> tuple[ToolCall, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        fault(".tool_calls", f"it is {kind_of(given)}; it must be a list")
        return ()
    calls: list[ToolCall] = []
    for index, item in enumerate(cast("list[object]", given)):
        where = f".tool_calls[{index}]"
        call = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        function = cast("dict[str, Any]", call["function"] if isinstance(call.get("function"), dict) else call)
        name, id = function.get("name"), call.get("id")
        arguments = _read_arguments(function.get("arguments", function.get("args", "{}")))
        if not isinstance(name, str) or not name:
            fault(where, "it names no tool; a call is {name, args}, or {type, id, function: {name, arguments}}")
        elif arguments is None:
            fault(where, "its arguments must be an object, or the JSON of one")
        elif id is not None and not isinstance(id, str):
            fault(f"{where}.id", f"it is {kind_of(id)}; it must be a string")
        else:
            calls.append(ToolCall(name, arguments, id))
    return tuple(calls)


def _read_arguments(given: object) -> dict[str, Any] | None:
    if isinstance(given, str):
        try:
            given = orjson.loads(given)
        except orjson.JSONDecodeError:
            return None
    return cast("dict[str, Any]", given) if isinstance(given, dict) else None
