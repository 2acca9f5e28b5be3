"""The retry policy is a pure function; so are the reading of Retry-After and of refusals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync import errors
from fwasync._http.faults import fault_text, refusal, request_id_of
from fwasync._http.retry import RetryPolicy, retry_after


@given(
    attempt=st.integers(1, 10_000),
    elapsed=st.floats(0, 1000),
    jitter=st.floats(0, 1, exclude_max=True),
    wanted=st.none() | st.floats(0, 60),
)
def test_delays_stay_within_cap_and_budget(attempt: int, elapsed: float, jitter: float, wanted: float | None) -> None:
    policy = RetryPolicy(base_s=0.5, cap_s=10, budget_s=300)
    delay = policy.delay(attempt, elapsed_s=elapsed, jitter=jitter, retry_after_s=wanted)
    if delay is None:
        assert elapsed + (10 if wanted is None else wanted) > 300
    else:
        assert elapsed + delay <= 300
        assert delay == wanted if wanted is not None else 0 <= delay < 10


def test_more_than_a_minute_is_not_heeded() -> None:
    policy = RetryPolicy(base_s=1, cap_s=8)
    delays = [policy.delay(1, elapsed_s=0, jitter=0.5, retry_after_s=wanted) for wanted in (60.0, 61.0, math.inf)]
    assert delays == [60.0, 0.5, 0.5]


def test_delays_double_up_to_the_cap() -> None:
    policy = RetryPolicy(base_s=1, cap_s=8)
    delays = [policy.delay(n, elapsed_s=0, jitter=0.5, retry_after_s=None) for n in range(1, 7)]
    assert delays == [0.5, 1, 2, 4, 4, 4]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:30 GMT"}, 20.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:05 GMT"}, None),
        ({"retry-after": "3600"}, 3600.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "x"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=10.0) == seconds


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, errors.ProtocolError),
        (400, errors.BadRequestError),
        (401, errors.AuthenticationError),
        (403, errors.PermissionDeniedError),
        (404, errors.NotFoundError),
        (409, errors.ConflictError),
        (418, errors.BadRequestError),
        (422, errors.BadRequestError),
        (429, errors.RateLimitError),
        (408, errors.ServiceUnavailableError),
        (500, errors.ServiceUnavailableError),
        (599, errors.ServiceUnavailableError),
    ],
)
def test_each_status_has_its_error(status: int, kind: type[errors.ServiceError]) -> None:
    error = refusal(status, "because", what="optim_step", url="http://x")
    assert type(error) is kind
    assert error.status == status
    assert "optim_step" in str(error)
    assert error.request_id is None


def test_a_refusal_has_the_id_by_which_the_service_knows_it() -> None:
    for headers in ({"cf-ray": "r2", "x-request-id": "r1"}, {"x-request-id": "", "x-fireworks-request-id": "r1"}):
        for status in (302, 400, 503):
            error = refusal(status, "", what="optim_step", url="http://x", request_id=request_id_of(headers))
            assert error.request_id == "r1"
    assert error.__notes__ == ["request id: r1"]
    assert request_id_of({"content-type": "text/plain"}) is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"detail": "no such model"}', "no such model"),
        (b'{"error": {"code": 3}}', '{"code":3}'),
        (b'{"message": "slow down"}', "slow down"),
        (b'{"error": {"code": 5, "message": "no such job"}}', "no such job"),
        (b'{"detail": [{"loc": ["x"]}]}', '[{"loc":["x"]}]'),
        (b"plain\n  text", "plain text"),
        (b"<HTML><body>", "an HTML page"),
        (b"key tml-secret was wrong", "key *** was wrong"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", ""),
        (b"x" * 2000, "x" * 600 + " …"),
    ],
)
def test_error_bodies_become_short_and_safe_text(body: bytes, text: str) -> None:
    assert fault_text(body, secret="tml-secret") == text
