"""Heads of requests: what goes out is the request that was meant, and nothing can be slipped in."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync import AsyncDeploymentSampler
from fwasync._http.client import Http
from fwasync._http.heads import Heads, header_lines
from fwasync.errors import UsageError
from support.raw_server import raw_server

HEADS = Heads("trainer.test", "/base/api/v1", {"x-api-key": "k", "user-agent": "u"})
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True)
ANY_TEXT = st.text(st.characters(max_codepoint=0x2FF), max_size=30)


def parsed(head: bytes) -> tuple[bytes, dict[str, str]]:
    """As another implementation reads it."""
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(head)
    request = reader.next_event()
    assert isinstance(request, h11.Request)
    return request.target, {name.decode(): value.decode("latin-1") for name, value in request.headers}


def test_a_head() -> None:
    assert HEADS.head("POST", "optim_step", {"accept": "*/*"}, 12) == (
        b"POST /base/api/v1/optim_step HTTP/1.1\r\nhost: trainer.test\r\nx-api-key: k\r\nuser-agent: u\r\n"
        b"accept: */*\r\ncontent-length: 12\r\n\r\n"
    )


def test_a_length_is_told_where_a_body_is_expected() -> None:
    assert b"content-length: 0\r\n" in HEADS.head("POST", "x", {}, 0)
    assert b"content-length" not in HEADS.head("GET", "x", {}, 0)
    assert b"content-length: 3\r\n" in HEADS.head("DELETE", "x", {}, 3)


def test_a_requests_own_header_replaces_the_common_one() -> None:
    _, headers = parsed(HEADS.head("GET", "x", {"user-agent": "mine"}, 0))
    assert headers == {"host": "trainer.test", "x-api-key": "k", "user-agent": "mine"}


@given(st.dictionaries(NAMES, ANY_TEXT, max_size=4))
def test_whatever_the_values_are_it_is_one_request_or_refused(headers: dict[str, str]) -> None:
    try:
        head = HEADS.head("GET", "x", headers, 0)
    except UsageError:
        return
    own = {"host": "trainer.test", "x-api-key": "k", "user-agent": "u"}
    assert parsed(head) == (b"/base/api/v1/x", own | {name: value.strip(" \t") for name, value in headers.items()})


@given(ANY_TEXT)
def test_whatever_the_path_is_it_is_one_request(path: str) -> None:
    target, headers = parsed(HEADS.head("GET", path, {}, 0))
    assert target.startswith(b"/base/api/v1/")
    assert b" " not in target and b"#" not in target
    assert len(headers) == 3


def test_a_path_is_quoted_where_it_must_be() -> None:
    assert parsed(HEADS.head("GET", "a b/é#c?d=%20&e=[1]", {}, 0))[0] == b"/base/api/v1/a%20b/%C3%A9%23c?d=%20&e=[1]"


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\n", "a\rb", "a\0b", "\x7f", "€"])
def test_a_value_that_breaks_the_line_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(UsageError, match="header 'x-key'") as e:
        header_lines({"accept": "*/*", "x-key": f"secret{value}"})
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "content-length: 5", "a\r\nb", "é"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name of a header"):
        header_lines({name: "1"})


@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "Connection"])
async def test_what_belongs_to_the_connection_is_refused(name: str) -> None:
    async with Http("http://trainer.test", "key") as http:
        with pytest.raises(UsageError, match=f"'{name.lower()}'.* belongs to the connection"):
            await http.attempt("GET", "x", headers={name: "1"})


async def test_nothing_is_sent_of_what_is_refused() -> None:
    async with raw_server() as server, Http(server.url, "key") as http:
        with pytest.raises(UsageError, match="line break"):
            await http.attempt("POST", "x", idempotency_key="a\r\nb")
        with pytest.raises(UsageError, match="line break"):
            await http.stream("POST", "x", [], accept="*/*", headers={"X-More": "a\nb"}, timeout=5)
        async with AsyncDeploymentSampler(server.url, "m", "key", additional_headers={"X-Who": "a\nb"}) as sampler:
            with pytest.raises(UsageError, match="x-who"):
                await sampler.sample_with_prompt_tokens([1])
    assert server.accepted == 0


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown() -> None:
    with pytest.raises(UsageError, match="x-api-key") as e:
        Http("http://trainer.test", "secret\n")
    assert "secret" not in str(e.value)
