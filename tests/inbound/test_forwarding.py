"""Forwarding end to end: what people write to our domains is kept and sent on in one step, and never in a circle."""

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from compose.signing import DkimSigner
from domain.forwarding import MARKER, read_rewritten
from inbound.policy import today
from store import forwarding, postgres, users
from store.forwarding import Forwarding, ForwardShown
from store.postgres import Pool
from tests.compose.test_signing import records, signing_key
from tests.inbound.conftest import World
from tests.inbound.peer import Server, serving, stored
from tests.machine import Machine, machine, until
from tests.reference.dkim_verdicts import verdicts

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
    return [(row["target"], row["rule"]) for row in await pool.fetch("select target, rule from forwards order by id")]


async def shown(pool: Pool) -> list[ForwardShown]:
    """What the operator sees, newest first."""
    async with pool.acquire() as conn:
        return await forwarding.page(conn, None, 100)


async def test_a_reply_is_kept_and_an_engine_sends_it_on_under_a_sender_of_ours(
    pool: Pool, world: World, server: Server, sinks: Machine
) -> None:
    script = sinks.directory / "script.toml"
    script.write_text('[[rule]]\nrecipient = "gone@*"\nreply = "550 5.1.1 Nobody here"\n')
    await sinks.sink("--script", str(script))
    await pool.execute("update delivery_servers set port = $1, enforced_from = 'us@mailer.example'", sinks.sink_port)
    aliases = "gone@relay.example:gone@ours.example\nleft@relay.example:left@ours.example\n"
    await set_rules(pool, server, RULES.partition("\n")[0] + "\n" + aliases)
    signed = dkim_signed(MAIL)
    assert (await deliver(server, "Reply@bounce.mailer.example", signed)).startswith("250")
    assert (await deliver(server, "gone@relay.example")).startswith("250")
    async with postgres.transaction(pool) as conn:
        admin = await users.admin_id(conn)
    await pool.execute("insert into suppressions (user_id, email_key, reason) values ($1, 'left@ours.example', 'manual')", admin)
    assert (await deliver(server, "left@relay.example")).startswith("250")
    assert [(each.target, each.rule, each.state) for each in await shown(pool)] == [
        ("left@ours.example", "alias", "queued"), ("gone@ours.example", "alias", "queued"), ("support@ours.example", "alias", "queued"),
    ]  # fmt: skip
    await sinks.engine(SLUICE_SECRETS_KEY=bytes(range(32)).hex())

    async def settled() -> list[ForwardShown]:
        found = await shown(pool)
        return found if all(each.state != "queued" for each in found) else []

    left, gone, sent = await until(settled, "three ends", 20, sinks)
    assert (left.state, left.reply) == ("suppressed", "suppressed address")
    assert (gone.state, gone.attempts, sent.state, sent.attempts) == ("bounced", 1, "delivered", 1)
    assert "550 5.1.1 Nobody here" in gone.reply
    assert sent.reply.startswith("250")
    [message] = (await sinks.sink_json("/api/v1/messages"))["messages"]
    sender = message["mail_from"]
    assert sender.startswith("SRS0=")
    assert sender.endswith("@bounce.mailer.example")
    assert read_rewritten(server.policy.forwards.srs_key, sender, today()) == "ada@reader.example"
    assert message["recipients"] == ["support@ours.example"]
    source = await sinks.sink_bytes(f"/api/v1/messages/{message['id']}/source")
    trace = source.removesuffix(signed)
    assert re.fullmatch(rb"Received: by mx\.mailer\.example \(Sluice\) id \d+;\r\n [^\r\n]+\r\nX-Sluice-Forwarded: [^\r\n]+\r\n", trace)
    assert f"\r\n{MARKER}: {world.keyring.fingerprint}\r\n".encode() in trace
    assert list(verdicts(source, records("sel"))) == [True]

    # The same mail comes back, as it was sent on: it stays here
    assert (await deliver(server, "reply@bounce.mailer.example", source)).startswith("250")
    # A bounce of it ends here, too, and one that nobody was told about is refused
    assert (await deliver(server, sender, sender="")).startswith("250")
    assert (await deliver(server, sender.replace("ada@", "eve@").replace("=ada", "=eve"), sender="")).startswith("550 5.1.1")
    assert len(await stored(pool)) == 5
    assert len(await queue(pool)) == 3


def dkim_signed(mail: bytes) -> bytes:
    """As its author's system signed it."""
    made = DkimSigner([signing_key("sel")]).sign([mail], int(time.time()))[0]
    assert isinstance(made, bytes)
    return made


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


async def test_without_a_way_out_or_past_the_bound_the_mail_is_kept_and_that_is_shown(pool: Pool, world: World, server: Server) -> None:
    await set_rules(pool, server)
    await pool.execute("update delivery_servers set enabled = false")
    assert (await deliver(server, "reply@bounce.mailer.example")).startswith("250")
    [one] = await shown(pool)
    assert (one.state, one.reply, one.message_id) == ("failed", "there is no delivery server that is enabled", None)
    await pool.execute("insert into forwards (inbound_id, target, reason) select 0, 'a@b.example', '' from generate_series(2, 10000)")
    assert (await deliver(server, "reply@bounce.mailer.example")).startswith("250")
    assert len(await stored(pool)) == 2
    assert await pool.fetchval("select count(*) from forwards") == 10_000


@pytest.mark.parametrize("content", [b"long " * 200 + b"\r\n", b"bare \r\r\n", b"\0\r\n"], ids=["long line", "CR", "NUL"])
async def test_what_no_server_may_be_sent_is_kept_and_that_is_shown(pool: Pool, world: World, server: Server, content: bytes) -> None:
    """A mailbox or a pipe gives us what a listener would have refused, and a notice passes on whatever was received."""
    await set_rules(pool, server)
    received, _ = server.policy.recipient("reply@bounce.mailer.example")
    assert received is not None
    await server.policy.take("", "ada@reader.example", [received], MAIL + content)
    async with postgres.transaction(pool) as conn:
        way = server.policy.forwards
        said = await way.add(conn, 1, "notice", "admin@ours.example", recipient="x@relay.example", mail_from="", raw=MAIL + content)
    assert said
    assert [(each.rule, each.state) for each in await shown(pool)] == [("notice", "failed"), ("alias", "failed")]
    assert len(await stored(pool)) == 1
    assert await pool.fetchval("select count(*) from messages") == 0


async def test_nothing_is_queued_unless_the_mail_is_kept(pool: Pool, world: World, server: Server) -> None:
    await set_rules(pool, server)
    await pool.execute("alter table messages rename to elsewhere")
    assert not (await deliver(server, "reply@bounce.mailer.example")).startswith("250")
    await pool.execute("alter table elsewhere rename to messages")
    assert await stored(pool) == []
    assert await queue(pool) == []
