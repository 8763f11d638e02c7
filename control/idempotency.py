"""`Idempotency-Key` on every POST: the same request again gets the same answer and has no second effect.

Same key and same request: the first answer with `Idempotent-Replayed: true`, for 24 hours. Same key, other request: 422. The
first still under way: 409; it stays 409 when the process died in the middle, because nobody knows then what happened.
Answers of 400 to 499 had no effect and are not kept. After one of 500 and above nobody knows (the connection to PostgreSQL may have
been lost behind the COMMIT), so the key stays in doubt: 409. A streamed import is compared by path, type and length, not content.
"""

import asyncio
import hashlib
import logging
from typing import Any

import msgspec

from config.keys import Keyring
from control.asgi import App, Message, Receive, Scope, Send
from control.errors import FieldError, of_exception, problem, send_problem
from control.guards import caller_of
from domain.errors import Invalid
from store import idempotency
from store.postgres import Pool, connection

MAX_KEY_CHARACTERS = 255
PURGE_SECONDS = 3600.0
_KEPT_HEADERS = frozenset({b"content-type", b"location"})

_log = logging.getLogger(__name__)


class Answer(msgspec.Struct, array_like=True):
    """What is sent again."""

    headers: list[tuple[bytes, bytes]]
    body: bytes


class Idempotency:
    """ASGI, behind Authentication and Bodies."""

    def __init__(self, app: App, pool: Pool, keyring: Keyring) -> None:
        self.app = app
        self._pool = pool
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/api/"):
            await self.app(scope, receive, send)
            return
        keys = [value for name, value in scope["headers"] if name == b"idempotency-key"]
        if not keys:
            await self.app(scope, receive, send)
            return
        key = keys[0].decode("latin-1")
        if len(keys) > 1 or not 0 < len(key) <= MAX_KEY_CHARACTERS or not key.isascii() or not key.isprintable():
            reason = f"must be one value of 1 to {MAX_KEY_CHARACTERS} printable ASCII characters"
            await send_problem(send, problem(422, f"Idempotency-Key: {reason}", [FieldError("Idempotency-Key", reason)]))
            return
        user_id = caller_of(scope).user_id
        digest = _digest(scope)
        try:
            async with connection(self._pool) as conn:
                earlier = await idempotency.claim(conn, user_id, key, digest)
            if earlier is not None:
                await self._again(send, user_id, key, digest, earlier)
                return
            await self._first(scope, receive, send, user_id, key)
        except Exception as error:
            answer = of_exception(error)
            if answer is None:
                raise
            await send_problem(send, answer)

    async def _again(self, send: Send, user_id: int, key: str, digest: bytes, earlier: idempotency.Earlier) -> None:
        if earlier.request_hash != digest:
            reason = "was used for another request; a new request needs a new key"
            await send_problem(send, problem(422, f"Idempotency-Key: {reason}", [FieldError("Idempotency-Key", reason)]))
        elif earlier.status is None:
            detail = (
                "the first request with this Idempotency-Key has not been answered; look at what it was to change before using a new key"
            )
            await send_problem(send, problem(409, detail))
        else:
            try:
                kept = msgspec.msgpack.decode(self._keyring.open(earlier.response, _context(user_id, key)), type=Answer)
            except (Invalid, msgspec.MsgspecError):
                await send_problem(
                    send, problem(409, "the first request was answered, but the answer can no longer be read (secrets.key changed)")
                )
                return
            headers = [*kept.headers, (b"content-length", str(len(kept.body)).encode()), (b"idempotent-replayed", b"true")]
            await send({"type": "http.response.start", "status": earlier.status, "headers": headers})
            await send({"type": "http.response.body", "body": kept.body, "more_body": False})

    async def _first(self, scope: Scope, receive: Receive, send: Send, user_id: int, key: str) -> None:
        """Run the request; its answer is kept before the client sees any of it."""
        messages: list[Message] = []

        async def hold(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, hold)
        status = next((m["status"] for m in messages if m["type"] == "http.response.start"), 500)
        try:
            async with connection(self._pool) as conn:
                if status < 400:
                    sealed = self._keyring.seal(msgspec.msgpack.encode(_answer(messages)), _context(user_id, key))
                    await idempotency.settle(conn, user_id, key, status, sealed)
                elif status < 500:
                    await idempotency.release(conn, user_id, key)
        except Exception as error:
            if of_exception(error) is None:
                raise
            _log.warning("the answer to an Idempotency-Key was not kept: %s", error)
        for message in messages:
            await send(message)


async def forget_old(pool: Pool, *, every_seconds: float = PURGE_SECONDS) -> None:
    """Remove answers that are older than a day, until cancelled."""
    while True:
        try:
            async with connection(pool) as conn:
                await idempotency.purge(conn)
        except Exception as error:
            _log.warning("old answers to Idempotency-Keys were not removed: %s", error)
        await asyncio.sleep(every_seconds)


def _answer(messages: list[Message]) -> Answer:
    headers: list[tuple[bytes, bytes]] = []
    body = b""
    for message in messages:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name.lower() in _KEPT_HEADERS]
        elif message["type"] == "http.response.body":
            body += message["body"]
    return Answer(headers, body)


def _digest(scope: Scope) -> bytes:
    state: dict[str, Any] = scope["state"]
    body: bytes | None = state.get("body")
    if body is None:
        wanted = {b"content-type", b"content-length"}
        body = repr(sorted((name, value) for name, value in scope["headers"] if name in wanted)).encode()
    parts = (scope["method"].encode(), scope["path"].encode("utf-8", "surrogateescape"), scope["query_string"], body)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def _context(user_id: int, key: str) -> bytes:
    return f"idempotency:{user_id}:{key}".encode()
