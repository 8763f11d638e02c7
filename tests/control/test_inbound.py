"""What came back through the API: whose it is, pages, and what others must not see."""

from domain import feedback
from store import inbound, received
from store.inbound import Received
from store.postgres import Pool, transaction
from store.received import Settled
from tests.control.conftest import Client
from tests.control.test_campaigns import draft


async def add_mail(pool: Pool, user_id: int | None, raw: bytes = b"Subject: x\r\n\r\nhello\r\n") -> int:
    to = [Received(recipient="b-x@bounce.example", user_id=user_id)]
    (message_id,) = await inbound.keep(pool, peer="192.0.2.1", mail_from="", recipients=to, raw=raw, timeout_seconds=5)
    reading = {"kind": "dsn", "failed": [{"recipient": "a@x.example", "status": "5.1.1"}]}
    async with transaction(pool) as conn:
        settled = Settled(id=message_id, kind="dsn", outcome=feedback.ACTED, reason="bad-mailbox", reading=reading)
        await received.settle(conn, [settled], timeout_seconds=5)
    return message_id


async def test_a_user_sees_mail_about_mail_of_its_own_and_an_administrator_all(ada: Client, eve: Client, admin: Client, pool: Pool) -> None:
    message = await add_mail(pool, ada.user_id)
    nobodys = await add_mail(pool, None)
    found = await ada.ok("GET", f"/inbound/messages/{message}")
    assert (found["kind"], found["outcome"], found["peer"]) == ("dsn", "acted", "192.0.2.1")
    assert found["reading"]["failed"][0]["status"] == "5.1.1"
    raw = await ada.call("GET", f"/inbound/messages/{message}/raw")
    assert (raw.content, raw.headers["content-type"]) == (b"Subject: x\r\n\r\nhello\r\n", "message/rfc822")
    for path in (f"/inbound/messages/{message}", f"/inbound/messages/{message}/raw", f"/inbound/messages/{nobodys}"):
        await eve.refused(404, "GET", path)
    assert [each["id"] for each in (await ada.ok("GET", "/inbound/messages"))["items"]] == [message]
    assert [each["id"] for each in (await admin.ok("GET", "/inbound/messages"))["items"]] == [nobodys, message]
    page = await admin.ok("GET", "/inbound/messages", params={"limit": 1, "kind": "dsn", "outcome": "acted"})
    assert page["next"] == nobodys
    assert [each["id"] for each in (await admin.ok("GET", "/inbound/messages", params={"before": nobodys}))["items"]] == [message]
    answer = await ada.refused(422, "GET", "/inbound/messages", params={"kind": "spam"})
    assert answer["errors"][0]["field"] == "kind"


async def test_events_and_rates_belong_to_the_user_of_the_campaign(ada: Client, eve: Client, pool: Pool) -> None:
    campaign = (await draft(ada))["id"]
    for number in (1, 2, 3):
        await pool.execute(
            "insert into feedback (kind, action, user_id, campaign_id, number, recipient, effect) "
            "values ('rb', 'failed', $1, $2, $3, 'r@x.example', 'hard')",
            ada.user_id, campaign, number,
        )  # fmt: skip
    page = await ada.ok("GET", "/feedback", params={"limit": 2, "kind": "rb"})
    rest = await ada.ok("GET", "/feedback", params={"after": page["next"], "campaign_id": campaign})
    assert [each["number"] for each in page["items"] + rest["items"]] == [1, 2, 3]
    assert (await eve.ok("GET", "/feedback"))["items"] == []
    await eve.refused(404, "GET", "/feedback", params={"campaign_id": campaign})
    await eve.refused(404, "GET", f"/campaigns/{campaign}/feedback")
    found = await ada.ok("GET", f"/campaigns/{campaign}/feedback")
    assert (found["remote_bounces"], found["bounce_rate"], found["pause_reason"]) == (0, None, "")
    assert await ada.ok("GET", "/feedback/domains", params={"days": 7}) == []
    await ada.refused(422, "GET", "/feedback/domains", params={"days": 0})
