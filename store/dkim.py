"""DKIM keys: kept sealed, found by domain. Every change of what signs raises dkim_version in its own transaction."""

from collections.abc import Callable
from datetime import datetime
from typing import cast

import asyncpg

from domain.dkim import ACTIVE, RETIRING, Algorithm, DkimKey
from domain.errors import Conflict, NotFound
from store.postgres import Pool, PooledConnection, transaction
from store.users import ADMIN_NAME

_COLUMNS = "id, user_id, domain, selector, algorithm, bits, public_key, private_key_sealed, state, created_at, activated_at, retired_at"

Seal = Callable[[int], bytes]  # the sealed private key for a row id (S11: the id is part of what is sealed)


async def create(
    pool: Pool, user_id: int, *, domain: str, selector: str, algorithm: Algorithm, bits: int, public_key: bytes, seal: Seal,
    activate: bool | None = None,
) -> DkimKey:  # fmt: skip
    """Store a new key. `activate` None: only if no key of its kind signs for the domain yet, so that nothing valid is replaced.

    Raises Conflict when the selector is taken.
    """
    async with transaction(pool) as conn:
        try:
            key_id = await conn.fetchval(
                "insert into dkim_keys (user_id, domain, selector, algorithm, bits, public_key) "
                "values ($1, $2, $3, $4, $5, $6) returning id",
                user_id,
                domain,
                selector,
                algorithm,
                bits,
                public_key,
            )
        except asyncpg.UniqueViolationError:
            raise Conflict(f"{domain} has a key with the selector {selector} already; choose another selector") from None
        await conn.execute("update dkim_keys set private_key_sealed = $2 where id = $1", key_id, seal(key_id))
        if activate is None:
            await _lock(conn, user_id, domain)
            activate = not await conn.fetchval(
                "select exists (select from dkim_keys where user_id = $1 and domain = $2 and algorithm = $3 and state = 'active')",
                user_id,
                domain,
                algorithm,
            )
        key = await get(conn, user_id, key_id)
        return await _activate(conn, key) if activate else key


async def activate(pool: Pool, user_id: int | None, key_id: int) -> DkimKey:
    """Sign with this key from now on; the one of its kind that did so retires. Raises NotFound."""
    async with transaction(pool) as conn:
        return await _activate(conn, await get(conn, user_id, key_id))


async def retire(pool: Pool, user_id: int | None, key_id: int) -> DkimKey:
    """Sign with this key no more; its DNS record is still needed for what is under way. Raises NotFound."""
    async with transaction(pool) as conn:
        key = await get(conn, user_id, key_id)
        await _lock(conn, key.user_id, key.domain)
        await conn.execute("update dkim_keys set state = 'retiring', retired_at = coalesce(retired_at, now()) where id = $1", key_id)
        await _raise_version(conn)
        return await get(conn, user_id, key_id)


async def delete(pool: Pool, user_id: int | None, key_id: int) -> None:
    """Forget a key for good. Raises NotFound; Conflict while it signs."""
    async with transaction(pool) as conn:
        key = await get(conn, user_id, key_id)
        await _lock(conn, key.user_id, key.domain)
        if not await conn.fetchval("delete from dkim_keys where id = $1 and state <> 'active' returning true", key_id):
            raise Conflict(f"DKIM key {key_id} signs for {key.domain}; retire it first")


async def get(conn: PooledConnection, user_id: int | None, key_id: int) -> DkimKey:
    """One key; `user_id` None looks at everybody's. Raises NotFound."""
    row = await conn.fetchrow(f"select {_COLUMNS} from dkim_keys where id = $1 and ($2::bigint is null or user_id = $2)", key_id, user_id)
    if row is None:
        raise NotFound("DKIM key", key_id)
    return DkimKey(**row)


async def list_keys(conn: PooledConnection, user_id: int | None, domain: str | None, after: int, limit: int) -> list[DkimKey]:
    """By id; `user_id` None lists everybody's, `domain` None those of all domains."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from dkim_keys where ($1::bigint is null or user_id = $1) and ($2::text is null or domain = $2) and id > $3 "
        "order by id limit $4",
        user_id,
        domain,
        after,
        limit,
    )
    return [DkimKey(**row) for row in rows]


async def note_record(pool: Pool, key_id: int, *, there: bool) -> datetime | None:
    """Keep whether the record of a key is in the DNS; returns since when it is known to be, None if it is not."""
    return cast(
        datetime | None,
        await pool.fetchval(
            "update dkim_keys set verified_at = case when $2 then now() end where id = $1 returning verified_at", key_id, there
        ),
    )


async def foreign_domain(conn: PooledConnection, user_id: int, domains: list[str]) -> str | None:
    """The first of `domains`, best first, that others have proved to be theirs by a record in its DNS and this user has not."""
    rows = await conn.fetch(
        "select domain, bool_or(user_id = $1) as own from dkim_keys where domain = any($2) and verified_at is not null group by domain",
        user_id,
        domains,
    )
    proved = {row["domain"]: row["own"] for row in rows}
    nearest = next((domain for domain in domains if domain in proved), None)
    return nearest if nearest is not None and not proved[nearest] else None


async def selectors(conn: PooledConnection, user_id: int, domain: str) -> set[str]:
    """Every selector that the domain has used and still has."""
    return {row[0] for row in await conn.fetch("select selector from dkim_keys where user_id = $1 and domain = $2", user_id, domain)}


async def version(pool: Pool) -> int:
    """The number that every change of a signing key raises."""
    return int(await pool.fetchval("select version from dkim_version"))


async def operator(conn: Pool | PooledConnection) -> int:
    """The user whose keys sign for addresses of the whole installation; 0 while there is no such user."""
    return int(await conn.fetchval("select id from users where name = $1", ADMIN_NAME) or 0)


async def active(pool: Pool, user_ids: list[int], domains: list[str]) -> list[DkimKey]:
    """The keys that sign for any of `domains`, of these users."""
    rows = await pool.fetch(
        f"select {_COLUMNS} from dkim_keys where state = 'active' and user_id = any($1) and domain = any($2)", user_ids, domains
    )
    return [DkimKey(**row) for row in rows]


async def _activate(conn: PooledConnection, key: DkimKey) -> DkimKey:
    await _lock(conn, key.user_id, key.domain)
    key = await get(conn, key.user_id, key.id)
    if key.state == ACTIVE:
        return key
    await conn.execute(
        "update dkim_keys set state = $4, retired_at = now() where user_id = $1 and domain = $2 and algorithm = $3 and state = 'active'",
        key.user_id,
        key.domain,
        key.algorithm,
        RETIRING,
    )
    await conn.execute("update dkim_keys set state = 'active', activated_at = now(), retired_at = null where id = $1", key.id)
    await _raise_version(conn)
    return await get(conn, key.user_id, key.id)


async def _lock(conn: PooledConnection, user_id: int, domain: str) -> None:
    """Changes of one domain's keys happen one after the other, also when it has no row to lock yet."""
    await conn.execute("select pg_advisory_xact_lock(hashtextextended('dkim ' || $1::bigint || ' ' || $2::text, 0))", user_id, domain)


async def _raise_version(conn: PooledConnection) -> None:
    await conn.execute("update dkim_version set version = version + 1")
