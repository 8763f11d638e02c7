"""A small client for our own HTTP API: JSON in, JSON out, every call bounded. The demo and its sink counters need no more."""

import asyncio
import http.client
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from domain.errors import SluiceError, Unavailable

_TIMEOUT_SECONDS: Final = 30.0


class Refused(SluiceError):
    """The API answered with an error: `status` and the problem (RFC 9457) it gave."""

    def __init__(self, call: str, status: int, problem: str) -> None:
        self.status = status
        super().__init__(f"{call}: {status} {problem}")


class ApiClient:
    """Calls below one base URL, with one API key. A call opens a connection of its own and runs in a thread."""

    def __init__(self, url: str, key: str = "") -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or 80
        self._base = parts.path.rstrip("/")
        self._headers = {"Accept": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    async def get(self, path: str) -> Any:
        """GET; the decoded JSON. Raises Refused, Unavailable."""
        return await asyncio.to_thread(self._call, "GET", path, None)

    async def post(self, path: str, body: object = None) -> Any:
        """POST a JSON body; the decoded JSON. Raises Refused, Unavailable."""
        return await asyncio.to_thread(self._call, "POST", path, body)

    def _call(self, method: str, path: str, body: object) -> Any:
        call = f"{method} {self._base}{path}"
        link = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        try:
            data = None if body is None else msgspec.json.encode(body)
            headers = self._headers | ({"Content-Type": "application/json"} if data is not None else {})
            link.request(method, self._base + path, body=data, headers=headers)
            answer = link.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{call} at {self._host}:{self._port}: {error or type(error).__name__}") from error
        finally:
            link.close()
        if answer.status >= 400:
            raise Refused(call, answer.status, content.decode("utf-8", "replace")[:2000])
        return msgspec.json.decode(content) if content else None
