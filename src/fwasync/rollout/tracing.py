"""Spans of OpenTelemetry, from a rollout to the optimizer step that it becomes part of; nothing if it is not installed.

Only the API is used: what is done with the spans is set up by the program, and without that they cost next to nothing.
A rollout's span is current while it runs, so that spans of its tools are its children; one that is cancelled, by its
deadline say, has the status of an error. A batch's span reaches from its
first chunk to its publication and links to the rollouts that it was trained on.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ("Tracing",)

Attributes = Mapping[str, str | bool | int | float]


class Tracing:
    """The tracer of this package, if there is one."""

    def __init__(self) -> None:
        try:
            self._api: Any = importlib.import_module("opentelemetry.trace")
        except ImportError:
            self._api = None
        self._tracer: Any = None if self._api is None else self._api.get_tracer("fwasync.rollout")

    @contextmanager
    def current(self, name: str, attributes: Attributes) -> Generator[Any]:
        """A span for the block; it is current inside. Yields the span, or `None`."""
        if self._tracer is None:
            yield None
            return
        with self._tracer.start_as_current_span(name, attributes=attributes) as span:
            try:
                yield span
            except Exception:
                raise  # which it sees itself
            except BaseException as error:
                span.set_status(self._api.StatusCode.ERROR, f"ended by {type(error).__name__}")
                raise

    def record(self, name: str, attributes: Attributes, *, started_ns: int, linked: Iterable[Any]) -> None:
        """A span that began at that time of the wall clock and ends now. Linked are spans that it came from."""
        if self._tracer is None:
            return
        links = [self._api.Link(span.get_span_context()) for span in linked if span is not None]
        self._tracer.start_span(name, attributes=attributes, links=links, start_time=started_ns).end()
