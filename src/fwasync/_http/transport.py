"""Which transport carries the requests to a service.

Our own connections (`pool`), because httpx's pool stays dead after requests that were cancelled while they waited for
a connection, and cancellation is what this library promises; and because requests are many, and httpx's objects cost
more than all the rest. Through a proxy, and for files, httpx's API over aiohttp's connections.

The environment counts as for httpx: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`; `SSL_CERT_FILE` and
`SSL_CERT_DIR` for certificates, else certifi's. This machine itself is never asked through a proxy.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import urllib.request
from collections.abc import Callable, Mapping

import httpx

from fwasync._http.carrier import Carrier
from fwasync._http.heads import Heads
from fwasync._http.inflate import ACCEPTED
from fwasync._http.pool import Pool
from fwasync.errors import UsageError

__all__ = ("Transport", "carrier_for", "default_transport", "proxy_for")

Transport = httpx.AsyncBaseTransport
"""Any httpx transport."""

_KEEPALIVE_S = 30.0
_PORTS = {"http": 80, "https": 443}
_COMMON = {"accept-encoding": ACCEPTED}


def carrier_for(
    root: str, headers: Mapping[str, str], transport: Transport | None, safe: Callable[[Exception], str]
) -> Carrier:
    """What carries requests to one service. It opens nothing before its first request.

    Args:
        root: What all URLs begin with, without a slash at its end.
        headers: Those of every request, with lower-case names.
        transport: What is to be used instead of our own.
        safe: Makes the text of an error that may be shown.

    Raises:
        UsageError: A header cannot be sent, or the environment names a proxy of another kind than HTTP's, or
            certificates that cannot be read.
    """
    url = httpx.URL(root)
    heads = Heads(url.netloc.decode("ascii"), url.raw_path.decode("ascii").rstrip("/"), {**headers, **_COMMON})
    if transport is None and proxy_for(url) is None:
        tls = None
        if url.scheme == "https":
            tls = _trusted()
            tls.set_alpn_protocols(["http/1.1"])
        return Pool(url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme], heads, tls)
    from fwasync._http.foreign import HttpxCarrier  # aiohttp takes its time

    return HttpxCarrier(root, headers, transport or default_transport(root), safe)


def default_transport(base_url: str) -> Transport:
    """A transport of httpx to one service. It opens nothing before its first request.

    Raises:
        UsageError: The environment names a proxy of another kind than HTTP's, or certificates that cannot be read.
    """
    import aiohttp
    from httpx_aiohttp import AiohttpTransport

    url = httpx.URL(base_url)
    tls = _trusted() if url.scheme == "https" else True
    proxy = proxy_for(url)

    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # httpx does that
        )

    return AiohttpTransport(client=session, proxy=None if proxy is None else httpx.Proxy(proxy))


def proxy_for(url: httpx.URL) -> str | None:
    """The proxy that the environment names for a URL, if it does.

    Raises:
        UsageError: It is of another kind than HTTP's. The text does not show it: it may hold a password.
    """
    if _is_loopback(url.host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    scheme, separator, _ = proxy.partition("://")
    if separator and scheme.lower() not in _PORTS:
        raise UsageError(
            f"the environment names a proxy for {url.host} that is not spoken to, by {scheme[:20]!r}: name one that "
            f"begins with http://, except the host in NO_PROXY, or pass a transport of your own"
        )
    return proxy if separator else f"http://{proxy}"


def _trusted() -> ssl.SSLContext:
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        file = os.environ.get("SSL_CERT_FILE")
        if not file:
            raise
        raise UsageError(f"SSL_CERT_FILE is {file}, from which no certificates can be read: {error}") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
