"""PostgreSQL stopped, cut off, exhausted and locked under load: held batches are sent until their leases run out, outcomes are in the
journal, everything catches up, no duplicate (rows 13 and 14)."""

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from bench.chaos.servers import Postgres
from store import migrate, postgres
from store.postgres import Pool
from tests import machine as machines
from tests.faults import load
from tests.machine import Machine, until

CRASH_SAFE_IS_ENOUGH = {"fsync": "off", "full_page_writes": "off", "max_connections": "40"}  # nobody pulls the plug here


@pytest.fixture(scope="module")
def server(short_temporary_directory: Path) -> Iterator[Postgres]:
    """A PostgreSQL of our own to break."""
    directory = short_temporary_directory / "postgresql-faults"
    (directory / "log").mkdir(parents=True)
    directory.chmod(0o711)
    made = Postgres(directory, more=CRASH_SAFE_IS_ENOUGH)
    yield made
    if made.process is not None and made.running:
        made.process.send_signal(signal.SIGQUIT)
        made.process.wait()


@pytest.fixture
async def pool(server: Postgres) -> AsyncIterator[Pool]:
    """It runs, with a database for this test."""
    if not server.running:
        await server.initialise()
        await server.start()
    name = f"fault_{secrets.token_hex(4)}"
    conn = await asyncpg.connect(server.url("postgres"))
    await conn.execute(f"create database {name}")
    await conn.close()
    await migrate.apply(server.url(name))
    opened = await postgres.open_pool(server.url(name), 4)
    yield opened
    opened.terminate()


@pytest.fixture
async def url(pool: Pool, server: Postgres) -> str:
    """Where that database is."""
    return server.url(await pool.fetchval("select current_database()"))


@pytest.fixture
async def machine(tmp_path: Path, url: str, redis: Redis, redis_url: str) -> AsyncIterator[Machine]:
    """Nothing runs on it yet."""
    async with machines.machine(tmp_path, url, redis_url) as made:
        yield made


@contextlib.asynccontextmanager
async def fresh(url: str) -> AsyncIterator[Pool]:
    """A pool that has seen nothing of what happened."""
    opened = await postgres.open_pool(url, 2)
    try:
        yield opened
    finally:
        opened.terminate()


@pytest.mark.parametrize(
    "seconds", [pytest.param(1.5, marks=pytest.mark.slow), 8.0], ids=["shorter than the leases", "longer than the leases"]
)
async def test_postgresql_stops_at_once_and_comes_back(machine: Machine, pool: Pool, server: Postgres, url: str, seconds: float) -> None:
    campaign = await load.start(machine, pool, recipients=6000, rate=1000)
    # Long enough to send on for a while after the stop, also on a slow machine, and to end before PostgreSQL is back
    leases = {**load.SHORT_LEASES, "SLUICE_ENGINE__LEASE_SECONDS": "7"}
    engines = [await machine.engine(0, **leases), await machine.engine(1, **leases)]
    await campaign.begun(1000)
    await server.end(signal.SIGQUIT)  # immediate: no commit that is on its way is answered
    await campaign.goes_on(messages=200)
    await asyncio.sleep(seconds)
    await server.start()
    async with fresh(url) as campaign.pool:
        await campaign.reconcile()
        assert await campaign.pool.fetchval("select count(*) from batches where owner is not null") == 0
    for engine in engines:
        assert engine.process.returncode is None, machine.words()
        assert engine.log.read_text().count("\n") < 150, "a log line for every try"


async def test_every_connection_is_ended_again_and_again(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool)
    await machine.engine(0, **load.SMALL_BATCHES)
    await machine.engine(1, **load.SMALL_BATCHES)
    for step in range(12):
        await campaign.begun(500 + 400 * step)
        await pool.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )
    await campaign.reconcile()


@pytest.mark.slow
async def test_what_waits_for_postgresql_is_named(machine: Machine, pool: Pool, server: Postgres, redis: Redis, url: str) -> None:
    campaign = await load.start(machine, pool, recipients=40_000, rate=1000)
    await machine.engine(0)
    await campaign.begun(1000)
    await server.end(signal.SIGQUIT)

    async def named() -> bool:
        said = " ".join(sentence for beat in await campaign.heartbeats(redis) for sentence in beat["trouble"])
        return all(
            words in said for words in ("cannot lease batches", "feeder: PostgreSQL", "outcomes are safe in the journal", "bytes behind")
        )

    await until(named, "the heartbeat says what waits", 40.0, Machine(machine.directory, "", ""))
    await server.start()
    async with fresh(url) as campaign.pool:
        await campaign.reconcile(seconds=90.0)


@pytest.mark.slow
async def test_a_table_is_locked_until_after_the_leases_have_ended(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool, recipients=5000, rate=1000)
    await machine.engine(0, **load.SHORT_LEASES)
    await machine.engine(1, **load.SHORT_LEASES)
    await campaign.begun(1000)
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("lock table batches in access exclusive mode")
        await asyncio.sleep(7.0)
    await campaign.reconcile()


@pytest.mark.slow
async def test_postgresql_hangs_until_after_the_leases_have_ended(machine: Machine, pool: Pool, server: Postgres) -> None:
    campaign = await load.start(machine, pool, recipients=5000, rate=1000)
    await machine.engine(0, **load.SHORT_LEASES)
    await machine.engine(1, **load.SHORT_LEASES)
    await campaign.begun(1000)
    stopped = server.processes()
    for pid in stopped:
        _send(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(7.0)
    finally:
        for pid in stopped:
            _send(pid, signal.SIGCONT)
    await campaign.reconcile()


@pytest.mark.slow
async def test_all_connections_are_taken_by_others(machine: Machine, pool: Pool, url: str) -> None:
    campaign = await load.start(machine, pool, recipients=5000, rate=1000)
    engine = await machine.engine(0, **load.SMALL_BATCHES)
    await campaign.begun(1000)
    taken: list[asyncpg.Connection[asyncpg.Record]] = []
    with contextlib.suppress(asyncpg.PostgresError):
        while True:
            taken.append(await asyncpg.connect(url))
    await pool.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'sluice' and pid <> pg_backend_pid() "
        "and backend_start < now() - interval '1 s'"
    )
    with contextlib.suppress(asyncpg.PostgresError, OSError):
        while True:
            taken.append(await asyncpg.connect(url))
    await asyncio.sleep(3.0)
    assert engine.process.returncode is None, machine.words()
    for conn in taken:
        conn.terminate()
    await campaign.reconcile()


async def test_an_engine_that_is_started_while_both_stores_are_away_begins_when_they_are_back(
    machine: Machine, pool: Pool, server: Postgres, url: str
) -> None:
    campaign = await load.start(machine, pool, recipients=500)
    await server.end(signal.SIGINT)
    starting = asyncio.create_task(machine.engine(0))
    log = machine.directory / "engine0.log"
    async with asyncio.timeout(60):
        while not (log.exists() and "waiting: PostgreSQL" in log.read_text()):
            await asyncio.sleep(0.05)
    assert not starting.done()
    await server.start()
    await starting
    async with fresh(url) as campaign.pool:
        await campaign.reconcile()


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
