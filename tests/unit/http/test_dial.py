"""Addresses in a race, without a network: who is tried when, and what is left of the losers."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field

import anyio
import pytest

from fwasync._http import dial
from fwasync.testing import virtual_time


@dataclass
class Network:
    """Addresses are numbers: each answers after so many seconds, or fails then."""

    answers: dict[int, float | tuple[float, OSError]]
    tried: list[tuple[float, int]] = field(default_factory=list)
    opened: dict[int, socket.socket] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)

    async def open(self, address: tuple[socket.AddressFamily, tuple[str, int]]) -> socket.socket:
        number = address[1][1]
        self.tried.append((anyio.current_time(), number))
        answer = self.answers[number]
        try:
            await anyio.sleep(answer if isinstance(answer, float) else answer[0])
        except BaseException:
            self.cancelled.append(number)
            raise
        if not isinstance(answer, float):
            raise answer[1]
        self.opened[number] = socket.socket()
        return self.opened[number]

    def dialer(self) -> dial.Dialer:
        dialer = dial.Dialer("trainer.test", 1)
        dialer._addresses = [(socket.AF_INET, ("", number)) for number in self.answers]
        dialer._stale_at = 1000.0
        return dialer


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network({})
    monkeypatch.setattr(dial, "_open", network.open)
    return network


NEVER = 1e6


def test_the_first_that_answers_wins_and_is_first_the_next_time(network: Network) -> None:
    @virtual_time
    async def run() -> None:
        network.answers = {1: (0.0, ConnectionRefusedError()), 2: NEVER, 3: 1.0, 4: 0.1}
        dialer = network.dialer()
        with await dialer.dial() as opened:
            assert opened is network.opened[4]
        assert network.tried == [(0.0, 1), (0.0, 2), (0.25, 3), (0.5, 4)]
        assert sorted(network.cancelled) == [2, 3]
        network.tried.clear()
        with await dialer.dial():
            assert [number for _, number in network.tried] == [4]

    run()


def test_two_that_answer_at_once(network: Network) -> None:
    @virtual_time
    async def run() -> None:
        network.answers = {1: 0.5, 2: 0.25}
        with await network.dialer().dial() as opened:
            assert opened.fileno() >= 0
        assert all(each.fileno() < 0 for each in network.opened.values()), "the loser is closed"

    run()


def test_all_fail(network: Network) -> None:
    @virtual_time
    async def run() -> None:
        network.answers = {1: (0.1, ConnectionRefusedError("first")), 2: (0.3, OSError("second"))}
        dialer = network.dialer()
        with pytest.raises(ConnectionRefusedError, match="first"):
            await dialer.dial()
        assert dialer._stale_at == 0.0, "the next one asks for the name anew"

    run()


@pytest.mark.parametrize("after", [0.0, 0.1, 0.3, 0.5])
def test_a_cancelled_race_leaves_nothing(network: Network, after: float) -> None:
    @virtual_time
    async def run() -> None:
        network.answers = {1: NEVER, 2: 0.25, 3: NEVER}
        with anyio.move_on_after(after) as scope:
            (await network.dialer().dial()).close()
        assert scope.cancelled_caught == (after < 0.5) or not network.opened
        assert all(each.fileno() < 0 for each in network.opened.values())
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    run()
