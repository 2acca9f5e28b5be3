"""The settings of a recipe: a TOML file, and over it what the command line says, checked by the recipe's own model.

`name=value`, `--name value` and `--name=value` mean the same, with hyphens or underscores; dots lead into a section
(`infra.region=EU`). The model says what a value is: text stays as it is given, everything else is read as TOML; `none`
unsets what may be unset.

Pure, but for reading the file. All that is wrong is told at once, each fault with its place: `run.toml:3: …` or the
name as it was typed.
"""

from __future__ import annotations

import difflib
import enum
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import pydantic
from pydantic import BaseModel

from fwasync.errors import UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ("Settings", "field_type", "members", "nearest")

C = TypeVar("C", bound=BaseModel)
Keys = tuple[str, ...]

_ALIASES: Mapping[str, Keys] = {
    "data": ("dataset",),
    "steps": ("max_steps",),
    "save_every": ("dcp_save_interval",),
    "warmup_steps": ("lr_scheduler", "warmup_steps"),
}
_AT = re.compile(r" \(at line (\d+), column (\d+)\)$| \(at end of document\)$")


@dataclass(slots=True)
class Settings:
    """Values as they were given, and where each was given.

    Attributes:
        values: Nested, by name.
        file: The file, if there is one.
    """

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    file: Path | None = None
    _text: str = ""
    _typed: dict[Keys, str] = field(default_factory=dict[Keys, str])
    _defaults: set[str] = field(default_factory=set[str])

    @classmethod
    def read(cls, file: Path | None) -> Settings:
        """Those of a TOML file, or none.

        Raises:
            UsageError: It cannot be read, or is not TOML; the text says where.
        """
        if file is None:
            return cls()
        try:
            text = file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UsageError(f"{file}: there is no such file") from None
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
            ) from None
        try:
            return cls(tomllib.loads(text), file, text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{file}{_at(str(error), text)}") from None

    def override(self, arguments: Sequence[str], model: type[BaseModel]) -> None:
        """Put over them what the command line says.

        Raises:
            UsageError: An argument is no setting.
        """
        for typed, text in _assignments(arguments):
            keys = tuple(key.replace("-", "_") for key in typed.removeprefix("--").split("."))
            if len(keys) == 1 and keys[0] not in model.model_fields:
                alias = _ALIASES.get(keys[0], keys)
                keys = alias if alias[0] in model.model_fields else keys
            self.put(keys, _value(field_type(model, keys), text), typed)

    def put(self, keys: Keys, value: object, typed: str) -> None:
        """Set a value; `typed` is what the user calls it.

        Raises:
            UsageError: It is a part of what was given as a whole, which would be lost.
        """
        place = self.values
        for depth, key in enumerate(keys[:-1], 1):
            if isinstance(place.get(key), str):
                whole = ".".join(keys[:depth])
                raise UsageError(f"{typed}: {whole} is {place[key]!r}, of which no part can be changed; give all parts")
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = cast("dict[str, Any]", place[key])
        place[keys[-1]] = value
        self._typed[keys] = typed

    def put_default(self, name: str, value: object) -> None:
        """Set what was not given, or set so before."""
        if name not in self.values or name in self._defaults:
            self._defaults.add(name)
            self.values[name] = value

    def build(self, model: type[C]) -> C:
        """The configuration.

        Raises:
            UsageError: Names that it does not have, or values that cannot be.
        """
        faults = list(self._unknown(model, self.values, ()))
        if not faults:
            try:
                return model.model_validate(_completed(model, self.values))
            except pydantic.ValidationError as error:
                faults = [self._fault(model, detail) for detail in error.errors()]
        raise UsageError(faults[0] if len(faults) == 1 else "\n  ".join(["several settings cannot be:", *faults]))

    def _unknown(self, model: type[BaseModel], values: Mapping[str, Any], above: Keys) -> Iterator[str]:
        for key, value in values.items():
            keys = (*above, key)
            reasons: Mapping[str, str] = getattr(model, "not_taken", {})
            if key in reasons:
                yield f"{self._place(keys)}: {'.'.join(keys)!r} is not taken: {reasons[key]}"
                continue
            if key not in model.model_fields:
                hint = nearest(key, list(model.model_fields))
                yield f"{self._place(keys)}: there is no setting {'.'.join(keys)!r}; {hint}"
                continue
            inner = next((kind for kind in members(model.model_fields[key].annotation) if _is_model(kind)), None)
            if inner is not None and isinstance(value, dict):
                yield from self._unknown(inner, cast("dict[str, Any]", value), keys)

    def _fault(self, model: type[BaseModel], fault: ErrorDetails) -> str:
        location, given = tuple(map(str, fault["loc"])), fault["input"]
        reason = fault["msg"].removeprefix("Value error, ")
        if not location:
            return f"{self.file}: {reason}" if self.file and not self._typed else reason
        keys = location
        while not _has(self.values, keys):  # further parts name a member of a union, or a field that is missing
            keys = keys[:-1]
        reason = f"{reason[0].lower()}{reason[1:]}"
        if fault["type"] == "missing":
            return f"{'.'.join(location)} must be set{f', in {self.file} or' if self.file else ''} as name=value"
        choices = [choice for kind in members(field_type(model, keys)) for choice in get_args(kind)] if keys else []
        hint = f"; {nearest(str(given), choices)}" if fault["type"] == "literal_error" else ""
        name = self._typed.get(keys) or f"{self._place(keys)}: {'.'.join(keys)}"
        return f"{name} is {given}: {reason}{hint}"

    def _place(self, keys: Keys) -> str:
        """Where something was given: as it was typed, or the line of the file."""
        typed = next((name for typed_keys, name in self._typed.items() if typed_keys[: len(keys)] == keys), None)
        if typed is not None or self.file is None:
            return typed or ".".join(keys)
        line = _line_of(self._text, keys)
        return str(self.file) if line is None else f"{self.file}:{line}"


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a name that is not known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"


def members(annotation: object) -> list[Any]:
    """The types of which a value may be one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in members(part)]
    return [annotation]


def field_type(model: type[BaseModel], keys: Keys) -> object:
    """The type of a field, through sections; `None` if there is no such field."""
    info = model.model_fields.get(keys[0])
    if info is None:
        return None
    if len(keys) == 1:
        return info.annotation
    inner = next((kind for kind in members(info.annotation) if _is_model(kind)), None)
    return None if inner is None else field_type(inner, keys[1:])


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _completed(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections begin with what the recipe's own default says of them: a section that is given changes it, in part."""
    completed = dict(values)
    for name, value in values.items():
        default = model.model_fields[name].get_default(call_default_factory=True)
        if isinstance(default, BaseModel) and isinstance(value, dict):
            given = _completed(type(default), cast("dict[str, Any]", value))
            completed[name] = {**default.model_dump(exclude_unset=True), **given}
    return completed


def _is_text(kind: object) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return isinstance(kind, type) and issubclass(kind, (str, PurePath, enum.Enum))


def _value(annotation: object, text: str) -> object:
    kinds = members(annotation)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if all(_is_text(kind) for kind in kinds if kind is not type(None)):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assignments(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What was typed as a name, and the value beside it."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        if equals and re.fullmatch(r"(--)?[A-Za-z_][\w.-]*", name):
            yield name, text
        elif re.fullmatch(r"--[A-Za-z_][\w.-]*", argument):
            yield argument, rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        else:
            raise UsageError(f"{argument!r} is no setting: write name=value, or --name value")


def _has(values: Mapping[str, Any], keys: Keys) -> bool:
    place: object = values
    for key in keys:
        if not isinstance(place, Mapping) or key not in place:
            return False
        place = cast("Mapping[str, object]", place)[key]
    return True


def _line_of(text: str, keys: Keys) -> int | None:
    """The line on which a key is set: that of the statement with which it appears, as the file is read line by line."""
    lines = text.splitlines(keepends=True)
    start = 1
    for count in range(1, len(lines) + 1):
        try:
            parsed = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a statement
        if _has(parsed, keys):
            return start
        start = count + 1
    return None


def _at(reason: str, text: str) -> str:
    """What TOML says is wrong, place first."""
    found = _AT.search(reason)
    what = _AT.sub("", reason)
    what = f"{what[0].lower()}{what[1:]}"
    if found is None:
        return f": {what}"
    if found[1] is None:
        return f", line {len(text.splitlines())}: {what}"
    return f", line {found[1]}, column {found[2]}: {what}"
