"""What an earlier process logged in the directory of a run that goes on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from fwasync.tracking.records import Record, record_of

__all__ = ("changes", "read_config", "read_metrics")

logger = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[Record]:
    """The lines of `metrics.jsonl`; a last line that was torn by a crash is cut off. This blocks.

    A broken line elsewhere is skipped, with a warning: metrics are no reason not to train.

    Raises:
        OSError: The file cannot be read or mended.
    """
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: the last line was torn by a crash and is removed", path)
            file.truncate(whole)
            os.fsync(file.fileno())
    found: list[Record] = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            found.append(record_of(line))
        except ValueError as error:
            logger.warning("%s, line %d, is no record and is skipped: %s", path, number, error)
    return found


def read_config(path: Path) -> object:
    """The configuration that a run was begun with; `None` if it is not known. This blocks."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def changes(old: object, new: object, name: str = "") -> Iterator[str]:
    """What differs between two configurations, as `learning_rate 0.001 → 0.01`. Pure."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = cast("dict[str, object]", old), cast("dict[str, object]", new)
        for key in dict.fromkeys((*before, *after)):
            yield from changes(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} {json.dumps(old)} → {json.dumps(new)}"
