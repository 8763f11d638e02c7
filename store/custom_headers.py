"""Custom header fields: who adds which to what; frozen into a campaign when it starts."""

from datetime import datetime
from typing import Literal

import msgspec

from domain.errors import NotFound
from store.postgres import PooledConnection

MailClass = Literal["transactional", "autoresponder", "marketing"]

# For a row of `campaigns` called {0}: its headers as JSON, the older rule first
OF_CAMPAIGN = (
    "coalesce({0}.headers, (select json_agg(json_build_array(h.name, h.value) order by h.id) from custom_headers h "
    "where h.user_id = {0}.user_id and (h.delivery_server_id is null or h.delivery_server_id = {0}.delivery_server_id) "
    "and (h.mail_classes = '{{}}' or {0}.mail_class = any(h.mail_classes))), '[]'::json)"
)

_decode = msgspec.json.Decoder(tuple[tuple[str, str], ...]).decode


class CustomHeader(msgspec.Struct, frozen=True, kw_only=True):
    """One rule. `mail_classes` empty: all classes; `delivery_server_id` null: all delivery servers. `value` is a template."""

    id: int
    user_id: int
    name: str
    value: str
    mail_classes: list[MailClass]
    delivery_server_id: int | None
    created_at: datetime


_COLUMNS = "id, user_id, name, value, mail_classes, delivery_server_id, created_at"


def of_campaign(text: str) -> tuple[tuple[str, str], ...]:
    """What `OF_CAMPAIGN` selected, as pairs of name and value."""
    return _decode(text)


async def rules_for(conn: PooledConnection, user_id: int, delivery_server_id: int, mail_class: MailClass) -> tuple[tuple[str, str], ...]:
    """Names and values of what a user adds to mail of a class behind a delivery server, the older rule first."""
    rows = await conn.fetch(
        "select name, value from custom_headers where user_id = $1 and (delivery_server_id is null or delivery_server_id = $2) "
        "and (mail_classes = '{}' or $3 = any(mail_classes)) order by id",
        user_id,
        delivery_server_id,
        mail_class,
    )
    return tuple((row["name"], row["value"]) for row in rows)


async def create(
    conn: PooledConnection, user_id: int, name: str, value: str, mail_classes: list[MailClass], delivery_server_id: int | None
) -> CustomHeader:
    """Store a rule that was checked; the caller has looked the delivery server up with the user."""
    row = await conn.fetchrow(
        "insert into custom_headers (user_id, name, value, mail_classes, delivery_server_id) values ($1, $2, $3, $4, $5) "
        f"returning {_COLUMNS}",
        user_id,
        name,
        value,
        mail_classes,
        delivery_server_id,
    )
    assert row is not None
    return CustomHeader(**dict(row))


async def list_headers(conn: PooledConnection, user_id: int | None, after: int, limit: int) -> list[CustomHeader]:
    """By id; `user_id` None lists everybody's."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from custom_headers where ($1::bigint is null or user_id = $1) and id > $2 order by id limit $3",
        user_id,
        after,
        limit,
    )
    return [CustomHeader(**dict(row)) for row in rows]


async def delete(conn: PooledConnection, user_id: int | None, header_id: int) -> None:
    """Take a rule away; campaigns that were started keep what they have. Raises NotFound."""
    done = await conn.execute("delete from custom_headers where id = $1 and ($2::bigint is null or user_id = $2)", header_id, user_id)
    if done == "DELETE 0":
        raise NotFound("custom header", header_id)
