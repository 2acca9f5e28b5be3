"""The session that a trainer service keeps for one client: opened, kept alive, finished."""

from __future__ import annotations

import importlib
import itertools
import logging
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Literal, Self

import anyio
import anyio.to_thread
import msgspec

from fwasync._background import Background
from fwasync._http.client import Http, Unanswered
from fwasync._http.reading import read
from fwasync._http.retry import RetryPolicy
from fwasync._http.transport import Transport
from fwasync._version import __version__
from fwasync._wire.codec import ACCEPT_ALL, JSON, PROTOBUF, Codec
from fwasync._wire.messages import CreateSessionRequest, SessionCreated, SessionHeartbeat, encode
from fwasync.errors import ClosedError, ProtocolError, ServiceError, SessionLostError, UsageError

__all__ = ("Session", "Wire")

logger = logging.getLogger("fwasync.session")

Wire = Literal["auto", "json", "protobuf"]

_CODECS: dict[str, Codec] = {"auto": replace(JSON, name="auto", accept=ACCEPT_ALL), "json": JSON, "protobuf": PROTOBUF}
_NO_SUCH_API = (404, 405, 501)
_HEARTBEAT_S = 10.0
_FAREWELL_S = 0.5


class Session:
    """One session on one service. An async context manager; everything it runs ends with it.

    Args:
        base_url: The service.
        api_key: Its key.
        wire: `"json"` or `"protobuf"` for batches and results; `"auto"` begins with JSON, goes over to protobuf with
            a service that takes nothing else, and lets results come in either.
        retry: How long requests are repeated that get no final answer.
        transport: Another httpx transport.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        wire: Wire = "auto",
        retry: RetryPolicy | None = None,
        transport: Transport | None = None,
    ) -> None:
        if wire not in _CODECS:
            raise UsageError(f"wire is {wire!r}; it must be 'auto', 'json' or 'protobuf'")
        self.http = Http(base_url, api_key, retry=retry, transport=transport)
        self.codec = _CODECS[wire]
        self._background = Background()
        self._session_id: str | None = None
        self._lost: str | None = None
        self._model_numbers = itertools.count()
        self._sampler_numbers = itertools.count()

    def __repr__(self) -> str:
        return f"<Session {self._session_id or 'not open'} at {self.http.base_url}>"

    @property
    def session_id(self) -> str:
        """The service's id for this session.

        Raises:
            ClosedError: Not entered, or left already.
            SessionLostError: The service has ended it.
        """
        if self._session_id is None:
            raise ClosedError(
                "the service client is not open: use it as `async with AsyncServiceClient(...) as service:`"
            )
        if self._lost is not None:
            raise SessionLostError(
                f"the service ended session {self._session_id}: {self._lost}. What was not saved is "
                "gone: open a new service client, create the model again and load its last checkpoint."
            )
        return self._session_id

    def refuses_json(self) -> bool:
        """Go over to protobuf, where that was left open; says whether it was."""
        if self.codec.name != "auto":
            return False
        self.codec = PROTOBUF
        return True

    def next_model_number(self) -> int:
        """A `model_seq_id`, each given once."""
        return next(self._model_numbers)

    def next_sampler_number(self) -> int:
        """A `sampling_session_seq_id`, each given once."""
        return next(self._sampler_numbers)

    async def confirm(self) -> None:
        """Ask at once whether the session is still there, after a refusal that could mean that it is not.

        Raises:
            SessionLostError: It is not.
        """
        await self._beat_once(self.session_id)
        _ = self.session_id

    async def __aenter__(self) -> Self:
        await self._background.open()
        try:
            session_id = await self._create()
            # The types of data and results. Importing them takes seconds where torch is installed: not on the
            # loop.
            types = partial(importlib.import_module, "tinker.types")
            await anyio.to_thread.run_sync(types, abandon_on_cancel=True)
        except BaseException:
            await self._aclose()
            raise
        self._session_id = session_id
        self._background.start(self._beat, session_id)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        session_id, self._session_id = self._session_id, None
        try:
            if session_id is not None and self._lost is None:
                reason = "success" if exc is None else "errored" if isinstance(exc, Exception) else "interrupted"
                with anyio.move_on_after(_FAREWELL_S, shield=True):
                    await self._finish(session_id, reason)
        finally:
            await self._aclose()

    async def _aclose(self) -> None:
        try:
            await self._background.aclose()
        finally:
            await self.http.__aexit__(None, None, None)

    async def _create(self) -> str:
        request = CreateSessionRequest(tags=[], user_metadata={}, sdk_version=f"fwasync-{__version__}")
        try:
            body = await self.http.call(
                "POST", "create_session", [encode(request)], retry=self.http.retry.for_contact()
            )
            created = read("create_session", body, SessionCreated)
        except ServiceError as error:
            if not isinstance(error, ProtocolError) and error.status not in _NO_SUCH_API:
                raise
            raise ProtocolError(
                f"{self.http.base_url} is not a trainer service: it does not answer create_session as one "
                f"({error}). Check base_url."
            ) from error
        said = (
            (logging.INFO, created.info_message),
            (logging.WARNING, created.warning_message),
            (logging.ERROR, created.error_message),
        )
        for level, text in said:
            if text:
                logger.log(level, "the service says: %s", self.http.safe(text))
        return created.session_id

    async def _beat(self, session_id: str) -> None:
        while self._lost is None:
            await anyio.sleep(_HEARTBEAT_S)
            await self._beat_once(session_id)

    async def _beat_once(self, session_id: str) -> None:
        body = [encode(SessionHeartbeat(session_id=session_id))]
        try:
            answer = await self.http.attempt("POST", "session_heartbeat", body, timeout=_HEARTBEAT_S)
        except Unanswered as error:
            logger.warning("a heartbeat of the session was not answered: %s", error)
            return
        if answer.status == 410:
            self._lost = self.http.error_text(answer) or "it says the session is finished"
            logger.error("the service ended the session: %s", self._lost)

    async def _finish(self, session_id: str, reason: str) -> None:
        body = msgspec.json.encode({"reason": {"type": reason}})
        try:
            await self.http.attempt("POST", f"sessions/{session_id}/finish", [body])
        except Unanswered as error:
            # A courtesy: services that know nothing of it, or are gone, end the session by its missing
            # heartbeats.
            logger.debug("the end of the session was not told: %s", error)
