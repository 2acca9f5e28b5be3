"""Preferences: of two answers the better one, from JSONL files of three forms.

| form | a row |
|---|---|
| A | `{"chosen": side, "rejected": side}`, a side being `{"messages": […]}` or `{"text": "…"}` |
| B | `{"samples": [sample, sample]}`: sides with `"evals": {"score": 1.0}` (chosen) and `{"score": 0.0}` (rejected) |
| C | `{"input": …, "preferred_output": …, "non_preferred_output": …}`: messages or text; input may be an object, too |

Each may have `tools`. A text side is encoded as it stands, special tokens where it spells them.

Invariants
    * A file is read strictly: keys that are not understood, sides that are missing or given twice, scores that are
      neither 0 nor 1 are refused, all with line and field.
    * What can be read but not be used, such as pairs that are too long, is left out and told, with its cause.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from fwasync.data.jsonl import JsonRow
from fwasync.data.messages import Fault, Message, kind_of, read_messages, read_tools

__all__ = ("Preference", "Side", "read_preference")

Side = tuple[Message, ...] | str
"""A conversation that ends with an answer, or a text."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A row of a file: two sides, its line in the file, counted from 1, and the tools that the assistant may use."""

    chosen: Side
    rejected: Side
    line: int
    tools: tuple[dict[str, Any], ...] = ()


def read_preference(row: JsonRow, line: int) -> Preference | list[Fault]:
    """A row of any of the three forms as a preference, or what is wrong with it."""
    if row.keys() & {"chosen", "rejected"}:
        known, read = {"chosen", "rejected"}, _read_chosen_rejected
    elif "samples" in row:
        known, read = {"samples"}, _read_samples
    elif row.keys() & {"preferred_output", "non_preferred_output"}:
        known, read = {"input", "preferred_output", "non_preferred_output"}, _read_outputs
    else:
        keys = ", ".join(map(repr, row)) or "no keys at all"
        forms = "chosen and rejected, or samples, or input, preferred_output and non_preferred_output"
        return [("", f"it is no preference: it must have {forms}, and has {keys}")]
    faults = _unknown(row, known | {"tools"}, "")
    tools, more = read_tools(row.get("tools"), "tools")
    faults += more
    chosen, rejected = read(row, faults)
    if not faults and isinstance(chosen, str) != isinstance(rejected, str):
        faults.append(("", "one side is a text and the other has messages; they cannot be compared"))
    return faults or Preference(chosen, rejected, line, tools)


def _read_chosen_rejected(row: JsonRow, faults: list[Fault]) -> tuple[Side, Side]:
    return _read_side(row, "chosen", faults), _read_side(row, "rejected", faults)


def _read_samples(row: JsonRow, faults: list[Fault]) -> tuple[Side, Side]:
    samples = row["samples"]
    if not isinstance(samples, list):
        faults.append(("samples", f"it is {kind_of(samples)}; it must be a list of two samples"))
        return "", ""
    sides: dict[int, Side] = {}
    for index, sample in enumerate(cast("list[object]", samples)):
        field = f"samples[{index}]"
        side = _read_item(sample, field, faults, also={"evals", "score"})
        if not isinstance(sample, dict):
            continue
        fields = cast("dict[str, object]", sample)
        evals = fields.get("evals", {})
        score = cast("dict[str, object]", evals).get("score", fields.get("score")) if isinstance(evals, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float) or score not in (0, 1):
            faults.append((f"{field}.evals.score", f"it is {score!r}; it must be 1.0 (chosen) or 0.0 (rejected)"))
        elif int(score) in sides:
            faults.append((f"{field}.evals.score", f"a second sample has the score {score}; there must be one of each"))
        else:
            sides[int(score)] = side
    missing = [name for score, name in ((1, "1.0 (chosen)"), (0, "0.0 (rejected)")) if score not in sides]
    if missing and not faults:
        faults.append(("samples", f"no sample has the score {' or '.join(missing)}"))
    return sides.get(1, ""), sides.get(0, "")


def _read_outputs(row: JsonRow, faults: list[Fault]) -> tuple[Side, Side]:
    given = row.get("input", [])
    field = "input"
    if isinstance(given, dict):
        fields = cast("dict[str, object]", given)
        faults += _unknown(fields, {"messages"}, "input.")
        given, field = fields.get("messages", []), "input.messages"
    before: tuple[Message, ...] = ()
    if isinstance(given, str):
        before = (Message("user", given),)
    elif given != []:
        before, more = read_messages(given, field)
        faults += more
    sides: list[Side] = []
    for name in ("preferred_output", "non_preferred_output"):
        output = row.get(name)
        if name not in row:
            faults.append((name, "it is missing"))
        elif isinstance(output, str):
            sides.append((*before, Message("assistant", output)))
            if not output:
                faults.append((name, "it is empty"))
        else:
            messages, more = read_messages(output, name)
            faults += more or _unfit(messages, name)
            sides.append((*before, *messages))
    return (sides[0], sides[1]) if len(sides) == 2 else ("", "")


def _read_side(row: JsonRow, name: str, faults: list[Fault]) -> Side:
    if name not in row:
        faults.append((name, "it is missing"))
        return ""
    return _read_item(row[name], name, faults, also=set())


def _read_item(item: object, field: str, faults: list[Fault], *, also: set[str]) -> Side:
    """An object with either messages or text."""
    if not isinstance(item, dict):
        faults.append((field, f"it is {kind_of(item)}; it must be an object with messages or text"))
        return ""
    fields = cast("dict[str, object]", item)
    faults += _unknown(fields, {"messages", "text"} | also, f"{field}.")
    if ("messages" in fields) == ("text" in fields):
        faults.append((field, "it must have either messages or text"))
        return ""
    if "messages" in fields:
        messages, more = read_messages(fields["messages"], f"{field}.messages")
        faults += more or _unfit(messages, f"{field}.messages")
        return messages
    text = fields["text"]
    if not isinstance(text, str) or not text:
        faults.append((f"{field}.text", "it is empty" if text == "" else f"it is {kind_of(text)}; it must be a string"))
        return ""
    return text


def _unfit(messages: tuple[Message, ...], field: str) -> list[Fault]:
    """What is wrong with messages as a side."""
    faults = [
        (f"{field}[{index}]", "it says whether it is trained on; what is compared are the last answers, always")
        for index, message in enumerate(messages)
        if message.trainable is not None
    ]
    if messages[-1].role != "assistant":
        faults.append((field, "the last message must be the assistant's: it is what is compared"))
    return faults


def _unknown(fields: Mapping[str, object], known: set[str], prefix: str) -> list[Fault]:
    names = ", ".join(sorted(known))
    return [(prefix + key, f"it is not understood; this form has {names}") for key in fields if key not in known]
