"""Imports: a stream of rows into a list through COPY, with a report of every row that was refused.

Good rows wait in a temporary table (not in the WAL, gone with the connection) until the stream has ended; then duplicates
are found in SQL and one transaction puts all of them on the list. So an import that breaks off changes nothing, and no
transaction is open while a slow client sends. Memory does not depend on the size of the list.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import datetime

import msgspec

from domain.errors import Invalid, NotFound, Unavailable
from domain.import_rows import Format, Kind, Refusal, RowReader, reader
from store.postgres import Connection, Pool, PooledConnection, connection, transaction

MAX_CONCURRENT = 4  # each holds one connection of the pool while it runs
REPORTED_REFUSALS = 1000  # in the report itself; all of them by `refusals`

_BLOCK_BYTES = 256 * 1024
_COPY_TIMEOUT_SECONDS = 120.0
_APPLY_TIMEOUT_SECONDS = 3600.0
_LOCK_RUNNING = 0x51C1  # advisory lock (this, import id): held by the connection that runs the import
_LOCK_LIST = 0x51C2  # advisory lock (this, list id): one import at a time writes a list

Progress = Callable[[int, int], None]


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an import. `rows` = `imported` (new on the list) + `updated` (were on it, fields replaced) + `refused`."""

    id: int
    list_id: int
    state: str  # running, completed, failed
    failure: str  # why nothing was imported, when failed
    rows: int
    imported: int
    updated: int
    refused: int
    created_at: datetime
    finished_at: datetime | None
    refusals: list[Refusal] = []  # the first 1,000


_running = 0


async def run_import(
    pool: Pool,
    user_id: int,
    list_id: int,
    blocks: AsyncIterator[bytes],
    format: Format,
    *,
    create_fields: bool = True,
    progress: Progress | None = None,
) -> ImportReport:
    """Import a CSV or NDJSON stream, cut anywhere, into a list of `user_id`. `progress` gets (rows read, rows refused) as it goes.

    Rows already on the list get the fields the file names; whoever unsubscribed stays unsubscribed. Raises NotFound (no such
    list), Invalid (the file as a whole cannot be read), Unavailable (PostgreSQL, or too many imports at once); nothing is on
    the list then, and the import is kept as failed.
    """
    global _running
    if _running >= MAX_CONCURRENT:
        raise Unavailable(f"{MAX_CONCURRENT} imports are running already; try again when one has ended")
    _running += 1
    try:
        async with connection(pool) as conn:
            known = await _known_fields(conn, user_id, list_id)
            import_id = await conn.fetchval("insert into imports (user_id, list_id) values ($1, $2) returning id", user_id, list_id)
            await conn.execute("select pg_advisory_lock($1, $2)", _LOCK_RUNNING, import_id % 2**31)
            try:
                await _stream(conn, import_id, blocks, rows := reader(format, known, create_fields), progress)
                await _apply(conn, import_id, user_id, list_id, rows)
            except BaseException as error:
                await _failed(pool, import_id, error)
                raise
            finally:
                if not conn.is_closed():
                    await asyncio.shield(_clean(conn, import_id))
            return await report(conn, user_id, import_id)
    finally:
        _running -= 1


async def _known_fields(conn: PooledConnection, user_id: int, list_id: int) -> dict[str, Kind]:
    if not await conn.fetchval("select exists (select from lists where id = $1 and user_id = $2 and deleted_at is null)", list_id, user_id):
        raise NotFound("list", list_id)
    return {row["name"]: row["kind"] for row in await conn.fetch("select name, kind from custom_fields where list_id = $1", list_id)}


async def _stream(conn: PooledConnection, import_id: int, blocks: AsyncIterator[bytes], rows: RowReader, progress: Progress | None) -> None:
    """Parse in a thread, store the block before it meanwhile: the event loop stays free for other requests."""
    await conn.execute(
        "drop table if exists pg_temp.import_rows; "
        "create temporary table import_rows (row bigint not null, email text not null, email_key text not null, data text not null)"
    )
    refused = 0
    storing: asyncio.Task[None] | None = None
    loop = asyncio.get_running_loop()
    try:
        async for block in in_blocks(blocks):
            await loop.run_in_executor(None, rows.feed, block)
            if storing is not None:
                await storing
            good, bad = rows.take()
            refused += len(bad)
            storing = asyncio.create_task(_store(conn, import_id, good, bad))
            if progress is not None:
                progress(rows.rows_read, refused)
        await loop.run_in_executor(None, rows.finish)
    finally:
        if storing is not None:
            await asyncio.shield(storing)
    good, bad = rows.take()
    await _store(conn, import_id, good, bad)
    if progress is not None:
        progress(rows.rows_read, refused + len(bad))


async def in_blocks(source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in blocks worth a thread switch and a COPY."""
    held: list[bytes] = []
    size = 0
    while True:
        try:
            piece = await anext(source)
        except StopAsyncIteration:
            break
        except OSError as error:
            # kept apart from what a broken link to PostgreSQL raises
            raise Invalid("body", f"could not be read to its end: {error.strerror or type(error).__name__}") from error
        for start in range(0, len(piece), _BLOCK_BYTES):
            held.append(piece[start : start + _BLOCK_BYTES])
            size += len(held[-1])
            if size >= _BLOCK_BYTES:
                yield b"".join(held)
                held, size = [], 0
    if held:
        yield b"".join(held)


async def _store(conn: PooledConnection, import_id: int, good: list[tuple[int, str, str, str]], bad: list[Refusal]) -> None:
    if good:
        await conn.copy_records_to_table(
            "import_rows", records=good, columns=("row", "email", "email_key", "data"), timeout=_COPY_TIMEOUT_SECONDS
        )
    if bad:
        await conn.copy_records_to_table(
            "import_refusals",
            records=[(import_id, refusal.row, refusal.field[:200], refusal.reason[:500]) for refusal in bad],
            columns=("import_id", "row", "field", "reason"),
            timeout=_COPY_TIMEOUT_SECONDS,
        )


async def _apply(conn: PooledConnection, import_id: int, user_id: int, list_id: int, rows: RowReader) -> None:
    """Put the waiting rows on the list, all or none."""
    timeout = _APPLY_TIMEOUT_SECONDS
    async with conn.transaction():
        await conn.execute("set local work_mem = '64MB'")
        # two imports that update the same addresses in different order would deadlock
        await conn.execute("select pg_advisory_xact_lock($1, $2)", _LOCK_LIST, list_id % 2**31, timeout=timeout)
        if not await conn.fetchval("select exists (select from lists where id = $1 and deleted_at is null)", list_id):
            raise NotFound("list", list_id)
        for name, kind in rows.new_fields.items():
            await conn.execute(
                "insert into custom_fields (user_id, list_id, name, kind) values ($1, $2, $3, $4) on conflict do nothing",
                user_id,
                list_id,
                name,
                kind,
            )
        await conn.execute(
            "insert into import_refusals (import_id, row, field, reason) "
            "select $1, row, 'email', 'is a duplicate of row ' || first from "
            "(select row, min(row) over (partition by email_key) as first from import_rows) d where row <> first",
            import_id,
            timeout=timeout,
        )
        await conn.execute(
            "delete from import_rows i using import_refusals r where r.import_id = $1 and r.row = i.row", import_id, timeout=timeout
        )
        # No ORDER BY: the rows lie in the order of the file already, and sorting them whole would go through the disk
        counts = await conn.fetchrow(
            "with stored as (insert into subscribers as s (user_id, list_id, email, email_key, data) "
            "select $1, $2, email, email_key, data::json from import_rows "
            "on conflict (list_id, email_key) do update set email = excluded.email, "
            "data = (s.data::jsonb || excluded.data::jsonb)::json, updated_at = now() returning xmax = 0 as fresh) "
            "select count(*) filter (where fresh) as imported, count(*) filter (where not fresh) as updated from stored",
            user_id,
            list_id,
            timeout=timeout,
        )
        assert counts is not None
        await conn.execute(
            "update imports set state = 'completed', rows = $2, imported = $3, updated = $4, finished_at = now(), "
            "refused = (select count(*) from import_refusals where import_id = $1) where id = $1",
            import_id,
            rows.rows_read,
            counts["imported"],
            counts["updated"],
            timeout=timeout,
        )


async def _failed(pool: Pool, import_id: int, error: BaseException) -> None:
    """Keep why an import changed nothing. On another connection: its own may be the thing that broke."""
    if isinstance(error, Invalid | NotFound | Unavailable):
        reason = str(error)
    elif isinstance(error, asyncio.CancelledError):
        reason = "the client went away, or the process was stopped, before the end"
    else:
        reason = f"broke off: {type(error).__name__}"
    try:
        async with connection(pool, timeout_seconds=5) as conn:
            await conn.execute(
                "update imports set state = 'failed', failure = $2, finished_at = now() where id = $1 and state = 'running'",
                import_id,
                reason[:500],
                timeout=5,
            )
    except (Unavailable, asyncio.CancelledError):
        pass  # `get` finds the lock free and says so then


async def _clean(conn: Connection | PooledConnection, import_id: int) -> None:
    """Leave the connection as it was; a broken one is closed by the pool, which does the same."""
    try:
        await conn.execute("drop table if exists pg_temp.import_rows", timeout=30)
        await conn.execute("select pg_advisory_unlock($1, $2)", _LOCK_RUNNING, import_id % 2**31, timeout=10)
    except Exception:
        conn.terminate()


async def report(conn: PooledConnection, user_id: int | None, import_id: int) -> ImportReport:
    """One import with its first 1,000 refusals; `user_id` None looks at everybody's. Raises NotFound."""
    query = (
        "select id, list_id, state, failure, rows, imported, updated, refused, created_at, finished_at "
        "from imports where id = $1 and ($2::bigint is null or user_id = $2)"
    )
    row = await conn.fetchrow(query, import_id, user_id)
    if row is None:
        raise NotFound("import", import_id)
    if row["state"] == "running":
        # whoever runs it holds the lock; when it is free, the process ended without a word
        await conn.execute(
            "update imports set state = 'failed', failure = 'the process that ran it ended before the import did', finished_at = now() "
            "where id = $1 and state = 'running' and pg_try_advisory_xact_lock($2, $3)",
            import_id,
            _LOCK_RUNNING,
            import_id % 2**31,
        )
        row = await conn.fetchrow(query, import_id, user_id)
        assert row is not None
    return ImportReport(**dict(row), refusals=await _refusals(conn, import_id, 0, REPORTED_REFUSALS))


async def imports_of(conn: PooledConnection, user_id: int | None, list_id: int, before: int | None, limit: int) -> list[ImportReport]:
    """The imports into a list, newest first, without their refusals."""
    rows = await conn.fetch(
        "select id, list_id, state, failure, rows, imported, updated, refused, created_at, finished_at from imports "
        "where list_id = $1 and ($2::bigint is null or user_id = $2) and ($3::bigint is null or id < $3) order by id desc limit $4",
        list_id,
        user_id,
        before,
        limit,
    )
    return [ImportReport(**dict(row)) for row in rows]


async def refusals(pool: Pool, user_id: int | None, import_id: int, after: int, limit: int) -> list[Refusal]:
    """Refused rows behind row `after`, in order. Raises NotFound."""
    async with transaction(pool, readonly=True) as conn:
        if not await conn.fetchval(
            "select exists (select from imports where id = $1 and ($2::bigint is null or user_id = $2))", import_id, user_id
        ):
            raise NotFound("import", import_id)
        return await _refusals(conn, import_id, after, limit)


async def _refusals(conn: PooledConnection, import_id: int, after: int, limit: int) -> list[Refusal]:
    rows = await conn.fetch(
        "select row, field, reason from import_refusals where import_id = $1 and row > $2 order by row limit $3", import_id, after, limit
    )
    return [Refusal(row["row"], row["field"], row["reason"]) for row in rows]
