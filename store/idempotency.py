"""Answers to POSTs with an Idempotency-Key. Kept sealed by the caller: an answer may hold a secret that is shown once (S9)."""

import msgspec

from domain.errors import NotFound
from store.postgres import PooledConnection

KEPT_HOURS = 24


class Earlier(msgspec.Struct, frozen=True):
    """An earlier request with the same key. `status` None: its answer is not known (yet)."""

    request_hash: bytes
    status: int | None
    response: bytes


async def claim(conn: PooledConnection, user_id: int, key: str, request_hash: bytes) -> Earlier | None:
    """Take the key for this request, or return the earlier request of the last day that has it. Exactly one of many at once gets None."""
    for _ in range(3):
        done = await conn.execute(
            "insert into idempotency_keys as k (user_id, key, request_hash) values ($1, $2, $3) on conflict (user_id, key) do update "
            "set request_hash = excluded.request_hash, status = null, response = null, created_at = now() "
            "where k.created_at < now() - make_interval(hours => $4)",
            user_id,
            key,
            request_hash,
            KEPT_HOURS,
        )
        if done == "INSERT 0 1":
            return None
        row = await conn.fetchrow(
            "select request_hash, status, response from idempotency_keys where user_id = $1 and key = $2", user_id, key
        )
        if row is not None:
            return Earlier(row["request_hash"], row["status"], row["response"] or b"")
        # released between the two statements: try to take it
    raise NotFound("idempotency key", key)


async def settle(conn: PooledConnection, user_id: int, key: str, status: int, response: bytes) -> None:
    """Keep the answer, to be given again."""
    await conn.execute(
        "update idempotency_keys set status = $3, response = $4 where user_id = $1 and key = $2", user_id, key, status, response
    )


async def release(conn: PooledConnection, user_id: int, key: str) -> None:
    """Forget a request that had no effect, so that it can be made again."""
    await conn.execute("delete from idempotency_keys where user_id = $1 and key = $2 and status is null", user_id, key)


async def purge(conn: PooledConnection) -> int:
    """Forget answers that are older than a day."""
    done = await conn.execute("delete from idempotency_keys where created_at < now() - make_interval(hours => $1)", KEPT_HOURS)
    return int(done.rpartition(" ")[2])
