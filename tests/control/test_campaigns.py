"""Campaigns through the API: drafts, transitions, progress."""

import asyncio
from typing import Any

import redis.asyncio as redis_client

from domain import states
from store import feed
from store.postgres import Pool, connection
from tests.control.conftest import Client

TEXT = "Hello {{ first_name }}"


async def draft(client: Client, *, subscribers: int = 2, **changes: Any) -> dict[str, Any]:
    """A list, a delivery server and a campaign over them."""
    name = changes.get("name", "c")
    news = await client.ok("POST", "/lists", json={"name": name, "sender_email": "list@news.example"})
    rows = "email,first_name\n" + "".join(f"r{i}@news.example,R{i}\n" for i in range(subscribers))
    await client.ok("POST", f"/lists/{news['id']}/imports", content=rows.encode(), headers={"content-type": "text/csv"})
    server = await client.ok("POST", "/delivery-servers", json={"name": name, "host": "127.0.0.1", "mfrom": "bounce.news.example"})
    body = {"name": name, "subject": "News for {{ first_name }}", "from_email": "news@news.example", "text": TEXT}
    made: dict[str, Any] = await client.ok(
        "POST", "/campaigns", json={**body, "list_id": news["id"], "delivery_server_id": server["id"], **changes}
    )
    return made


async def prepare(pool: Pool, campaign_id: int) -> None:
    """What the feeder does first."""
    async with connection(pool) as conn:
        await feed.prepare(conn, campaign_id, 10)


async def test_a_draft_can_be_changed_until_it_is_started(ada: Client) -> None:
    made = await draft(ada)
    assert (made["state"], made["recipients"], made["text"]) == ("draft", 0, TEXT)
    path = f"/campaigns/{made['id']}"
    changed = await ada.ok("PATCH", path, json={"subject": "Other"})
    assert (changed["subject"], changed["text"]) == ("Other", TEXT)
    assert changed["version"] > made["version"]
    await ada.ok("POST", f"{path}/start")
    await ada.refused(409, "PATCH", path, json={"subject": "Late"})
    await ada.refused(409, "DELETE", path)
    other = await draft(ada, name="other")
    await ada.ok("DELETE", f"/campaigns/{other['id']}")
    await ada.refused(404, "GET", f"/campaigns/{other['id']}")
    page = await ada.ok("GET", "/campaigns?state=preparing")
    assert [(each["id"], each["text"]) for each in page["items"]] == [(made["id"], "")]


async def test_content_that_cannot_be_sent_is_refused_by_field(ada: Client) -> None:
    made = await draft(ada)
    cases: list[tuple[str, object]] = [
        ("subject", "a\r\nBcc: x@y.example"),
        ("subject", ""),
        ("subject", "{% if x %}"),
        ("html", "<p>{{ name"),
        ("text", "{% for x in y %}"),
        ("from_email", "x"),
        ("from_email", "a@b.example\r\nX: y"),
        ("from_name", "a\nb"),
        ("reply_to", "a@b@c.example"),
        ("name", "a\0b"),
        ("mail_class", "spam"),
        ("list_id", "7"),
    ]
    for field, value in cases:
        answer = await ada.refused(422, "PATCH", f"/campaigns/{made['id']}", json={field: value})
        assert answer["errors"][0]["field"].startswith(field), answer
    assert (await ada.ok("GET", f"/campaigns/{made['id']}")) == made


async def test_a_mistake_is_named_where_somebody_wrote_it(ada: Client) -> None:
    made = await draft(ada)
    broken = {"html": "<p>Hello</p>\n<p>{% if x %}</p>", "text": None}
    answer = await ada.refused(422, "PATCH", f"/campaigns/{made['id']}", json=broken)
    assert answer["errors"][0]["field"] == "html", "the text part was made of it"
    assert "line 2" in answer["errors"][0]["reason"]


async def test_a_campaign_without_content_is_a_draft_for_ever(ada: Client) -> None:
    made = await draft(ada, text=" ")
    answer = await ada.refused(422, "POST", f"/campaigns/{made['id']}/start", params={"force": "true"})
    assert answer["errors"] == [{"field": "html", "reason": "is empty, and so is text: there is nothing to send"}]


async def test_a_campaign_without_a_sender_takes_that_of_its_list_or_is_told_to_name_one(ada: Client) -> None:
    made = await draft(ada, from_email="")
    assert made["from_email"] == ""
    await ada.ok("PATCH", f"/lists/{made['list_id']}", json={"sender_email": ""})
    answer = await ada.refused(422, "PATCH", f"/campaigns/{made['id']}", json={"name": "other"})
    assert answer["errors"] == [{"field": "from_email", "reason": "is missing; give one, or give the list a sender address"}]


async def test_starting_twice_is_starting_once(ada: Client, redis: redis_client.Redis) -> None:
    made = await draft(ada)
    listening = redis.pubsub()
    await listening.subscribe("sluice:changes")
    await listening.get_message(timeout=1)
    answers = await asyncio.gather(*(ada.ok("POST", f"/campaigns/{made['id']}/start") for _ in range(5)))
    assert {(each["state"], each["version"]) for each in answers} == {("preparing", made["version"] + 1)}
    message = await listening.get_message(timeout=2)
    assert message is not None
    assert message["data"] == b"campaigns"
    await listening.aclose()


async def test_a_list_without_subscribers_cannot_be_mailed(ada: Client) -> None:
    made = await draft(ada, subscribers=0)
    answer = await ada.refused(422, "POST", f"/campaigns/{made['id']}/start")
    assert answer["errors"][0]["field"] == "list_id"
    assert (await ada.ok("GET", f"/campaigns/{made['id']}"))["state"] == "draft"


async def test_every_transition_is_the_table_s(ada: Client, pool: Pool) -> None:
    made = await draft(ada)
    path = f"/campaigns/{made['id']}"
    expected = {
        # state: what start, pause, resume, cancel lead to; None: refused with 409
        "draft": ("preparing", None, None, "cancelled"),
        "preparing": ("preparing", "paused", "preparing", "cancelling"),
        "running": ("running", "paused", "running", "cancelling"),
        "paused": (None, "paused", "running", "cancelling"),
        "cancelling": (None, None, None, "cancelling"),
        "cancelled": (None, None, None, "cancelled"),
        "completed": (None, None, None, None),
    }
    assert set(expected) == set(states.CAMPAIGN_STATES)
    for state, outcomes in expected.items():
        for verb, outcome in zip(("start", "pause", "resume", "cancel"), outcomes, strict=True):
            prepared = "now()" if state in ("running", "paused") else "null"
            await pool.execute(f"update campaigns set state = $2, prepared_at = {prepared} where id = $1", made["id"], state)
            if outcome is None:
                await ada.refused(409, "POST", f"{path}/{verb}")
            else:
                assert (await ada.ok("POST", f"{path}/{verb}"))["state"] == outcome, (state, verb)
                assert outcome == state or outcome in states.NEXT_CAMPAIGN_STATES[state]


async def test_a_campaign_paused_before_its_recipients_were_numbered_goes_on_preparing(ada: Client) -> None:
    made = await draft(ada)
    for verb, state in (("start", "preparing"), ("pause", "paused"), ("resume", "preparing")):
        assert (await ada.ok("POST", f"/campaigns/{made['id']}/{verb}"))["state"] == state


async def test_what_a_campaign_needs_cannot_be_deleted(ada: Client) -> None:
    made = await draft(ada)
    await ada.refused(409, "DELETE", f"/delivery-servers/{made['delivery_server_id']}")
    await ada.refused(409, "DELETE", f"/lists/{made['list_id']}")
    await ada.ok("POST", f"/campaigns/{made['id']}/cancel")
    await ada.ok("DELETE", f"/delivery-servers/{made['delivery_server_id']}")
    await ada.ok("DELETE", f"/lists/{made['list_id']}")


async def test_progress_report_and_recipients_tell_what_happened(ada: Client, pool: Pool) -> None:
    made = await draft(ada, subscribers=6)
    path = f"/campaigns/{made['id']}"
    assert (await ada.ok("GET", f"{path}/progress"))["recipients"] == 0
    await ada.ok("POST", f"{path}/start")
    await prepare(pool, made["id"])
    records = [
        (1, "d", 1, "2.0.0", ""),
        (2, "t", 1, "4.2.1", ""),
        (3, "t", 1, "4.2.1", ""),
        (3, "b", 2, "5.1.1", "bad-mailbox"),
        (4, "s", 1, "", ""),
    ]
    for number, kind, attempt, status, category in records:
        await pool.execute(
            "insert into accounting (campaign_id, number, attempt, kind, at, batch, delivery_server_id, connection, size, status, "
            'category, diagnostic, mta, recipient) values ($1, $2, $3, $4::text::"char", now(), 1, 1, 1, 100, $5, $6, $7, \'\', $8)',
            made["id"], number, attempt, kind, status, category, f"said {status}", f"r{number - 1}@news.example",
        )  # fmt: skip
    await pool.execute("insert into retries values ($1, 2, 2, now() + interval '1 minute', now())", made["id"])
    await pool.execute(
        "insert into campaign_totals (campaign_id, journal, delivered, bounced, suppressed, deferrals) "
        "values ($1, 'a', 1, 0, 1, 2), ($1, 'b', 0, 1, 0, 0)",
        made["id"],
    )
    progress = await ada.ok("GET", f"{path}/progress")
    expected = {
        "recipients": 6,
        "delivered": 1,
        "bounced": 1,
        "suppressed": 1,
        "queued": 3,
        "deferred": 1,
        "deferrals": 2,
        "state": "running",
    }
    assert {name: progress[name] for name in expected} == expected
    report = await ada.ok("GET", f"{path}/report")
    assert {(line["kind"], line["status"]): line["records"] for line in report["outcomes"]}["t", "4.2.1"] == 2
    found = {number: (await ada.ok("GET", f"{path}/recipients/{number}"))["state"] for number in range(1, 7)}
    assert found == {1: "delivered", 2: "deferred", 3: "bounced", 4: "suppressed", 5: "pending", 6: "pending"}
    one = await ada.ok("GET", f"{path}/recipients/R2@news.example")
    assert (one["number"], [(a["kind"], a["attempt"], a["diagnostic"]) for a in one["attempts"]]) == (
        3,
        [("t", 1, "said 4.2.1"), ("b", 2, "said 5.1.1")],
    )
    await ada.refused(404, "GET", f"{path}/recipients/7")
    await ada.refused(404, "GET", f"{path}/recipients/nobody@news.example")
