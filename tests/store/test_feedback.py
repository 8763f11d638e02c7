"""Rates of what came back, and a recipient's state after a report."""

from store import accounting, campaigns, feed, feedback
from store.postgres import Pool, connection, transaction
from tests.store import seed


async def sent(pool: Pool) -> int:
    """A campaign of three: two delivered, one refused; then one report of failure and one complaint."""
    campaign = await seed.campaign(pool, recipients=3, state="running")
    async with transaction(pool) as conn:
        await feed.make_room(conn, campaign)
    await pool.execute(
        "insert into recipients select $1, row_number() over (order by id), id, email, '{}' from subscribers where list_id = "
        "(select list_id from campaigns where id = $1)",
        campaign,
    )
    await pool.execute("update campaigns set recipients = 3 where id = $1", campaign)
    for number, kind in ((1, b"d"), (2, b"d"), (3, b"b")):
        await pool.execute(
            "insert into accounting values ($1, $2, 1, $3, now(), 1, 1, 1, 1, '', '', '', '', $4)", campaign, number, kind,
            f"p{number}@people.example",
        )  # fmt: skip
    await pool.execute("insert into campaign_totals (campaign_id, journal, delivered, bounced) values ($1, 'e', 2, 1)", campaign)
    for number, event, action, effect in ((1, "rb", "failed", "hard"), (2, "f", "complaint", "complained")):
        await pool.execute(
            "insert into feedback (kind, action, user_id, campaign_id, number, recipient, effect) "
            "select $2, $3, user_id, id, $4, $5, $6 from campaigns where id = $1",
            campaign, event, action, number, f"p{number}@People.example", effect,
        )  # fmt: skip
    await pool.execute("insert into campaign_feedback (campaign_id, hard, remote_bounces, complaints) values ($1, 2, 1, 1)", campaign)
    return campaign


async def test_rates_by_campaign_recipient_domain_and_sender_domain(pool: Pool) -> None:
    campaign = await sent(pool)
    async with connection(pool) as conn:
        found = await feedback.of_campaign(conn, campaign)
        (domain,) = await feedback.of_sender_domains(conn, None, 30)
    assert (found.delivered, found.bounced, found.remote_bounces, found.complaints, found.hard) == (2, 1, 1, 1, 2)
    assert (found.bounce_rate, found.complaint_rate) == (0.666667, 0.5)
    assert [(each.domain, each.delivered, each.remote_bounces, each.complaints) for each in found.domains] == [("people.example", 2, 1, 1)]
    assert (domain.domain, domain.delivered, domain.bounce_rate) == ("sender.example", 2, 0.666667)


async def test_a_report_makes_a_delivered_recipient_bounced_and_the_audit_stays_true(pool: Pool) -> None:
    campaign = await sent(pool)
    async with connection(pool) as conn:
        states = [await campaigns.recipient(conn, campaign, number) for number in (1, 2, 3)]
        after = await feedback.events(conn, None, after=0, limit=10, kind="rb")
    assert [each.state for each in states] == ["bounced", "delivered", "bounced"]
    assert [[event.kind for event in each.feedback] for each in states] == [["rb"], ["f"], []]
    assert [event.number for event in after] == [1]
    audit = await accounting.audit(pool, campaign)
    assert audit.clean, audit
    assert (audit.delivered, audit.bounced, audit.multiple_terminal) == (2, 1, 0)
