"""What comes back, with real processes: an engine sends to a sink, the inbound process hears of it, and the engine stops mailing."""

import asyncio
import csv
import email
import email.policy
import os
import smtplib
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from store import accounting, campaigns
from store.postgres import Pool
from tests.engine.test_signed_through_postfix import POSTFIX, Relay, relay
from tests.inbound.test_app import free_port
from tests.machine import Machine, campaign_state, until
from tests.store import seed

__all__ = ["relay"]


def bounce(original: EmailMessage, recipient: str) -> bytes:
    """As Postfix reports an unknown mailbox."""
    return (
        "From: MAILER-DAEMON@mx.example\r\nTo: <sender>\r\nSubject: Undelivered Mail Returned to Sender\r\nMIME-Version: 1.0\r\n"
        'Content-Type: multipart/report; report-type=delivery-status; boundary="x"\r\n\r\n--x\r\n\r\nSorry.\r\n'
        "--x\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.example\r\n\r\n"
        f"Final-Recipient: rfc822; {recipient}\r\nAction: failed\r\nStatus: 5.1.1\r\nDiagnostic-Code: smtp; 550 5.1.1 User unknown\r\n\r\n"
        f"--x\r\nContent-Type: message/rfc822\r\n\r\n{original.as_string().replace(chr(10), chr(13) + chr(10))}\r\n--x--\r\n"
    ).encode()


def complaint(original: EmailMessage) -> bytes:
    """As a mailbox provider reports spam."""
    return (
        "From: fbl@provider.example\r\nTo: abuse@sender.example\r\nSubject: FW: letter\r\nMIME-Version: 1.0\r\n"
        'Content-Type: multipart/report; report-type=feedback-report; boundary="x"\r\n\r\n--x\r\n\r\nAbuse.\r\n'
        "--x\r\nContent-Type: message/feedback-report\r\n\r\nFeedback-Type: abuse\r\nUser-Agent: Provider/1\r\nVersion: 1\r\n\r\n"
        f"--x\r\nContent-Type: message/rfc822\r\n\r\n{original.as_string().replace(chr(10), chr(13) + chr(10))}\r\n--x--\r\n"
    ).encode()


async def completed(machine: Machine, pool: Pool, campaign: int) -> None:
    async def is_completed() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(is_completed, f"campaign {campaign} completed", 60, machine)


async def suppressed(machine: Machine, pool: Pool, count: int) -> list[tuple[str, str]]:
    async def there() -> Any:
        rows = await pool.fetch("select email_key, reason from suppressions where removed_at is null order by id")
        return rows if len(rows) >= count else None

    return [tuple(row) for row in await until(there, f"{count} suppressions", 20, machine)]


async def test_what_is_refused_reported_complained_of_or_unsubscribed_is_not_mailed_again(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    smtp_port = free_port()
    await machine.start(
        "inbound", "inbound", SLUICE_INBOUND__SMTP_PORT=str(smtp_port), SLUICE_INBOUND__HTTP_PORT=str(free_port()),
        SLUICE_ACCOUNTING__FLUSH_INTERVAL_SECONDS="0.1",
    )  # fmt: skip
    campaign = await seed.campaign(pool, recipients=12, port=machine.sink_port, state="draft")
    refused = "bounce+1@people.example"
    await pool.execute("update subscribers set email = $1, email_key = $1 where email = 'p12@people.example'", refused)
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await completed(machine, pool, campaign)
    assert await suppressed(machine, pool, 1) == [(refused, "bounced")]

    found = (await machine.sink_json("/api/v1/messages?limit=500"))["messages"]
    sources = [await machine.sink_bytes(f"/api/v1/messages/{each['id']}/source") for each in found]
    messages = {str(m["To"]): m for m in (email.message_from_bytes(source, policy=email.policy.default) for source in sources)}
    bounced, complained, left = (messages[f"p{number}@people.example"] for number in (1, 2, 3))
    back = f"b-{bounced['X-FBLId']}@bounces.sender.example"
    leave = str(left["List-Unsubscribe"]).partition("mailto:")[2].partition("?")[0]

    def send() -> None:
        with smtplib.SMTP("127.0.0.1", smtp_port, timeout=20) as session:
            session.sendmail("", [back], bounce(bounced, "p1@people.example"))
            session.sendmail("fbl@provider.example", ["abuse@bounces.sender.example"], complaint(complained))
            session.sendmail("p3@people.example", [leave], b"From: p3@people.example\r\nSubject: unsubscribe\r\n\r\n\r\n")
            session.sendmail("p4@people.example", [back], b"From: p4@people.example\r\nSubject: Re: letter\r\n\r\nThank you\r\n")

    await asyncio.to_thread(send)
    reasons = {"p1@people.example": "bounced", "p2@people.example": "complained", "p3@people.example": "unsubscribed", refused: "bounced"}
    assert dict(await suppressed(machine, pool, 4)) == reasons
    states = {row[0]: row[1] for row in await pool.fetch("select email, state from subscribers where state <> 'subscribed'")}
    assert states == {
        "p1@people.example": "bounced", "p2@people.example": "unsubscribed", "p3@people.example": "unsubscribed", refused: "bounced",
    }  # fmt: skip
    async with pool.acquire() as conn:
        after = [await campaigns.recipient(conn, campaign, number) for number in (1, 2)]
    assert [each.state for each in after] == ["bounced", "delivered"]
    assert (await accounting.audit(pool, campaign)).clean

    # On the list again by force, they are still not mailed
    await pool.execute("update subscribers set state = 'subscribed'")
    second = await pool.fetchval(
        "insert into campaigns (user_id, name, state, list_id, delivery_server_id, subject, from_email, text, started_at) "
        "select user_id, 'second', 'preparing', list_id, delivery_server_id, subject, from_email, text, now() from campaigns where id = $1 "
        "returning id",
        campaign,
    )
    await completed(machine, pool, second)
    kinds = {row[0]: row[1] for row in await pool.fetch("select recipient, kind::text from accounting where campaign_id = $1", second)}
    assert {address for address, kind in kinds.items() if kind == "s"} == set(reasons)
    assert sum(kind == "d" for kind in kinds.values()) == 8

    async def files_written() -> bool:
        return not await pool.fetchval("select count(*) from feedback where node <> ''")

    await until(files_written, "the accounting files", 20, machine)
    assert [(row["type"], row["rcpt"], row["bounceCat"]) for row in rows(machine.directory, "remote")] == [
        ("rb", "p1@people.example", "bad-mailbox")
    ]
    (line,) = rows(machine.directory, "fbl")
    assert (line["type"], line["feedbackType"], line["rcpt"]) == ("f", "abuse", "p2@people.example")
    assert line["header_X-FBLId"] == complained["X-FBLId"]


@pytest.mark.slow
@pytest.mark.skipif(not POSTFIX or os.geteuid() != 0, reason="needs Postfix, and root to start an instance of its own")
async def test_what_a_real_postfix_bounces_and_passes_on_ends_in_record_state_and_file(machine: Machine, pool: Pool, relay: Relay) -> None:
    """Postfix takes all mail, delivers most of it, and reports what it cannot to the return path."""
    await machine.sink()
    smtp_port = free_port()
    await machine.start(
        "inbound", "inbound", SLUICE_INBOUND__SMTP_PORT=str(smtp_port), SLUICE_INBOUND__HTTP_PORT=str(free_port()),
        SLUICE_ACCOUNTING__FLUSH_INTERVAL_SECONDS="0.1",
    )  # fmt: skip
    relay.start(
        machine.sink_port,
        f"transport_maps = inline:{{ {{bounces.sender.example = smtp:[127.0.0.1]:{smtp_port}}} }}\n",
    )
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=8, port=relay.port, state="draft")
    # The sink behind Postfix refuses these, after Postfix has taken them
    for number, address in ((7, "bounce+7@people.example"), (8, "full+8@people.example")):
        await pool.execute("update subscribers set email = $1, email_key = $1 where email = $2", address, f"p{number}@people.example")
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await completed(machine, pool, campaign)
    assert await suppressed(machine, pool, 1) == [("bounce+7@people.example", "bounced")]

    async def delivered() -> Any:
        found = (await machine.sink_json("/api/v1/messages?limit=500"))["messages"]
        return found if len(found) == 6 else None

    found = await until(delivered, "all mail through Postfix", 60, machine)
    sources = [await machine.sink_bytes(f"/api/v1/messages/{each['id']}/source") for each in found]
    messages = {str(m["To"]): m for m in (email.message_from_bytes(source, policy=email.policy.default) for source in sources)}
    back = f"b-{messages['p1@people.example']['X-FBLId']}@bounces.sender.example"
    leave = str(messages["p3@people.example"]["List-Unsubscribe"]).partition("mailto:")[2].partition("?")[0]

    def send() -> None:
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=20) as session:
            session.sendmail("fbl@provider.example", ["abuse@bounces.sender.example"], complaint(messages["p2@people.example"]))
            session.sendmail("p3@people.example", [leave], b"From: p3@people.example\r\nSubject: unsubscribe\r\n\r\n\r\n")
            reply = b"From: p4@people.example\r\nSubject: Re: Hello\r\nIn-Reply-To: <x@y>\r\n\r\nThank you\r\n"
            session.sendmail("p4@people.example", [back], reply)

    await asyncio.to_thread(send)
    assert dict(await suppressed(machine, pool, 3)) == {
        "bounce+7@people.example": "bounced", "p2@people.example": "complained", "p3@people.example": "unsubscribed",
    }  # fmt: skip

    async def all_handled() -> bool:
        waits = "select count(*) from inbound_messages where handled_at is null"
        return await pool.fetchval("select count(*) from inbound_messages") == 5 and not await pool.fetchval(waits)

    await until(all_handled, "five messages handled", 20, machine)
    read = await pool.fetch("select kind, outcome from inbound_messages order by kind, outcome")
    assert [tuple(row) for row in read] == [
        ("arf", "acted"), ("dsn", "acted"), ("dsn", "recorded"), ("reply", "kept"), ("unsubscribe", "acted"),
    ]  # fmt: skip
    events = await pool.fetch("select kind, effect, status, category, recipient from feedback where kind = 'rb' order by number")
    assert [tuple(event) for event in events] == [
        ("rb", "hard", "5.1.1", "bad-mailbox", "bounce+7@people.example"), ("rb", "soft", "5.2.2", "quota-issues", "full+8@people.example"),
    ]  # fmt: skip
    async with pool.acquire() as conn:
        assert [(await campaigns.recipient(conn, campaign, number)).state for number in (7, 8, 1)] == ["bounced", "bounced", "delivered"]
    assert (await accounting.audit(pool, campaign)).clean

    async def files_written() -> bool:
        return not await pool.fetchval("select count(*) from feedback where node <> ''")

    await until(files_written, "the accounting files", 20, machine)
    remote = {row["rcpt"]: row for row in rows(machine.directory, "remote")}
    assert {(row["type"], row["bounceCat"], row["dsnReportingMta"]) for row in remote.values()} == {
        ("rb", "bad-mailbox", "relay.example"), ("rb", "quota-issues", "relay.example"),
    }  # fmt: skip
    assert [row["rcpt"] for row in rows(machine.directory, "fbl")] == ["p2@people.example"]


def rows(directory: Path, stem: str) -> list[dict[str, str]]:
    """The lines of every file, in order: at midnight there are two."""
    files = sorted((directory / "accounting").glob(f"{stem}-*.csv"))
    return [row for path in files for row in csv.DictReader(path.read_text("utf-8").splitlines())]
