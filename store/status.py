"""What `sluice status` and `GET /api/v1/status` show: the stores, engines, delivery servers and unfinished campaigns, at one look.

It answers also when a store does not: then it says so, and shows what the other one knows.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

import asyncpg
import msgspec
import redis.asyncio
import redis.exceptions

from domain.errors import Unavailable
from domain.feedback import TROUBLESOME
from store import redis_keys
from store.postgres import Pool, connection

TIMEOUT_SECONDS = 3.0
_MAX_PROCESSES = 1000
_MAIL_WAITS_SECONDS = 60.0  # longer than any group takes to be read
_SILENT_SECONDS = 3.0  # an engine says every second that it lives

T = TypeVar("T")

# Of several engines' words about one delivery server the one an operator must act on comes first
_WORST_FIRST = ("suspended", "failing", "connecting", "sending", "idle", "disabled")


class PathStatus(msgspec.Struct, kw_only=True):
    """One engine's connections to one delivery server, as its heartbeat says."""

    delivery_server_id: int
    state: str = ""
    sentence: str = ""
    since: float = 0.0  # POSIX seconds
    connections: int = 0
    in_flight: int = 0
    ready: int = 0
    delivered: int = 0
    bounced: int = 0
    deferred: int = 0
    uncertain: int = 0
    delivered_per_second: float = 0.0


class EngineStatus(msgspec.Struct, kw_only=True):
    """One engine's last heartbeat, at most 5 s old. `state`: starting, running, draining, as it said; or silent, when it says nothing
    any more: it died a moment ago, stands still or is cut off."""

    id: str
    node: str = ""
    state: str = ""
    at: float = 0.0  # POSIX seconds
    started_at: float = 0.0
    feeder: bool = False
    messages: int = 0
    messages_per_second: float = 0.0
    cpu_seconds: float = 0.0
    max_rss_bytes: int = 0
    held_batches: int = 0
    journal_bytes: int = 0  # on its disk
    journal_sync_failures: int = 0  # times that disk failed to keep it
    trouble: list[str] = []
    paths: list[PathStatus] = []


class InboundProcess(msgspec.Struct, kw_only=True):
    """One inbound process's last heartbeat, at most 5 s old. `id` is node:port of its web side."""

    id: str
    node: str = ""
    at: float = 0.0  # POSIX seconds
    started_at: float = 0.0
    visits_recorded: int = 0  # opens and clicks since the start
    visits_lost: int = 0  # of those, such as its disk did not take
    visits_waiting_bytes: int = 0  # on its disk, not in PostgreSQL yet
    trouble: list[str] = []


class ServerStatus(msgspec.Struct, kw_only=True):
    """One delivery server over all engines. `sentence` says what an operator can do."""

    id: int
    user_id: int
    name: str
    host: str
    port: int
    state: str
    sentence: str
    connections: int = 0
    in_flight: int = 0
    queued_batches: int = 0  # announced in Redis and not taken
    delivered: int = 0  # these five since the engines started
    bounced: int = 0
    deferred: int = 0
    uncertain: int = 0
    delivered_per_second: float = 0.0


class CampaignStatus(msgspec.Struct, kw_only=True):
    """One campaign that is neither a draft nor finished."""

    id: int
    user_id: int
    name: str
    state: str
    delivery_server_id: int
    recipients: int
    delivered: int
    bounced: int
    expired: int
    suppressed: int
    cancelled: int
    queued: int
    pause_reason: str = ""  # why Sluice paused it by itself


class ReceivedStatus(msgspec.Struct, kw_only=True):
    """Received mail. `today`: handled since midnight by what was done with it (words of `domain.feedback.OUTCOMES`)."""

    waiting: int = 0
    oldest_waiting_seconds: float = 0.0
    refusals_waiting: int = 0  # refusals while sending whose consequences are not drawn yet; counted up to 100,000
    today: dict[str, int] = {}
    unprocessed_today: int = 0  # reports that could not be processed: unproven or unreadable


class Status(msgspec.Struct, kw_only=True):
    """All of it. `ok` means both stores answer, an engine runs and nothing needs an operator; `trouble` says what does."""

    at: float
    ok: bool
    postgresql: str  # "ok", or what it said
    redis: str
    trouble: list[str]
    engines: list[EngineStatus]
    inbound_processes: list[InboundProcess]
    delivery_servers: list[ServerStatus]
    campaigns: list[CampaignStatus]
    received: ReceivedStatus | None = None  # null for users: what comes in is the whole system's


async def ping_postgresql(pool: Pool) -> str:
    """`ok`, or a sentence; within TIMEOUT_SECONDS."""
    return await _ask(_ping_postgresql(pool))


async def ping_redis(client: redis.asyncio.Redis) -> str:
    """`ok`, or a sentence; within TIMEOUT_SECONDS."""
    return await _ask(_ping_redis(client))


async def gather(pool: Pool, client: redis.asyncio.Redis, user_id: int | None = None) -> Status:
    """Look at everything; `user_id` given: only that user's servers and campaigns. Never raises because a store is away."""
    database: tuple[Sequence[asyncpg.Record], Sequence[asyncpg.Record]] = ((), ())
    engines: list[EngineStatus] = []
    receivers: list[InboundProcess] = []
    ages: dict[str, float | None] = {}
    postgresql, (database_rows, ages) = await _try(_from_postgresql(pool, user_id), (database, ages))
    servers, campaigns = database_rows
    received = ReceivedStatus()
    if postgresql == "ok" and user_id is None:
        postgresql, received = await _try(_received(pool), received)
    redis_said, (engines, receivers) = await _try(_heartbeats(client), (engines, receivers))
    if postgresql == "ok":
        # A heartbeat outlives its engine by seconds; the table knows who has ended (None), and who was last seen when
        engines = [engine for engine in engines if ages.get(engine.id, 0.0) is not None]
        for engine in engines:
            if (age := ages.get(engine.id) or 0.0) > _SILENT_SECONDS:
                engine.state, engine.messages_per_second, engine.paths = "silent", 0.0, []
                engine.trouble = [f"it has said nothing for {age:.0f} s: it died, stands still or is cut off"]
    queues: dict[int, int] = {}
    if redis_said == "ok":
        redis_said, queues = await _try(_queues(client, [row["id"] for row in servers]), queues)
    by_server: dict[int, list[PathStatus]] = {}
    for engine in engines:
        for path in engine.paths:
            by_server.setdefault(path.delivery_server_id, []).append(path)
    server_states = [_server(row, by_server.get(row["id"], []), queues.get(row["id"], 0), bool(engines)) for row in servers]
    trouble = [f"{name}: {said}" for name, said in (("PostgreSQL", postgresql), ("Redis", redis_said)) if said != "ok"]
    if not any(engine.state != "silent" for engine in engines) and redis_said == "ok":
        trouble.append("no engine is running: nothing is sent; start `sluice engine` or `sluice up`")
    if received.oldest_waiting_seconds > _MAIL_WAITS_SECONDS:
        trouble.append(
            f"{received.waiting} received messages wait to be read, the oldest for {received.oldest_waiting_seconds:.0f} s: "
            "start `sluice inbound`, or read its log"
        )
    trouble += [f"engine {engine.id}: {sentence}" for engine in engines for sentence in engine.trouble]
    trouble += [f"inbound {process.id}: {sentence}" for process in receivers for sentence in process.trouble]
    trouble += [f"delivery server {s.name}: {s.sentence}" for s in server_states if s.state in ("suspended", "failing")]
    trouble += [f"campaign {row['name']}: {row['pause_reason']}" for row in campaigns if row["pause_reason"]]
    closed = {row["id"]: row["name"] for row in servers if not row["enabled"]}
    trouble += [
        f"campaign {row['name']}: waits for delivery server {closed[row['delivery_server_id']]}, which is switched off"
        for row in campaigns
        if row["delivery_server_id"] in closed and row["state"] in ("preparing", "running")
    ]
    if user_id is not None:
        # another user's servers and recipients are none of this one's business
        own = {row["id"] for row in servers}
        for engine in engines:
            engine.paths = [path for path in engine.paths if path.delivery_server_id in own]
            engine.trouble = []
        receivers = []
        trouble = [sentence for sentence in trouble if not sentence.startswith(("engine ", "inbound "))]
    return Status(
        at=time.time(),
        ok=not trouble,
        postgresql=postgresql,
        redis=redis_said,
        trouble=trouble,
        engines=engines,
        inbound_processes=receivers,
        delivery_servers=server_states,
        campaigns=[_campaign(row) for row in campaigns],
        received=received if user_id is None else None,
    )


async def _try(work: Awaitable[T], otherwise: T) -> tuple[str, T]:
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return "ok", await work
    except TimeoutError:
        return f"no answer within {TIMEOUT_SECONDS:.0f} s", otherwise
    except (Unavailable, OSError, redis.exceptions.RedisError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return (str(error) or type(error).__name__)[:300], otherwise


async def _ask(work: Awaitable[None]) -> str:
    return (await _try(work, None))[0]


async def _ping_postgresql(pool: Pool) -> None:
    async with connection(pool, timeout_seconds=TIMEOUT_SECONDS) as conn:
        await conn.fetchval("select 1")


async def _ping_redis(client: redis.asyncio.Redis) -> None:
    await client.ping()


async def _from_postgresql(
    pool: Pool, user_id: int | None
) -> tuple[tuple[Sequence[asyncpg.Record], Sequence[asyncpg.Record]], dict[str, float | None]]:
    async with connection(pool, timeout_seconds=TIMEOUT_SECONDS) as conn:
        servers = await conn.fetch(
            "select id, user_id, name, host, port, enabled from delivery_servers "
            "where ($1::bigint is null or user_id = $1) and deleted_at is null order by id",
            user_id,
        )
        campaigns = await conn.fetch(
            "select c.id, c.user_id, c.name, c.state, c.delivery_server_id, c.recipients, "
            "case when c.state = 'paused' then c.pause_reason else '' end as pause_reason, "
            "coalesce(sum(t.delivered), 0)::bigint as delivered, "
            "coalesce(sum(t.bounced), 0)::bigint as bounced, coalesce(sum(t.expired), 0)::bigint as expired, "
            "coalesce(sum(t.suppressed), 0)::bigint as suppressed, coalesce(sum(t.cancelled), 0)::bigint as cancelled "
            "from campaigns c left join campaign_totals t on t.campaign_id = c.id "
            "where c.state in ('preparing', 'running', 'paused', 'cancelling') and ($1::bigint is null or c.user_id = $1) "
            "group by c.id order by c.id",
            user_id,
        )
        engines = await conn.fetch(
            "select id, case when stopped_at is null then extract(epoch from now() - seen_at)::float8 end from engines "
            "where seen_at > now() - interval '1 h'"
        )
    return (servers, campaigns), {row[0]: row[1] for row in engines}


async def _received(pool: Pool) -> ReceivedStatus:
    async with connection(pool, timeout_seconds=TIMEOUT_SECONDS) as conn:
        row = await conn.fetchrow(
            "select count(*) as waiting, coalesce(extract(epoch from now() - min(received_at)), 0)::float8 as oldest, "
            "(select count(*) from (select from refusals limit 100000) r) as refusals from "
            "(select received_at from inbound_messages where handled_at is null order by id limit 100000) m"
        )
        totals = await conn.fetch(
            "select outcome, sum(messages)::bigint from inbound_totals where day = current_date group by 1 order by 1"
        )
    today = {total[0]: total[1] for total in totals}
    assert row is not None
    return ReceivedStatus(
        waiting=row["waiting"],
        oldest_waiting_seconds=round(row["oldest"], 1),
        refusals_waiting=row["refusals"],
        today=today,
        unprocessed_today=sum(today.get(outcome, 0) for outcome in TROUBLESOME),
    )


async def _heartbeats(client: redis.asyncio.Redis) -> tuple[list[EngineStatus], list[InboundProcess]]:
    engines = [engine async for engine in _said(client, redis_keys.ENGINE_STATUS_PATTERN, EngineStatus)]
    receivers = [process async for process in _said(client, redis_keys.INBOUND_STATUS_PATTERN, InboundProcess)]
    return sorted(engines, key=lambda engine: engine.id), sorted(receivers, key=lambda process: process.id)


async def _said(client: redis.asyncio.Redis, pattern: str, kind: type[T]) -> AsyncIterator[T]:
    keys = [key async for key in client.scan_iter(match=pattern, count=1000)][:_MAX_PROCESSES]
    # one by one, not MGET: on Redis Cluster the keys lie in different slots
    for value in [await client.get(key) for key in keys]:
        try:
            if value:
                yield msgspec.json.decode(value, type=kind)
        except msgspec.MsgspecError:
            continue  # a foreign value under our key


async def _queues(client: redis.asyncio.Redis, server_ids: list[int]) -> dict[int, int]:
    lengths: dict[int, int] = {}
    for server_id in server_ids:
        pipeline = client.pipeline(transaction=False)
        for priority_class in redis_keys.PRIORITY_CLASSES:
            pipeline.llen(redis_keys.queue(server_id, priority_class))
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        lengths[server_id] = sum(answer for answer in answers if isinstance(answer, int))
    return lengths


def _server(row: asyncpg.Record, paths: list[PathStatus], queued: int, engines: bool) -> ServerStatus:
    known = [path for path in paths if path.state in _WORST_FIRST]
    worst = min(known, key=lambda path: _WORST_FIRST.index(path.state), default=None)
    if not row["enabled"]:
        state, sentence = "disabled", "switched off"
    elif worst is not None:
        state, sentence = worst.state, worst.sentence
    else:
        state, sentence = "unknown", "no engine has said anything about it yet" if engines else "no engine is running"
    return ServerStatus(
        id=row["id"],
        user_id=row["user_id"],
        name=row["name"],
        host=row["host"],
        port=row["port"],
        state=state,
        sentence=sentence,
        connections=sum(path.connections for path in paths),
        in_flight=sum(path.in_flight for path in paths),
        queued_batches=queued,
        delivered=sum(path.delivered for path in paths),
        bounced=sum(path.bounced for path in paths),
        deferred=sum(path.deferred for path in paths),
        uncertain=sum(path.uncertain for path in paths),
        delivered_per_second=round(sum(path.delivered_per_second for path in paths), 1),
    )


def _campaign(row: asyncpg.Record) -> CampaignStatus:
    fields = dict(row)
    ended = fields["delivered"] + fields["bounced"] + fields["expired"] + fields["suppressed"] + fields["cancelled"]
    return CampaignStatus(**fields, queued=fields["recipients"] - ended)
