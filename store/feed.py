"""The feeder's queries: numbering a campaign's recipients, what to announce next, retries that are due, cancelling, completing.

Only the feeder that holds `FEEDER_LOCK` runs them, so no two engines announce the same thing. Each is safe to repeat after
a crash at any point. A batch goes pending -> queued -> settled; every recovery (Redis wiped, lease ended, batch handed back)
is the one step queued -> pending, and announcing is the one way out of it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import cast

import msgspec
from asyncpg import BitString

from domain import states
from domain.campaign import Recipient
from store import leases
from store.postgres import Connection, Pool, PooledConnection

FEEDER_LOCK = 0x51C1CE01  # pg advisory lock: who holds it is the feeder
_PARTITION_LOCK = 0x51C1CE02  # pg advisory lock: who holds it makes a partition
_LARGE_TABLES = ("recipients", "batches", "retries", "accounting")
_CAMPAIGNS_PER_PARTITION = 50  # stands in schema 0022 as well
_MANY_ROWS = 10_000
_PREPARE_TIMEOUT_SECONDS = 3600.0
_CANCEL_BATCHES_AT_ONCE = 25
# Of campaign c, one of those in $1: named as a plain list as well, from which PostgreSQL sees which partitions it need not even open
_BATCHES_OF_IT = "select from batches b where b.campaign_id = any($1) and b.campaign_id = c.id"
_RETRIES_OF_IT = "select from retries r where r.campaign_id = any($1) and r.campaign_id = c.id"
# A batch costs its engine two to three milliseconds, however many are in it; but all engines are to have a share of a campaign
_LEAST_RECIPIENTS = 500
_SHARED_BATCHES = 32


class ActiveCampaign(msgspec.Struct, frozen=True):
    """A campaign that still needs the feeder."""

    id: int
    state: str
    delivery_server_id: int
    mail_class: str
    prepared: bool
    stream: bool = False  # recipients keep coming (`store.messages`)


class Announcement(msgspec.Struct, frozen=True):
    """A batch that has just been marked as announced and now has to be pushed."""

    campaign_id: int
    batch: int
    attempt: int
    first_number: int
    last_number: int
    numbers: list[int] | None
    queued_at: datetime
    first_attempt_at: datetime | None
    done: BitString
    part: int = 0


async def try_to_lead(conn: Connection | PooledConnection) -> bool:
    """Become the feeder, for as long as `conn` lives. False: another engine is."""
    return bool(await conn.fetchval("select pg_try_advisory_lock($1)", FEEDER_LOCK))


async def active_campaigns(conn: Connection | PooledConnection) -> list[ActiveCampaign]:
    """Every campaign that is not a draft and not finished, oldest first."""
    rows = await conn.fetch(
        "select id, state, delivery_server_id, mail_class, prepared_at is not null, stream_month is not null from campaigns "
        "where state in ('preparing', 'running', 'paused', 'cancelling') order by id"
    )
    return [ActiveCampaign(*row) for row in rows]


async def make_room(conn: Connection | PooledConnection, campaign_id: int) -> None:
    """Make sure that the four large tables have a partition for a campaign. It holds those with neighbouring numbers, too.

    In a short transaction: until its end nobody else can make a partition. Readers and writers are not held up.
    """
    # not `to_regclass`: behind the lock it could still remember that there was none
    there = "select exists (select from pg_class where relname = $1 and relnamespace = current_schema()::regnamespace)"
    last, end = _partition(_LARGE_TABLES[-1], campaign_id), _partition_end(campaign_id)
    if await conn.fetchval(there, last):
        return
    await conn.execute("select pg_advisory_xact_lock($1)", _PARTITION_LOCK)
    if await conn.fetchval(there, last):
        return
    for name in _LARGE_TABLES:
        partition = _partition(name, campaign_id)
        # batches are updated in place: room on each page keeps those updates off the indexes
        fill = " with (fillfactor = 50)" if name == "batches" else ""
        # `create table … partition of` would have to wait for everybody who reads the parent
        await conn.execute(f"create table {partition} (like {name} including defaults including constraints){fill}")
        await conn.execute(f"alter table {name} attach partition {partition} for values from ({end - _CAMPAIGNS_PER_PARTITION}) to ({end})")


def _partition(table: str, campaign_id: int) -> str:
    return f"{table}_below_{_partition_end(campaign_id)}"


def _partition_end(campaign_id: int) -> int:
    return (campaign_id // _CAMPAIGNS_PER_PARTITION + 1) * _CAMPAIGNS_PER_PARTITION


async def analyze_much(conn: Connection | PooledConnection, campaign_id: int, rows: int) -> None:
    """Tell the planner of many new rows. Autovacuum would, too, but a minute later and after the campaign has begun."""
    partition = _partition("recipients", campaign_id)
    known = await conn.fetchval("select reltuples from pg_class where oid = $1::text::regclass", partition)
    if rows >= max(_MANY_ROWS, known / 10):
        for table in (partition, _partition("batches", campaign_id)):
            await conn.execute(f"analyze {table}", timeout=_PREPARE_TIMEOUT_SECONDS)


def batch_size(count: int, most: int) -> int:
    """How many recipients each batch of a campaign to `count` of them has."""
    return min(most, max(_LEAST_RECIPIENTS, -(-count // _SHARED_BATCHES)))


async def prepare(conn: Connection | PooledConnection, campaign_id: int, batch_recipients: int) -> int:
    """Number the recipients of a started campaign and cut them into batches of at most so many, in one transaction. Returns their number.

    Whatever state the campaign got meanwhile (paused, cancelling) is kept.
    """
    timeout = _PREPARE_TIMEOUT_SECONDS
    async with conn.transaction():
        await make_room(conn, campaign_id)
    async with conn.transaction():
        campaign = await conn.fetchrow("select list_id, prepared_at from campaigns where id = $1", campaign_id)
        if campaign is None or campaign["prepared_at"] is not None:
            return 0
        data = "with_opt_in(s.data, s.subscription_ip, s.subscribed_at)" if await _tells_opt_in(conn, campaign_id) else "s.data"
        inserted = await conn.execute(
            "insert into recipients "
            f"select $1, row_number() over (order by s.id), s.id, s.email, {data} from subscribers s "
            "where s.list_id = $2 and s.state = 'subscribed' order by s.id",
            campaign_id,
            campaign["list_id"],  # a value and no join: how a list is best read depends on how large it is
            timeout=timeout,
        )
        count = int(inserted.rpartition(" ")[2])
        size = batch_size(count, batch_recipients)
        batches = -(-count // size)
        await conn.execute(
            "insert into batches (campaign_id, batch, first_number, last_number, done) "
            "select $1, n + 1, n * $2 + 1, least((n + 1) * $2, $3), repeat('0', (least((n + 1) * $2, $3) - n * $2)::int)::varbit "
            "from generate_series(0, $4::int - 1) n",
            campaign_id,
            size,
            count,
            batches,
            timeout=timeout,
        )
        await conn.execute(
            "update campaigns set recipients = $2, batches = $3, prepared_at = now(), "
            "state = case when state = 'preparing' then 'running' else state end where id = $1",
            campaign_id,
            count,
            batches,
        )
    await analyze_much(conn, campaign_id, count)
    return count


async def _tells_opt_in(conn: Connection | PooledConnection, campaign_id: int) -> bool:
    """Whether a campaign may say when and from where its recipients signed up; only then it is kept with each of them."""
    found = await conn.fetchval(
        "select concat_ws(' ', subject, from_name, html, text, preheader, headers::text) ~* 'subscription_?(ip|date)' "
        "from campaigns where id = $1",
        campaign_id,
    )
    return bool(found)


async def with_pending(conn: Connection | PooledConnection, campaigns: Sequence[int]) -> set[int]:
    """Those of `campaigns` that have a batch to announce."""
    return await _those(conn, campaigns, f"exists ({_BATCHES_OF_IT} and b.state = 'pending')")


async def announce(conn: Connection | PooledConnection, campaign_id: int, limit: int) -> list[Announcement]:
    """Mark up to `limit` pending batches of a running campaign as announced, lowest first, and return them for pushing."""
    rows = await conn.fetch(
        "update batches b set state = 'queued', queued_at = coalesce(b.queued_at, now()), announced_at = now() "
        "from (select campaign_id, batch from batches where campaign_id = $1 and state = 'pending' order by batch limit $2) p "
        "where b.campaign_id = $1 and b.batch = p.batch and b.state = 'pending' "
        "returning b.campaign_id, b.batch, b.attempt, b.first_number, b.last_number, b.numbers, b.queued_at, "
        "b.first_attempt_at, b.done, b.part",
        campaign_id,
        limit,
    )
    return sorted((Announcement(*row) for row in rows), key=lambda announcement: announcement.batch)


async def recipients_of(conn: Connection | PooledConnection, announcement: Announcement) -> tuple[list[int], list[Recipient]]:
    """Read the recipients of a batch that have no outcome yet, each with its position in the progress bitmap."""
    if announcement.numbers is None:
        rows = await conn.fetch(
            "select number, subscriber_id, email, data from recipients where campaign_id = $1 and number between $2 and $3 order by number",
            announcement.campaign_id,
            announcement.first_number,
            announcement.last_number,
        )
        position_of = {number: i for i, number in enumerate(range(announcement.first_number, announcement.last_number + 1))}
    else:
        rows = await conn.fetch(
            "select number, subscriber_id, email, data from recipients where campaign_id = $1 and number = any($2) order by number",
            announcement.campaign_id,
            announcement.numbers,
        )
        position_of = {number: i for i, number in enumerate(announcement.numbers)}
    done = announcement.done.bytes
    positions: list[int] = []
    recipients: list[Recipient] = []
    for number, subscriber_id, email, data in rows:
        position = position_of[number]
        if not done[position >> 3] & (0x80 >> (position & 7)):
            positions.append(position)
            recipients.append(Recipient(number, subscriber_id, email, data.encode()))
    return positions, recipients


async def copy_recipients(conn: Connection | PooledConnection, announcement: Announcement, take: Callable[[bytes], None]) -> None:
    """Give `take` a binary COPY of all recipients of a batch that is a range of numbers: number, subscriber id, email, data."""

    async def feed(block: bytes) -> None:
        take(bytes(block))

    await conn.copy_from_query(
        f"select number, subscriber_id, email, data from recipients where campaign_id = {announcement.campaign_id:d} "
        f"and number between {announcement.first_number:d} and {announcement.last_number:d} order by number",
        output=feed,
        format="binary",
    )


# An owner that is gone: it has said that it stopped, or has said nothing for $3 seconds before $2
_GONE = (
    "not exists (select from engines e where e.id = b.owner and e.stopped_at is null "
    "and e.seen_at > $2::timestamptz - make_interval(secs => $3))"
)


async def database_time(conn: Connection | PooledConnection | Pool) -> datetime:
    """PostgreSQL's clock."""
    return cast(datetime, await conn.fetchval("select clock_timestamp()"))


async def call_back_ended_leases(
    conn: Connection | PooledConnection,
    campaigns: Sequence[int],
    *,
    as_of: datetime,
    silent_seconds: float = 0.0,
    grace_seconds: float = 0.0,
    spared: Sequence[str] = (),
) -> Counter[int]:
    """Make batches pending again whose lease ended more than `grace_seconds` before `as_of`, if their engine is gone.

    Returns how many of each campaign.

    A living engine gives its leases back itself, after its ledger has caught up; one that was seen within `silent_seconds` before
    `as_of` lives. `spared`: engines whose journal somebody is about to read. `as_of` is an earlier answer of `database_time` and
    not the statement's own time: PostgreSQL may have stood still in between, and then every engine looks silent.
    """
    rows = await conn.fetch(
        "update batches b set state = 'pending', owner = null, lease_until = null "
        "where b.campaign_id = any($1) and b.state = 'queued' and b.lease_until < $2::timestamptz - make_interval(secs => $4) "
        f"and b.owner <> all($5::text[]) and {_GONE} returning b.campaign_id",
        campaigns,
        as_of,
        silent_seconds,
        grace_seconds,
        spared,
    )
    return Counter(row[0] for row in rows)


async def call_back_of(pool: Pool, engine_id: str, *, as_of: datetime, grace_seconds: float = 0.0) -> int:
    """Make the batches pending again whose lease of `engine_id` ended more than `grace_seconds` before `as_of`.

    `as_of`: an answer of `database_time` from before its journal was read. What it sent under a lease that ended later may stand
    behind the end that was read then; the grace is for answers to what was on the wire when the lease ended.
    """
    done = await pool.execute(
        "update batches set state = 'pending', owner = null, lease_until = null "
        "where owner = $1 and state = 'queued' and lease_until < $2::timestamptz - make_interval(secs => $3) and campaign_id = any($4)",
        engine_id,
        as_of,
        grace_seconds,
        await leases.campaigns(pool),
    )
    return int(done.rpartition(" ")[2])


async def withdraw(conn: Connection | PooledConnection, campaign_id: int, batches: Sequence[int]) -> None:
    """Make batches pending again that could not be pushed. One that was pushed all the same is fenced by its lease."""
    await conn.execute(
        "update batches set state = 'pending' where campaign_id = $1 and batch = any($2) and state = 'queued' and owner is null",
        campaign_id,
        list(batches),
    )


async def call_back_announced(
    conn: Connection | PooledConnection, campaigns: Sequence[int], older_than_seconds: float, *, before: datetime | None = None
) -> int:
    """Make batches pending again that were announced but never leased: Redis lost them, or an engine died with them in hand.

    `before`: only those announced before that moment, because the queue still holds what was announced later.
    """
    done = await conn.execute(
        "update batches set state = 'pending' where campaign_id = any($1) and state = 'queued' and owner is null "
        "and announced_at <= now() - make_interval(secs => $2) and ($3::timestamptz is null or announced_at < $3)",
        campaigns,
        older_than_seconds,
        before,
    )
    return int(done.rpartition(" ")[2])


async def with_due_retries(conn: Connection | PooledConnection, campaigns: Sequence[int]) -> set[int]:
    """Those of `campaigns` that have a deferred recipient whose time has come."""
    return await _those(conn, campaigns, f"exists ({_RETRIES_OF_IT} and r.due_at <= now())")


async def without_work(conn: Connection | PooledConnection, campaigns: Sequence[int]) -> set[int]:
    """Those of `campaigns` that have neither an open batch nor a retry just now: `finish` may end them."""
    return await _those(conn, campaigns, f"not exists ({_BATCHES_OF_IT} and b.state <> 'settled') and not exists ({_RETRIES_OF_IT})")


async def _those(conn: Connection | PooledConnection, campaigns: Sequence[int], which: str) -> set[int]:
    return {row[0] for row in await conn.fetch(f"select id from unnest($1::bigint[]) as c(id) where {which}", campaigns)}


async def batch_due_retries(conn: Connection | PooledConnection, campaign_id: int, batch_recipients: int) -> int:
    """Move deferred recipients whose time has come into new pending batches, one per attempt and content. Returns how many."""
    async with conn.transaction():
        rows = await conn.fetch(
            "delete from retries t where campaign_id = $1 and number in "
            "(select number from retries where campaign_id = $1 and due_at <= now() order by due_at limit $2) "
            "returning number, attempt, first_attempt_at, coalesce((select m.part from messages m "
            "where m.campaign_id = $1 and m.first_number <= t.number order by m.first_number desc limit 1), 0)",
            campaign_id,
            batch_recipients,
        )
        if not rows:
            return 0
        groups: dict[tuple[int, int], list[tuple[int, datetime]]] = {}
        for number, attempt, first_attempt_at, part in rows:
            groups.setdefault((attempt, part), []).append((number, first_attempt_at))
        last = await conn.fetchval("update campaigns set batches = batches + $2 where id = $1 returning batches", campaign_id, len(groups))
        for offset, ((attempt, part), members) in enumerate(sorted(groups.items())):
            numbers = sorted(number for number, _ in members)
            await conn.execute(
                "insert into batches (campaign_id, batch, attempt, first_number, last_number, numbers, first_attempt_at, done, part) "
                "values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                campaign_id,
                last - offset,
                attempt,
                numbers[0],
                numbers[-1],
                numbers,
                min(first for _, first in members),
                BitString.frombytes(bytes(-(-len(numbers) // 8)), len(numbers)),
                part,
            )
        return len(rows)


async def count_announced(conn: Connection | PooledConnection, campaigns: Sequence[int]) -> dict[int, int]:
    """How many batches of each of `campaigns` are announced and leased to nobody: in their queue, in somebody's hands, or lost."""
    rows = await conn.fetch(
        "select campaign_id, count(*) from batches where campaign_id = any($1) and state = 'queued' and owner is null group by campaign_id",
        campaigns,
    )
    return {row[0]: row[1] for row in rows}


async def announced_at(conn: Connection | PooledConnection, campaign_id: int, batch: int) -> datetime | None:
    """When a batch was last announced; None: never, or there is no such batch."""
    found = await conn.fetchval("select announced_at from batches where campaign_id = $1 and batch = $2", campaign_id, batch)
    return cast(datetime | None, found)


async def cancel_some(conn: Connection | PooledConnection, campaign_id: int) -> bool:
    """Record as cancelled what nobody holds a lease on, some batches at a time. True: there may be more.

    The recipients of leased batches follow when their engine has handed the batch back or its lease was called back.
    """
    async with conn.transaction():
        batches = await conn.fetch(
            "select batch from batches where campaign_id = $1 and state <> 'settled' and owner is null order by batch limit $2 for update",
            campaign_id,
            _CANCEL_BATCHES_AT_ONCE,
        )
        numbers = [row["batch"] for row in batches]
        ended = await conn.fetchval(
            "with gone as ("
            "  select r.number, b.attempt, b.batch, r.email from batches b "
            "  cross join lateral (select m.number, m.ordinality from unnest(coalesce(b.numbers, "
            "    array(select generate_series(b.first_number, b.last_number)))) with ordinality as m(number, ordinality)) m "
            "  join recipients r on r.campaign_id = $1 and r.number = m.number "
            "  where b.campaign_id = $1 and b.batch = any($2) and get_bit(b.done, (m.ordinality - 1)::int) = 0 "
            "), retried as (delete from retries where campaign_id = $1 and $3 returning number, attempt), ended as ("
            "  insert into accounting (campaign_id, number, attempt, kind, at, batch, delivery_server_id, connection, size, status, "
            "    category, diagnostic, mta, recipient) "
            "  select $1, g.number, g.attempt, 'c', now(), g.batch, c.delivery_server_id, 0, 0, '', '', 'campaign cancelled', '', g.email "
            "  from gone g, campaigns c where c.id = $1 "
            "  union all "
            "  select $1, t.number, t.attempt, 'c', now(), 0, c.delivery_server_id, 0, 0, '', '', 'campaign cancelled', '', r.email "
            "  from retried t join recipients r on r.campaign_id = $1 and r.number = t.number, campaigns c where c.id = $1 "
            "  returning 1) select count(*) from ended",
            campaign_id,
            numbers,
            len(numbers) < _CANCEL_BATCHES_AT_ONCE,
            timeout=120.0,
        )
        if numbers:
            await conn.execute(
                "update batches set state = 'settled', owner = null, lease_until = null, done = repeat('1', length(done))::varbit "
                "where campaign_id = $1 and batch = any($2)",
                campaign_id,
                numbers,
            )
        if ended:
            await conn.execute(
                "insert into campaign_totals (campaign_id, journal, cancelled) values ($1, 'feeder', $2) "
                "on conflict (campaign_id, journal) do update set cancelled = campaign_totals.cancelled + excluded.cancelled",
                campaign_id,
                ended,
            )
        return len(numbers) == _CANCEL_BATCHES_AT_ONCE


async def finish(conn: Connection | PooledConnection, campaign: ActiveCampaign) -> bool:
    """End a campaign that has nothing left: running becomes completed, cancelling becomes cancelled.

    A stream, to which recipients may come at this very moment, is locked before it is looked at; its next message wakes it again.
    """
    if campaign.stream:
        async with conn.transaction():
            await conn.execute("select from campaigns where id = $1 for update", campaign.id)
            return await _finish(conn, campaign)
    return await _finish(conn, campaign)


async def _finish(conn: Connection | PooledConnection, campaign: ActiveCampaign) -> bool:
    following = states.COMPLETED if campaign.state == states.RUNNING else states.CANCELLED
    done = await conn.execute(
        "update campaigns set state = $3, finished_at = now() where id = $1 and state = $2 and prepared_at is not null "
        "and not exists (select from batches where campaign_id = $1 and state <> 'settled') "
        "and not exists (select from retries where campaign_id = $1)",
        campaign.id,
        campaign.state,
        following,
    )
    return bool(done == "UPDATE 1")
