"""Suppressions: addresses that must not be mailed. Rows stay when removed, so that engines see the removal (schema note)."""

import re
from collections.abc import Callable
from datetime import datetime
from typing import Final, Literal

import msgspec

from domain.errors import NotFound
from domain.suppression import Reason, Scope, Suppression, decide
from domain.suppression_key import covering
from store.postgres import Pool, PooledConnection

Source = Literal["administrator", "user", "hard bounce", "complaint", "unsubscribe", "import"]

COPY_TIMEOUT_SECONDS = 300.0
_SOURCES: Final[dict[Reason, Source]] = {
    "bounced": "hard bounce", "complained": "complaint", "unsubscribed": "unsubscribe", "import": "import",
}  # fmt: skip
_SNAPSHOT: Final = re.compile(r"\d+:\d+:[\d,]*").fullmatch


class Suppressed(msgspec.Struct, frozen=True, kw_only=True):
    """One suppression as it is kept."""

    id: int
    user_id: int | None
    list_id: int | None
    email: str
    reason: Reason
    note: str
    created_at: datetime

    @property
    def scope(self) -> Scope:
        """system, user or list."""
        return Suppression(user_id=self.user_id, list_id=self.list_id, email_key=self.email, reason=self.reason).scope

    @property
    def source(self) -> Source:
        """Where it comes from; what people decide for the whole system is the administrator's."""
        return _SOURCES.get(self.reason, "administrator" if self.user_id is None else "user")


_COLUMNS = "id, user_id, list_id, email_key as email, reason, note, created_at"

# A row that was removed comes back to life with the new reason; a living one keeps its first
_UPSERT = (
    "insert into suppressions as s (user_id, list_id, email_key, reason, note) "
    "select $1, $2, k, $4, $5 from (select distinct unnest($3::text[]) as k order by k) keys "
    "on conflict (coalesce(user_id, 0), coalesce(list_id, 0), email_key) do update set removed_at = null, "
    "reason = excluded.reason, note = excluded.note, created_at = now(), changed = pg_current_xact_id() "
    "where s.removed_at is not null"
)


async def add(
    conn: PooledConnection, user_id: int | None, list_id: int | None, email_keys: list[str], reason: Reason, note: str = ""
) -> int:
    """Suppress addresses under one scope; returns how many were not suppressed before. The keys are `domain.address.key`s."""
    done = await conn.execute(_UPSERT, user_id, list_id, email_keys, reason, note)
    return int(done.rpartition(" ")[2])


async def record(conn: PooledConnection, suppression: Suppression) -> bool:
    """Store one decision of `domain.suppression.decide`; tells whether it is new."""
    return bool(await add(conn, suppression.user_id, suppression.list_id, [suppression.email_key], suppression.reason, suppression.note))


async def unsubscribe(
    conn: PooledConnection, user_id: int, list_id: int, subscriber_id: int | None, email_key: str, note: str = ""
) -> bool:
    """Take a subscriber off a list for good: its state, and a suppression for the list, in one transaction.

    `subscriber_id` None finds the subscriber by its key. Doing it twice is fine; tells whether anything changed.
    """
    async with conn.transaction():
        if subscriber_id is not None:
            # the address may have been re-imported in another spelling since: what the list holds now counts as well
            stored = await conn.fetchval(
                "select email_key from subscribers where id = $1 and list_id = $2 and user_id = $3", subscriber_id, list_id, user_id
            )
        else:
            stored = None
        done = await conn.execute(
            "update subscribers set state = 'unsubscribed', updated_at = now() "
            "where user_id = $1 and list_id = $2 and email_key = any($3::text[]) and state <> 'unsubscribed'",
            user_id,
            list_id,
            [email_key, stored or email_key],
        )
        fresh = await record(conn, decide(user_id, list_id, email_key, "unsubscribed", note))
        if stored is not None and stored != email_key:
            fresh = await record(conn, decide(user_id, list_id, stored, "unsubscribed", note)) or fresh
    return fresh or done != "UPDATE 0"


async def remove(conn: PooledConnection, user_id: int | None, suppression_id: int) -> None:
    """End a suppression; `user_id` None may end everybody's and the system's. Raises NotFound."""
    done = await conn.execute(
        "update suppressions set removed_at = now(), changed = pg_current_xact_id() "
        "where id = $1 and removed_at is null and ($2::bigint is null or user_id = $2)",
        suppression_id,
        user_id,
    )
    if done == "UPDATE 0":
        raise NotFound("suppression", suppression_id)


async def remove_keys(conn: PooledConnection, user_id: int | None, list_id: int | None, email_keys: list[str]) -> int:
    """End the suppressions of these keys under exactly one scope; returns how many there were."""
    done = await conn.execute(
        "update suppressions set removed_at = now(), changed = pg_current_xact_id() where removed_at is null "
        "and coalesce(user_id, 0) = coalesce($1::bigint, 0) and coalesce(list_id, 0) = coalesce($2::bigint, 0) "
        "and email_key = any($3::text[])",
        user_id,
        list_id,
        email_keys,
    )
    return int(done.rpartition(" ")[2])


async def check(conn: PooledConnection, user_id: int, list_id: int | None, email_key: str) -> list[Suppressed]:
    """What stops mail of this user to this address: system, user, and the list's own where a list is given (else any list's)."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from suppressions where email_key = any($3::text[]) and removed_at is null "
        "and (user_id is null or (user_id = $1 and (list_id is null or $2::bigint is null or list_id = $2))) "
        # names the parts of the unique index
        "and coalesce(user_id, 0) in (0, $1) order by id",
        user_id,
        list_id,
        covering(email_key),
    )
    return [Suppressed(**dict(row)) for row in rows]


async def of_key(conn: PooledConnection, user_id: int, email_key: str) -> list[Suppressed]:
    """The suppressions of this very key, not of patterns that cover it: the system's and the user's, for all lists and for any."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from suppressions where email_key = $2 and removed_at is null and coalesce(user_id, 0) in (0, $1) order by id",
        user_id,
        email_key,
    )
    return [Suppressed(**dict(row)) for row in rows]


async def list_suppressions(
    conn: PooledConnection, user_id: int | None, list_id: int | None, after: int, limit: int, reason: Reason | None = None
) -> list[Suppressed]:
    """By id; `user_id` None lists everybody's and the system's, `list_id` only that list's, `reason` only those."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from suppressions where ($1::bigint is null or user_id = $1) and ($2::bigint is null or list_id = $2) "
        "and removed_at is null and id > $3 and ($5::text is null or reason = $5) order by id limit $4",
        user_id,
        list_id,
        after,
        limit,
        reason,
    )
    return [Suppressed(**dict(row)) for row in rows]


async def counts(conn: PooledConnection, user_id: int | None) -> dict[str, int]:
    """How many there are by reason; `user_id` None counts everybody's and the system's."""
    rows = await conn.fetch(
        "select reason, count(*) from suppressions where removed_at is null and ($1::bigint is null or user_id = $1) group by 1 order by 1",
        user_id,
    )
    return {row[0]: row[1] for row in rows}


async def changes(pool: Pool, since: str, feed: Callable[[bytes], None]) -> str:
    """Give `feed` a binary COPY of every suppression that changed after the snapshot `since` ("": all there are).

    Columns: user (0: the system), list (0: all), removed, key. Returns the snapshot to go on from. What was not committed in that
    snapshot comes, and nothing else, however long other transactions take. `feed` is not called when nothing changed; what it was
    given when this raises comes again.
    """
    if since:
        if not _SNAPSHOT(since):
            raise ValueError(f"not a snapshot: {since!r}")
        # the index finds the first part, the second leaves out what was seen already
        changed = f"changed >= pg_snapshot_xmin('{since}') and not pg_visible_in_snapshot(changed, '{since}')"
        if not await pool.fetchval(f"select exists (select from suppressions where {changed})"):
            return since
    else:
        changed = "removed_at is null"
    failures: list[Exception] = []

    async def take(block: bytes) -> None:
        if not failures:
            try:
                feed(bytes(block))
            except Exception as error:  # raised behind the COPY: one that is broken off makes asyncpg wait for its time limit
                failures.append(error)

    async with pool.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
        snapshot = await conn.fetchval("select pg_current_snapshot()::text")
        await conn.copy_from_query(
            f"select coalesce(user_id, 0), coalesce(list_id, 0), removed_at is not null, email_key from suppressions where {changed}",
            output=take,
            format="binary",
            timeout=COPY_TIMEOUT_SECONDS,
        )
    if failures:
        raise failures[0]
    return str(snapshot)
