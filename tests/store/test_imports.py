"""Imports without HTTP, as `sluice import` does them: all or nothing, bounded, and right under competition."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from domain.errors import Invalid, NotFound, Unavailable
from store import imports, lists, users
from store.postgres import Pool, transaction


async def stream(*pieces: bytes) -> AsyncIterator[bytes]:
    """A file in pieces."""
    for piece in pieces:
        yield piece


@pytest.fixture
async def owner(pool: Pool) -> tuple[int, int]:
    """(user, list)"""
    async with transaction(pool) as conn:
        user = await users.create_user(conn, "ada")
        return user.id, (await lists.create(conn, user.id, "news", "", "")).id


async def test_progress_is_told_and_every_row_is_counted(pool: Pool, owner: tuple[int, int]) -> None:
    told: list[tuple[int, int]] = []
    rows = b"email\n" + b"".join(b"u%d@x.example\n" % i for i in range(60_000)) + b"bad\n"
    report = await imports.run_import(pool, *owner, stream(rows), "csv", progress=lambda read, refused: told.append((read, refused)))
    assert (report.rows, report.imported, report.refused) == (60_001, 60_000, 1)
    assert told[-1] == (60_001, 1)
    assert len(told) > 2
    assert told == sorted(told)
    assert await pool.fetchval("select count(*) from pg_class where relname = 'import_rows'") == 0


async def test_a_stream_that_breaks_off_changes_nothing(pool: Pool, owner: tuple[int, int]) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"email,city\n" + b"".join(b"u%d@x.example,y\n" % i for i in range(30_000))
        raise ConnectionResetError

    with pytest.raises(Invalid, match="could not be read to its end"):
        await imports.run_import(pool, *owner, broken(), "csv")
    assert await pool.fetchval("select count(*) from subscribers") == 0
    assert await pool.fetchval("select count(*) from custom_fields") == 0
    row = await pool.fetchrow("select state, failure from imports")
    assert row is not None
    assert (row["state"], row["failure"]) == ("failed", "body: could not be read to its end: ConnectionResetError")


async def test_an_import_that_is_cancelled_gives_its_connection_back(pool: Pool, owner: tuple[int, int]) -> None:
    begun = asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        yield b"email\n" + b"u@x.example\n" * 30_000
        begun.set()
        await asyncio.sleep(60)

    for _ in range(12):  # more than the pool has connections
        begun.clear()
        running = asyncio.create_task(imports.run_import(pool, *owner, silent(), "csv"))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert {row["state"] for row in await pool.fetch("select state from imports")} == {"failed"}
    report = await imports.run_import(pool, *owner, stream(b"email\nu@x.example"), "csv")
    assert report.imported == 1


async def test_imports_into_one_list_at_once_do_not_disturb_each_other(pool: Pool, owner: tuple[int, int]) -> None:
    addresses = [b"u%d@x.example" % i for i in range(5000)]
    reports = await asyncio.gather(
        imports.run_import(pool, *owner, stream(b"email\n", b"\n".join(addresses)), "csv"),
        imports.run_import(pool, *owner, stream(b"email\n", b"\n".join(reversed(addresses))), "csv"),
    )
    assert sorted((report.imported, report.updated) for report in reports) == [(0, 5000), (5000, 0)]


async def test_too_many_at_once_are_turned_away(pool: Pool, owner: tuple[int, int]) -> None:
    gate = asyncio.Event()

    async def waiting() -> AsyncIterator[bytes]:
        await gate.wait()
        yield b"email\nu@x.example"

    running = [asyncio.create_task(imports.run_import(pool, *owner, waiting(), "csv")) for _ in range(imports.MAX_CONCURRENT)]
    await asyncio.sleep(0.05)
    with pytest.raises(Unavailable, match="imports are running"):
        await imports.run_import(pool, *owner, waiting(), "csv")
    gate.set()
    assert sum(report.imported for report in await asyncio.gather(*running)) == 1


async def test_a_list_of_another_user_does_not_exist(pool: Pool, owner: tuple[int, int]) -> None:
    with pytest.raises(NotFound):
        await imports.run_import(pool, owner[0] + 1, owner[1], stream(b"email\n"), "csv")
    with pytest.raises(Invalid, match="header"):
        await imports.run_import(pool, *owner, stream(b"name\n"), "csv")
    assert await pool.fetchval("select count(*) from imports") == 1
