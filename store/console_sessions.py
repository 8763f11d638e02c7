"""Sessions of the web console, in Redis: lost with it, which costs a sign-in.

The cookie holds 256 random bits; Redis holds their SHA-256 and the key that signed in, by prefix and hash, so neither a dump of
Redis nor one of the database lets anybody in, and a revoked key ends its sessions (S9).
"""

import hashlib
import secrets

import msgspec
import redis.asyncio

from store import redis_keys

LIFETIME_SECONDS = 12 * 3600


class Session(msgspec.Struct, frozen=True):
    """The API key a browser signed in with."""

    prefix: str
    key_hash: bytes


async def begin(client: redis.asyncio.Redis, session: Session) -> str:
    """Store a session; returns the token for its cookie."""
    token = secrets.token_urlsafe(32)
    await client.set(_key(token), msgspec.json.encode(session), ex=LIFETIME_SECONDS)
    return token


async def find(client: redis.asyncio.Redis, token: str) -> Session | None:
    """The session of a token, None when there is none."""
    value = await client.get(_key(token))
    if not value:
        return None
    try:
        return msgspec.json.decode(value, type=Session)
    except msgspec.MsgspecError:
        return None


async def end(client: redis.asyncio.Redis, token: str) -> None:
    """Forget a session; one that is gone is fine."""
    await client.delete(_key(token))


def _key(token: str) -> str:
    return redis_keys.console_session(hashlib.sha256(token.encode("utf-8", "replace")).hexdigest())
