"""Forwarding end to end: what people write to our domains is kept and sent on in one step, and never in a circle."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from domain.forwarding import MARKER, read_rewritten
from inbound.forwarding import Forwarder
from inbound.policy import today
from store import forwarding, postgres
from store.forwarding import Forwarding
from store.postgres import Pool
from tests.inbound.conftest import World
from tests.inbound.peer import Server, serving, stored
from tests.machine import Machine, machine

MAIL = b"From: Ada <ada@reader.example>\r\nTo: News <reply@bounce.mailer.example>\r\nSubject: Re: News\r\n\r\nHello there\r\n"
RULES = "reply@bounce.mailer.example:support@ours.example\n*@relay.example:rest@ours.example\n"


@pytest.fixture
async def sinks(tmp_path: Path, fresh_database_url: str, redis_url: str) -> AsyncIterator[Machine]:
    async with machine(tmp_path, fresh_database_url, redis_url) as made:
        yield made


@pytest.fixture
async def server(pool: Pool, world: World) -> AsyncIterator[Server]:
    async with serving(pool, world) as made:
        yield made


async def set_rules(pool: Pool, server: Server, aliases: str = RULES, **others: Any) -> None:
    async with postgres.transaction(pool) as conn:
        await forwarding.put(conn, Forwarding(aliases=aliases, **others))
    await server.policy.refresh()


async def deliver(server: Server, recipient: str, mail: bytes = MAIL, sender: str = "ada@reader.example") -> str:
    client = await server.greeted()
    await client.say(f"MAIL FROM:<{sender}>")
    reply = await client.say(f"RCPT TO:<{recipient}>")
    if not reply.startswith("250"):
        return reply
    await client.say("DATA")
    return await client.say(mail + b".")


async def queue(pool: Pool) -> list[tuple[str, str]]:
    return [(row["target"], row["state"]) for row in await pool.fetch("select target, state from forwards order by id")]


async def arrived(sinks: Machine, count: int) -> list[dict[str, Any]]:
    """The sink's mail, newest first, when there is so much."""
    async with asyncio.timeout(20):
        while True:
            found: list[dict[str, Any]] = (await sinks.sink_json("/api/v1/messages"))["messages"]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.05)


async def test_a_reply_is_kept_and_sent_on_under_a_sender_of_ours(pool: Pool, world: World, server: Server, sinks: Machine) -> None:
    await sinks.sink()
    await pool.execute("update delivery_servers set port = $1", sinks.sink_port)
    await set_rules(pool, server)
    assert (await deliver(server, "Reply@bounce.mailer.example")).startswith("250")
    assert await queue(pool) == [("support@ours.example", "waiting")]
    forwarder = Forwarder(pool, server.policy, world.keyring, "mx.mailer.example")
    assert await forwarder.work()
    assert not await forwarder.work()
    assert await queue(pool) == [("support@ours.example", "sent")]
    [message] = await arrived(sinks, 1)
    sender = message["mail_from"]
    assert sender.startswith("SRS0=")
    assert sender.endswith("@bounce.mailer.example")
    assert read_rewritten(server.policy.srs_key, sender, today()) == "ada@reader.example"
    assert message["recipients"] == ["support@ours.example"]
    source = await sinks.sink_bytes(f"/api/v1/messages/{message['id']}/source")
    assert source.endswith(MAIL)
    assert source.startswith(b"Received: by mx.mailer.example (Sluice) id ")
    assert f"\r\n{MARKER}: {world.keyring.fingerprint}\r\n".encode() in source

    # The same mail comes back, as it was sent on: it stays here
    assert (await deliver(server, "reply@bounce.mailer.example", source)).startswith("250")
    # A bounce of it ends here, too, and one that nobody was told about is refused
    assert (await deliver(server, sender, sender="")).startswith("250")
    assert (await deliver(server, sender.replace("ada@", "eve@").replace("=ada", "=eve"), sender="")).startswith("550 5.1.1")
    assert len(await stored(pool)) == 3
    assert len(await queue(pool)) == 1


async def test_who_gets_what(pool: Pool, world: World, server: Server) -> None:
    assert (await deliver(server, "root@bounce.mailer.example")).startswith("550 5.1.1")
    assert (await deliver(server, "anyone@relay.example")).startswith("550 5.1.1")
    await set_rules(pool, server, forward_to="admin@ours.example", abuse_to="trust@ours.example")
    report = b"Auto-Submitted: auto-generated\r\n" + MAIL
    for recipient, sender in (
        ("abuse@bounce.mailer.example", ""),  # reports are automatic mail, and meant for somebody
        ("postmaster@relay.example", "ada@reader.example"),
        ("root@relay.example", "ada@reader.example"),
        ("anyone@relay.example", "ada@reader.example"),
    ):
        assert (await deliver(server, recipient, report if not sender else MAIL, sender)).startswith("250"), recipient
    assert [target for target, _ in await queue(pool)] == [
        "trust@ours.example", "admin@ours.example", "admin@ours.example", "rest@ours.example",
    ]  # fmt: skip
    # to two addresses that one person reads: once
    client = await server.greeted()
    client.send(b"MAIL FROM:<ada@reader.example>\r\nRCPT TO:<root@relay.example>\r\nRCPT TO:<postmaster@relay.example>\r\nDATA\r\n")
    for _ in range(4):
        await client.reply()
    assert (await client.say(MAIL + b".")).startswith("250")
    assert len(await queue(pool)) == 5
    # what the rules do not name, and what only looks like ours
    assert (await deliver(server, "other@bounce.mailer.example")).startswith("550 5.1.1")
    assert (await deliver(server, world.return_path(days_ago=90, domain="relay.example"))).startswith("550 5.1.1")
    # a return path is nobody's mail
    assert (await deliver(server, world.return_path(), sender="")).startswith("250")
    assert len(await queue(pool)) == 5


async def test_automatic_mail_and_loops_stay_here(pool: Pool, world: World, server: Server) -> None:
    await set_rules(pool, server)
    for mail, sender in (
        (b"Auto-Submitted: auto-replied\r\n" + MAIL, "ada@reader.example"),
        (b"Precedence: bulk\r\n" + MAIL, "ada@reader.example"),
        (b"List-Id: <x.example>\r\n" + MAIL, "ada@reader.example"),
        (b"Disposition-Notification-To: <ada@reader.example>\r\nAuto-Submitted: auto-generated\r\n" + MAIL, "ada@reader.example"),
        (b"Received: from a by b\r\n" * 40 + MAIL, "ada@reader.example"),
        (MAIL, ""),
    ):
        assert (await deliver(server, "reply@bounce.mailer.example", mail, sender)).startswith("250")
    assert len(await stored(pool)) == 6
    assert await queue(pool) == []
    looped = b"Received: from a by b\r\n" * 120 + MAIL
    assert (await deliver(server, "reply@bounce.mailer.example", looped)).startswith("554 5.4.6")


async def test_what_is_refused_for_good_is_given_up_and_the_rest_is_tried_again(
    pool: Pool, world: World, server: Server, sinks: Machine
) -> None:
    await set_rules(pool, server)
    forwarder = Forwarder(pool, server.policy, world.keyring, "mx.mailer.example")
    assert (await deliver(server, "reply@bounce.mailer.example")).startswith("250")
    await pool.execute("update delivery_servers set port = 1")
    await forwarder.work()
    [row] = await pool.fetch("select state, attempts, reply, due_at > now() + interval '50 seconds' as later from forwards")
    assert (row["state"], row["attempts"], row["later"]) == ("waiting", 1, True)
    assert "127.0.0.1:1" in row["reply"]
    assert not await forwarder.work()  # not due
    script = sinks.directory / "script.toml"
    script.write_text('[[rule]]\nrecipient = "support@*"\nreply = "550 5.1.1 Nobody here"\n')
    await sinks.sink("--script", str(script))
    await pool.execute("update delivery_servers set port = $1", sinks.sink_port)
    await pool.execute("update forwards set due_at = now()")
    await forwarder.work()
    [row] = await pool.fetch("select state, attempts, reply from forwards")
    assert (row["state"], row["attempts"]) == ("failed", 2), row["reply"]
    assert "550" in row["reply"]
    await pool.execute("update delivery_servers set enabled = false")
    assert (await deliver(server, "reply@bounce.mailer.example")).startswith("250")
    await forwarder.work()
    assert await pool.fetchval("select reply from forwards where state = 'waiting'") == "there is no delivery server that is enabled"


async def test_a_full_queue_keeps_the_mail(pool: Pool, world: World, server: Server) -> None:
    await set_rules(pool, server)
    await pool.execute("insert into forwards (inbound_id, target) select 0, 'a@b.example' from generate_series(1, 10000)")
    assert (await deliver(server, "reply@bounce.mailer.example")).startswith("250")
    assert len(await stored(pool)) == 1
    assert await pool.fetchval("select count(*) from forwards") == 10_000
