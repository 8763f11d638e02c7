"""inbound.listener over real sockets: the bad inputs 1-21 and 30 of reliability.md §5, and that good mail is stored before its 250."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from inbound.content import MAX_LINE_OCTETS, refusal
from inbound.session import MAX_ERRORS, MAX_RECIPIENTS
from store import postgres
from store.postgres import Pool
from tests.inbound.conftest import World
from tests.inbound.peer import BODY, LIMIT, QUICK, Client, Server, serving, stored


@pytest.fixture
async def server(pool: Pool, world: World) -> AsyncIterator[Server]:
    async with serving(pool, world) as made:
        yield made


async def test_mail_to_a_return_path_is_stored_as_it_came_with_whose_it_was(server: Server, pool: Pool, world: World) -> None:
    client = await server.greeted()
    content = BODY + b"..dot\r\n.. \r\n\r\n" + bytes(range(128, 256)) + b"\r\n"
    assert (await client.deliver(world.return_path(), content)).startswith("250")
    [row] = await stored(pool)
    assert row["raw"] == content.replace(b"\r\n.", b"\r\n")
    assert (row["mail_from"], row["recipient"], str(row["peer"])) == ("", world.return_path(), "127.0.0.1")
    assert (row["user_id"], row["campaign_id"], row["number"]) == (world.user_id, world.campaign_id, 1)
    assert (await client.say("QUIT")).startswith("221")


async def test_each_recipient_has_a_row_and_the_next_message_starts_afresh(server: Server, pool: Pool, world: World) -> None:
    client = await server.greeted()
    await client.say("MAIL FROM:<someone@elsewhere.example> SIZE=100 BODY=8BITMIME")
    for recipient in (world.return_path(), "Postmaster@bounce.mailer.example", "abuse@RELAY.example", world.return_path()):
        assert (await client.say(f"RCPT TO:<{recipient}>")).startswith("250")
    await client.say("DATA")
    assert (await client.say(BODY + b".")).startswith("250")
    assert (await client.deliver(world.return_path())).startswith("250")
    rows = await stored(pool)
    assert [row["recipient"] for row in rows] == [
        world.return_path(),
        "Postmaster@bounce.mailer.example",
        "abuse@relay.example",
        world.return_path(),
    ]
    assert [row["mail_from"] for row in rows] == ["someone@elsewhere.example"] * 3 + [""]
    assert rows[1]["user_id"] is None


FOREIGN = [
    "ada@reader.example",
    "postmaster@reader.example",
    "postmaster%reader.example@bounce.mailer.example",
    "@bounce.mailer.example:ada@reader.example",
    '"ada@reader.example"@bounce.mailer.example',
    "ada@reader.example@bounce.mailer.example",
    "postmaster@[127.0.0.1]",
    "postmaster@bounce.mailer.example.",
    "postmaster@bounce.mailer.example.evil.example",
    "postmaster@xbounce.mailer.example",
    "postmaster@bounce.mailer.exampl",
    "postmaster@",
    "@",
    "",
    "postmaster",
    "postmaster@bounce..mailer.example",
    "postmaster @bounce.mailer.example",
    "postmaster@bounce.mailer.example\t",
    "a!b!postmaster@reader.example",
    "<postmaster@bounce.mailer.example",
    "nobody@bounce.mailer.example",
    "b-aaaa@bounce.mailer.example",
    "root@bounce.mailer.example",
    "postmaster+x@bounce.mailer.example",
    "(c)postmaster@bounce.mailer.example",
    "postmaster%reader.example",
    "ada%reader.example%bounce.mailer.example@bounce.mailer.example",
    "postmaster!reader.example@bounce.mailer.example",
    "reader.example!ada@bounce.mailer.example",
    "@reader.example,@bounce.mailer.example:postmaster@bounce.mailer.example",
    "@bounce.mailer.example:postmaster@bounce.mailer.example",
    '"postmaster"@bounce.mailer.example',
    '"post\\master"@bounce.mailer.example',
    '""@bounce.mailer.example',
    '" "@bounce.mailer.example',
    "postmaster@bounce.mailer.example@reader.example",
    "postmaster@@bounce.mailer.example",
    "@postmaster@bounce.mailer.example",
    "postmaster@[IPv6:::1]",
    "postmaster@[bounce.mailer.example]",
    "postmaster@127.0.0.1",
    "postmaster@2130706433",
    "postmaster@localhost",
    "postmaster@bounce.mailer.example..",
    "postmaster@.bounce.mailer.example",
    "postmaster@-bounce.mailer.example",
    "postmaster@bounce.mailer.example-",
    "postmaster@bounce-mailer.example",
    "postmaster@bounce_mailer.example",
    "postmaster@bouncemailer.example",
    "postmaster@mailer.example",
    "postmaster@sub.bounce.mailer.example",
    "postmaster@bounce.mailer.example.com",
    "postmaster@bounce.mailer.example/x",
    "postmaster@bounce.mailer.example:25",
    "postmaster@bounce.mailer.example;ada@reader.example",
    "postmaster@bounce.mailer.example,ada@reader.example",
    "postmaster@bounce.mailer.example ada@reader.example",
    "postmaster@bounce.mailer.example> <ada@reader.example",
    "postmaster@xn--bounce-mailer.example",
    "p\u00f6stmaster@bounce.mailer.example",
    "postmaster@bounc\u0435.mailer.example",
    "postmaster.@bounce.mailer.example.",
    "postmaster@bounce.mailer.example\\",
    "|/bin/sh@bounce.mailer.example",
    "/etc/passwd@bounce.mailer.example",
    ":include:/etc/passwd@bounce.mailer.example",
    "${run{/bin/id}}@bounce.mailer.example",
    "b-@bounce.mailer.example",
    "u-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@bounce.mailer.example",
    "SRS0=AAAAAAAA=AA=reader.example=ada@bounce.mailer.example",
    "x" * 65 + "@bounce.mailer.example",
    "postmaster@" + "x" * 300 + ".bounce.mailer.example",
]


async def test_addresses_that_are_not_ours_are_refused(server: Server) -> None:
    for address in FOREIGN:
        client = await server.greeted()
        await client.say("MAIL FROM:<>")
        refused = (await client.say(f"RCPT TO:<{address}>".encode()))[:3]
        assert refused == "550" or (refused == "500" and not address.isascii()), (address, refused)
        assert (await client.say("DATA")).startswith("503"), address
        await client.say("QUIT")


async def test_foreign_domains_and_unknown_addresses_are_told_apart(server: Server) -> None:
    client = await server.greeted()
    await client.say("MAIL FROM:<>")
    assert await client.say("RCPT TO:<ada@reader.example>") == "550 5.7.1 Relaying denied"
    assert (await client.say("RCPT TO:<ada@bounce.mailer.example>")).startswith("550 5.1.1")


async def test_forged_mutated_and_expired_return_paths_are_refused(server: Server, world: World) -> None:
    client = await server.greeted()
    await client.say("MAIL FROM:<>")
    local, _, domain = world.return_path().partition("@")
    forged = [local[:at] + ("a" if local[at] != "a" else "b") + local[at + 1 :] for at in range(2, len(local))]
    for mutated in forged[:18]:  # fewer than the errors one session may make
        assert (await client.say(f"RCPT TO:<{mutated}@{domain}>")).startswith("550 5.1.1")
    other = await server.greeted()
    await other.say("MAIL FROM:<>")
    assert (await other.say(f"RCPT TO:<{world.return_path(days_ago=61)}>")).startswith("550 5.1.1")
    assert (await other.say(f"RCPT TO:<{world.return_path(days_ago=-2)}>")).startswith("550 5.1.1")
    assert (await other.say(f"RCPT TO:<{world.return_path(domain='reader.example')}>")).startswith("550 5.7.1")
    assert (await other.say(f"RCPT TO:<{world.return_path(days_ago=59).upper()}>")).startswith("250")


async def test_a_new_mfrom_domain_is_taken_mail_for_at_once(server: Server, pool: Pool, world: World) -> None:
    await pool.execute("update delivery_servers set mfrom = 'returns@new.example'")
    client = await server.greeted()
    await client.say("MAIL FROM:<>")
    assert (await client.say("RCPT TO:<Returns@new.example>")).startswith("250")
    assert (await client.say("RCPT TO:<postmaster@bounce.mailer.example>")).startswith("550")


FALSE_ENDS = [
    b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r\n.\r\r\n", b"\r.\r", b"\r\n.\r", b"\r\n\0.\r\n", b"\r.\r\n", b"\r\r\n.\r\r\n", b"\n\n.\r\n",
    b"\r\n.\0\r\n", b"\r\n.\x0b\r\n", b"\n\r.\n\r", b"\r\n\r.\r\n",
]  # fmt: skip


async def test_only_crlf_dot_crlf_ends_the_content(server: Server, pool: Pool, world: World) -> None:
    smuggled = f"MAIL FROM:<evil@x.example>\r\nRCPT TO:<{world.return_path()}>\r\nDATA\r\nevil\r\n".encode()
    taken = 0
    for end in FALSE_ENDS:
        client = await server.greeted()
        reply = await client.deliver(world.return_path(), BODY + b"text" + end + smuggled)
        assert reply[:3] in ("250", "550"), end  # one reply, to the whole of it
        taken += reply[:3] == "250"
        assert len(await stored(pool)) == taken, end
        assert (await client.say("NOOP")).startswith("250"), end
        await client.say("QUIT")


LENGTHS = (990, 997, 998, 999, 1000, 2045, 4094, 4095, 4096, 4097, 8190, 8192, 16380, 16381, 16382, 65536)


async def test_a_dot_line_behind_an_over_long_line_is_no_second_message(server: Server, pool: Pool, world: World) -> None:
    taken = 0
    for length in LENGTHS:
        client = await server.greeted()
        reply = await client.deliver(world.return_path(), BODY + b"x" * length + b".\r\nMAIL FROM:<evil@x.example>\r\n")
        assert reply.startswith("250" if length + 1 <= MAX_LINE_OCTETS - 2 else "550"), length
        taken += reply.startswith("250")
        assert (await client.say("NOOP")).startswith("250"), length
        assert len(await stored(pool)) == taken, length
        await client.say("QUIT")


@pytest.mark.parametrize(
    "line",
    [b"NOOP\n", b"NOOP x\ry\r\n", b"MAIL FROM:<a\0b@x.example>\r\n", b"NOOP \x1b[2J\r\n", b"RSET\n\r\n", b"\0\r\n", b"NOOP \x7f\r\n"],
)
async def test_bare_line_ends_and_control_characters_in_commands_end_the_session(server: Server, line: bytes) -> None:
    client = await server.greeted()
    client.send(line)
    assert [reply[:1] for reply in await client.rest()] == ["5"]


async def test_content_with_bare_line_ends_or_nul_is_refused_not_stored(server: Server, pool: Pool, world: World) -> None:
    client = await server.greeted()
    for bad in (b"a\nb", b"a\rb", b"a\0b", b"\n", b"\r\r\n"):
        assert (await client.deliver(world.return_path(), BODY + bad + b"\r\n")).startswith("550 5.6.0"), bad
    assert await stored(pool) == []


async def test_a_client_that_talks_before_the_greeting_is_refused(server: Server, pool: Pool, world: World) -> None:
    session = f"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<{world.return_path()}>\r\nDATA\r\n".encode() + BODY + b".\r\nQUIT\r\n"
    for early in (b"EHLO x\r\n", session, b"POST / HTTP/1.1\r\nHost: x\r\n\r\n" + session, b"\x16\x03\x01\x02\x00"):
        client = await server.connect()
        client.send(early)
        assert [reply[:3] for reply in await client.rest()] in (["554"], [])
    assert await stored(pool) == []


async def test_a_whole_session_in_one_segment_is_refused(server: Server, pool: Pool, world: World) -> None:
    client = await server.connect()
    await client.reply()
    client.send(f"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<{world.return_path()}>\r\nDATA\r\n".encode() + BODY + b".\r\nQUIT\r\n")
    assert [reply[:3] for reply in await client.rest()] == ["554"]
    assert await stored(pool) == []


async def test_content_sent_with_data_is_refused(server: Server, pool: Pool, world: World) -> None:
    client = await server.greeted()
    await client.say("MAIL FROM:<>")
    await client.say(f"RCPT TO:<{world.return_path()}>")
    client.send(b"DATA\r\n" + BODY + b".\r\n")
    assert [reply[:3] for reply in await client.rest()] == ["554"]
    assert await stored(pool) == []


@pytest.mark.parametrize("request_line", ["GET / HTTP/1.1", "POST /x HTTP/1.0", "CONNECT mx:25 HTTP/1.1", "PRI * HTTP/2.0"])
async def test_http_is_shown_out(server: Server, request_line: str) -> None:
    client = await server.connect()
    await client.reply()
    client.send(request_line.encode() + b"\r\nHost: x\r\n\r\nEHLO x\r\n")
    assert [reply[:3] for reply in await client.rest()] == ["554"]


async def test_commands_behind_starttls_are_not_run(server: Server) -> None:
    client = await server.greeted()
    client.send(b"STARTTLS\r\nMAIL FROM:<a@x.example>\r\n")
    assert [reply[:3] for reply in await client.rest()] == ["554"]
    again = await server.greeted()
    assert (await again.say("STARTTLS")).startswith("502")
    assert "STARTTLS" not in await again.say("EHLO x")


async def test_commands_out_of_order_are_refused(server: Server, world: World) -> None:
    client = await server.connect()
    await client.reply()
    assert (await client.say("MAIL FROM:<>")).startswith("503")
    assert (await client.say("EHLO x")).startswith("250")
    assert (await client.say(f"RCPT TO:<{world.return_path()}>")).startswith("503")
    assert (await client.say("DATA")).startswith("503")
    assert (await client.deliver(world.return_path())).startswith("250")
    assert (await client.say(f"RCPT TO:<{world.return_path()}>")).startswith("503")
    assert (await client.say("DATA")).startswith("503")
    await client.say("MAIL FROM:<>")
    assert (await client.say("MAIL FROM:<>")).startswith("503")
    await client.say("RCPT TO:<ada@reader.example>")
    assert (await client.say("DATA")).startswith("503")


async def test_recipients_are_limited(server: Server, world: World) -> None:
    client = await server.greeted()
    await client.say("MAIL FROM:<>")
    for number in range(MAX_RECIPIENTS + 1):
        reply = await client.say(f"RCPT TO:<{world.return_path(number=number + 1)}>")
        assert reply.startswith("250" if number < MAX_RECIPIENTS else "452 4.5.3")


@pytest.mark.parametrize(
    "command",
    ["NOOP", "VRFY x", "EXPN x", "HELP", "RSET", "EHLO x", "AUTH PLAIN AAAA", "XYZZY", "BDAT 1 LAST", "RCPT TO:<ada@reader.example>"],
)
async def test_repetition_ends_the_session(server: Server, command: str) -> None:
    client = await server.greeted()
    await client.say("MAIL FROM:<>")
    for _ in range(200):
        reply = await client.say(command)
        if not reply or reply.startswith("421"):
            break
    else:
        pytest.fail(f"200 times {command} were taken")


ODD = [
    ("VRFY postmaster", "252"),
    ("EXPN staff", "502"),
    ("XCLIENT ADDR=1.2.3.4", "500"),
    ("PROXY TCP4 1.2.3.4 5.6.7.8 1 2", "500"),
    ("ETRN x", "500"),
    ("BDAT 5 LAST", "500"),
    ("AUTH LOGIN", "502"),
    ("TURN", "500"),
    ("MAIL FROM:<a@x.example> SIZE=-1", "501"),
    ("MAIL FROM:<a@x.example> SIZE=abc", "501"),
    ("MAIL FROM:<a@x.example> SIZE=100000000000000000000", "552"),
    ("MAIL FROM:<a@x.example> XYZ=1", "555"),
    ("MAIL FROM:a@x.example", "553"),
    ("MAIL FROM:<a b@x.example>", "553"),
    ("MAIL TO:<a@x.example>", "501"),
    ("MAIL", "501"),
    ("NOOP \udcff", "500"),
    ("EHLO", "501"),
]


async def test_odd_commands_have_their_codes(server: Server) -> None:
    for command, code in ODD:
        client = await server.greeted()
        assert (await client.say(command)).startswith(code), command
        await client.say("QUIT")


async def test_a_command_without_end_is_cut(server: Server) -> None:
    client = await server.greeted()
    client.send(b"NOOP " + b"x" * 1_000_000)
    assert [reply[:3] for reply in await client.rest()] in (["500"], [])


async def test_content_over_the_limit_is_refused_and_the_session_goes_on(server: Server, pool: Pool, world: World) -> None:
    client = await server.greeted()
    assert (await client.deliver(world.return_path(), BODY + b"x" * 70 + b"\r\n" + b"y\r\n" * (LIMIT // 3))).startswith("552")
    assert (await client.deliver(world.return_path())).startswith("250")
    assert len(await stored(pool)) == 1
    client.send(b"MAIL FROM:<>\r\n")
    await client.reply()
    await client.say(f"RCPT TO:<{world.return_path()}>")
    await client.say("DATA")
    client.send(b"x" * 70 + b"\r\n" + b"y\r\n" * (2 * LIMIT))
    assert [reply[:3] for reply in await client.rest()] in (["552"], [])


async def test_a_silent_client_is_shown_out(pool: Pool, world: World) -> None:
    server = Server(pool, world, QUICK._replace(idle=1.0))
    await server.policy.refresh()
    await server.listener.start()
    try:
        client = await server.greeted()
        assert [reply[:3] for reply in await client.rest()] == ["421"]
    finally:
        await server.stop()


async def test_a_client_that_drips_commands_or_content_is_shown_out(pool: Pool, world: World) -> None:
    server = Server(pool, world, QUICK._replace(idle=1.0, content=1.0))
    await server.policy.refresh()
    await server.listener.start()
    try:
        client = await server.greeted()
        other = await server.greeted()
        await other.say("MAIL FROM:<>")
        await other.say(f"RCPT TO:<{world.return_path()}>")
        await other.say("DATA")

        async def drip(each: Client) -> list[str]:
            waiting = asyncio.create_task(each.rest())
            while not waiting.done():
                each.send(b"x")
                await asyncio.sleep(0.02)
            return waiting.result()

        for replies in await asyncio.gather(drip(client), drip(other)):
            assert [reply[:3] for reply in replies] in (["421"], [])
        assert await stored(pool) == []
    finally:
        await server.stop()


async def test_a_session_has_an_end_however_busy_it_is(pool: Pool, world: World) -> None:
    server = Server(pool, world, QUICK._replace(session=0.4))
    await server.policy.refresh()
    await server.listener.start()
    try:
        client = await server.greeted()
        while (reply := await client.say("MAIL FROM:<>")).startswith("250"):
            if not (await client.say(f"RCPT TO:<{world.return_path()}>")).startswith("250"):
                break
            if not (await client.say("RSET")).startswith("250"):
                break
            await asyncio.sleep(0.05)
        assert reply == "" or reply[:3] in ("250", "421")
        assert await client.rest() in ([], ["421 4.4.2 Timeout, closing"])
    finally:
        await server.stop()


async def test_connections_are_limited_and_a_free_place_is_used_again(pool: Pool, world: World) -> None:
    server = Server(pool, world, connections=10)
    await server.policy.refresh()
    await server.listener.start()
    try:
        taken = [await server.greeted() for _ in range(10)]
        turned_away = await server.connect()
        assert (await turned_away.reply()).startswith("421")
        assert await turned_away.reply() == ""
        assert (await taken[0].say("QUIT")).startswith("221")
        assert await taken[0].reply() == ""
        await server.greeted()
    finally:
        await server.stop()


async def test_without_the_store_the_answer_is_451_and_nothing_is_half_stored(pool: Pool, world: World, fresh_database_url: str) -> None:
    away = await postgres.open_pool(fresh_database_url, 1)
    server = Server(away, world)
    await server.policy.refresh()
    away.terminate()
    await server.listener.start()
    try:
        client = await server.greeted()
        assert (await client.deliver(world.return_path())).startswith("451")
        await client.say("MAIL FROM:<>")
        assert (await client.say("RCPT TO:<postmaster@perhaps-new.example>")).startswith("451 4.3.0")
        assert await stored(pool) == []
    finally:
        await server.stop()


async def test_a_client_that_vanishes_in_the_content_leaves_nothing(server: Server, pool: Pool, world: World) -> None:
    client = await server.greeted()
    await client.say("MAIL FROM:<>")
    await client.say(f"RCPT TO:<{world.return_path()}>")
    await client.say("DATA")
    client.send(BODY)
    await client.writer.drain()
    client.writer.transport.abort()
    other = await server.greeted()
    assert (await other.deliver(world.return_path())).startswith("250")
    assert len(await stored(pool)) == 1
    assert server.listener.limits.buffered_bytes == 0


async def test_a_mail_loop_is_refused(server: Server, world: World) -> None:
    client = await server.greeted()
    assert (await client.deliver(world.return_path(), b"Received: from x by y\r\n" * 120 + BODY)).startswith("554 5.4.6")
    assert (await client.deliver(world.return_path(), b"Received: from x by y\r\n" * 20 + BODY)).startswith("250")


def test_what_is_refused_in_content_is_decided_by_lengths() -> None:
    assert refusal(b"\r\n" + b"\r\n" * 100_000) == ""
    assert refusal(b"\r\n" + b"x" * (MAX_LINE_OCTETS - 2) + b"\r\n") == ""
    assert refusal(b"\r\n" + b"x" * (MAX_LINE_OCTETS - 1) + b"\r\n") != ""
    assert refusal(b"\r\n" + (b"x" * 880 + b"\r\n") * 4000) == ""
    assert MAX_ERRORS < 100
