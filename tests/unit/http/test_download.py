"""Files from URLs: what breaks off is tried again, and no error shows the query."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import httpx
import pytest

from fwasync import errors
from fwasync._http.download import download, without_query
from fwasync._http.retry import RetryPolicy
from fwasync.testing import virtual_time

URL = "https://data.test/rows.jsonl?signature=secret"
Handle = Callable[[httpx.Request], httpx.Response]


class Pieces(httpx.AsyncByteStream):
    """A body that comes in pieces, and may break off or stop."""

    def __init__(self, *pieces: bytes, then: Exception | None = None, stop: bool = False) -> None:
        self.pieces, self.then, self.stop = pieces, then, stop
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
        if self.stop:
            await anyio.sleep_forever()
        if self.then is not None:
            raise self.then

    async def aclose(self) -> None:
        self.closed = True


def answers(*given: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[str]]:
    """A transport that gives these answers one by one, the last one for ever; and what was asked."""
    left, asked = list(given), []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.MockTransport(handle), asked


@virtual_time
async def test_what_breaks_off_is_had_whole_in_the_end(tmp_path: Path) -> None:
    broken, stopped = Pieces(b"ab", then=httpx.ReadError(f"lost {URL}")), Pieces(b"abc", stop=True)
    transport, asked = answers(
        httpx.ConnectError("refused"),
        httpx.Response(503, headers={"Retry-After": "7"}),
        httpx.Response(200, stream=broken),
        httpx.Response(200, stream=stopped),
        httpx.Response(200, stream=Pieces(b"ab", b"cd")),
    )
    await download(URL, tmp_path / "file", transport=transport)
    assert (tmp_path / "file").read_bytes() == b"abcd"
    assert asked == [URL] * 5
    assert broken.closed
    assert stopped.closed
    assert anyio.current_time() > 30 + 7


@virtual_time
async def test_redirects_are_followed(tmp_path: Path) -> None:
    transport, asked = answers(
        httpx.Response(302, headers={"Location": "https://store.test/x?token=other"}), httpx.Response(200, content=b"y")
    )
    await download(URL, tmp_path / "file", transport=transport)
    assert (tmp_path / "file").read_bytes() == b"y"
    assert asked == [URL, "https://store.test/x?token=other"]


@pytest.mark.parametrize(
    ("answer", "kind", "told", "attempts"),
    [
        (httpx.Response(404, text="no such key"), errors.NotFoundError, "404: no such key", 1),
        (httpx.Response(403), errors.PermissionDeniedError, "403", 1),
        (httpx.Response(500, text="oh"), errors.ServiceUnavailableError, "500: oh", 3),
        (httpx.ReadError("signature=secret is lost"), errors.RetryBudgetExhaustedError, "… is lost", 3),
        (httpx.Response(302, headers={"Location": "http://data.test/x"}), errors.TransportError, "https to http", 1),
        (httpx.Response(302, headers={"Location": URL}), errors.TransportError, "redirects more than 5 times", 6),
    ],
)
def test_what_cannot_be_had(
    tmp_path: Path, answer: httpx.Response | Exception, kind: type[Exception], told: str, attempts: int
) -> None:
    transport, asked = answers(answer)

    @virtual_time
    async def run() -> None:
        with pytest.raises(kind, match=told) as caught:
            retry = (
                RetryPolicy(base_s=1e-6, budget_s=3) if attempts != 3 else RetryPolicy(base_s=4, cap_s=4, budget_s=4)
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("random.random", lambda: 0.5)
                await download(URL, tmp_path / "file", retry=retry, transport=transport)
        assert "secret" not in str(caught.value)
        assert len(asked) == attempts

    run()


@virtual_time
async def test_what_is_no_url_of_data(tmp_path: Path) -> None:
    for url in (
        "ftp://data.test/x",
        "https://user:secret@data.test/x",
        "https:///x",
        "https://user:secret@data.test:port/x",
        "https://xn--/x",
    ):
        with pytest.raises(errors.UsageError) as caught:
            await download(url, tmp_path / "file", transport=answers(httpx.Response(200))[0])
        assert "secret" not in str(caught.value)
    assert without_query("https://a.test/b?c#d") == "https://a.test/b"
