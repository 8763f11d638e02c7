"""A delivery server that cannot be used: its mail goes out through the fallback, composed for it, once each, and home again (row 18)."""

import asyncio
import base64
import json
import socket
from collections import Counter

from store import inbound, status, users
from store.batch_queue import connect
from store.postgres import Pool, transaction
from tests.engine.test_eight_bit import made_again
from tests.engine.test_signed_mail import SECRET
from tests.faults.peers import sentences
from tests.machine import Machine, campaign_state, until
from tests.peers import Peer
from tests.store import seed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def add_fallback(pool: Pool, of: int, port: int, *, mutual: bool = False) -> int:
    """A second delivery server of the same user, which takes over for the one of campaign `of` after a second."""
    first, user = await pool.fetchrow("select s.id, s.user_id from delivery_servers s join campaigns c on s.id = c.delivery_server_id "
                                      "where c.id = $1", of)  # type: ignore[misc]  # fmt: skip
    second = await pool.fetchval(
        "insert into delivery_servers (user_id, name, host, port, security, mfrom, limits, fallback_server_id) "
        "values ($1, 'spare', '127.0.0.1', $2, 'none', 'spare.sender.example', $3::text::jsonb, $4) returning id",
        user, port, json.dumps({"fallback_after_seconds": 1.0}), first if mutual else None,
    )  # fmt: skip
    await pool.execute(
        "update delivery_servers set fallback_server_id = $2, limits = limits || '{\"fallback_after_seconds\": 1.0}', "
        "version = version + 1 where id = $1", first, second,
    )  # fmt: skip
    await pool.execute("update egress_version set version = version + 1")
    return int(second)


async def completed(pool: Pool, campaign: int, machine: Machine, seconds: float = 30.0) -> None:
    async def ended() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(ended, "campaign completed", seconds, machine)


async def servers_of(pool: Pool, campaign: int) -> dict[tuple[str, int], int]:
    """(kind, delivery server) -> records."""
    rows = await pool.fetch(
        "select kind::text as kind, delivery_server_id, count(*) as records from accounting where campaign_id = $1 group by 1, 2", campaign
    )
    return {(row["kind"], row["delivery_server_id"]): row["records"] for row in rows}


async def test_what_waits_for_a_dead_server_goes_out_through_its_fallback_and_later_mail_goes_home_again(
    machine: Machine, pool: Pool
) -> None:
    port = free_port()
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    async with Peer() as spare:
        await machine.engine()
        campaign = await seed.campaign(pool, recipients=1200, port=port)
        first = await pool.fetchval("select id from delivery_servers")
        second = await add_fallback(pool, campaign, spare.port)
        await completed(pool, campaign, machine)
        assert await servers_of(pool, campaign) == {("d", second): 1200}
        assert set(Counter(message.rcpt for message in spare.accepted).values()) == {1}
        assert {message.mail_from.rpartition("@")[2] for message in spare.accepted} == {"spare.sender.example"}, "composed for the fallback"
        for number in (1, 1200):
            made = await made_again(pool, campaign, number)
            [sent] = [message for message in spare.accepted if message.rcpt == made.recipient]
            assert base64.b64decode(made.message) == sent.content, "made again as it was composed for the fallback"

        async def said() -> bool:
            state, sentence = (await sentences(pool, machine.environment["SLUICE_REDIS_URL"])).get("relay", ("", ""))
            return state == "failing" and "go out through spare (1200 so far)" in sentence

        await until(said, "the status says where its mail goes", 5.0, machine)
        async with Peer(port=port) as relay:
            # Small ones, one after the other: each is a reason to look whether the first server works again
            for _ in range(40):
                again = await seed.campaign(pool, recipients=5, port=port, state="draft")
                await pool.execute(
                    "update campaigns set user_id = $2, delivery_server_id = $3, state = 'preparing' where id = $1", again,
                    await pool.fetchval("select user_id from delivery_servers where id = $1", first), first,
                )  # fmt: skip
                await completed(pool, again, machine)
                if relay.accepted:
                    break
                await asyncio.sleep(0.25)
            assert await servers_of(pool, again) in ({("d", first): 5}, {("d", second): 5})
            assert relay.accepted, "nothing came home"
            assert {message.mail_from.rpartition("@")[2] for message in relay.accepted} == {"bounces.sender.example"}


async def test_the_operators_server_stands_in_for_one_that_has_no_fallback_of_its_own(machine: Machine, pool: Pool) -> None:
    machine.environment |= {"SLUICE_SECRETS__KEY": SECRET, "SLUICE_ENGINE__FALLBACK_SERVER": "common"}
    async with Peer() as common, connect(machine.environment["SLUICE_REDIS_URL"], 5.0) as redis:
        await machine.engine()
        campaign = await seed.campaign(pool, recipients=300, port=free_port(), limits={"fallback_after_seconds": 1.0})

        async def missed() -> bool:
            said = (await status.gather(pool, redis)).trouble
            return any("engine.fallback_server: the user admin has no delivery server 'common'" in sentence for sentence in said)

        await until(missed, "the status says that there is no such server", 10.0, machine)
        insert = (
            "insert into delivery_servers (user_id, name, host, port, security, mfrom) "
            "values ($1, 'common', '127.0.0.1', $2, 'none', 'common.example') returning id"
        )
        await pool.fetchval(insert, await pool.fetchval("insert into users (name) values ('stranger') returning id"), free_port())
        async with transaction(pool) as conn:
            spare = await conn.fetchval(insert, await users.admin_id(conn), common.port)
            await conn.execute("update egress_version set version = version + 1")
        await completed(pool, campaign, machine)
        assert await servers_of(pool, campaign) == {("d", spare): 300}, "not through that of another user with the same name"
        assert {message.mail_from.rpartition("@")[2] for message in common.accepted} == {"common.example"}
        made = await made_again(pool, campaign, 1)
        [sent] = [message for message in common.accepted if message.rcpt == made.recipient]
        assert base64.b64decode(made.message) == sent.content
        user = await pool.fetchval("select user_id from campaigns where id = $1", campaign)
        page = await inbound.sent(pool, user, campaign, 1, timeout_seconds=10.0)
        assert page is not None
        assert page.server.id == spare, "the web view is made for the server that was used"


async def test_two_dead_servers_that_stand_in_for_each_other_lose_nobody_and_send_once(machine: Machine, pool: Pool) -> None:
    ports = free_port(), free_port()
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=300, port=ports[0])
    await add_fallback(pool, campaign, ports[1], mutual=True)

    async def failing() -> bool:
        words = await sentences(pool, machine.environment["SLUICE_REDIS_URL"])
        return words.get("relay", ("",))[0] == "failing"

    await until(failing, "the first server fails", 10.0, machine)
    await asyncio.sleep(4.0)
    assert await pool.fetchval("select count(*) from accounting where campaign_id = $1", campaign) == 0
    async with Peer(port=ports[0]) as relay:
        await completed(pool, campaign, machine, 60.0)
        assert Counter(message.rcpt for message in relay.accepted) == Counter(f"p{n}@people.example" for n in range(1, 301))
