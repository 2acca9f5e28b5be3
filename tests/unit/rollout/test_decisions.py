"""The small decisions: when a group is given up, when failures are too many, which failures are bad luck."""

from __future__ import annotations

import errno
import itertools
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync import errors
from fwasync.rollout.assembly import GroupAssembly
from fwasync.rollout.breaker import BreakerSettings, CircuitBreaker
from fwasync.rollout.failures import is_recoverable
from fwasync.rollout.settings import RolloutSettings


def test_a_group_is_whole_when_all_have_ended_and_enough_are_left() -> None:
    assembly = GroupAssembly[str](3, 2, 0)
    assert [assembly.ended(2, "c"), assembly.ended(1, None), assembly.ended(0, "a")] == ["running", "running", "whole"]
    assert assembly.kept == ["a", "c"]


@pytest.mark.parametrize(("retries", "verdict"), [(1, "retry"), (0, "failed")])
def test_a_group_is_given_up_as_soon_as_too_few_can_be_left(retries: int, verdict: str) -> None:
    assembly = GroupAssembly[str](4, 3, retries)
    assert assembly.ended(0, None) == "running"
    assert assembly.ended(1, None) == "give up"
    assert assembly.given_up
    assert assembly.ended(2, None) == "running", "it is told once"
    assert assembly.ended(3, "late") == verdict


@given(st.integers(1, 5), st.data())
def test_a_group_ends_in_one_way_only(size: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, size))
    outcomes = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    assembly = GroupAssembly[int](size, least, 0)
    verdicts = [assembly.ended(number, number if good else None) for number, good in enumerate(outcomes)]
    assert verdicts[-1] == ("whole" if sum(outcomes) >= least else "failed")
    assert not {"whole", "failed", "retry"} & set(verdicts[:-1])
    assert verdicts.count("give up") <= 1


def tripped(outcomes: str, settings: BreakerSettings | None = None, rows: int = 100) -> int | None:
    """After how many outcomes (`.` success, `x` failure, of so many rows in turn) the breaker trips."""
    breaker = CircuitBreaker(settings or BreakerSettings())
    for count, outcome in enumerate(outcomes, 1):
        if outcome == ".":
            breaker.succeeded()
        elif breaker.failed(count % rows):
            return count
    return None


@pytest.mark.parametrize(
    ("outcomes", "after"),
    [
        ("xxxxx", 5),
        ("xxxx.xxxx.", None),  # 8 of 10, but the tenth is no failure
        ("xxxx.xxxx.x", 11),
        (".x" * 4, None),
        (".x" * 5, 10),
        ("." * 15 + "xxxx", None),
        ("." * 20 + ".xx" * 30, 35),
    ],
)
def test_the_breaker(outcomes: str, after: int | None) -> None:
    assert tripped(outcomes) == after


def test_the_breaker_is_not_tripped_by_one_row() -> None:
    assert tripped("x" * 40, rows=1) is None
    assert tripped(".x" * 20, rows=1) is None
    assert tripped("x", BreakerSettings(consecutive=1), rows=1) == 1


def test_a_breaker_that_cannot_work_is_refused() -> None:
    with pytest.raises(errors.UsageError, match="least"):
        BreakerSettings(least=30)


class HTTPStatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.response = SimpleNamespace(status_code=status)


def library_error(module: str, name: str) -> Exception:
    base = type(name, (Exception,), {"__module__": module})
    return type("Subclass", (base,), {"__module__": "elsewhere"})("broken")


@pytest.mark.parametrize(
    ("error", "recoverable"),
    [
        (errors.RecoverableRolloutError("the sandbox went away"), True),
        (errors.RewardTimeoutError("killed"), True),
        (errors.RateLimitError("busy", status=429), True),
        (errors.ServiceUnavailableError("down", status=503), True),
        (errors.RetryBudgetExhaustedError("no answer"), True),
        (errors.OperationTimeoutError("late"), True),
        (errors.OperationFailedError("broken", category="server"), True),
        (errors.OperationFailedError("bad prompt", category="user"), False),
        (errors.BadRequestError("bad", status=400), False),
        (errors.AuthenticationError("no", status=401), False),
        (errors.ProtocolError("what?"), False),
        (errors.UsageError("empty"), False),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (OSError(errno.EHOSTUNREACH, "no route"), True),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (FileNotFoundError(), False),
        (HTTPStatusError(408), True),
        (HTTPStatusError(502), True),
        (HTTPStatusError(404), False),
        (library_error("httpx._exceptions", "TransportError"), True),
        (library_error("aiohttp.client_exceptions", "ClientConnectionError"), True),
        (library_error("mine.errors", "TransportError"), False),
        (ExceptionGroup("tools", [TimeoutError(), ConnectionError()]), True),
        (ExceptionGroup("tools", [TimeoutError(), ValueError()]), False),
        (ValueError(), False),
        (TypeError(), False),
        (AssertionError(), False),
        (KeyError("reward"), False),
        (RuntimeError(), False),
    ],
)
def test_what_is_bad_luck(error: Exception, recoverable: bool) -> None:
    assert is_recoverable(error) is recoverable


def test_the_real_libraries_have_the_classes_that_are_known_by_name() -> None:
    import aiohttp
    import httpx

    assert is_recoverable(httpx.ReadTimeout("late"))
    assert is_recoverable(httpx.ConnectError("refused"))
    assert is_recoverable(aiohttp.ServerDisconnectedError())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"groups_per_batch": 0}, "groups_per_batch"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"max_concurrency": 3}, "max_concurrency"),
        ({"chunks_per_batch": 3}, "chunks_per_batch"),
        ({"min_group_size": 5}, "min_group_size"),
        ({"rollout_timeout": 0.0}, "rollout_timeout"),
        ({"stall_timeout": float("inf")}, "stall_timeout"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.UsageError, match=named):
        RolloutSettings(**{"groups_per_batch": 2, "group_size": 4, **wrong})


def test_one_rollout_alone_is_no_group_unless_groups_are_of_one() -> None:
    sizes = itertools.product((1, 2, 8), (None, 1))
    found = [RolloutSettings(groups_per_batch=1, group_size=g, min_group_size=m).least_group_size for g, m in sizes]
    assert found == [1, 1, 2, 1, 2, 1]
