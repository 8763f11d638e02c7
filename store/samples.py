"""Some recipients of a list with their merge data, for looking at what a campaign would say to them."""

from typing import Final

from domain.campaign import Recipient
from store.postgres import PooledConnection

# Where in the alphabet to look: all over it, without sorting or counting a list of millions
_STARTS: Final = ["", *"13579bcdefghijklmnoprstvw"]


async def of_list(conn: PooledConnection, list_id: int, count: int) -> list[Recipient]:
    """Up to `count` subscribed recipients from all over the list, numbered from 1; the same ones each time while it does not change."""
    rows = await conn.fetch(
        "select distinct on (s.email_key) s.id, s.email, with_opt_in(s.data, s.subscription_ip, s.subscribed_at)::text as data "
        "from unnest($3::text[]) start cross join lateral ("
        "select id, email, email_key, data, subscription_ip, subscribed_at from subscribers "
        "where list_id = $1 and state = 'subscribed' and email_key >= start "
        "order by email_key limit $2) s order by s.email_key",
        list_id,
        max(1, count // 10),
        _STARTS,
    )
    step = max(1, len(rows) // count)
    return [Recipient(number, row["id"], row["email"], row["data"].encode()) for number, row in enumerate(rows[::step][:count], 1)]


async def field_names(conn: PooledConnection, list_id: int) -> list[str]:
    """The custom fields of a list."""
    return [row[0] for row in await conn.fetch("select name from custom_fields where list_id = $1 order by name", list_id)]
