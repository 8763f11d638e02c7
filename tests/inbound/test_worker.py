"""inbound.worker over a real database and a real triage process: what each kind of mail does, and what forged mail does not."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from domain.bounce_patterns import Pattern
from inbound.forwarding import Forwards
from inbound.triage_process import TriageProcess
from inbound.worker import Worker
from store import bounce_patterns, inbound
from store.bounces import Rules
from store.inbound import Received
from store.postgres import Pool
from tests.inbound import mails
from tests.inbound.conftest import World


class Office:
    """A worker, and what it told the engines."""

    def __init__(self, pool: Pool, world: World, rules: Rules, triage: TriageProcess, **options: Any) -> None:
        self.pool = pool
        self.world = world
        self.triage = triage
        self.told: list[str] = []
        forwards = Forwards(world.keyring, "mx.mailer.example")
        self.worker = Worker(pool, world.keys, rules, self._changed, triage=triage, forwards=forwards, **options)

    async def _changed(self, what: str) -> None:
        self.told.append(what)

    async def take(self, *raw: bytes, to: str = "", sender: str = "") -> list[Any]:
        """Keep mails as the listener does, have them handled, and return their rows."""
        ids: list[int] = []
        for each in raw:
            recipients = [Received(recipient=to or self.world.return_path())]
            ids += await inbound.keep(self.pool, peer="192.0.2.1", mail_from=sender, recipients=recipients, raw=each, timeout_seconds=5)
        while await self.worker.once():
            pass
        return list(await self.pool.fetch("select * from inbound_messages where id = any($1) order by id", ids))

    async def suppressions(self) -> list[tuple[Any, ...]]:
        rows = await self.pool.fetch("select user_id, list_id, email_key, reason from suppressions where removed_at is null order by id")
        return [tuple(row) for row in rows]

    async def state(self) -> str:
        return str(await self.pool.fetchval("select state from subscribers where id = $1", self.world.subscriber_id))

    async def events(self) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.pool.fetch("select kind, action, effect, status, category from feedback order by id")]


@pytest.fixture
async def office(pool: Pool, world: World) -> AsyncIterator[Office]:
    process = TriageProcess()
    yield Office(pool, world, Rules(node="mx1"), process)
    await process.close()


async def test_a_hard_bounce_marks_unsubscribes_and_suppresses_and_fifty_of_it_are_one_event(office: Office, world: World) -> None:
    rows = await office.take(*[mails.dsn(world)] * 50)
    assert await office.state() == "bounced"
    assert await office.suppressions() == [(world.user_id, None, "ada@reader.example", "bounced")]
    assert await office.events() == [("rb", "failed", "hard", "5.1.1", "bad-mailbox")]
    assert [row["outcome"] for row in rows] == ["acted", *["repeated"] * 49]
    assert {row["kind"] for row in rows} == {"dsn"}
    assert (rows[0]["user_id"], rows[0]["campaign_id"], rows[0]["number"]) == (world.user_id, world.campaign_id, 1)
    assert office.told == ["suppressions"]
    counts = await office.pool.fetchrow("select hard, soft, remote_bounces, complaints from campaign_feedback")
    assert counts is not None
    assert tuple(counts) == (1, 0, 1, 0)
    assert await office.pool.fetchval("select sum(messages) from inbound_totals") == 50


SOFT = {"status": "4.2.2", "text": "452 4.2.2 Mailbox full"}


async def forward_campaign(office: Office, numbers: int) -> None:
    """More messages to the same reader: the recipients 2.. of the campaign."""
    await office.pool.executemany(
        "insert into recipients values ($1, $2, $3, $4, '{}')",
        [(office.world.campaign_id, number, office.world.subscriber_id, office.world.email) for number in range(2, numbers + 1)],
    )


async def test_soft_bounces_count_up_to_the_threshold(office: Office, world: World) -> None:
    await forward_campaign(office, 3)
    for number in (1, 2, 3):
        assert await office.state() == "subscribed"
        (row,) = await office.take(mails.dsn(world, number=number, **SOFT), to=world.return_path(number=number))
        assert (row["kind"], row["outcome"]) == ("dsn", "recorded" if number < 3 else row["outcome"])
    assert await office.state() == "bounced"
    assert [row[2:] for row in await office.suppressions()] == [("ada@reader.example", "bounced")]
    assert await office.pool.fetchval("select note from suppressions") == f"3 soft bounces, the last of campaign {world.campaign_id}"
    assert await office.pool.fetchval("select count(*) from soft_bounces") == 0


async def test_a_report_of_delivery_resets_the_count(office: Office, world: World) -> None:
    await forward_campaign(office, 5)
    for number in (1, 2):
        await office.take(mails.dsn(world, number=number, **SOFT), to=world.return_path(number=number))
    await office.take(mails.dsn(world, number=3, action="delivered", status="2.0.0", text="250 ok"), to=world.return_path(number=3))
    for number in (4, 5):
        await office.take(mails.dsn(world, number=number, **SOFT), to=world.return_path(number=number))
    assert await office.state() == "subscribed"
    assert len(await office.pool.fetchval("select bounced_at from soft_bounces")) == 2


async def test_a_delivery_by_an_engine_resets_the_count(office: Office, world: World) -> None:
    campaign = world.campaign_id
    await forward_campaign(office, 6)
    await office.pool.execute("update campaigns set started_at = now()")
    for number in (1, 2):
        await office.take(mails.dsn(world, number=number, **SOFT), to=world.return_path(number=number))
    delivered = "insert into accounting values ($1, $2, 1, 'd', now(), 1, 1, 1, 1, '2.0.0', '', '', '', '')"
    await office.pool.execute(delivered, campaign, 3)
    await office.pool.execute(delivered, campaign, 6)
    await office.take(mails.dsn(world, number=3, **SOFT), to=world.return_path(number=3))  # not delivered after all
    await office.take(mails.dsn(world, number=4, **SOFT), to=world.return_path(number=4))
    assert await office.state() == "subscribed"
    assert len(await office.pool.fetchval("select bounced_at from soft_bounces")) == 2
    await office.take(mails.dsn(world, number=5, **SOFT), to=world.return_path(number=5))
    assert await office.state() == "bounced"


async def test_a_delay_is_an_event_of_its_own_and_the_failure_after_it_another(office: Office, world: World) -> None:
    await office.take(mails.dsn(world, action="delayed", status="4.4.1", text="451 4.4.1 no answer"), mails.dsn(world))
    assert sorted(event[:3] for event in await office.events()) == [("rb", "failed", "hard"), ("rs", "delayed", "none")]


async def test_a_complaint_unsubscribes_and_suppresses(office: Office, world: World) -> None:
    (row,) = await office.take(mails.arf(world), to="abuse@bounce.mailer.example", sender="feedback@provider.example")
    assert (row["kind"], row["outcome"], row["user_id"], row["number"]) == ("arf", "acted", world.user_id, 1)
    assert await office.state() == "unsubscribed"
    assert await office.suppressions() == [(world.user_id, None, "ada@reader.example", "complained")]
    assert await office.pool.fetchval("select details ->> 'reportedDomain' from feedback") == "mailer.example"
    (again,) = await office.take(mails.arf(world, kind="fraud"), to="abuse@bounce.mailer.example", sender="feedback@provider.example")
    assert again["outcome"] == "repeated"


@pytest.mark.parametrize("subject", ["unsubscribe", "please stop", ""])
async def test_mail_to_an_unsubscribe_address_is_carried_out(office: Office, world: World, subject: str) -> None:
    (row,) = await office.take(mails.plain(subject), to=world.unsubscribe_address(), sender="ada@reader.example")
    assert row["outcome"] == "acted", row["reason"]
    assert await office.state() == "unsubscribed"
    assert await office.suppressions() == [(world.user_id, world.list_id, "ada@reader.example", "unsubscribed")]


async def test_an_unsubscribe_by_mail_is_told_to_whom_the_operator_names_once(pool: Pool, world: World, office: Office) -> None:
    await pool.execute("update campaigns set from_email = 'news@mailer.example'")
    teller = Office(pool, world, Rules(unsubscribe_copy_to="leavers@%sender_domain%"), office.triage)
    subject = f"Unsubscribe {world.unsubscribe_address().partition('@')[0]}"
    for outcome in ("acted", "repeated"):  # it was passed on from the address that our header named
        (row,) = await teller.take(mails.plain(subject), to="leavers@mailer.example", sender="ada@reader.example")
        assert row["outcome"] == outcome
    assert await office.state() == "unsubscribed"
    rows = await pool.fetch("select email, data->>'address' as address from recipients where campaign_id <> $1", world.campaign_id)
    assert [tuple(row) for row in rows] == [("leavers@mailer.example", "Ada@reader.example")]
    changed = subject[:-2] + ("aa" if subject[-2:] != "aa" else "bb")
    (row,) = await teller.take(mails.plain(changed), to="leavers@mailer.example", sender="ada@reader.example")
    assert row["outcome"] in ("kept", "unproven")


async def test_an_automatic_answer_to_an_unsubscribe_address_is_no_request(office: Office, world: World) -> None:
    answer = mails.plain("Out of office", Auto_Submitted="auto-replied")
    (row,) = await office.take(answer, to=world.unsubscribe_address(), sender="ada@reader.example")
    assert (row["kind"], row["outcome"], await office.state()) == ("autoreply", "kept", "subscribed")


async def test_mail_of_people_is_kept_and_nothing_follows(office: Office, world: World) -> None:
    (row,) = await office.take(mails.plain("Re: Hello", In_Reply_To="<1@x>"), sender="ada@reader.example")
    assert (row["kind"], row["outcome"]) == ("reply", "kept")
    assert await office.events() == []


# name -> (message, where to, envelope sender, outcome); nothing of it may change an address
def forged(world: World) -> dict[str, tuple[bytes, str, str, str]]:
    other = World(type(world.keyring)(bytes(32)), *world[1:])
    there, path = "postmaster@bounce.mailer.example", world.return_path()
    mutated = path[:20] + ("a" if path[20] != "a" else "b") + path[21:]
    two = "\r\nFinal-Recipient: rfc822; other@reader.example\r\nAction: failed\r\nStatus: 4.2.2\r\n"
    return {
        "26 no token": (mails.dsn(world, original=mails.header(world, token="")), there, "", "unproven"),
        "26 signed by somebody else": (mails.dsn(world, original=mails.header(other)), other.return_path(), "", "unproven"),
        "26 mutated": (mails.dsn(world, original=""), mutated, "", "unproven"),
        "26 the token of another recipient": (mails.dsn(world, recipient="bob@reader.example"), path, "", "recorded"),
        "26 two different tokens": (mails.dsn(world, original=mails.header(world, number=7)), path, "", "unproven"),
        "26 with a sender": (mails.dsn(world), path, "attacker@x.example", "unproven"),
        "26 expired": (mails.dsn(world, original=""), world.return_path(days_ago=61), "", "unproven"),
        "25 no status": (mails.dsn(world, status="", text="smtp; something"), path, "", "recorded"),
        "25 impossible status": (mails.dsn(world, status="9.9.9", text="what"), path, "", "recorded"),
        "25 delivered with 5.1.1": (mails.dsn(world, action="delivered"), path, "", "recorded"),
        "25 two statuses": (mails.dsn(world, status="4.2.2", text="full", fields="Status: 5.1.1\r\n"), path, "", "recorded"),
        "25 several recipients": (mails.dsn(world, fields=two), path, "", "recorded"),
        "25 to the unsubscribe address": (mails.dsn(world), world.unsubscribe_address(), "", "unproven"),
        "28 unsigned": (mails.arf(world, original=mails.header(world, token="")), "abuse@bounce.mailer.example", "a@p.example", "unproven"),
        "28 not-spam": (mails.arf(world, kind="not-spam"), path, "a@p.example", "recorded"),
        "28 a recipient who does not exist": (mails.arf(world, original=mails.header(world, number=99)), there, "a@p.example", "unproven"),
        "28 inside another": (
            mails.arf(world, original=mails.arf(world).decode()), "abuse@bounce.mailer.example", "a@p.example", "unproven",
        ),
        "people who ask without a token": (mails.plain("unsubscribe"), there, "ada@reader.example", "unproven"),
    }  # fmt: skip


async def test_nothing_forged_changes_an_address(office: Office, world: World) -> None:
    for name, (raw, to, sender, outcome) in forged(world).items():
        await office.pool.execute("delete from feedback; delete from soft_bounces")
        (row,) = await office.take(raw, to=to, sender=sender)
        assert row["outcome"] == outcome, (name, row["kind"], row["reason"])
        assert len(await office.events()) <= 1, name
        assert (await office.state(), await office.suppressions()) == ("subscribed", []), name
    assert "suppressions" not in office.told


async def test_a_refusal_of_the_sender_marks_nobody_and_pauses_its_domain_when_there_are_many(office: Office, world: World) -> None:
    await forward_campaign(office, 30)
    await office.pool.execute("update campaigns set from_email = 'news@mailer.example'")
    totals = "insert into campaign_totals (campaign_id, journal, delivered) values ($1, 'e', 500)"
    await office.pool.execute(totals, world.campaign_id)
    text = "550 5.7.26 This mail has been blocked because the sender is unauthenticated"
    for number in range(1, 25):
        await office.take(mails.dsn(world, number=number, status="5.7.26", text=text), to=world.return_path(number=number))
    assert await office.pool.fetchval("select state from campaigns") == "running"  # 24 of 500
    assert (await office.state(), await office.suppressions()) == ("subscribed", [])
    for number in range(25, 27):
        await office.take(mails.dsn(world, number=number, status="5.7.26", text=text), to=world.return_path(number=number))
    state, reason = await office.pool.fetchrow("select state, pause_reason from campaigns")  # type: ignore[misc]
    assert state == "paused"
    assert "25 of 500 messages" in reason
    assert "5.7.26" in reason
    assert "mailer.example until you resume" in reason
    assert office.told == ["campaigns"]
    await office.pool.execute("update campaigns set state = 'running'")
    await office.take(mails.dsn(world, number=27, status="5.7.26", text=text), to=world.return_path(number=27))
    assert await office.pool.fetchval("select state from campaigns") == "running"  # resumed: counted anew


async def test_what_was_refused_while_sending_has_the_same_consequences(office: Office, world: World) -> None:
    await forward_campaign(office, 6)
    row = "insert into refusals (campaign_id, number, attempt, kind, at, batch, delivery_server_id, connection, size, status, category, "\
        "diagnostic, mta, recipient) values ($1, $2, 1, $3, now(), 1, 1, 1, 1, '', $4, $5, '', '')"  # fmt: skip

    async def refuse(number: int, kind: bytes, category: str, text: str) -> None:
        await office.pool.execute(row, world.campaign_id, number, kind, category, text)
        await office.worker.once()

    await refuse(1, b"b", "invalid-sender", "550 5.1.1 User unknown")  # an answer to MAIL FROM
    await refuse(2, b"x", "message-expired", "connection refused")  # no server answered
    await refuse(3, b"b", "policy-related", "550 5.7.26 unauthenticated mail from this sender is blocked")
    assert (await office.state(), await office.suppressions()) == ("subscribed", [])
    assert await office.pool.fetchval("select count(*) from soft_bounces") == 0
    await refuse(4, b"x", "message-expired", "452 4.2.2 Mailbox full")
    assert len(await office.pool.fetchval("select bounced_at from soft_bounces")) == 1
    await refuse(5, b"b", "bad-mailbox", "550 5.1.1 User unknown")
    assert await office.state() == "bounced"
    assert office.told == ["suppressions"]
    assert await office.pool.fetchval("select count(*) from refusals") == 0


async def test_mail_that_takes_too_much_is_kept_flagged_and_sent_to_the_administrator(pool: Pool, world: World) -> None:
    triage = TriageProcess(cpu_seconds=0.008)  # an ordinary mail takes one millisecond, the slow one forty
    office = Office(pool, world, Rules(), triage, admin_address="root@mailer.example")
    slow = mails.soup(recipients=2000)
    try:
        rows = await office.take(mails.dsn(world), slow, slow, mails.arf(world))
    finally:
        await triage.close()
    assert [row["kind"] for row in rows] == ["dsn", "unreadable", "unreadable", "arf"], [row["reason"] for row in rows]
    assert rows[1]["outcome"] == "unreadable"
    assert "processor time" in rows[1]["reason"]
    assert bytes(rows[1]["raw"]) == slow
    assert triage.restarts == 2
    assert [tuple(row) for row in await pool.fetch("select inbound_id, target, rule from forwards order by id")] == [
        (rows[1]["id"], "root@mailer.example", "notice"), (rows[2]["id"], "root@mailer.example", "notice"),
    ]  # fmt: skip


async def test_two_workers_never_count_a_message_twice(office: Office, world: World, pool: Pool) -> None:
    await forward_campaign(office, 60)
    for number in range(1, 61):
        to = [Received(recipient=world.return_path(number=number))]
        await inbound.keep(pool, peer=None, mail_from="", recipients=to, raw=mails.dsn(world, number=number), timeout_seconds=5)
    second = TriageProcess()
    other = Office(pool, world, Rules(), second)
    try:
        await asyncio.gather(office.worker.once(), other.worker.once())
        await asyncio.gather(office.worker.once(), other.worker.once())
    finally:
        await second.close()
    assert await pool.fetchval("select sum(messages) from inbound_totals") == 60
    assert await pool.fetchval("select count(*) from feedback") == 60
    assert await pool.fetchval("select hard from campaign_feedback") == 60


async def test_what_the_operator_says_of_a_reply_counts_in_reports_too(office: Office, world: World, pool: Pool) -> None:
    async with pool.acquire() as conn:
        await bounce_patterns.add(conn, Pattern("we do not want you", "Hard"))
    (row,) = await office.take(mails.dsn(world, status="5.7.1", text="550 5.7.1 We do not want you here"))
    assert (row["outcome"], await office.state()) == ("acted", "bounced"), row["reason"]
    assert "pattern we do not want you" in row["reason"]


async def test_words_that_look_like_an_escape_are_words(office: Office, world: World) -> None:
    (row,) = await office.take(mails.dsn(world, text=r"550 5.1.1 \u0000 User unknown"))
    assert (row["outcome"], await office.state()) == ("acted", "bounced"), row["reason"]


async def test_a_message_that_cannot_be_handled_is_flagged_alone(office: Office, world: World, pool: Pool) -> None:
    await pool.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'no such luck'; end $$; "
        "create trigger refuse before insert on feedback for each row when (new.number = 2) execute function refuse()"
    )
    await forward_campaign(office, 3)
    ids = []
    for number in (1, 2, 3):
        to = [Received(recipient=world.return_path(number=number))]
        raw = mails.dsn(world, number=number)
        ids += await inbound.keep(pool, peer=None, mail_from="", recipients=to, raw=raw, timeout_seconds=5)
    with pytest.raises(asyncpg.RaiseError):
        await office.worker.once()  # the group fails, and is taken apart
    while await office.worker.once():
        pass
    rows = await pool.fetch("select outcome, reason from inbound_messages order by id")
    assert [row["outcome"] for row in rows] == ["acted", "unreadable", "acted"]
    assert "no such luck" in rows[1]["reason"]
    assert await office.state() == "bounced"


async def test_the_administrator_gets_ten_an_hour_and_old_mail_goes(pool: Pool, world: World) -> None:
    triage = TriageProcess()
    office = Office(pool, world, Rules(), triage, admin_address="root@mailer.example", keep_days=1.0)
    try:
        forged = mails.dsn(world, original=mails.header(world, token=""))
        rows = await office.take(*[forged] * 15, to="postmaster@bounce.mailer.example")
        assert {row["outcome"] for row in rows} == {"unproven"}
        assert await pool.fetchval("select count(*) from forwards") == 10
        await pool.execute("update inbound_messages set handled_at = now() - interval '2 days'")
        await pool.execute("update forwards set created_at = now() - interval '31 days' where inbound_id > $1", rows[1]["id"])
        again = Office(pool, world, Rules(), triage, keep_days=1.0)
        while await again.worker.once():
            pass
        assert await pool.fetchval("select count(*) from inbound_messages") == 0  # what is sent on has a copy of its own
        assert [bytes(row["raw"]).endswith(forged) for row in await pool.fetch("select raw from message_parts")] == [True] * 10
        assert await pool.fetchval("select count(*) from forwards") == 2
    finally:
        await triage.close()
