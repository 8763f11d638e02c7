"""Subscribers of a list, one at a time; many at once come through `store.imports`."""

from datetime import datetime
from typing import Literal

import msgspec

from domain.address import Address
from domain.errors import NotFound
from store.postgres import PooledConnection

SubscriberState = Literal["subscribed", "unsubscribed", "bounced"]


class Subscriber(msgspec.Struct, frozen=True, kw_only=True):
    """One address on one list with its merge data."""

    id: int
    list_id: int
    email: str
    state: SubscriberState
    data: dict[str, object]
    subscribed_at: datetime
    updated_at: datetime


_COLUMNS = "id, list_id, email, state, data::text as data, subscribed_at, updated_at"


def _subscriber(row: object) -> Subscriber:
    fields = dict(row)  # type: ignore[call-overload]
    fields["data"] = msgspec.json.decode(fields["data"])
    return Subscriber(**fields)


async def count(conn: PooledConnection, list_id: int) -> dict[str, int]:
    """How many subscribers a list has in each state."""
    rows = await conn.fetch("select state, count(*) as n from subscribers where list_id = $1 group by state", list_id)
    return {row["state"]: row["n"] for row in rows}


async def add(conn: PooledConnection, user_id: int, list_id: int, address: Address, data: dict[str, object]) -> tuple[Subscriber, bool]:
    """Put one address on a list, or change the fields named of the one that is there. Returns it and whether it is new.

    Whoever unsubscribed stays unsubscribed.
    """
    row = await conn.fetchrow(
        "insert into subscribers as s (user_id, list_id, email, email_key, data) values ($1, $2, $3, $4, $5) "
        "on conflict (list_id, email_key) do update set email = excluded.email, "
        f"data = (s.data::jsonb || excluded.data::jsonb)::json, updated_at = now() returning {_COLUMNS}, xmax = 0 as fresh",
        user_id,
        list_id,
        address.text,
        address.key,
        msgspec.json.encode(data).decode(),
    )
    assert row is not None
    fields = dict(row)
    fresh = fields.pop("fresh")
    return _subscriber(fields), fresh


async def get(conn: PooledConnection, list_id: int, subscriber_id: int | None, email_key: str = "") -> Subscriber:
    """By id, or by key where the id is None. The caller has looked the list up with its user. Raises NotFound."""
    if subscriber_id is not None:
        row = await conn.fetchrow(f"select {_COLUMNS} from subscribers where list_id = $1 and id = $2", list_id, subscriber_id)
    else:
        row = await conn.fetchrow(f"select {_COLUMNS} from subscribers where list_id = $1 and email_key = $2", list_id, email_key)
    if row is None:
        raise NotFound("subscriber", email_key if subscriber_id is None else subscriber_id)
    return _subscriber(row)


async def list_subscribers(conn: PooledConnection, list_id: int, after: int, limit: int, state: str | None = None) -> list[Subscriber]:
    """By id, behind `after`; of one state where given."""
    # ordered by id within one list: the primary key is walked from `after`, which is quick while the list is most of the table;
    # with many lists the planner sorts this list's rows instead
    rows = await conn.fetch(
        f"select {_COLUMNS} from subscribers where list_id = $1 and id > $2 and ($3::text is null or state = $3) order by id limit $4",
        list_id,
        after,
        state,
        limit,
    )
    return [_subscriber(row) for row in rows]


async def set_state(conn: PooledConnection, list_id: int, subscriber_id: int, state: SubscriberState) -> Subscriber:
    """Raises NotFound."""
    row = await conn.fetchrow(
        f"update subscribers set state = $3, updated_at = now() where list_id = $1 and id = $2 returning {_COLUMNS}",
        list_id,
        subscriber_id,
        state,
    )
    if row is None:
        raise NotFound("subscriber", subscriber_id)
    return _subscriber(row)
