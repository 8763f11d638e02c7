"""Results that others report (bounces, complaints, unsubscribes, suppressions): a stream of rows, applied all or none.

Good rows wait in a temporary table until the stream has ended; then one transaction suppresses, unsubscribes and marks. What is done is
a state, not a count, so the same file again changes nothing more.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from domain.errors import Invalid, NotFound, Unavailable
from domain.import_rows import Refusal
from domain.result_rows import ResultReader, ResultRow
from store.imports import in_blocks
from store.postgres import Pool, PooledConnection, connection

MAX_CONCURRENT: Final = 2  # each holds one connection of the pool while it runs
REPORTED_REFUSALS: Final = 1000

_COPY_TIMEOUT_SECONDS: Final = 120.0
_APPLY_TIMEOUT_SECONDS: Final = 1800.0
_LOCK: Final = 0x51C3  # advisory lock (this, user id): two files that name the same addresses in different order would deadlock

_running = 0

# Results to suppressions: hard and complaint are about the address, an unsubscribe about the list where one is named. Where a file says
# several things of one address, the gravest is kept. An older result does not undo the removal of a suppression.
_SUPPRESS = (
    "insert into suppressions as s (user_id, list_id, email_key, reason, note, created_at) "
    "select distinct on (list, email_key) $1::bigint, list, email_key, reason, note, least(coalesce(at, now()), now()) from ("
    "select email_key, note, at, row, case result when 'hard' then 'bounced' when 'complaint' then 'complained' "
    "when 'unsubscribe' then 'unsubscribed' else 'import' end as reason, "
    "case when result in ('unsubscribe', 'suppress') then $2::bigint end as list, "
    "case result when 'complaint' then 1 when 'hard' then 2 when 'unsubscribe' then 3 else 4 end as gravity "
    "from result_rows where result <> 'soft') r order by list, email_key, gravity, at desc nulls last, row "
    "on conflict (coalesce(user_id, 0), coalesce(list_id, 0), email_key) do update set removed_at = null, reason = excluded.reason, "
    "note = excluded.note, created_at = excluded.created_at, changed = pg_current_xact_id() "
    "where s.removed_at is not null and excluded.created_at > s.removed_at"
)
# Soft results count like those of our own messages, once for each time: the next of ours that reaches the threshold makes it hard.
# Without a time one could not tell a second result from the same one again. Whoever is suppressed is past counting.
_COUNT = (
    "insert into soft_bounces as s (user_id, email_key, campaigns, bounced_at) "
    "select $1, email_key, array_agg(0::bigint order by at), array_agg(at order by at) from ("
    "select distinct email_key, at from result_rows where result = 'soft' and at <= now()) r where not exists ("
    "select from suppressions p where p.email_key = r.email_key and p.user_id = $1 and p.list_id is null and p.removed_at is null) "
    "group by email_key on conflict (user_id, email_key) do update set (campaigns, bounced_at) = ("
    "select array_agg(c order by t), array_agg(t order by t) from (select c, t from unnest(s.campaigns, s.bounced_at) as old (c, t) "
    "union all select 0, t from unnest(excluded.bounced_at) as t where t <> all (s.bounced_at)) both_of_them) "
    "where not excluded.bounced_at <@ s.bounced_at"
)
# Only where the suppression stands: it may have been removed since the result
_MARK = (
    "update subscribers s set state = $3, updated_at = now() from lists l, "
    "(select distinct email_key from result_rows where result = any($4::text[])) r "
    "where l.user_id = $1 and ($2::bigint is null or l.id = $2) and s.list_id = l.id and s.email_key = r.email_key "
    "and (s.state = 'subscribed' or (s.state = 'bounced' and $3 = 'unsubscribed')) "
    "and exists (select from suppressions p where p.email_key = r.email_key and coalesce(p.user_id, 0) = $1 "
    "and coalesce(p.list_id, 0) in (0, coalesce($2::bigint, 0)) and p.removed_at is null)"
)


class ResultsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a file said, and what changed by it: `suppressed`, `unsubscribed`, `marked_bounced`, `soft_counted` were not so before."""

    rows: int
    hard: int
    soft: int
    complaints: int
    unsubscribes: int
    suppressions: int
    skipped: int
    refused: int
    suppressed: int
    unsubscribed: int
    marked_bounced: int
    soft_counted: int  # addresses
    refusals: list[Refusal] = []  # the first 1,000


async def run(pool: Pool, user_id: int | None, list_id: int | None, blocks: AsyncIterator[bytes], reader: ResultReader) -> ResultsReport:
    """Read a stream of results, cut anywhere, and apply it for `user_id` (None: the whole system, rows of type suppress only).

    `list_id`: the list that unsubscribes and suppressions are for; None: all of the user's. Raises NotFound (no such list), Invalid (the
    file as a whole cannot be read), Unavailable; nothing has changed then.
    """
    global _running
    if _running >= MAX_CONCURRENT:
        raise Unavailable(f"{MAX_CONCURRENT} imports of results are running already; try again when one has ended")
    _running += 1
    try:
        async with connection(pool) as conn:
            if list_id is not None and not await conn.fetchval(
                "select exists (select from lists where id = $1 and user_id = $2 and deleted_at is null)", list_id, user_id
            ):
                raise NotFound("list", list_id)
            try:
                refused, refusals = await _stream(conn, blocks, reader, user_id)
                async with conn.transaction():
                    return await _apply(conn, user_id, list_id, reader, refused, refusals)
            finally:
                if not conn.is_closed():
                    await asyncio.shield(_clean(conn))
    finally:
        _running -= 1


async def _stream(
    conn: PooledConnection, blocks: AsyncIterator[bytes], reader: ResultReader, user_id: int | None
) -> tuple[int, list[Refusal]]:
    await conn.execute(
        "drop table if exists pg_temp.result_rows; create temporary table result_rows "
        "(row bigint not null, email_key text not null, result text not null, at timestamptz, note text not null)"
    )
    refused = 0
    refusals: list[Refusal] = []
    loop = asyncio.get_running_loop()

    async def store() -> None:
        nonlocal refused
        _, bad = reader.take()
        good = reader.take_results()
        if user_id is None and (other := next((row for row in good if row.result != "suppress"), None)) is not None:
            raise Invalid("type", f"row {other.row} is of type {other.result}; for the whole system only suppressions are imported")
        refused += len(bad)
        refusals.extend(bad[: REPORTED_REFUSALS - len(refusals)])
        if good:
            await conn.copy_records_to_table(
                "result_rows", records=map(_record, good), columns=("row", "email_key", "result", "at", "note"),
                timeout=_COPY_TIMEOUT_SECONDS,
            )  # fmt: skip

    async for block in in_blocks(blocks):
        await loop.run_in_executor(None, reader.feed, block)  # parsed in a thread: the event loop stays free for others
        await store()
    await loop.run_in_executor(None, reader.finish)
    await store()
    return refused, refusals


def _record(row: ResultRow) -> tuple[object, ...]:
    return row.row, row.key, row.result, row.when, row.text


async def _apply(
    conn: PooledConnection, user_id: int | None, list_id: int | None, reader: ResultReader, refused: int, refusals: list[Refusal]
) -> ResultsReport:
    timeout = _APPLY_TIMEOUT_SECONDS
    await conn.execute("select pg_advisory_xact_lock($1, $2)", _LOCK, (user_id or 0) % 2**31, timeout=timeout)
    await conn.execute("set local work_mem = '64MB'; analyze result_rows", timeout=timeout)
    said = {row[0]: row[1] for row in await conn.fetch("select result, count(*) from result_rows group by 1", timeout=timeout)}

    def changed(done: str) -> int:
        return int(done.rpartition(" ")[2])

    suppressed = changed(await conn.execute(_SUPPRESS, user_id, list_id, timeout=timeout))
    unsubscribed = marked = counted = 0
    if user_id is not None:
        # a complaint is about the address, on whatever list it is
        unsubscribed = changed(await conn.execute(_MARK, user_id, None, "unsubscribed", ["complaint"], timeout=timeout))
        unsubscribed += changed(await conn.execute(_MARK, user_id, list_id, "unsubscribed", ["unsubscribe"], timeout=timeout))
        marked = changed(await conn.execute(_MARK, user_id, None, "bounced", ["hard"], timeout=timeout))
        await conn.execute(
            "delete from soft_bounces where user_id = $1 "
            "and email_key in (select email_key from result_rows where result in ('hard', 'complaint'))",
            user_id, timeout=timeout,
        )  # fmt: skip
        counted = changed(await conn.execute(_COUNT, user_id, timeout=timeout))
    return ResultsReport(
        rows=reader.rows_read, hard=said.get("hard", 0), soft=said.get("soft", 0), complaints=said.get("complaint", 0),
        unsubscribes=said.get("unsubscribe", 0), suppressions=said.get("suppress", 0), skipped=reader.skipped, refused=refused,
        suppressed=suppressed, unsubscribed=unsubscribed, marked_bounced=marked, soft_counted=counted, refusals=refusals,
    )  # fmt: skip


async def _clean(conn: PooledConnection) -> None:
    """Leave the connection as it was; a broken one is closed by the pool, which does the same."""
    try:
        await conn.execute("drop table if exists pg_temp.result_rows", timeout=30)
    except Exception:
        conn.terminate()
