"""Bad inputs 22-29 of reliability.md §5 as a sender would bring them: a real SMTP session with the inbound process, then the rows.

Required: an answer within a second or so, other sessions not held up, at most one event and only for the recipient of the token, one clean
line of what the report says, and no address touched without proof.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from domain.reply import one_line
from store import batch_queue, redis_keys
from store.postgres import Pool
from tests.inbound import mails
from tests.inbound.conftest import World
from tests.inbound.test_app import ready, start

PATIENCE_SECONDS = 60.0
SLOWEST_SECONDS = 10.0  # 0.1 s on an idle machine; the tests share theirs


class Door(NamedTuple):
    """The inbound process, and the way in."""

    pool: Pool
    host: str
    port: int

    async def deliver(self, raw: bytes, to: str, sender: str = "") -> tuple[str, float]:
        """One session, one message: the last reply, and how long the slowest took."""
        slowest = 0.0
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                reply = (await reader.readline()).decode()
                body = raw.replace(b"\r\n.", b"\r\n..")
                for step in (b"HELO x", f"MAIL FROM:<{sender}>".encode(), f"RCPT TO:<{to}>".encode(), b"DATA", body + b"\r\n."):
                    writer.write(step + b"\r\n")
                    await writer.drain()
                    sent = time.monotonic()
                    reply = (await reader.readline()).decode()
                    slowest = max(slowest, time.monotonic() - sent)
                    if reply[:1] not in ("2", "3"):
                        break
        finally:
            writer.close()
        return reply.strip(), slowest

    async def handled(self) -> list[Any]:
        """Every row, once all are handled."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self.pool.fetchval("select count(*) from inbound_messages where handled_at is null"):
                await asyncio.sleep(0.1)
        return list(await self.pool.fetch("select id, kind, outcome, reason from inbound_messages order by id"))


@pytest.fixture
async def door(tmp_path: Path, fresh_database_url: str, redis_url: str, pool: Pool, world: World) -> AsyncIterator[Door]:
    process = await start(tmp_path, fresh_database_url, redis_url)
    try:
        host, port = (await ready(process))["smtp"]
        yield Door(pool, host, port)
    finally:
        process.terminate()
        assert process.stderr is not None
        errors = (await asyncio.wait_for(process.stderr.read(), 60)).decode()
        assert await asyncio.wait_for(process.wait(), 60) == 0
        assert "Traceback" not in errors, errors


def headers(count: int, line: str = "X-Filler: value") -> bytes:
    return (f"{line}\r\n" * count).encode()


def folded(field: str, piece: str, count: int) -> bytes:
    return (f"{field}: " + f"\r\n {piece}" * count + "\r\n").encode()


def nested(kind: str, depth: int) -> bytes:
    text = ""
    for level in range(depth):
        text += (
            f'Content-Type: multipart/mixed; boundary="{level}"\r\n\r\n--{level}\r\n' if kind == "multipart"
            else "Content-Type: message/rfc822\r\n\r\n"
        )  # fmt: skip
    return text.encode() + b"\r\nend\r\n"


def part(content_type: str, body: bytes, encoding: str = "7bit") -> bytes:
    head = f"Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: {content_type}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
    return head.encode("utf-8", "surrogateescape") + body + b"\r\n"


def lines(body: bytes, length: int = 900) -> bytes:
    return b"\r\n".join(body[at : at + length] for at in range(0, len(body), length))


MIME: dict[str, Callable[[], bytes]] = {
    "22 50,000 headers": lambda: headers(50_000) + b"\r\nx\r\n",
    "22 a header of 900 KB": lambda: folded("Subject", "x" * 900, 1000) + b"\r\nx\r\n",
    "22 30,000 addresses": lambda: folded("To", "someone@example.com,", 30_000) + b"\r\nx\r\n",
    "22 20,000 encoded words": lambda: folded("Subject", "=?utf-8?q?=61?=", 20_000) + b"\r\nx\r\n",
    "22 20,000 RFC 2231 pieces": lambda: folded("Content-Type", "multipart/mixed;", 1)
    + b"".join(b" boundary*%d=x;\r\n" % number for number in range(20_000)) + b"\r\n\r\nx\r\n",
    "23 multipart 2,000 deep": lambda: nested("multipart", 2000),
    "23 rfc822 3,000 deep": lambda: nested("rfc822", 3000),
    "23 100,000 parts": lambda: part('multipart/mixed; boundary="x"', b"--x\r\n\r\n\r\n" * 100_000),
    "23 a boundary of 2,000": lambda: part("multipart/mixed;\r\n boundary=" + "\r\n ".join(["x" * 500] * 4), b"--" + b"x" * 900),
    "23 a boundary of regex signs": lambda: part('multipart/mixed; boundary="(a+)+$[^"', b"--(a+)+$[^\r\n\r\naaaaaaaaaaaaaaaaaaaaa!\r\n"),
    "23 a boundary never closed": lambda: part('multipart/mixed; boundary="x"', b"--x\r\nContent-Type: text/plain\r\n\r\nhello"),
    **{
        f"24 charset {name[:20]}": lambda name=name: part(f'text/plain; charset="{name}"', b"eJzLSM3JyQcABiwCFQ==" * 100, "base64")  # type: ignore[misc]
        for name in ("zlib_codec", "idna", "punycode", "utf-7", "hex", "no-such-charset", "../../etc/passwd", "x" * 900)
    },
    "24 4 MB of bad base64": lambda: part("text/plain", lines(b"@!~=" * 1_000_000), "base64"),
}  # fmt: skip


async def test_22_to_24_mime_that_is_made_to_hurt_is_taken_and_holds_nobody_up(door: Door, world: World) -> None:
    replies = {}
    waits: list[float] = []

    async def others() -> None:
        """Another sender, all the while."""
        while True:
            reply, wait = await door.deliver(mails.plain("Re: hello"), world.return_path(), "ada@reader.example")
            assert reply.startswith("250"), reply
            waits.append(wait)
            await asyncio.sleep(0.05)

    beside = asyncio.create_task(others())
    try:
        for name, make in MIME.items():
            replies[name], slowest = await door.deliver(b"From: MAILER-DAEMON@x.example\r\n" + make(), world.return_path())
            assert slowest < SLOWEST_SECONDS, (name, slowest)
    finally:
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
    assert all(reply[:3] == "250" or reply[:1] == "5" for reply in replies.values()), replies
    assert sum(reply.startswith("250") for reply in replies.values()) >= len(MIME) - 1  # what does not fit is refused
    assert max(waits) < SLOWEST_SECONDS
    rows = await door.handled()
    assert not [row for row in rows if row["outcome"] == "unreadable"], rows
    assert await door.pool.fetchval("select count(*) from feedback") <= 1
    assert await door.pool.fetchval("select count(*) from suppressions") == 0


def reports(world: World) -> dict[str, bytes]:
    """Row 25 and 29: reports to a return path that verifies."""
    one = "\r\nFinal-Recipient: rfc822; r{}@other.example\r\nAction: failed\r\nStatus: 5.1.1\r\n"
    many = "".join(map(one.format, range(10_000)))
    return {
        "25 no status": mails.dsn(world, status="", text="smtp; failed"),
        "25 two statuses": mails.dsn(world, status="4.2.2", text="full", fields="Status: 5.1.1\r\n"),
        "25 9.9.9": mails.dsn(world, status="9.9.9", text="failed"),
        "25 delivered with 5.1.1": mails.dsn(world, action="delivered"),
        "25 10,000 recipients": mails.dsn(world, recipient="r@other.example", fields=many),
        "25 cut off": mails.dsn(world, recipient="r@other.example")[:700] + b"\r\n",
        "25 wrong type": mails.dsn(world, recipient="r@other.example").replace(b"message/delivery-status", b"application/octet-stream"),
        "29 a formula": mails.dsn(world, recipient="r@other.example", text="=cmd|' /C calc'!A0, \"q\", 'x'"),
        "29 ESC and direction marks": mails.dsn(world, recipient="r@other.example", text="550 \x1b[2J \u2028 \u202e \x85 end"),
        "29 lines": mails.dsn(world, recipient="r@other.example", text="550 one\r\n 550 two\r\n three"),
        "29 60 KB of one letter": mails.dsn(world, recipient="r@other.example", text="\r\n ".join(["a" * 900] * 66)),
        "29 ((((": mails.dsn(world, recipient="r@other.example", text="\r\n ".join(["(" * 900] * 20)),
        "29 a@a@a@": mails.dsn(world, recipient="r@other.example", text="\r\n ".join(["a@" * 450] * 20)),
    }  # fmt: skip


async def test_25_and_29_odd_reports_are_at_most_one_event_about_the_recipient_of_the_token(door: Door, world: World) -> None:
    for number, (name, raw) in enumerate(reports(world).items(), 1):
        reply, slowest = await door.deliver(raw, world.return_path())
        assert reply.startswith("250"), (name, reply)
        assert slowest < SLOWEST_SECONDS, (name, slowest)
        rows = await door.handled()
        assert len(rows) == number
        await door.pool.execute("delete from soft_bounces")
        events = await door.pool.fetch("delete from feedback returning kind, number, recipient, effect, diagnostic")
        assert len(events) <= 1, name
        assert all((event["number"], event["recipient"]) == (1, world.email) for event in events), name
        assert all(event["effect"] != "hard" for event in events), (name, events)
        for text in (rows[-1]["reason"], *(event["diagnostic"] for event in events)):
            assert text == one_line(text.encode()), (name, text)
            assert len(text.encode()) <= 1024, name
    assert await door.pool.fetchval("select count(*) from suppressions") == 0


async def test_25_a_command_with_nul_in_a_field_is_refused_by_the_door(door: Door, world: World) -> None:
    reply, _ = await door.deliver(mails.dsn(world, text="550 \x00 unknown"), world.return_path())
    assert reply[:1] == "5" or not reply


async def test_26_a_return_path_that_is_not_ours_is_refused_at_rcpt_and_nothing_else_suppresses(door: Door, world: World) -> None:
    path = world.return_path()
    mutated = path[:20] + ("a" if path[20] != "a" else "b") + path[21:]
    for to in (mutated, world.return_path(days_ago=61), "b-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@bounce.mailer.example"):
        reply, _ = await door.deliver(mails.dsn(world), to)
        assert reply.startswith("550"), reply
    no_token = mails.dsn(world, original=mails.header(world, token=""))
    for raw, to, sender in (
        (no_token, "postmaster@bounce.mailer.example", ""),
        (mails.dsn(world), path, "somebody@x.example"),
        (mails.dsn(world, recipient="bob@reader.example"), path, ""),
    ):
        reply, _ = await door.deliver(raw, to, sender)
        assert reply.startswith("250"), reply
    assert [row["outcome"] for row in await door.handled()] == ["unproven", "unproven", "recorded"]
    assert await door.pool.fetchval("select count(*) from suppressions") == 0
    assert await door.pool.fetchval("select state from subscribers") == "subscribed"


async def test_27_the_same_bounce_fifty_times_is_one_event(door: Door, world: World) -> None:
    replies = await asyncio.gather(*(door.deliver(mails.dsn(world), world.return_path()) for _ in range(50)))
    assert all(reply.startswith("250") for reply, _ in replies)
    rows = await door.handled()
    assert [row["outcome"] for row in rows].count("acted") == 1
    assert await door.pool.fetchval("select count(*) from feedback") == 1
    assert await door.pool.fetchval("select count(*) from suppressions") == 1


async def test_engines_are_told_of_a_proven_bounce_soon_after_its_250(door: Door, world: World, redis_url: str) -> None:
    client = batch_queue.connect(redis_url, 5.0)
    async with client.pubsub() as changes:
        await changes.subscribe(redis_keys.CHANGES)
        while (await changes.get_message(timeout=5.0) or {}).get("type") != "subscribe":
            pass
        assert (await door.deliver(mails.dsn(world), world.return_path()))[0].startswith("250")
        answered = time.monotonic()
        async with asyncio.timeout(60):
            while (message := await changes.get_message(ignore_subscribe_messages=True, timeout=10.0)) is None:
                pass
        took = time.monotonic() - answered
    await client.aclose()
    assert message["data"] == b"suppressions"
    assert await door.pool.fetchval("select count(*) from suppressions") == 1  # it was committed before the word
    assert took < 5, took  # 0.2 s on an idle machine; engines then read what changed at once


async def test_28_complaints_without_proof_suppress_nobody(door: Door, world: World) -> None:
    unsigned = mails.header(world, token="")
    many = "".join(f"Original-Rcpt-To: r{number}@reader.example\r\n" for number in range(2000))
    cases = {
        "unsigned": mails.arf(world, original=unsigned),
        "not spam": mails.arf(world, kind="not-spam"),
        "a recipient of nobody": mails.arf(world, original=mails.header(world, number=4711)),
        "2,000 addresses": mails.arf(world, original=unsigned, fields=many),
        "one inside another": mails.arf(world, original=mails.arf(world).decode()),
    }
    for name, raw in cases.items():
        reply, _ = await door.deliver(raw, "abuse@bounce.mailer.example", "fbl@provider.example")
        assert reply.startswith("250"), (name, reply)
    rows = await door.handled()
    assert {row["outcome"] for row in rows} <= {"unproven", "recorded"}, rows
    assert await door.pool.fetchval("select count(*) from suppressions") == 0
    assert await door.pool.fetchval("select state from subscribers") == "subscribed"
