"""How errors are told, and with which exit status."""

from __future__ import annotations

import pytest

from fwasync.cli.failures import BUG, CommandError, describe, exit_status
from fwasync.errors import AuthenticationError, DatumError, ServiceUnreachableError, UsageError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("x"), 2),
        (DatumError("x"), 2),
        (CommandError("x"), 1),
        (ServiceUnreachableError("x"), 1),
        (AuthenticationError("x", status=401), 1),
        (OSError(28, "No space left on device"), 1),
        (ZeroDivisionError("x"), BUG),
        (ExceptionGroup("", [UsageError("x"), ExceptionGroup("", [CommandError("y")])]), 2),
        (ExceptionGroup("", [UsageError("x"), KeyError("y")]), BUG),
    ],
)
def test_exit_status(error: BaseException, status: int) -> None:
    assert exit_status(error) == status


def test_an_expected_error_is_its_message_and_its_notes() -> None:
    error = CommandError("it does not start")
    error.add_note("the disk is full")
    assert describe(error) == "error: it does not start\n  note: the disk is full"


def test_a_bug_says_so_and_how_to_see_more() -> None:
    told = describe(KeyError("x")).splitlines()
    assert told[0] == "error: this is a bug in fwasync: KeyError: 'x'"
    assert "--debug" in told[1]
    assert describe(AssertionError()).startswith("error: this is a bug in fwasync: AssertionError\n")


def test_a_group_is_told_by_its_leaves_each_once() -> None:
    group = ExceptionGroup("g", [CommandError("a"), ExceptionGroup("h", [CommandError("b"), CommandError("a")])])
    assert describe(group) == "error: a\nerror: b"
