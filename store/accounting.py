"""Accounting: outcomes into PostgreSQL exactly once, and what is asked about them afterwards.

`record` is the ledger's transaction. It moves the journal's cursor, COPYs the rows, and sets the progress bits of the
batches together, so an outcome is in the ledger once however often a crash or an unclear COMMIT makes us repeat it.
The row of a batch is locked before its bits are looked at: of two words about one recipient the first is its terminal record,
the second becomes a `u` record (P1, P4).
"""

import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeAlias

import msgspec
from asyncpg import BitString

from domain import states
from domain.campaign import CampaignTotals
from domain.errors import Conflict, NotFound
from store import leases
from store.postgres import Pool, PooledConnection, connection, transaction

Cursor: TypeAlias = tuple[int, int]  # (segment, offset); (0, 0) before anything was read
BatchKey: TypeAlias = tuple[int, int]  # (campaign_id, batch)
Progress: TypeAlias = dict[BatchKey, tuple[bytearray, int]]  # bits, most significant first, and how many there are

# In the order of ext.ledger_rows.copy_rows
COLUMNS = (
    "campaign_id", "number", "attempt", "kind", "at", "batch", "delivery_server_id", "connection", "size", "status", "category",
    "diagnostic", "mta", "recipient",
)  # fmt: skip
TOTALS_COLUMNS = ("delivered", "bounced", "expired", "suppressed", "cancelled", "deferrals", "uncertain")
TERMINAL = "".join(states.TERMINAL_KINDS)
_REFUSED = re.compile(rb"^\d+\t\d+\t\d+\t[bx]\t.*\n", re.MULTILINE)  # the lines of a COPY whose consequences somebody must draw

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class LedgerRows(NamedTuple):
    """What one block of the journal becomes; `ext.ledger_rows.copy_rows` says how each is made."""

    copy: list[bytes]
    retries: list[tuple[int, int, int, int, int]]  # campaign, number, attempt, due at, first attempt at (microseconds)
    totals: dict[int, list[int]]  # campaign -> rows written, in the order of TOTALS_COLUMNS
    strays: int


async def cursor(pool: Pool, journal: str, *, timeout_seconds: float = 30.0) -> Cursor:
    """How far the ledger has read a journal. Raises Unavailable."""
    async with connection(pool, timeout_seconds=timeout_seconds) as conn:
        row = await conn.fetchrow("select segment, position from journal_cursors where journal = $1", journal, timeout=timeout_seconds)
    return (row[0], row[1]) if row else (0, 0)


async def record(
    pool: Pool,
    journal: str,
    expected: Cursor,
    new: Cursor,
    batches: Iterable[BatchKey],
    campaigns: Iterable[int],
    make_rows: Callable[[Progress, set[int]], LedgerRows],
    *,
    timeout_seconds: float = 30.0,
) -> int | None:
    """Write what lies between two places of a journal, in one transaction. Returns how many records were strays.

    `make_rows(progress, existing campaigns)` is called once the rows of `batches` are locked, and sets their new bits in place.
    None: the journal stood at `new` already, nothing was done. Raises Conflict when it stands anywhere else, and Unavailable
    when PostgreSQL does not answer; then ask `cursor` again, because the COMMIT may have happened.
    """
    async with transaction(pool, timeout_seconds=timeout_seconds) as conn:
        if not await _move_cursor(conn, journal, expected, new):
            return None
        progress = await _lock(conn, batches)
        existing = await conn.fetch("select id from campaigns where id = any($1)", list(campaigns))
        before = {key: bytes(bits) for key, (bits, _) in progress.items()}
        rows = make_rows(progress, {row[0] for row in existing})
        if any(rows.copy):
            await conn.copy_to_table("accounting", source=_chunks(rows.copy), columns=COLUMNS, timeout=timeout_seconds)
        if any(counts[1] or counts[2] for counts in rows.totals.values()):
            refused = [line for part in rows.copy for line in _REFUSED.findall(part)]
            await conn.copy_to_table("refusals", source=_chunks(refused), columns=COLUMNS, timeout=timeout_seconds)
        await _settle(conn, {key: found for key, found in progress.items() if found[0] != before[key]})
        await _schedule(conn, rows.retries)
        await _count(conn, journal, rows.totals)
        return rows.strays


async def _move_cursor(conn: PooledConnection, journal: str, expected: Cursor, new: Cursor) -> bool:
    if expected == (0, 0):
        statement = (
            "insert into journal_cursors as j (journal, segment, position) values ($1, $4, $5) on conflict (journal) do update "
            "set segment = $4, position = $5, updated_at = now() where j.segment = $2 and j.position = $3"
        )
    else:
        statement = (
            "update journal_cursors set segment = $4, position = $5, updated_at = now() "
            "where journal = $1 and segment = $2 and position = $3"
        )
    if (await conn.execute(statement, journal, *expected, *new)).endswith(" 1"):
        return True
    row = await conn.fetchrow("select segment, position from journal_cursors where journal = $1", journal)
    stands_at = (row[0], row[1]) if row else (0, 0)
    if stands_at == new:
        return False
    raise Conflict(
        f"the ledger has read journal {journal} up to {stands_at}, not {expected}: somebody else reads it, or a COMMIT came late"
    )


async def _lock(conn: PooledConnection, batches: Iterable[BatchKey]) -> Progress:
    """Lock the rows of `batches` in the order of their keys, so that two ledgers never wait for each other in a circle."""
    keys = list(batches)
    if not keys:
        return {}
    rows = await conn.fetch(
        "select b.campaign_id, b.batch, b.done from unnest($1::bigint[], $2::int[]) as k(campaign_id, batch) "
        "join batches b on b.campaign_id = k.campaign_id and b.batch = k.batch "
        "where b.campaign_id = any($1) order by b.campaign_id, b.batch for update of b",
        [key[0] for key in keys],
        [key[1] for key in keys],
    )
    return {(campaign_id, batch): (bytearray(done.bytes), len(done)) for campaign_id, batch, done in rows}


async def _settle(conn: PooledConnection, changed: Progress) -> None:
    if not changed:
        return
    await conn.execute(
        "update batches b set done = n.done, state = case when n.settled then 'settled' else b.state end, "
        "owner = case when n.settled then null else b.owner end, "
        "lease_until = case when n.settled then null else b.lease_until end "
        "from unnest($1::bigint[], $2::int[], $3::varbit[], $4::boolean[]) as n(campaign_id, batch, done, settled) "
        "where b.campaign_id = any($1) and b.campaign_id = n.campaign_id and b.batch = n.batch",
        [campaign_id for campaign_id, _ in changed],
        [batch for _, batch in changed],
        [BitString.frombytes(bytes(bits), count) for bits, count in changed.values()],
        [int.from_bytes(bits).bit_count() == count for bits, count in changed.values()],
    )


async def _schedule(conn: PooledConnection, retries: list[tuple[int, int, int, int, int]]) -> None:
    if not retries:
        return
    campaigns, numbers, attempts, due, first = zip(*retries, strict=True)
    await conn.execute(
        "insert into retries (campaign_id, number, attempt, due_at, first_attempt_at) "
        "select * from unnest($1::bigint[], $2::int[], $3::smallint[], $4::timestamptz[], $5::timestamptz[]) on conflict do nothing",
        campaigns,
        numbers,
        attempts,
        [_EPOCH + timedelta(microseconds=at) for at in due],
        [_EPOCH + timedelta(microseconds=at) for at in first],
    )


async def _count(conn: PooledConnection, journal: str, totals: dict[int, list[int]]) -> None:
    if not totals:
        return
    columns = ", ".join(TOTALS_COLUMNS)
    arrays = ", ".join(f"${number}::bigint[]" for number in range(2, 3 + len(TOTALS_COLUMNS)))
    await conn.execute(
        f"insert into campaign_totals as t (journal, campaign_id, {columns}) select $1, * from unnest({arrays}) order by 2 "
        "on conflict (campaign_id, journal) do update set " + ", ".join(f"{name} = t.{name} + excluded.{name}" for name in TOTALS_COLUMNS),
        journal,
        list(totals),
        *(list(counts) for counts in zip(*totals.values(), strict=True)),
    )


async def _chunks(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


# --- the end of an engine -------------------------------------------------------------------------------------------------


async def release_owner(pool: Pool, engine_id: str) -> int:
    """Release every lease of a dead engine and mark it as stopped. Call when the ledger holds its journal. Returns batches."""
    async with transaction(pool) as conn:
        done = await conn.execute(
            "update batches set owner = null, lease_until = null, state = 'pending' "
            "where owner = $1 and state = 'queued' and campaign_id = any($2)",
            engine_id,
            await leases.campaigns(conn),
        )
        await conn.execute("update engines set stopped_at = now() where id = $1 and stopped_at is null", engine_id)
        return int(done.rpartition(" ")[2])


class Sighting(NamedTuple):
    """When and where an engine was seen last."""

    node: str
    journal_directory: str
    seconds_ago: float
    stopped: bool


async def last_seen(pool: Pool, engine_id: str) -> Sighting | None:
    """The last sign of life of an engine, by the clock of PostgreSQL; None when it is not known here. Raises Unavailable."""
    async with connection(pool) as conn:
        row = await conn.fetchrow(
            "select node, journal_directory, extract(epoch from now() - seen_at)::float8, stopped_at is not null "
            "from engines where id = $1",
            engine_id,
        )
    return Sighting(*row) if row else None


async def on_uncertain(pool: Pool, delivery_servers: Iterable[int]) -> dict[int, str]:
    """What each delivery server wants done with an attempt in doubt (R8): retry, assume_delivered or fail."""
    rows = await pool.fetch(
        "select id, coalesce(limits ->> 'on_uncertain', 'retry') from delivery_servers where id = any($1)", list(delivery_servers)
    )
    return {row[0]: row[1] for row in rows}


async def recipients_in_doubt(pool: Pool, recipients: Iterable[tuple[int, int]]) -> dict[tuple[int, int], tuple[str, int]]:
    """Address and time the campaign was started (microseconds) of (campaign, number)s; those that are gone are left out."""
    wanted: dict[int, list[int]] = {}
    for campaign_id, number in recipients:
        wanted.setdefault(campaign_id, []).append(number)
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for campaign_id, numbers in wanted.items():
        for number, email, queued_at in await pool.fetch(
            "select r.number, r.email, (extract(epoch from coalesce(c.started_at, c.created_at)) * 1000000)::bigint "
            "from recipients r join campaigns c on c.id = r.campaign_id where r.campaign_id = $1 and r.number = any($2)",
            campaign_id,
            numbers,
        ):
            found[campaign_id, number] = (email, queued_at)
    return found


# --- questions ------------------------------------------------------------------------------------------------------------


async def totals(pool: Pool, campaign_id: int) -> CampaignTotals:
    """Progress of one campaign. Raises NotFound."""
    async with connection(pool) as conn:
        return await totals_on(conn, campaign_id)


async def totals_on(conn: PooledConnection, campaign_id: int) -> CampaignTotals:
    """The same in the snapshot of `conn`: the sums the ledger keeps, one small row per journal. Raises NotFound."""
    row = await conn.fetchrow(
        "select c.recipients, "
        + ", ".join(f"coalesce(sum(t.{name}), 0)::bigint as {name}" for name in TOTALS_COLUMNS)
        + " from campaigns c left join campaign_totals t on t.campaign_id = c.id where c.id = $1 group by c.id",
        campaign_id,
    )
    if row is None:
        raise NotFound("campaign", campaign_id)
    return CampaignTotals(**dict(row))


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """The contract, counted from the ledger: input = the five terminal states + queued + missing, each recipient once."""

    input: int
    delivered: int
    bounced: int
    expired: int
    suppressed: int
    cancelled: int
    queued: int  # no terminal record yet, and something will bring one: an open batch or a retry
    missing: int  # no terminal record, and nothing will ever bring one
    multiple_terminal: int  # recipients with more than one terminal record
    disagreeing: int  # recipients or totals that one table calls finished and another does not
    possible_duplicates: int  # `u` records: attempts that may have reached the recipient besides the one that counts

    @property
    def clean(self) -> bool:
        """Whether the contract holds."""
        return not (self.missing or self.multiple_terminal or self.disagreeing)


# The numbers that still await a terminal record: those of open bits, and those of retries
_OPEN = """
    select case when b.numbers is null then b.first_number + i else b.numbers[i + 1] end as number
    from batches b cross join lateral generate_series(0, length(b.done) - 1) as i
    where b.campaign_id = $1 and b.state <> 'settled' and get_bit(b.done, i) = 0
    union all
    select number from retries where campaign_id = $1
"""
# A sum of hashes is the same for two collections exactly when they hold the same numbers equally often (but for a chance of
# 2^-64; the seed is new each time). It needs plain scans, which PostgreSQL runs in parallel: no sort, no join, no large hash table.
# One sum for each 4,096 numbers, so that where something is wrong only those are looked at one by one.
_SPAN_BITS = 12
_FINGERPRINT = f"number >> {_SPAN_BITS} as span, count(*) as records, sum(hashint4extended(number, $2)) as fingerprint"
_KNOWN = f"select {_FINGERPRINT} from recipients where campaign_id = $1 group by span"
_RECORDED = f"select kind, {_FINGERPRINT} from accounting where campaign_id = $1 group by kind, span"
_AWAITED = f"select {_FINGERPRINT} from ({_OPEN}) as open group by span"

# In spans whose fingerprints differ every table says about each number what it knows of it, and the numbers are looked at one by one
_ONE_BY_ONE = f"""
with facts as (
    select number, 1 as known, 0 as terminal, null::"char" as kind, 0 as open from recipients
        where campaign_id = $1 and number >> {_SPAN_BITS} = any($3::int[])
    union all
    select number, 0, 1, kind, 0 from accounting
        where campaign_id = $1 and kind = any($2::"char"[]) and number >> {_SPAN_BITS} = any($3::int[])
    union all
    select number, 0, 0, null, 1 from ({_OPEN}) as open where number >> {_SPAN_BITS} = any($3::int[])
), recipient as (
    select number, sum(known) as known, sum(terminal) as terminal, min(kind) as kind, sum(open) as open from facts group by number
)
select
    count(*) filter (where known > 0) as input,
    count(*) filter (where known > 0 and kind = 'd') as delivered,
    count(*) filter (where known > 0 and kind = 'b') as bounced,
    count(*) filter (where known > 0 and kind = 'x') as expired,
    count(*) filter (where known > 0 and kind = 's') as suppressed,
    count(*) filter (where known > 0 and kind = 'c') as cancelled,
    count(*) filter (where known > 0 and terminal = 0 and open > 0) as queued,
    count(*) filter (where known > 0 and terminal = 0 and open = 0) as missing,
    count(*) filter (where terminal > 1) as multiple_terminal,
    count(*) filter (where known <> 1 or (terminal > 0 and open > 0) or open > 1) as disagreeing
from recipient
"""


async def audit(pool: Pool, campaign_id: int, *, timeout_seconds: float = 600.0) -> Audit:
    """Prove the contract for one campaign from recipients, accounting, batches and retries. Raises NotFound.

    One snapshot, so it is true while the campaign runs.
    """
    seed = secrets.randbits(62)
    found = dict.fromkeys(("input", *states.TERMINAL_KINDS.values(), "queued", "missing", "multiple_terminal", "disagreeing"), 0)
    uncertain = 0
    async with transaction(pool, isolation="repeatable_read", readonly=True) as conn:
        counted = await totals_on(conn, campaign_id)
        spans: dict[int, dict[str, int]] = {}  # what each span adds if it is as it should be
        balance: dict[int, int] = {}  # what is known minus what is accounted for: 0 if it is
        for name, statement in (("input", _KNOWN), ("queued", _AWAITED), ("", _RECORDED)):
            for row in await conn.fetch(statement, campaign_id, seed, timeout=timeout_seconds):
                kind = "" if name else _letter(row["kind"])
                if kind == states.KIND_UNCERTAIN:
                    uncertain += row["records"]
                if name or kind in states.TERMINAL_KINDS:
                    spans.setdefault(row["span"], {})[name or states.TERMINAL_KINDS[kind]] = row["records"]
                    sign = 1 if name == "input" else -1
                    balance[row["span"]] = balance.get(row["span"], 0) + sign * int(row["fingerprint"])
        wrong = [span for span, difference in balance.items() if difference]
        for span, counts in spans.items():
            if not balance[span]:
                for name, records in counts.items():
                    found[name] += records
        if wrong:
            await conn.execute("set local work_mem = '192MB'")
            (row,) = await conn.fetch(_ONE_BY_ONE, campaign_id, [kind.encode() for kind in TERMINAL], wrong, timeout=timeout_seconds)
            for name, value in dict(row).items():
                found[name] += value
    # the totals people see while a campaign runs must be the ledger's own
    disagreeing = found.pop("disagreeing") + abs(counted.recipients - found["input"])
    if not found["multiple_terminal"]:
        disagreeing += sum(abs(getattr(counted, state) - found[state]) for state in states.TERMINAL_KINDS.values())
    return Audit(disagreeing=disagreeing, possible_duplicates=uncertain, **found)


class ReportLine(msgspec.Struct, frozen=True):
    """How often one outcome was recorded."""

    kind: str
    category: str
    status: str
    records: int


class Diagnostic(msgspec.Struct, frozen=True):
    """One sentence servers answered with, and how often."""

    kind: str
    diagnostic: str
    records: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a campaign."""

    totals: CampaignTotals
    outcomes: list[ReportLine]
    diagnostics: list[Diagnostic]


async def report(pool: Pool, campaign_id: int, *, diagnostics: int = 20, timeout_seconds: float = 120.0) -> Report:
    """Counts by kind, category and status, and the most frequent answers that were no acceptance. Raises NotFound."""
    counted = await totals(pool, campaign_id)
    outcomes = await pool.fetch(
        "select kind, category, status, count(*) as records from accounting where campaign_id = $1 "
        "group by 1, 2, 3 order by 4 desc, 1, 2, 3",
        campaign_id,
        timeout=timeout_seconds,
    )
    answers = await pool.fetch(
        "select kind, diagnostic, count(*) as records from accounting where campaign_id = $1 and kind <> 'd' and diagnostic <> '' "
        "group by 1, 2 order by 3 desc, 1, 2 limit $2",
        campaign_id,
        diagnostics,
        timeout=timeout_seconds,
    )
    return Report(
        totals=counted,
        outcomes=[ReportLine(_letter(row["kind"]), row["category"], row["status"], row["records"]) for row in outcomes],
        diagnostics=[Diagnostic(_letter(row["kind"]), row["diagnostic"], row["records"]) for row in answers],
    )


class RecipientRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One accounting record of one recipient."""

    number: int
    attempt: int
    kind: str
    at: datetime
    delivery_server_id: int
    status: str
    category: str
    diagnostic: str
    mta: str
    recipient: str


async def records_of(pool: Pool, campaign_id: int, number: int, *, timeout_seconds: float = 60.0) -> list[RecipientRecord]:
    """Every record of one recipient of a campaign, oldest first."""
    async with connection(pool) as conn:
        return await records_on(conn, campaign_id, number, timeout_seconds=timeout_seconds)


async def records_on(conn: PooledConnection, campaign_id: int, number: int, *, timeout_seconds: float = 60.0) -> list[RecipientRecord]:
    """The same on a connection that is not inside a transaction."""
    async with conn.transaction(readonly=True):
        # Without statistics PostgreSQL reads the whole table; the BRIN index leads to a few pages (1 ms of 10 million rows)
        await conn.execute("set local enable_seqscan = off")
        rows = await conn.fetch(
            "select number, attempt, kind, at, delivery_server_id, status, category, diagnostic, mta, recipient from accounting "
            "where campaign_id = $1 and number = $2 order by at, attempt",
            campaign_id,
            number,
            timeout=timeout_seconds,
        )
    return [RecipientRecord(**{**dict(row), "kind": _letter(row["kind"])}) for row in rows]


async def delivered_after_deferral(pool: Pool, campaign_id: int, *, timeout_seconds: float = 120.0) -> int:
    """How many recipients were delivered after a server had refused them for now at least once."""
    return int(
        await pool.fetchval(
            "select count(*) from accounting d where d.campaign_id = $1 and d.kind = 'd' "
            "and d.number in (select t.number from accounting t where t.campaign_id = $1 and t.kind = 't')",
            campaign_id,
            timeout=timeout_seconds,
        )
    )


def _letter(kind: Any) -> str:
    """asyncpg gives PostgreSQL's "char" as bytes."""
    return kind.decode() if isinstance(kind, bytes) else str(kind)
