"""P12 and row 33: changes of delivery servers through the API reach engines at once and whole, or not at all; a right password heals."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest
from redis.asyncio import Redis

from config.keys import Keyring
from config.settings import Settings
from control.app import create_app
from store import users
from store.postgres import Pool, transaction
from tests.control.conftest import Client
from tests.faults.peers import end_of, sentences, taken, verdict
from tests.machine import Machine, until
from tests.peers import Peer
from tests.store import seed

MASTER_KEY = bytes(range(32))
SECONDS = 5.0  # for what takes less than one on a machine that does nothing else

Operator = Callable[[int], Awaitable[tuple[Client, str]]]


@pytest.fixture
async def operator(pool: Pool, redis: Redis) -> AsyncIterator[Operator]:
    """Gives the API client of a campaign's user, and the path of the campaign's delivery server."""
    transport = httpx.ASGITransport(app=create_app(pool, redis, Keyring(MASTER_KEY), Settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://sluice.example", timeout=30) as http:

        async def make(campaign: int) -> tuple[Client, str]:
            row = await pool.fetchrow("select user_id, delivery_server_id from campaigns where id = $1", campaign)
            assert row is not None
            async with transaction(pool) as conn:
                _, key = await users.create_key(conn, row["user_id"], "test", "user")
            return Client(http, row["user_id"], key), f"/delivery-servers/{row['delivery_server_id']}"

        yield make


async def test_a_change_reaches_running_engines_at_once_and_a_bad_one_is_refused_whole(
    machine: Machine, pool: Pool, operator: Operator
) -> None:
    await machine.engine(0, SLUICE_SECRETS__KEY=MASTER_KEY.hex())
    async with Peer() as first, Peer() as second:
        campaign = await seed.campaign(pool, recipients=2000, port=first.port, limits={"max_messages_per_second": 50.0})
        client, server = await operator(campaign)

        async def grows(peer: Peer) -> None:
            before = len(peer.accepted)

            async def grown() -> bool:
                return len(peer.accepted) >= before + 10

            await until(grown, "messages arrive", 20.0, machine)

        await grows(first)
        await client.refused(422, "PATCH", server, json={"port": second.port, "limits": {"bdat_window": 0}})
        await asyncio.sleep(1.0)
        await grows(first)
        assert second.accepted == [], "nothing of a refused change is applied"

        changed_at = time.monotonic()
        await client.ok("PATCH", server, json={"port": second.port})
        await grows(second)
        assert time.monotonic() - changed_at < SECONDS
        before = len(first.accepted)
        await grows(second)
        assert len(first.accepted) == before

        # What no API lets in: a row that cannot be read. The old configuration goes on, and it is said
        kept = await pool.fetchval("update delivery_servers set limits = '{\"max_connections\": \"many\"}', version = version + 1 "
                                   "returning (select s.limits::text from delivery_servers s)")  # fmt: skip
        await pool.execute("update egress_version set version = version + 1")

        async def said() -> bool:
            return "limits cannot be read" in machine.processes[0].log.read_text()

        await until(said, "the bad row is said", 10.0, machine)
        await grows(second)
        await pool.execute("update delivery_servers set limits = $1::text::jsonb, version = version + 1", kept)
        await pool.execute("update egress_version set version = version + 1")

        await client.ok("PATCH", server, json={"enabled": False})

        async def switched_off() -> bool:
            state, _ = (await sentences(pool, machine.environment["SLUICE_REDIS_URL"])).get("relay", ("", ""))
            return state == "disabled" and second.open == 0

        await until(switched_off, "the server is switched off and its connections are closed", 10.0, machine)
        before = len(second.accepted)
        await asyncio.sleep(1.0)
        assert len(second.accepted) == before
        await client.ok("PATCH", server, json={"enabled": True, "limits": {"max_messages_per_second": 0}})
        await end_of(pool, [campaign], 30.0)
        found = await verdict(pool, campaign, taken(first) + taken(second))
        found.must_hold()
        assert Counter(found.kinds.values()) == {"d": 2000}
        assert set(found.copies.values()) == {1}, "nobody lost, nobody doubled"


async def refused_password(machine: Machine, pool: Pool, peer: Peer, operator: Operator) -> tuple[int, Client, str]:
    """A campaign that waits because its delivery server refuses the password."""
    await machine.engine(0, SLUICE_SECRETS__KEY=MASTER_KEY.hex())
    campaign = await seed.campaign(pool, recipients=20, port=peer.port, state="draft")
    client, server = await operator(campaign)
    await client.ok("PATCH", server, json={"username": "user", "password": "first one"})
    await pool.execute("update campaigns set state = 'preparing'")

    async def suspended() -> bool:
        state, sentence = (await sentences(pool, machine.environment["SLUICE_REDIS_URL"])).get("relay", ("", ""))
        return state == "suspended" and "refused the user name or password of 'user'" in sentence and "recipients wait" in sentence

    await until(suspended, "the alarm", 20.0, machine)
    assert await pool.fetchval("select count(*) from accounting") == 0
    assert tries(peer) == 1
    return campaign, client, server


def tries(peer: Peer) -> int:
    return sum(line.startswith("AUTH") for line in peer.commands)


async def all_delivered(pool: Pool, campaign: int, peer: Peer, seconds: float) -> None:
    await end_of(pool, [campaign], seconds)
    found = await verdict(pool, campaign, taken(peer))
    found.must_hold()
    assert Counter(found.kinds.values()) == {"d": 20}
    assert await pool.fetchval("select max(attempt) from accounting") == 1


async def test_a_password_that_an_operator_puts_right_is_used_at_once(machine: Machine, pool: Pool, operator: Operator) -> None:
    async with Peer(("PIPELINING", "AUTH PLAIN"), password="second one") as peer:
        campaign, client, server = await refused_password(machine, pool, peer, operator)
        await client.ok("PATCH", server, json={"password": "second one"})
        await all_delivered(pool, campaign, peer, 20.0)


@pytest.mark.slow
async def test_a_password_that_becomes_right_again_is_found_so_with_one_try_a_minute(
    machine: Machine, pool: Pool, operator: Operator
) -> None:
    async with Peer(("PIPELINING", "AUTH PLAIN"), password="second one") as peer:
        campaign, _, _ = await refused_password(machine, pool, peer, operator)
        began = time.monotonic()
        await asyncio.sleep(50.0)
        assert tries(peer) == 1
        peer.password = "first one"
        await all_delivered(pool, campaign, peer, 60.0)
        assert time.monotonic() - began >= 55.0
        assert peer.commands.count("EHLO " + peer.commands[0].partition(" ")[2]) <= 3
