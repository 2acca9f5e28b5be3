"""The gatekeeper: answers have an id, and faults are told to the log only, with that id."""

from __future__ import annotations

import logging
import re

import httpx
import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from fwasync.local.web import Gatekeeper


def client_of(app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Gatekeeper(app, "tml-key", frozenset({"/open"})))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers={"X-API-Key": "tml-key"})


async def test_a_fault_is_told_by_its_id(caplog: pytest.LogCaptureFixture):
    async def app(scope, receive, send):
        raise ValueError("a secret of /the/house")

    with caplog.at_level(logging.ERROR):
        async with client_of(app) as client:
            response = await client.post("/x")
    assert response.status_code == 500
    number = re.search(r"internal error (\w+)", response.json()["detail"])
    assert number is not None
    assert number[1] == response.headers["x-request-id"]
    assert "secret" not in response.text
    assert number[1] in caplog.text
    assert "a secret of /the/house" in caplog.text


async def test_every_answer_has_the_id_of_its_request():
    async with client_of(PlainTextResponse("here")) as client:
        answers = [
            await client.get("/x"),
            await client.get("/x"),
            await client.get("/x", headers={"X-API-Key": "wrong"}),
            await client.get("/x", headers={"x-request-id": "mine"}),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 401, 200]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert answers[3].headers["x-request-id"] == "mine"


async def test_a_client_that_left_in_its_own_sentence_is_no_fault(caplog: pytest.LogCaptureFixture):
    async def app(scope, receive, send):
        raise ClientDisconnect

    sent: list[object] = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/open", "method": "POST", "headers": []}
    await Gatekeeper(app, "tml-key", frozenset({"/open"}))(scope, None, send)
    assert sent == []
    assert not caplog.records


@pytest.mark.parametrize("key", ["", "tml-kex", "tml-key ", "tml-key\xff"])
async def test_only_the_very_key_opens(key):
    async def app(scope, receive, send):
        pytest.fail("it came in")

    async with client_of(app) as client:
        response = await client.post("/x", headers={"X-API-Key": key.encode("latin-1")})
    assert response.status_code == 401
