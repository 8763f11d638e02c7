"""Migrations: applied once however many ask, whole or not at all, never over a newer schema."""

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from domain.errors import ConfigurationError, Unavailable
from store import feed, migrate, postgres

FIRST = (
    "-- one\n-- depends:\n\n-- migrate: apply\ncreate table a (n int); -- has; a semicolon\ninsert into a values (1);\n\n"
    "-- migrate: rollback\n"
)
SECOND = "-- two\n-- depends: 0001_one\n\n-- migrate: apply\ninsert into a values (2);\n\n-- migrate: rollback\n"


def directory_with(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / f"{name.replace('n', '', 1)}.sql").write_text(text)
    return path


async def test_an_empty_database_gets_the_whole_schema_and_the_second_call_does_nothing(empty_database_url):
    assert await migrate.apply(empty_database_url) == sorted(path.stem for path in migrate.SCHEMA_DIRECTORY.glob("*.sql"))
    assert await migrate.apply(empty_database_url) == []
    connection = await postgres.connect(empty_database_url)
    tables = {row[0] for row in await connection.fetch("select tablename from pg_tables where schemaname = 'public'")}
    await connection.close()
    created = re.findall(r"^create table (\w+)", (migrate.SCHEMA_DIRECTORY / "0001_first.sql").read_text(), re.MULTILINE)
    assert len(created) > 15
    assert set(created) <= tables


async def test_four_callers_at_once_apply_it_once(empty_database_url):
    results = await asyncio.gather(*(migrate.apply(empty_database_url) for _ in range(4)))
    assert sorted(map(len, results)) == [0, 0, 0, len(list(migrate.SCHEMA_DIRECTORY.glob("*.sql")))]


async def test_later_files_are_applied_on_top_in_order(empty_database_url, tmp_path):
    directory = directory_with(tmp_path, n0001_one=FIRST)
    assert await migrate.apply(empty_database_url, directory=directory) == ["0001_one"]
    directory_with(tmp_path, n0002_two=SECOND)
    assert await migrate.apply(empty_database_url, directory=directory) == ["0002_two"]
    connection = await postgres.connect(empty_database_url)
    assert [row["n"] for row in await connection.fetch("select n from a order by n")] == [1, 2]
    await connection.close()


async def test_a_file_that_fails_leaves_nothing_and_can_be_repeated(empty_database_url, tmp_path):
    directory = directory_with(tmp_path, n0001_one=FIRST.replace("values (1)", "values ('x')"))
    with pytest.raises(Exception, match="0001_one"):
        await migrate.apply(empty_database_url, directory=directory)
    connection = await postgres.connect(empty_database_url)
    assert await connection.fetchval("select to_regclass('a')") is None
    await connection.close()
    directory_with(tmp_path, n0001_one=FIRST)
    assert await migrate.apply(empty_database_url, directory=directory) == ["0001_one"]


async def test_campaigns_of_an_older_version_keep_their_rows_and_their_neighbours_find_room(empty_database_url, tmp_path):
    before = {path.stem: path for path in migrate.SCHEMA_DIRECTORY.glob("*.sql") if path.stem < "0022"}
    for name, path in before.items():
        (tmp_path / f"{name}.sql").write_bytes(path.read_bytes())
    await migrate.apply(empty_database_url, directory=tmp_path)
    connection = await postgres.connect(empty_database_url)
    old = (3, 7, 49, 120, 121)
    for campaign in old:
        for table in ("recipients", "batches", "retries", "accounting"):
            await connection.execute(f"create table {table}_c{campaign} partition of {table} for values in ({campaign})")
        await connection.execute("insert into recipients values ($1, 1, 5, 'a@people.example', '{}')", campaign)
    await migrate.apply(empty_database_url)
    drafts = (1, 5, 8, 48, 50, 99, 100, 119, 122, 149, 150)
    for campaign in drafts:
        async with connection.transaction():
            await feed.make_room(connection, campaign)
        await connection.execute("insert into recipients values ($1, 1, 5, 'b@people.example', '{}')", campaign)
    rows = await connection.fetch("select campaign_id, tableoid::regclass::text as name from recipients order by 1")
    assert [row["campaign_id"] for row in rows] == sorted(old + drafts)
    assert {row["name"] for row in rows} == {
        "recipients_below_50", "recipients_c7", "recipients_c49", "recipients_below_100", "recipients_below_150", "recipients_c121",
        "recipients_below_200",
    }  # fmt: skip
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute("insert into recipients values (7, 1, 5, 'twice@people.example', '{}')")
    await connection.close()


async def test_the_schema_of_a_newer_version_is_refused(empty_database_url, tmp_path):
    directory = directory_with(tmp_path, n0001_one=FIRST, n0002_two=SECOND)
    await migrate.apply(empty_database_url, directory=directory)
    (directory / "0002_two.sql").unlink()
    with pytest.raises(ConfigurationError, match=r"newer Sluice \(0002_two\); upgrade"):
        await migrate.apply(empty_database_url, directory=directory)


async def test_the_lock_is_free_again_after_a_failure(empty_database_url, tmp_path):
    with pytest.raises(Exception, match="0001_one"):
        await migrate.apply(empty_database_url, directory=directory_with(tmp_path, n0001_one="no header"))
    connection = await postgres.connect(empty_database_url)
    assert await connection.fetchval("select pg_try_advisory_lock($1)", migrate.LOCK_KEY) is True
    await connection.close()


def test_every_file_names_the_one_before_it():
    names = sorted(path.stem for path in migrate.SCHEMA_DIRECTORY.glob("*.sql"))
    for before, name in zip([None, *names], names, strict=False):
        header = (migrate.SCHEMA_DIRECTORY / f"{name}.sql").read_text().split("-- migrate: apply")[0]
        assert f"-- depends: {before or ''}".strip() in [line.strip() for line in header.splitlines()]


async def test_a_server_that_does_not_answer_is_unavailable_with_a_next_step_and_without_the_password():
    with pytest.raises(Unavailable) as caught:
        await postgres.open_pool("postgresql://u:hunter2@127.0.0.1:1/x", 2)
    assert "127.0.0.1:1/x is not available" in str(caught.value)
    assert "check that the server runs" in str(caught.value)
    assert "hunter2" not in str(caught.value)


async def test_a_missing_database_is_named(empty_database_url):
    url = re.sub(r"sluice_empty_\w+", "sluice_nothing_here", empty_database_url)
    with pytest.raises(Unavailable, match="create the database"):
        await postgres.connect(url)


async def test_a_transaction_is_rolled_back_when_its_block_raises(pool):
    with pytest.raises(RuntimeError):
        async with postgres.transaction(pool) as connection:
            await connection.execute("insert into users (name) values ('x')")
            raise RuntimeError
    async with postgres.transaction(pool, readonly=True) as connection:
        assert await connection.fetchval("select count(*) from users") == 0
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("insert into users (name) values ('x')")


async def test_a_link_that_breaks_in_a_transaction_is_unavailable(pool):
    with pytest.raises(Unavailable, match="not confirmed"):
        async with postgres.transaction(pool) as connection:
            other = await pool.acquire()
            await other.execute("select pg_terminate_backend($1)", await connection.fetchval("select pg_backend_pid()"))
            await pool.release(other)
            await connection.fetchval("select 1")
    async with postgres.connection(pool) as connection:
        assert await connection.fetchval("select 1") == 1
