"""Every way in which services answer `retrieve_future`."""

from __future__ import annotations

import pytest

from fwasync._wire.futures import Expired, Failed, NotReady, Outcome, PayloadHeld, Ready, Transient, read_outcome


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, b'{"metrics":{}}', Ready()),
        (200, b'{"type":"optim_step"}', Ready()),
        (200, b'{"type":"save_weights","path":"p"}', Ready()),
        (200, b'{"status":"complete_metadata","response_payload_size":7}', PayloadHeld()),
        (200, b'{"type":"try_again","queue_state":"active"}', NotReady("active", None)),
        (
            408,
            b'{"type":"try_again","queue_state":"paused_capacity","queue_state_reason":"full"}',
            NotReady("paused_capacity", "full"),
        ),
        (408, b"{}", NotReady(None, None)),
        (408, b"<html>", Transient()),
        (200, b'{"error":"bad","category":"user"}', Failed("bad", "user")),
        (200, b'{"error":"bad","category":"strange"}', Failed("bad", "unknown")),
        (200, b'{"error":"bad"}', Failed("bad", "unknown")),
        (200, b'{"loss_fn_outputs":[' + b"0," * 60_000 + b"0]}", Ready()),
        (400, b"...", Failed("TEXT", "user")),
        (422, b"...", Failed("TEXT", "user")),
        (404, b"", Expired("TEXT")),
        (410, b"", Expired("TEXT")),
        (425, b"", Transient()),
        (429, b"", Transient()),
        (500, b"", Transient()),
        (503, b"", Transient()),
        (408, b'{"type":"\xff"}', Transient()),
        (408, b"[" * 50_000, Transient()),
        (200, b"<html>", None),
        (200, b'{"error":"\xff"}', None),
        (401, b"", None),
        (403, b"", None),
        (302, b"", None),
    ],
)
def test_answers(status: int, body: bytes, outcome: Outcome | None) -> None:
    assert read_outcome(status, body, text="TEXT") == outcome
