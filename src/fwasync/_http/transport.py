"""What carries the requests: httpx's API over aiohttp's connections.

httpx's own connection pool stays dead after requests that were cancelled while they waited for a connection, and
cancellation is what this library promises. There is no limit on connections here; who sends many requests limits
them before they get here.

The environment counts as for httpx: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`; `SSL_CERT_FILE` and
`SSL_CERT_DIR` for certificates, else certifi's. This machine itself is never asked through a proxy.
"""

from __future__ import annotations

import ipaddress
import urllib.request

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

__all__ = ("Transport", "default_transport", "proxy_for")

Transport = httpx.AsyncBaseTransport
"""Any httpx transport."""

_KEEPALIVE_S = 30.0


def default_transport(base_url: str) -> Transport:
    """A transport to one service. It opens nothing before its first request."""
    url = httpx.URL(base_url)
    tls = httpx.create_ssl_context() if url.scheme == "https" else True
    proxy = proxy_for(url)

    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # httpx does that
        )

    return AiohttpTransport(client=session, proxy=None if proxy is None else httpx.Proxy(proxy))


def proxy_for(url: httpx.URL) -> str | None:
    """The proxy that the environment names for a URL, if it does."""
    if _is_loopback(url.host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
