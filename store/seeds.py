"""The seed list: addresses that get an extra copy of every campaign, beside its list and outside its figures (requirement 35).

The copies travel in a message stream, so a campaign's recipients, totals, opens and clicks know nothing of them.
"""

from datetime import datetime

import asyncpg
import msgspec

from domain.address import Address
from domain.errors import Conflict, NotFound
from store import messages
from store.custom_headers import MailClass
from store.messages import Copy, Target
from store.postgres import PooledConnection

MAX_SEEDS = 100  # of one user, and of the whole system


class Seed(msgspec.Struct, frozen=True, kw_only=True):
    """One address; `user_id` null: it gets the campaigns of all users."""

    id: int
    user_id: int | None
    email: str
    created_at: datetime


_COLUMNS = "id, user_id, email, created_at"


async def add(conn: PooledConnection, user_id: int | None, address: Address) -> Seed:
    """One more address. Raises Conflict when it is there already, or there are too many."""
    if await conn.fetchval("select count(*) from seeds where user_id is not distinct from $1", user_id) >= MAX_SEEDS:
        raise Conflict(f"there are {MAX_SEEDS} seed addresses already; remove one first")
    try:
        row = await conn.fetchrow(
            f"insert into seeds (user_id, email, email_key) values ($1, $2, $3) returning {_COLUMNS}", user_id, address.text, address.key
        )
    except asyncpg.UniqueViolationError:
        raise Conflict(f"{address.text} is on the seed list already") from None
    assert row is not None
    return Seed(**dict(row))


async def list_seeds(conn: PooledConnection, user_id: int | None) -> list[Seed]:
    """All that get copies of a user's campaigns, by id; `user_id` None lists everybody's."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from seeds where $1::bigint is null or user_id is null or user_id = $1 order by id", user_id
    )
    return [Seed(**dict(row)) for row in rows]


async def remove(conn: PooledConnection, user_id: int | None, seed_id: int) -> None:
    """Take one away; `user_id` None may take away anybody's, a user only his own. Raises NotFound."""
    if await conn.execute("delete from seeds where id = $1 and ($2::bigint is null or user_id = $2)", seed_id, user_id) == "DELETE 0":
        raise NotFound("seed address", seed_id)


async def send_copies(
    conn: PooledConnection, campaign_id: int, user_id: int, delivery_server_id: int, mail_class: MailClass, list_id: int
) -> None:
    """Give every seed address its copy, in the transaction that starts the campaign: one each, however often it is started.

    They see the campaign with the data of its first recipient.
    """
    rows = await conn.fetch(
        "select distinct on (email_key) email from seeds where user_id is null or user_id = $1 order by email_key, id", user_id
    )
    if not rows:
        return
    data = await conn.fetchval(
        "select with_opt_in(data, subscription_ip, subscribed_at)::text from subscribers "
        "where list_id = $1 and state = 'subscribed' order by id limit 1",
        list_id,
    )
    target = Target(user_id=user_id, delivery_server_id=delivery_server_id, mail_class=mail_class, list_id=list_id)
    copy = Copy(name=f"seed copies of campaign {campaign_id}", copy_of=campaign_id)
    await messages.add(conn, target, copy, {"seed_copies_of": str(campaign_id)}, [(row["email"], data or "{}") for row in rows])
