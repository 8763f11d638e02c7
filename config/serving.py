"""uvicorn as our processes run it: what it lets a peer do without bound is bounded here, and signals are the process's own."""

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from typing import Final

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024  # of the request line and the headers together
HEAD_SECONDS: Final = 10.0  # for them to arrive

log = structlog.get_logger(__name__)


class BoundedHttp(HttpToolsProtocol):
    """A peer whose request line and headers are too long, or do not come to their end, is cut off."""

    _head_bytes = 0
    _giving_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Counts what arrives until the headers are complete."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            log.warning("a request with too long headers was cut off", bytes=self._head_bytes)
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """What follows is the body, which has limits of its own."""
        self._stop_waiting()
        super().on_headers_complete()
        self._head_bytes = -sys.maxsize

    def on_message_complete(self) -> None:
        """What follows is the next request."""
        super().on_message_complete()
        self._head_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._giving_up is None:
            self._giving_up = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would die of the signal after an orderly stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's."""
        yield
