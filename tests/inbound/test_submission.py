"""inbound.submission: programs sign in, hand mail in, and an engine sends it as it is."""

import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from config.settings import Inbound, Mail, Settings
from inbound.listener import Certificate
from inbound.submission import Submission
from store import accounting, batch_queue, messages, users
from store.postgres import Pool, transaction
from tests.engine.test_connect import make_certificate
from tests.inbound.conftest import World
from tests.inbound.peer import Client, Server, serving, stored
from tests.machine import machine, until

FIELDS = b"Date: Sat, 21 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@shop.example>\r\nFrom: Shop <news@shop.example>\r\nSubject: Hi\r\n"
BODY = b"\r\n.one\r\nbr\xc3\xbccke\r\n.\r\nend\r\n"
MAIL = FIELDS + BODY


async def key_of(pool: Pool, user_id: int, scope: users.Scope = "user") -> str:
    async with transaction(pool) as conn:
        return (await users.create_key(conn, user_id, "smtp", scope))[1]


def plain(name: str, password: str) -> str:
    return base64.b64encode(f"\0{name}\0{password}".encode()).decode()


def coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@asynccontextmanager
async def submitting(
    pool: Pool, world: World, told: list[str] | None = None, mail: Mail = Mail(), *, clear: bool = True, **options: Any  # noqa: B008
) -> AsyncIterator[Server]:  # fmt: skip
    async def tell(what: str) -> None:
        (told if told is not None else []).append(what)

    settings = Settings(inbound=Inbound(submission_clear_from_loopback=clear), mail=mail)
    async with serving(pool, world, submissions=Submission(pool, world.keyring, settings, tell), **options) as server:
        yield server


async def signed_in(server: Server, key: str) -> Client:
    client = await server.greeted()
    assert (await client.say("AUTH PLAIN " + plain("Tester", key))).startswith("235 2.7.0")
    return client


def stuffed(mail: bytes) -> bytes:
    return mail.replace(b"\r\n.", b"\r\n..")


async def hand_in(client: Client, mail: bytes, *recipients: str) -> str:
    assert (await client.say("MAIL FROM:<whoever@shop.example> BODY=8BITMIME AUTH=<>")).startswith("250")
    for each in recipients or ("ann@people.example",):
        assert (await client.say(f"RCPT TO:<{each}>")).startswith("250")
    assert (await client.say("DATA")).startswith("354")
    return await client.say(stuffed(mail) + b".")


async def test_a_password_is_taken_under_tls_only(pool: Pool, world: World, tmp_path: Path) -> None:
    make_certificate(tmp_path, "mx.mailer.example")
    pem = next(path for path in tmp_path.iterdir() if path.suffix == ".pem")
    key = await key_of(pool, world.user_id)
    async with submitting(pool, world, clear=False, tls=Certificate(str(pem), "").context) as server:
        client = await server.connect()
        await client.reply()
        assert "AUTH" not in await client.say("EHLO shop.example")
        assert (await client.say("AUTH PLAIN " + plain("tester", key))).startswith("538 5.7.11")
        assert (await client.say("STARTTLS")).startswith("220")
        context = ssl.create_default_context(cafile=str(pem))
        await client.writer.start_tls(context, server_hostname="mx.mailer.example")
        assert (await client.say("AUTH PLAIN " + plain("tester", key))).startswith("503")
        assert (await client.say("EHLO shop.example")).endswith("AUTH PLAIN LOGIN")
        assert (await client.say("AUTH PLAIN")).startswith("334")
        assert (await client.say(plain("tester", key))).startswith("235 2.7.0")
        assert (await client.say("AUTH PLAIN " + plain("tester", key))).startswith("503")
        assert (await hand_in(client, MAIL)).startswith("250 2.0.0 Queued as message ")
        assert await pool.fetchval("select raw from message_parts") == MAIL


async def test_login_works_too_and_wrong_passwords_end_the_session(pool: Pool, world: World) -> None:
    key = await key_of(pool, world.user_id)
    admin = await key_of(pool, world.user_id, "admin")
    async with submitting(pool, world) as server:
        client = await server.greeted()
        assert await client.say("AUTH LOGIN") == "334 VXNlcm5hbWU6"
        assert await client.say(coded("tester")) == "334 UGFzc3dvcmQ6"
        assert (await client.say(coded(key))).startswith("235")
        client = await server.greeted()
        assert (await client.say("AUTH CRAM-MD5")).startswith("504")
        for name, password in (("tester", key[:-1] + "!"), ("somebody", key)):
            assert (await client.say("AUTH PLAIN " + plain(name, password))).startswith("535 5.7.8")
        assert (await client.say("AUTH PLAIN " + plain("tester", admin))).startswith("421")
        assert await client.rest() == []
        for line in ("AUTH PLAIN !!!", "AUTH PLAIN " + coded("one word")):
            client = await server.greeted()
            assert (await client.say(line)).startswith("501 5.5.2")
        # who did not sign in brings mail to our own addresses, as on port 25
        client = await server.greeted()
        assert (await client.say("MAIL FROM:<ada@reader.example>")).startswith("250")
        assert (await client.say("RCPT TO:<ann@people.example>")).startswith("550 5.7.1 Relaying denied")
        assert (await (await server.greeted()).deliver(world.return_path())).startswith("250 2.0.0 Stored")
        assert len(await stored(pool)) == 1
        await pool.execute("update users set disabled_at = now()")
        assert (await (await server.greeted()).say("AUTH PLAIN " + plain("tester", key))).startswith("535")


async def test_job_way_and_class_are_what_the_header_says(pool: Pool, world: World) -> None:
    second = await pool.fetchval(
        "insert into delivery_servers (user_id, name, host, port, security) values ($1, 'Pool-2', '127.0.0.1', 2527, 'none') returning id",
        world.user_id,
    )
    told: list[str] = []
    async with submitting(pool, world, told) as server:
        client = await signed_in(server, await key_of(pool, world.user_id))
        controls = b"X-Job: june-1\r\nX-Virtual-MTA: pool-2\r\nX-Mail-Class: Marketing\r\nBcc: bob@people.example\r\nX-Order: 4711\r\n"
        assert (await hand_in(client, controls + MAIL, "ann@people.example", "bob@people.example")).startswith("250")
        assert told == ["campaigns"]
        async with pool.acquire() as conn:
            [made] = await messages.list_messages(conn, world.user_id, None, 10)
        assert (made.name, made.mail_class, made.delivery_server_id, made.recipients) == ("june-1", "marketing", second, 2)
        assert await pool.fetchval("select raw from message_parts") == b"X-Order: 4711\r\n" + MAIL
        # the same once more shares the part
        assert (await hand_in(client, controls + MAIL)).startswith("250")
        assert await pool.fetchval("select count(*) from message_parts") == 1


async def test_what_may_not_go_out_is_refused_with_the_reason(pool: Pool, world: World) -> None:
    other = await pool.fetchval("insert into users (name) values ('other') returning id")
    await pool.execute(
        "insert into dkim_keys (user_id, domain, selector, algorithm, bits, public_key, private_key_sealed, verified_at) "
        "values ($1, 'theirs.example', 's', 'rsa-sha256', 2048, 'x', 'x', now())",
        other,
    )
    async with submitting(pool, world, mail=Mail(forbidden_from=("*@public.example",))) as server:
        client = await signed_in(server, await key_of(pool, world.user_id))
        for mail, said in (
            (MAIL.replace(b"shop.example>", b"mail.theirs.example>"), "belongs to another user"),
            (MAIL.replace(b"shop.example>", b"public.example>"), "sends nothing from"),
            (b"X-Virtual-MTA: nowhere\r\n" + MAIL, "X-Virtual-MTA"),
            (b"X-Mail-Class: junk\r\n" + MAIL, "X-Mail-Class"),
            (b"X-Job: two words\r\n" + MAIL, "X-Job"),
            (MAIL + b"x" * 999 + b"\r\n", "lines of more than 998"),
            (b"Subject: nobody\r\n\r\n", "From"),
        ):
            reply = await hand_in(client, mail)
            assert reply.startswith("550 5.7.1"), reply
            assert said in reply
        assert (await client.say("MAIL FROM:<>")).startswith("250")
        assert (await client.say("RCPT TO:<nonsense>")).startswith("553 5.1.3")
        assert await pool.fetchval("select count(*) from messages") == 0
        await pool.execute("update delivery_servers set enabled = false")
        assert "none that is enabled" in await hand_in(await signed_in(server, await key_of(pool, world.user_id)), MAIL)


async def test_nothing_is_promised_while_the_store_is_away(pool: Pool, world: World) -> None:
    async with submitting(pool, world) as server:
        client = await signed_in(server, await key_of(pool, world.user_id))
        await pool.execute("alter table messages rename to elsewhere")
        assert (await hand_in(client, MAIL)).startswith(("421 4.3.0", "451 4.3.0"))
        await pool.execute("alter table elsewhere rename to messages")
        client = await signed_in(server, await key_of(pool, world.user_id))
        assert (await hand_in(client, MAIL)).startswith("250")


@pytest.mark.parametrize("options", [(), ("--no-chunking",)])
async def test_an_engine_sends_it_octet_for_octet(
    pool: Pool, world: World, tmp_path: Path, fresh_database_url: str, redis_url: str, options: tuple[str, ...]
) -> None:
    async with machine(tmp_path, fresh_database_url, redis_url) as made:
        await made.sink(*options)
        await pool.execute("update delivery_servers set port = $1", made.sink_port)
        await made.engine(SLUICE_SECRETS_KEY=bytes(range(32)).hex())
        async with submitting(pool, world) as server:
            client = await signed_in(server, await key_of(pool, world.user_id))
            people = [f"p{number}@people.example" for number in range(5)]
            assert (await hand_in(client, MAIL, *people, "defer1+x@people.example", "bounce@people.example")).startswith("250")
            redis = batch_queue.connect(redis_url, 5.0)
            await batch_queue.publish_change(redis, "campaigns")
            await redis.aclose()

        async def arrived() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = (await made.sink_json("/api/v1/messages"))["messages"]
            return found if len(found) >= 5 else []

        found = await until(arrived, "five messages", 20, made)
        assert {each["recipients"][0] for each in found} == set(people)
        for each in found:
            assert await made.sink_bytes(f"/api/v1/messages/{each['id']}/source") == MAIL
            assert each["mail_from"].startswith("b-")
            assert each["mail_from"].lower().endswith("@bounce.mailer.example")

        async def settled() -> dict[str, int]:
            async with pool.acquire() as conn:
                [message] = await messages.list_messages(conn, world.user_id, None, 10)
                said = await messages.outcomes(conn, message)
            return said if said == {"delivered": 5, "bounced": 1, "queued": 1} else {}

        await until(settled, "outcomes", 10, made)
        audit = await accounting.audit(pool, await pool.fetchval("select campaign_id from messages"))
        assert (audit.input, audit.delivered, audit.missing) == (7, 5, 0)
