"""A delivery server that cannot be used: a state and a sentence an operator can act on; recipients wait, nothing is lost."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from config import keys, load
from store import batch_queue, status
from store.postgres import Pool
from tests.machine import Machine, campaign_state, until
from tests.store import seed


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    """A server that takes connections and never says a word."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def trouble(machine: Machine, pool: Pool, state: str) -> str:
    """Wait until the status shows `state` for the one delivery server; returns its sentence."""
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)

    async def shown() -> str:
        found = await status.gather(pool, client)
        return next((server.sentence for server in found.delivery_servers if server.state == state), "")

    try:
        return str(await until(shown, f"delivery server {state}", 30.0, machine))
    finally:
        await client.aclose()


async def nobody_lost(pool: Pool, campaign: int, recipients: int) -> None:
    assert await campaign_state(pool, campaign) == "running"
    assert await pool.fetchval("select count(*) from accounting where campaign_id = $1", campaign) == 0
    waiting = await pool.fetchval("select sum(length(done) - bit_count(done)) from batches where campaign_id = $1", campaign)
    assert waiting == recipients


async def test_a_refused_connection_is_said_and_tried_again(machine: Machine, pool: Pool) -> None:
    port = closed_port()
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=10, port=port)
    sentence = await trouble(machine, pool, "failing")
    assert "refused" in sentence
    assert str(port) in sentence
    await nobody_lost(pool, campaign, 10)
    await machine.sink("--port", str(port))

    async def completed() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(completed, "campaign completed once the server was back", 60.0, machine)


async def test_an_unknown_host_is_named(machine: Machine, pool: Pool) -> None:
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=10, host="no-such-host.invalid")
    assert "no-such-host.invalid" in await trouble(machine, pool, "suspended")
    await nobody_lost(pool, campaign, 10)


async def test_a_server_that_hangs_before_its_banner_is_given_up_on_in_time(machine: Machine, pool: Pool, silent_port: int) -> None:
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=10, port=silent_port, state="draft")
    await pool.execute("update delivery_servers set connect_timeout_seconds = 1, version = version + 1")
    await pool.execute("update egress_version set version = version + 1")
    await pool.execute("update campaigns set state = 'preparing'")
    sentence = await trouble(machine, pool, "failing")
    assert "1" in sentence
    await nobody_lost(pool, campaign, 10)


async def test_tls_that_is_required_and_not_offered_suspends_the_server(machine: Machine, pool: Pool) -> None:
    await machine.sink("--no-starttls")
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=10, port=machine.sink_port)
    await pool.execute("update delivery_servers set security = 'starttls', version = version + 1")
    await pool.execute("update egress_version set version = version + 1")
    assert "STARTTLS" in await trouble(machine, pool, "suspended")
    await nobody_lost(pool, campaign, 10)


async def test_a_wrong_password_suspends_the_server_and_is_never_shown(machine: Machine, pool: Pool, tmp_path: Path) -> None:
    await machine.sink("--user", "ada:right")
    settings = load.load(None, machine.environment)
    keyring = keys.load_keyring(settings)
    campaign = await seed.campaign(pool, recipients=10, port=machine.sink_port)
    server = await pool.fetchval("select id from delivery_servers")
    await pool.execute(
        "update delivery_servers set username = 'ada', password_sealed = $1",
        keyring.seal(b"planted-secret", b"delivery_servers:%d" % server),
    )
    await machine.engine()
    sentence = await trouble(machine, pool, "suspended")
    assert "password" in sentence
    assert "planted-secret" not in sentence + machine.words()
    await nobody_lost(pool, campaign, 10)


async def test_a_sink_that_hangs_after_the_content_is_uncertain_and_tried_again(machine: Machine, pool: Pool) -> None:
    limits = {"final_dot_timeout_seconds": 2.0, "command_timeout_seconds": 2.0, "retry_schedule_seconds": [0.3], "max_age_seconds": 2.0}
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=3, port=machine.sink_port, limits=limits, state="draft")
    await pool.execute("update subscribers set email = 'hang-dot+' || id || '@people.example' where id % 3 = 0")
    await pool.execute("update campaigns set state = 'preparing'")

    async def completed() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(completed, "campaign completed", 60.0, machine)
    rows = await pool.fetch("select kind, count(*) as records from accounting where campaign_id = $1 group by 1", campaign)
    records = {row["kind"].decode() if isinstance(row["kind"], bytes) else row["kind"]: row["records"] for row in rows}
    assert records["d"] == 2
    assert records["u"] >= 1
    assert records["x"] == 1
