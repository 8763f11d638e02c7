"""Redis killed, hung, wiped, rolled back and refusing under load: nothing lost, no duplicate, held batches are sent on (rows 7-11)."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from bench.chaos.servers import Valkey
from store.postgres import Pool
from tests import machine as machines
from tests.faults import load
from tests.machine import Machine


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory, short_temporary_directory: Path) -> Iterator[Valkey]:
    """A Valkey of our own to break."""
    directory = short_temporary_directory / "redis-faults"
    (directory / "log").mkdir(parents=True)
    directory.chmod(0o711)
    server = Valkey(directory)
    yield server
    if server.process is not None and server.running:
        server.process.send_signal(signal.SIGCONT)
        server.process.kill()
        server.process.wait()


@pytest.fixture
async def client(valkey: Valkey) -> AsyncIterator[Redis]:
    """It runs, and is empty."""
    if not valkey.running:
        await valkey.start()
    made = Redis.from_url(f"unix://{valkey.socket}", socket_timeout=5)
    await made.flushall()
    yield made
    await made.aclose()


@pytest.fixture
async def machine(tmp_path: Path, pool: Pool, client: Redis, valkey: Valkey, fresh_database_url: str) -> AsyncIterator[Machine]:
    """Nothing runs on it yet."""
    async with machines.machine(tmp_path, fresh_database_url, f"unix://{valkey.socket}?db=0") as made:
        yield made


async def test_redis_is_killed_and_comes_back(machine: Machine, pool: Pool, valkey: Valkey) -> None:
    campaign = await load.start(machine, pool, recipients=5000, rate=800)
    await machine.engine(0, **load.SMALL_BATCHES)
    await machine.engine(1, **load.SMALL_BATCHES)
    await campaign.begun(1500)
    await valkey.end(signal.SIGKILL)
    await campaign.goes_on(messages=100)  # from what is held
    await asyncio.sleep(1.0)
    await valkey.start()
    await campaign.reconcile()


async def test_redis_loses_everything(machine: Machine, pool: Pool, client: Redis) -> None:
    campaign = await load.start(machine, pool, recipients=5000)
    await machine.engine(0, **load.SMALL_BATCHES)
    for messages in (1000, 2000, 3000):
        await campaign.begun(messages)
        await client.flushall()
    await campaign.reconcile()


async def test_redis_comes_back_as_it_was_two_seconds_ago(machine: Machine, pool: Pool, valkey: Valkey, tmp_path: Path) -> None:
    campaign = await load.start(machine, pool, recipients=5000)
    await machine.engine(0, **load.SMALL_BATCHES)
    await campaign.begun(1500)
    valkey.copy_data(tmp_path / "before")
    await asyncio.sleep(2.0)
    await valkey.end(signal.SIGKILL)
    valkey.replace_data(tmp_path / "before")
    await valkey.start()
    await campaign.reconcile()


@pytest.mark.slow
async def test_redis_hangs(machine: Machine, pool: Pool, valkey: Valkey) -> None:
    campaign = await load.start(machine, pool, recipients=5000, rate=1000)
    await machine.engine(0, SLUICE_REDIS__TIMEOUT_SECONDS="1", **load.SMALL_BATCHES)
    await campaign.begun(1500)
    valkey.send(signal.SIGSTOP)
    try:
        await campaign.goes_on(messages=100)
        await asyncio.sleep(3.0)
    finally:
        valkey.send(signal.SIGCONT)
    await campaign.reconcile()


@pytest.mark.parametrize("refusal", ["memory", *(pytest.param(other, marks=pytest.mark.slow) for other in ("read-only", "password"))])
async def test_redis_refuses(machine: Machine, pool: Pool, client: Redis, refusal: str) -> None:
    campaign = await load.start(machine, pool, recipients=5000)
    engine = await machine.engine(0, **load.SMALL_BATCHES)
    await campaign.begun(1500)
    begin = {"memory": ("CONFIG SET maxmemory 1",), "read-only": ("REPLICAOF 127.0.0.1 1",), "password": ("CONFIG SET requirepass x",)}
    end = {"memory": ("CONFIG SET maxmemory 0",), "read-only": ("REPLICAOF NO ONE",), "password": ("CONFIG SET requirepass ''",)}
    for command in begin[refusal]:
        await client.execute_command(*command.replace("''", "").split(" "))
    if refusal == "password":
        await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await asyncio.sleep(3.0)
    assert engine.process.returncode is None, machine.words()
    assert engine.log.read_text().count("\n") < 60, "a log line for every try"
    for command in end[refusal]:
        await client.execute_command(*command.replace("''", "").split(" "))
    await campaign.reconcile()


async def test_values_of_others_under_our_keys_are_dropped(machine: Machine, pool: Pool, client: Redis) -> None:
    campaign = await load.start(machine, pool, recipients=3000)
    server = await pool.fetchval("select id from delivery_servers")
    await client.set(f"sluice:{{{server}}}:queue:marketing", "not a list")
    await client.lpush(f"sluice:{{{server}}}:queue:transactional", b"not a batch")
    await machine.engine(0, **load.SMALL_BATCHES)
    await campaign.reconcile()
