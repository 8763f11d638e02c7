"""Lists and their custom fields."""

from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from domain.errors import Conflict, NotFound
from domain.import_rows import MAX_FIELDS, Kind
from store.postgres import PooledConnection


class List(msgspec.Struct, frozen=True, kw_only=True):
    """A list of subscribers and who mail to it comes from."""

    id: int
    user_id: int
    name: str
    sender_name: str
    sender_email: str
    created_at: datetime


class CustomField(msgspec.Struct, frozen=True, kw_only=True):
    """A field of merge data that subscribers of a list may have."""

    id: int
    name: str
    kind: Kind
    created_at: datetime


_COLUMNS = "id, user_id, name, sender_name, sender_email, created_at"


async def create(conn: PooledConnection, user_id: int, name: str, sender_name: str, sender_email: str) -> List:
    """Raises Conflict when the name is taken."""
    try:
        row = await conn.fetchrow(
            f"insert into lists (user_id, name, sender_name, sender_email) values ($1, $2, $3, $4) returning {_COLUMNS}",
            user_id,
            name,
            sender_name,
            sender_email,
        )
    except asyncpg.UniqueViolationError:
        raise Conflict(f"a list named {name!r} exists already; choose another name") from None
    assert row is not None
    return List(**dict(row))


async def get(conn: PooledConnection, user_id: int | None, list_id: int) -> List:
    """One list; `user_id` None looks at everybody's. Raises NotFound."""
    row = await conn.fetchrow(
        f"select {_COLUMNS} from lists where id = $1 and ($2::bigint is null or user_id = $2) and deleted_at is null", list_id, user_id
    )
    if row is None:
        raise NotFound("list", list_id)
    return List(**dict(row))


async def list_lists(conn: PooledConnection, user_id: int | None, after: int, limit: int) -> list[List]:
    """By id; `user_id` None lists everybody's."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from lists where ($1::bigint is null or user_id = $1) and deleted_at is null and id > $2 order by id limit $3",
        user_id,
        after,
        limit,
    )
    return [List(**dict(row)) for row in rows]


async def update(conn: PooledConnection, user_id: int | None, list_id: int, fields: dict[str, Any]) -> List:
    """Change name, sender_name or sender_email; a campaign under way keeps the old ones. Raises NotFound, Conflict."""
    await get(conn, user_id, list_id)
    changes = {name: fields[name] for name in ("name", "sender_name", "sender_email") if name in fields}
    if changes:
        assignments = ", ".join(f"{name} = ${i}" for i, name in enumerate(changes, 2))
        try:
            await conn.execute(f"update lists set {assignments} where id = $1", list_id, *changes.values())
        except asyncpg.UniqueViolationError:
            raise Conflict(f"a list named {fields['name']!r} exists already; choose another name") from None
        # what a campaign says hangs on its list, and engines keep it compiled by version
        await conn.execute(
            "update campaigns set version = version + 1 where list_id = $1 and state not in ('completed', 'cancelled')", list_id
        )
    return await get(conn, user_id, list_id)


async def delete(conn: PooledConnection, user_id: int | None, list_id: int) -> None:
    """Take a list out of use; its rows stay. Call it in a transaction. Raises NotFound; Conflict while an unfinished campaign needs it."""
    await get(conn, user_id, list_id)
    await conn.execute("select from lists where id = $1 for update", list_id)  # a start holds it for share
    busy = await conn.fetchval("select id from campaigns where list_id = $1 and state not in ('completed', 'cancelled') limit 1", list_id)
    if busy is not None:
        raise Conflict(f"campaign {busy} still needs list {list_id}; cancel or delete the campaign first")
    await conn.execute("update lists set deleted_at = now() where id = $1", list_id)


async def fields(conn: PooledConnection, user_id: int | None, list_id: int) -> list[CustomField]:
    """The custom fields of a list, by id. Raises NotFound."""
    await get(conn, user_id, list_id)
    rows = await conn.fetch("select id, name, kind, created_at from custom_fields where list_id = $1 order by id", list_id)
    return [CustomField(**dict(row)) for row in rows]


async def create_field(conn: PooledConnection, user_id: int | None, list_id: int, name: str, kind: Kind) -> CustomField:
    """Raises NotFound (no such list), Conflict when the list has such a field or too many."""
    owner = (await get(conn, user_id, list_id)).user_id
    if await conn.fetchval("select count(*) from custom_fields where list_id = $1", list_id) >= MAX_FIELDS:
        raise Conflict(f"a list has at most {MAX_FIELDS} fields")
    try:
        row = await conn.fetchrow(
            "insert into custom_fields (user_id, list_id, name, kind) values ($1, $2, $3, $4) returning id, name, kind, created_at",
            owner,
            list_id,
            name,
            kind,
        )
    except asyncpg.UniqueViolationError:
        raise Conflict(f"list {list_id} has a field {name!r} already") from None
    assert row is not None
    return CustomField(**dict(row))


async def delete_field(conn: PooledConnection, user_id: int | None, list_id: int, field_id: int) -> None:
    """The list no longer has the field; values that were stored stay with their subscribers. Raises NotFound."""
    await get(conn, user_id, list_id)
    if await conn.execute("delete from custom_fields where id = $1 and list_id = $2", field_id, list_id) == "DELETE 0":
        raise NotFound("custom field", field_id)
