"""What comes back: raw mail kept before its 250 (P11), the domains we take mail for, and one-click unsubscribes."""

import msgspec

from domain import address
from domain.campaign import CampaignContent, Recipient
from domain.egress import DeliveryServer
from store import campaigns, egress, messages, suppressions, unsubscribe_copies
from store.postgres import Pool, PooledConnection, connection, transaction
from store.sent import last_record

# Reports on the last messages of a delivery server arrive after it was deleted
_DELETED_SERVERS_STILL_RECEIVE = "60 days"


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """One recipient of one received message; `user_id`, `campaign_id` and `number` where its return path named them."""

    recipient: str
    user_id: int | None = None
    campaign_id: int | None = None
    number: int | None = None


async def keep(
    pool: Pool, *, peer: str | None, mail_from: str, recipients: list[Received], raw: bytes, timeout_seconds: float
) -> list[int]:
    """Store one row per recipient, all or none; returns their ids. When it returns, the message is durable (`synchronous_commit` on).

    `peer` is an IP address. The message travels to the server once, however many recipients it has. Raises Unavailable.
    """
    async with transaction(pool, timeout_seconds=timeout_seconds) as conn:
        return await keep_in(conn, peer=peer, mail_from=mail_from, recipients=recipients, raw=raw, timeout_seconds=timeout_seconds)


async def keep_in(
    conn: PooledConnection, *, peer: str | None, mail_from: str, recipients: list[Received], raw: bytes, timeout_seconds: float
) -> list[int]:
    """The same inside a transaction of the caller's, which is made durable by it."""
    await conn.execute("set local synchronous_commit = on", timeout=timeout_seconds)
    rows = await conn.fetch(
        "insert into inbound_messages (peer, mail_from, recipient, user_id, campaign_id, number, raw) "
        # A tenant that is gone must not make us refuse mail that its token allows
        "select $1::text::inet, $2, r, (select id from users where id = u), c, n, $7 "
        "from unnest($3::text[], $4::bigint[], $5::bigint[], $6::int[]) as t (r, u, c, n) returning id",
        peer,
        mail_from,
        [each.recipient for each in recipients],
        [each.user_id for each in recipients],
        [each.campaign_id for each in recipients],
        [each.number for each in recipients],
        raw,
        timeout=timeout_seconds,
    )
    return [row["id"] for row in rows]


async def return_addresses(pool: Pool, *, timeout_seconds: float) -> tuple[frozenset[str], frozenset[str]]:
    """The MFROM domains of all delivery servers, and those MFROMs that are whole addresses; lower case. Raises Unavailable."""
    async with connection(pool, timeout_seconds=timeout_seconds) as conn:
        rows = await conn.fetch(
            "select distinct lower(mfrom) as mfrom from delivery_servers where mfrom <> '' "
            f"and (deleted_at is null or deleted_at > now() - interval '{_DELETED_SERVERS_STILL_RECEIVE}')",
            timeout=timeout_seconds,
        )
    found = [row["mfrom"] for row in rows]
    return frozenset(each.rpartition("@")[2] for each in found), frozenset(each for each in found if "@" in each)


async def unsubscribe(
    conn: PooledConnection, user_id: int, campaign_id: int, number: int, *, note: str, timeout_seconds: float, copy_to: str = "",
    at: float | None = None,
) -> bool | None:  # fmt: skip
    """Take the recipient of one sent message off the campaign's list, and tell `copy_to` of it; in the caller's transaction.

    `at`: when he asked for it, in POSIX seconds; None: now.
    True: done now; False: it was off the list already; None: there is no such recipient.
    """
    row = await conn.fetchrow(
        "select c.list_id, r.subscriber_id, r.email from campaigns c join recipients r on r.campaign_id = c.id "
        "where c.id = $2 and c.user_id = $1 and r.campaign_id = $2 and r.number = $3",
        user_id,
        campaign_id,
        number,
        timeout=timeout_seconds,
    )
    if row is None:
        return None
    fresh = await suppressions.unsubscribe(conn, user_id, row["list_id"], row["subscriber_id"], address.key(row["email"]), note=note)
    if fresh and copy_to:
        await unsubscribe_copies.send(conn, user_id, campaign_id, number, row["email"], copy_to, at)
    return fresh


class Sent(msgspec.Struct, frozen=True):
    """What one message was made of."""

    content: CampaignContent
    server: DeliveryServer
    recipient: Recipient
    composed_at: float  # POSIX seconds


async def sent(pool: Pool, user_id: int, campaign_id: int, number: int, *, timeout_seconds: float) -> Sent | None:
    """What the message to one recipient was made of, as it stood when the campaign was started: that which was delivered, where one was.

    None: there is no such recipient, or nothing was composed for it yet. Raises Unavailable.
    """
    async with connection(pool, timeout_seconds=timeout_seconds) as conn:
        row = await conn.fetchrow(
            "select r.number, r.subscriber_id, r.email, r.data::text as data, c.delivery_server_id, ("
            "select extract(epoch from b.queued_at)::float8 from batches b where b.campaign_id = $2 and b.queued_at is not null "
            "and (b.numbers is null and r.number between b.first_number and b.last_number or r.number = any(b.numbers)) "
            "order by b.attempt, b.batch limit 1) as composed_at "
            "from campaigns c join recipients r on r.campaign_id = c.id "
            "where c.id = $2 and c.user_id = $1 and r.campaign_id = $2 and r.number = $3",
            user_id,
            campaign_id,
            number,
            timeout=timeout_seconds,
        )
        if row is None or row["composed_at"] is None:
            return None
        said = await last_record(conn, campaign_id, number, timeout_seconds=timeout_seconds) or row
        content = await campaigns.content(conn, campaign_id, await messages.part_of(conn, campaign_id, number))
        server = await egress.get(conn, None, said["delivery_server_id"], deleted=True)  # maybe a fallback, maybe the operator's
    recipient = Recipient(row["number"], row["subscriber_id"], row["email"], row["data"].encode())
    return Sent(content, server, recipient, said["composed_at"])
