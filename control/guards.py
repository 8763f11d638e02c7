"""Who calls: API keys and scopes.

`Authorization: Bearer slk_<prefix>_<secret>` on everything under /api/. A key is looked up by its prefix and compared by its
SHA-256 in constant time; what was found is kept for 4 s, so a revoked key stops working everywhere within 5 (S9). Wrong keys
from one address are answered 429 after a while, without asking the database; forwarding headers are not believed (S16).
"""

import hmac
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar.connection import ASGIConnection
from litestar.exceptions import PermissionDeniedException
from litestar.handlers.base import BaseRouteHandler

from control.asgi import App, Receive, Scope, Send
from control.errors import of_exception, problem, send_problem
from store import users
from store.postgres import Pool, connection

CACHE_SECONDS = 4.0
MAX_CACHED = 10_000
FAILURES_AT_ONCE = 50.0  # wrong keys one address may try ...
FAILURES_PER_SECOND = 2.0  # ... and go on trying

_NO_HASH = b"\0" * 32


class Caller(msgspec.Struct, frozen=True):
    """Whose key it is. `sees` is what the store looks rows up with: an admin sees everybody's."""

    user_id: int
    scope: users.Scope

    @property
    def sees(self) -> int | None:
        """The user whose rows are visible; None: everybody's."""
        return None if self.scope == "admin" else self.user_id


class Failures:
    """A token bucket of wrong keys per address, bounded in number."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def exhausted(self, address: str, now: float) -> bool:
        """Whether this address has tried too many."""
        return self._level(address, now) < 1.0

    def count(self, address: str, now: float) -> None:
        """One more wrong key."""
        self._buckets[address] = (self._level(address, now) - 1.0, now)
        self._buckets.move_to_end(address)
        while len(self._buckets) > MAX_CACHED:
            self._buckets.popitem(last=False)

    def _level(self, address: str, now: float) -> float:
        level, then = self._buckets.get(address, (FAILURES_AT_ONCE, now))
        return min(FAILURES_AT_ONCE, level + (now - then) * FAILURES_PER_SECOND)


class Authenticator:
    """Checks keys against the store, through a cache of seconds."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: OrderedDict[str, tuple[float, users.KeyOwner]] = OrderedDict()
        self.failures = Failures()

    async def check(self, text: str, *, cached_only: bool = False) -> Caller | None:
        """Whose key this is; None when it is nobody's. Raises Unavailable."""
        prefix = users.prefix_of(text)
        owner = await self._find(prefix, cached_only) if prefix else None
        # compared also when nothing was found, so that both answers take alike
        if not hmac.compare_digest(users.hash_key(text), owner.hash if owner else _NO_HASH) or owner is None:
            return None
        return Caller(owner.user_id, owner.scope)

    async def _find(self, prefix: str, cached_only: bool) -> users.KeyOwner | None:
        now = time.monotonic()
        kept = self._known.get(prefix)
        if kept is not None and now - kept[0] < CACHE_SECONDS:
            return kept[1]
        self._known.pop(prefix, None)
        if cached_only:
            return None
        async with connection(self._pool) as conn:
            owner = await users.find_key(conn, prefix)
        if owner is not None:
            # the age counts from before the question: what is revoked after it is not served longer
            self._known[prefix] = (now, owner)
            while len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
        return owner


class Authentication:
    """ASGI: lets nothing under `/api/` through without a valid key; leaves the Caller in the connection's state."""

    def __init__(self, app: App, authenticator: Authenticator) -> None:
        self.app = app
        self.authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self.app(scope, receive, send)
            return
        address = (scope.get("client") or ("", 0))[0]
        now = time.monotonic()
        limited = self.authenticator.failures.exhausted(address, now)
        try:
            caller = await self._caller(scope, limited)
        except Exception as error:
            answer = of_exception(error)
            if answer is None:
                raise
            await send_problem(send, answer)
            return
        if caller is None:
            if limited:
                await send_problem(send, problem(429, "too many wrong API keys from this address; wait a little"))
                return
            self.authenticator.failures.count(address, now)
            detail = "send a valid API key as `Authorization: Bearer slk_...`"
            await send_problem(send, problem(401, detail), [(b"www-authenticate", b"Bearer")])
            return
        scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)

    async def _caller(self, scope: Scope, cached_only: bool) -> Caller | None:
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(found) != 1 or len(found[0]) > 300:
            return None
        kind, _, text = found[0].decode("latin-1").partition(" ")
        return await self.authenticator.check(text.strip(), cached_only=cached_only) if kind.lower() == "bearer" else None


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """The caller of a request that came through Authentication."""
    found = scope["state"]["caller"]
    assert isinstance(found, Caller)
    return found


def requires_admin(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Guard: a key of admin scope."""
    if caller_of(connection.scope).scope != "admin":
        raise PermissionDeniedException("this needs an API key of admin scope")
