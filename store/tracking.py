"""Opens and clicks: where the links of a campaign lead, the events that came in, and what they sum up to."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from store.postgres import Pool, PooledConnection, connection, transaction

BURST_SECONDS = 10  # clicks this close to one of a burst belong to it
EARLY_SECONDS = 2  # nobody reads a message before it was accepted, or so soon behind that


class Visit(NamedTuple):
    """One open (`kind` "o", link 0) or click ("c"). `at`: POSIX seconds; `bot`: why no person did it, "" for a person."""

    campaign_id: int
    number: int
    kind: str
    link: int
    at: float
    bot: str
    agent: str


class LinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """One followed link. `clicks` and `clickers` (recipients) are people's; `bot_clicks` are those of scanners."""

    link: int
    url: str
    clicks: int
    clickers: int
    bot_clicks: int


class TrackingReport(msgspec.Struct, frozen=True, kw_only=True):
    """Opens and clicks of one campaign; `openers` and `clickers` are recipients. Who clicked has opened, image or not."""

    opens: int
    openers: int
    bot_opens: int
    clicks: int
    clickers: int
    bot_clicks: int
    links: list[LinkReport]


async def keep_links(conn: PooledConnection, campaign_id: int, destinations: Sequence[str]) -> None:
    """Fix where link 1, 2, ... of a campaign lead; in the transaction that starts it."""
    await conn.execute("delete from campaign_links where campaign_id = $1", campaign_id)
    await conn.executemany(
        "insert into campaign_links (campaign_id, link, url) values ($1, $2, $3)",
        [(campaign_id, link, url) for link, url in enumerate(destinations, 1)],
    )


async def links(pool: Pool, user_id: int, campaign_id: int, *, timeout_seconds: float) -> dict[int, str]:
    """Link number -> address, of a campaign of this user. Raises Unavailable."""
    async with connection(pool, timeout_seconds=timeout_seconds) as conn:
        rows = await conn.fetch(
            "select l.link, l.url from campaign_links l join campaigns c on c.id = l.campaign_id where c.id = $1 and c.user_id = $2",
            campaign_id,
            user_id,
            timeout=timeout_seconds,
        )
    return {row["link"]: row["url"] for row in rows}


async def position(pool: Pool, journal: str, *, timeout_seconds: float) -> int:
    """How far a file of visits was read into `events`, in octets. Raises Unavailable."""
    async with connection(pool, timeout_seconds=timeout_seconds) as conn:
        found = await conn.fetchval("select position from journal_cursors where journal = $1", journal, timeout=timeout_seconds)
    return int(found or 0)


async def record(
    pool: Pool, journal: str, start: int, end: int, visits: Sequence[Visit], *, timeout_seconds: float,
    also: Callable[[PooledConnection], Awaitable[None]] | None = None,
) -> None:  # fmt: skip
    """Write what lies between two places of a file of visits, once however often it is repeated. Raises Unavailable.

    Visits of campaigns that are gone are dropped. `also` is done in the same transaction, behind them.
    """
    async with transaction(pool, timeout_seconds=timeout_seconds) as conn:
        await conn.execute("insert into journal_cursors (journal) values ($1) on conflict do nothing", journal, timeout=timeout_seconds)
        stands = await conn.fetchval("select position from journal_cursors where journal = $1 for update", journal, timeout=timeout_seconds)
        if stands != start:
            return
        if visits:
            await _keep(conn, visits, timeout_seconds)
        if also is not None:
            await also(conn)
        await conn.execute(
            "update journal_cursors set position = $2, updated_at = now() where journal = $1", journal, end, timeout=timeout_seconds
        )


async def _keep(conn: PooledConnection, visits: Sequence[Visit], timeout_seconds: float) -> None:
    rows = await conn.fetch("select id from campaigns where id = any($1)", list({visit.campaign_id for visit in visits}))
    known = {row["id"] for row in rows}
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    await conn.copy_records_to_table(
        "events",
        records=[
            (v.campaign_id, v.number, v.kind.encode("ascii"), v.link, epoch + timedelta(seconds=v.at), v.bot, v.agent)
            for v in visits
            if v.campaign_id in known
        ],
        columns=("campaign_id", "number", "kind", "link", "at", "bot", "agent"),
        timeout=timeout_seconds,
    )


async def forget(pool: Pool, journal: str, *, timeout_seconds: float) -> None:
    """Drop the cursor of a file of visits that was read whole and removed. Raises Unavailable."""
    async with connection(pool, timeout_seconds=timeout_seconds) as conn:
        await conn.execute("delete from journal_cursors where journal = $1", journal, timeout=timeout_seconds)


_JUDGED = (
    "with judged as (select e.*, e.bot <> '' or exists (select from accounting a where a.campaign_id = $1 and a.number = e.number "
    f"and a.kind = 'd' and e.at < a.at + interval '{EARLY_SECONDS} s') "
    "or (e.kind = 'c' and exists (select from events b where b.campaign_id = e.campaign_id "
    "and b.number = e.number and b.bot = 'burst' "
    f"and b.at between e.at - interval '{BURST_SECONDS} s' and e.at + interval '{BURST_SECONDS} s')) as machine "
    "from events e where e.campaign_id = $1) "
)


async def report(conn: PooledConnection, campaign_id: int) -> TrackingReport:
    """Opens and clicks so far. The caller has looked the campaign up with the user."""
    row = await conn.fetchrow(
        _JUDGED + "select count(*) filter (where kind = 'o' and not machine) as opens, "
        "count(distinct number) filter (where not machine) as openers, "
        "count(*) filter (where kind = 'o' and machine) as bot_opens, "
        "count(*) filter (where kind = 'c' and not machine) as clicks, "
        "count(distinct number) filter (where kind = 'c' and not machine) as clickers, "
        "count(*) filter (where kind = 'c' and machine) as bot_clicks from judged",
        campaign_id,
    )
    rows = await conn.fetch(
        _JUDGED + "select l.link, l.url, count(j.number) filter (where not machine) as clicks, "
        "count(distinct j.number) filter (where not machine) as clickers, count(j.number) filter (where machine) as bot_clicks "
        "from campaign_links l left join judged j on j.link = l.link and j.kind = 'c' where l.campaign_id = $1 "
        "group by l.link, l.url order by l.link",
        campaign_id,
    )
    assert row is not None
    return TrackingReport(**dict(row), links=[LinkReport(**dict(each)) for each in rows])
