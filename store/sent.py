"""A message that was sent, and everything needed to make its octets once more."""

from datetime import datetime

import asyncpg
import msgspec

from domain.campaign import CampaignContent, Recipient
from domain.dkim import DkimKey
from domain.egress import DeliveryServer
from domain.errors import Conflict, NotFound
from store import campaigns, egress, messages
from store.postgres import PooledConnection

_KEY_COLUMNS = "id, user_id, domain, selector, algorithm, bits, public_key, private_key_sealed, state, created_at, activated_at, retired_at"


class SentMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What a message was made of, and the record of its last attempt: the delivery where there was one."""

    content: CampaignContent
    server: DeliveryServer
    recipient: Recipient
    composed_at: float  # POSIX seconds
    kind: str  # letter of `domain.states.KINDS`
    attempt: int
    at: datetime
    size: int  # octets, as recorded when it was sent


async def find(conn: PooledConnection, user_id: int | None, campaign_id: int, number: int) -> SentMessage:
    """The message of one recipient. Raises NotFound; Conflict where nothing was sent to him."""
    await campaigns.get(conn, user_id, campaign_id)  # it is his
    row = await conn.fetchrow(
        "select number, subscriber_id, email, data::text as data from recipients where campaign_id = $1 and number = $2",
        campaign_id,
        number,
    )
    if row is None:
        raise NotFound("recipient", number)
    record = await last_record(conn, campaign_id, number)
    if record is None:
        raise Conflict(f"nothing was sent to recipient {number} of campaign {campaign_id} so far")
    content = await campaigns.content(conn, campaign_id, await messages.part_of(conn, campaign_id, number))
    return SentMessage(
        content=content,
        server=await egress.get(conn, None, record["delivery_server_id"], deleted=True),
        recipient=Recipient(row["number"], row["subscriber_id"], row["email"], row["data"].encode()),
        composed_at=record["composed_at"],
        kind=record["kind"].decode(),
        attempt=record["attempt"],
        at=record["at"],
        size=record["size"],
    )


async def last_record(conn: PooledConnection, campaign_id: int, number: int, *, timeout_seconds: float = 60.0) -> asyncpg.Record | None:
    """The record of a recipient's delivery, else of the last attempt that reached a server, with the time its message was composed at."""
    async with conn.transaction(readonly=True):
        # As in `accounting.records_on`: the BRIN index, also where there are no statistics yet
        await conn.execute("set local enable_seqscan = off")
        return await conn.fetchrow(
            "select a.kind, a.attempt, a.at, a.size, a.delivery_server_id, extract(epoch from b.queued_at)::float8 as composed_at "
            "from accounting a join batches b on b.campaign_id = $1 and b.batch = a.batch "
            # `connection` 0: an outcome that no server had a part in
            "where a.campaign_id = $1 and a.number = $2 and a.connection > 0 and b.queued_at is not null "
            "order by a.kind = 'd' desc, a.at desc limit 1",
            campaign_id,
            number,
            timeout=timeout_seconds,
        )


async def keys_at(conn: PooledConnection, user_ids: list[int], domains: list[str], at: datetime) -> list[DkimKey]:
    """The keys of these users that signed for any of `domains` at that time, as far as they have not been deleted since."""
    rows = await conn.fetch(
        f"select {_KEY_COLUMNS} from dkim_keys where user_id = any($1) and domain = any($2) and activated_at <= $3 "
        "and (retired_at is null or retired_at > $3)",
        user_ids,
        domains,
        at,
    )
    return [msgspec.structs.replace(DkimKey(**row), state="active") for row in rows]
