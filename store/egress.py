"""Delivery servers: the control side of `domain.egress`. Every change raises egress_version in its own transaction."""

from collections.abc import Callable
from typing import Any

import asyncpg
import msgspec

from domain.egress import DeliveryServer, DeliveryServerLimits
from domain.errors import Conflict, Invalid, NotFound
from store.postgres import Pool, PooledConnection, transaction

# The columns a caller may write; `limits` is stored as JSON, `password` arrives sealed
FIELDS = (
    "name",
    "host",
    "port",
    "security",
    "connect_timeout_seconds",
    "username",
    "link_domain",
    "open_domain",
    "mfrom",
    "enforced_from",
    "use_list_sender_as_mfrom",
    "use_list_sender_as_from",
    "fallback_server_id",
    "limits",
    "enabled",
)
_COLUMNS = f"id, user_id, {', '.join(FIELDS)}, password_sealed, version".replace("limits", "limits::text as limits")

Seal = Callable[[int], bytes]  # the sealed password for a row id (S11: the id is part of what is sealed)


def _server(row: asyncpg.Record) -> DeliveryServer:
    fields = dict(row)
    fields["limits"] = msgspec.json.decode(fields["limits"], type=DeliveryServerLimits)
    return DeliveryServer(**fields)


async def create(pool: Pool, user_id: int, fields: dict[str, Any], seal: Seal | None) -> DeliveryServer:
    """Store a new delivery server; `fields` has every name of FIELDS. Raises Conflict when the name is taken, Invalid for the fallback."""
    async with transaction(pool) as conn:
        await _check_fallback(conn, user_id, 0, fields)
        try:
            server_id = await conn.fetchval(
                f"insert into delivery_servers (user_id, {', '.join(FIELDS)}) "
                f"values ($1, {', '.join(f'${i}' for i in range(2, len(FIELDS) + 2))}) returning id",
                user_id,
                *(_value(name, fields[name]) for name in FIELDS),
            )
        except asyncpg.UniqueViolationError:
            raise _taken(fields) from None
        if seal is not None:
            await conn.execute("update delivery_servers set password_sealed = $2 where id = $1", server_id, seal(server_id))
        await _raise_version(conn)
        return await get(conn, user_id, server_id)


async def update(pool: Pool, user_id: int | None, server_id: int, fields: dict[str, Any], seal: Seal | None) -> DeliveryServer:
    """Change the given fields, and the password where `seal` is given. Raises NotFound, Conflict, Invalid for the fallback."""
    async with transaction(pool) as conn:
        owner = await conn.fetchval(
            "select user_id from delivery_servers where id = $1 and ($2::bigint is null or user_id = $2) and deleted_at is null for update",
            server_id,
            user_id,
        )
        if owner is None:
            raise NotFound("delivery server", server_id)
        await _check_fallback(conn, owner, server_id, fields)
        changes = {name: _value(name, fields[name]) for name in FIELDS if name in fields}
        if seal is not None:
            changes["password_sealed"] = seal(server_id)
        if changes:
            assignments = ", ".join(f"{name} = ${i}" for i, name in enumerate(changes, 2))
            try:
                await conn.execute(
                    f"update delivery_servers set {assignments}, version = version + 1 where id = $1", server_id, *changes.values()
                )
            except asyncpg.UniqueViolationError:
                raise _taken(fields) from None
            await _raise_version(conn)
        return await get(conn, user_id, server_id)


async def delete(pool: Pool, user_id: int | None, server_id: int) -> None:
    """Take a delivery server out of use. Raises NotFound; Conflict while an unfinished campaign needs it."""
    async with transaction(pool) as conn:
        if not await conn.fetchval(
            "select true from delivery_servers where id = $1 and ($2::bigint is null or user_id = $2) and deleted_at is null for update",
            server_id,
            user_id,
        ):
            raise NotFound("delivery server", server_id)
        busy = await conn.fetchval(
            "select id from campaigns where delivery_server_id = $1 and state not in ('completed', 'cancelled') limit 1", server_id
        )
        if busy is not None:
            raise Conflict(f"campaign {busy} still needs delivery server {server_id}; cancel it or give it another one")
        await conn.execute(
            "update delivery_servers set deleted_at = now(), enabled = false, version = version + 1 where id = $1", server_id
        )
        await conn.execute(
            "update delivery_servers set fallback_server_id = null, version = version + 1 where fallback_server_id = $1", server_id
        )
        await _raise_version(conn)


async def get(conn: PooledConnection, user_id: int | None, server_id: int, *, deleted: bool = False) -> DeliveryServer:
    """One delivery server; `user_id` None looks at everybody's, `deleted` at those taken out of use, too. Raises NotFound."""
    row = await conn.fetchrow(
        f"select {_COLUMNS} from delivery_servers where id = $1 and ($2::bigint is null or user_id = $2) and ($3 or deleted_at is null)",
        server_id,
        user_id,
        deleted,
    )
    if row is None:
        raise NotFound("delivery server", server_id)
    return _server(row)


async def list_servers(conn: PooledConnection, user_id: int | None, after: int, limit: int) -> list[DeliveryServer]:
    """By id; `user_id` None lists everybody's."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from delivery_servers where ($1::bigint is null or user_id = $1) and deleted_at is null and id > $2 "
        "order by id limit $3",
        user_id,
        after,
        limit,
    )
    return [_server(row) for row in rows]


async def list_enabled(conn: PooledConnection, user_id: int | None) -> list[DeliveryServer]:
    """Those that are switched on, of the first thousand, by id; `user_id` None lists everybody's."""
    return [server for server in await list_servers(conn, user_id, 0, 1000) if server.enabled]


def _value(name: str, value: Any) -> Any:
    return msgspec.json.encode(value).decode() if name == "limits" else value


async def _check_fallback(conn: PooledConnection, owner: int, server_id: int, fields: dict[str, Any]) -> None:
    """A fallback is another server of the same user; locked, so that it is not deleted meanwhile."""
    fallback = fields.get("fallback_server_id")
    if fallback is None:
        return
    if fallback == server_id:
        raise Invalid("fallback_server_id", "is this server itself; choose another one, or null for none", fallback)
    if not await conn.fetchval(
        "select true from delivery_servers where id = $1 and user_id = $2 and deleted_at is null for share", fallback, owner
    ):
        raise Invalid("fallback_server_id", "there is no such delivery server of the same user", fallback)


def _taken(fields: dict[str, Any]) -> Conflict:
    return Conflict(f"a delivery server named {fields.get('name')!r} exists already; choose another name")


async def _raise_version(conn: PooledConnection) -> None:
    await conn.execute("update egress_version set version = version + 1")
