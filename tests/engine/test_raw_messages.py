"""Raw messages through a real engine: every attempt the same octets, made again, bounced to the right one, refused where they must be."""

import asyncio
import base64
import smtplib
from typing import Any

from compose.raw import take
from store import accounting, batch_queue, messages
from store.messages import Message, Part, RecipientState, Target
from store.postgres import Pool, connection, transaction
from tests.engine.test_eight_bit import made_again
from tests.engine.test_feedback_end_to_end import suppressed
from tests.engine.test_message_streams import beside
from tests.engine.test_signed_mail import SECRET, make_key
from tests.inbound.test_app import free_port
from tests.machine import Machine, until
from tests.peers import DROP, Peer
from tests.reference.dkim_verdicts import verdicts
from tests.store import seed

FIELDS = b"Date: Sat, 21 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@sender.example>\r\nFrom: Shop <shop@sender.example>\r\nSubject: Hi\r\n"
MAIL = FIELDS + b"\r\n.one\r\nbr\xc3\xbccke \t \r\n..\r\n.\r\nend\r\n\r\n"
ASCII = FIELDS + b"\r\n.one\r\nend\r\n"


async def way(pool: Pool, port: int, **limits: object) -> Target:
    return await beside(pool, await seed.campaign(pool, recipients=1, port=port, state="draft", limits=limits))


async def hand_in(pool: Pool, machine: Machine, to: Target, content: bytes, *addresses: str) -> Message:
    """As the submission listener does."""
    taken = take(content, 0.0)
    part = Part(name="job", subject=taken.subject, from_email=taken.from_email)
    async with transaction(pool) as conn:
        made = await messages.add(conn, to, part, {}, [(each, "{}") for each in addresses], taken.raw)
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    await batch_queue.publish_change(client, "campaigns")
    await client.aclose()
    return made


async def ended(pool: Pool, machine: Machine, message: Message) -> list[RecipientState]:
    """Its recipients, once each of them has come to an end."""

    async def there() -> list[RecipientState]:
        async with connection(pool) as conn:
            found = await messages.recipients(conn, message, 0, 100)
        return found if all(each.state not in ("queued", "deferred") for each in found) else []

    found: list[RecipientState] = await until(there, "an end for everybody", 30, machine)
    return found


def contents(peer: Peer) -> list[bytes]:
    """What followed each DATA, as it came, also where it was not taken."""
    said = (part for chunks in peer.chunks for part in b"".join(chunks).split(b"\r\nDATA\r\n")[1:])
    return [part[: part.index(b"\r\n.\r\n") + 2] for part in said]


async def test_every_attempt_sends_the_same_octets_and_they_can_be_made_again(machine: Machine, pool: Pool) -> None:
    """Refused for now after the content, a link lost after the final dot, then taken: the signature is the same in all three."""
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    async with Peer(offers=("PIPELINING", "8BITMIME"), script={"content": ["451 4.3.0 not now", DROP]}) as peer:
        to = await way(pool, peer.port, retry_schedule_seconds=[1.1])
        keys = [await make_key(pool, "s1"), await make_key(pool, "e1", "ed25519-sha256")]
        await machine.engine()
        message = await hand_in(pool, machine, to, MAIL, "ann@people.example")
        [ann] = await ended(pool, machine, message)
        assert (ann.state, ann.attempts) == ("delivered", 3)
        [taken] = peer.accepted
        seen = contents(peer)
        assert not peer.violations
    assert len(seen) == 3
    assert set(seen) == {taken.content.replace(b"\r\n.", b"\r\n..")}
    assert taken.content.endswith(MAIL)
    assert verdicts(taken.content, {key.record_name: key.record for key in keys}) == [True, True]
    assert sum(" BODY=8BITMIME" in each for each in peer.commands) == 3
    kinds = await pool.fetch("select kind::text from accounting where campaign_id = $1 order by at, kind = 't'", message.campaign_id)
    assert [row["kind"] for row in kinds] == ["t", "u", "t", "d"]
    again = await made_again(pool, message.campaign_id, ann.number)
    assert base64.b64decode(again.message) == taken.content
    assert (again.mail_from, again.recipient, again.attempt) == (taken.mail_from, taken.rcpt, 3)
    assert again.same_size
    assert [each.good for each in again.signatures] == [True, True]


async def test_a_second_copy_is_the_first_and_what_comes_back_marks_the_right_recipient(machine: Machine, pool: Pool) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    script = machine.directory / "script.toml"
    script.write_text('[[rule]]\nstage = "accepted"\naction = "drop"\nrecipient = "lost@*"\ntimes = 1\n')
    await machine.sink("--script", str(script))
    smtp_port = free_port()
    await machine.start("inbound", "inbound", SLUICE_INBOUND__SMTP_PORT=str(smtp_port), SLUICE_INBOUND__HTTP_PORT=str(free_port()))
    await machine.engine()
    to = await way(pool, machine.sink_port, retry_schedule_seconds=[0.2])
    message = await hand_in(pool, machine, to, MAIL, "ann@people.example", "bob@people.example", "lost@people.example")
    found = await ended(pool, machine, message)
    assert [(each.email.partition("@")[0], each.state, each.attempts) for each in found] == [
        ("ann", "delivered", 1), ("bob", "delivered", 1), ("lost", "delivered", 2),
    ]  # fmt: skip
    listed = (await machine.sink_json("/api/v1/messages?limit=50"))["messages"]
    assert sorted(each["recipients"][0].partition("@")[0] for each in listed) == ["ann", "bob", "lost", "lost"]
    assert {await machine.sink_bytes(f"/api/v1/messages/{each['id']}/source") for each in listed} == {MAIL}
    counters = await machine.sink_json("/api/v1/counters")
    assert counters["duplicates"] == 1
    assert counters["violations"]["undeclared_8bit"] == 0
    paths = {each["recipients"][0]: each["mail_from"] for each in listed}
    assert len(set(paths.values())) == 3

    report = (
        b"From: MAILER-DAEMON@mx.example\r\nTo: <sender>\r\nSubject: Undelivered Mail Returned to Sender\r\nMIME-Version: 1.0\r\n"
        b'Content-Type: multipart/report; report-type=delivery-status; boundary="x"\r\n\r\n--x\r\n\r\nSorry.\r\n'
        b"--x\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.example\r\n\r\nFinal-Recipient: rfc822; "
        b"bob@people.example\r\nAction: failed\r\nStatus: 5.1.1\r\nDiagnostic-Code: smtp; 550 5.1.1 User unknown\r\n\r\n"
        b"--x\r\nContent-Type: text/rfc822-headers\r\n\r\n"
    ) + FIELDS + b"\r\n--x--\r\n"  # fmt: skip

    def send() -> None:
        with smtplib.SMTP("127.0.0.1", smtp_port, timeout=20) as session:
            session.sendmail("", [paths["bob@people.example"]], report)

    await asyncio.to_thread(send)
    assert await suppressed(machine, pool, 1) == [("bob@people.example", "bounced")]
    async with connection(pool) as conn:
        standing = await messages.recipients(conn, message, 0, 10)
        assert await messages.outcomes(conn, message) == {"delivered": 2, "bounced": 1}
    assert [(each.state, each.status) for each in standing] == [("delivered", "2.0.0"), ("bounced", "5.1.1"), ("delivered", "2.0.0")]
    assert "550 5.1.1 User unknown" in standing[1].diagnostic
    assert (await accounting.audit(pool, message.campaign_id)).clean
    for each in found:
        again = await made_again(pool, message.campaign_id, each.number)
        assert (base64.b64decode(again.message), again.same_size, again.signatures) == (MAIL, True, [])
        assert again.mail_from == paths[each.email]


async def test_a_server_without_8bitmime_gets_no_octet_of_an_8bit_message(machine: Machine, pool: Pool) -> None:
    await machine.sink("--no-8bitmime", "--no-smtputf8")
    await machine.engine()
    to = await way(pool, machine.sink_port)
    refused = await hand_in(pool, machine, to, MAIL, "ann@people.example", "bob@people.example")
    for each in await ended(pool, machine, refused):
        assert (each.state, each.status, each.category) == ("expired", "5.6.3", "bad-configuration")
        assert each.diagnostic == "the message needs 8BITMIME, which the delivery server does not offer"
    plain = await hand_in(pool, machine, to, ASCII, "ann@people.example")
    assert [each.state for each in await ended(pool, machine, plain)] == ["delivered"]
    listed: list[dict[str, Any]] = (await machine.sink_json("/api/v1/messages"))["messages"]
    assert [each["recipients"] for each in listed] == [["ann@people.example"]]
    assert await machine.sink_bytes(f"/api/v1/messages/{listed[0]['id']}/source") == ASCII
    assert not await pool.fetchval("select count(*) from suppressions")
    row = await pool.fetchrow("select kind::text, connection, size from accounting where status = '5.6.3' limit 1")
    assert row is not None
    assert tuple(row) == ("x", 0, 0)
