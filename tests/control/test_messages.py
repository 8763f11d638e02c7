"""Direct messages through the API: checked whole, named by place, taken once, seen by their owner only."""

from typing import Any

import msgspec
import pytest

from store import campaigns
from store.postgres import Pool, connection
from tests.control.conftest import Client

RECEIPT: dict[str, Any] = {
    "subject": "Order {{ subscriber.order }}",
    "from_email": "shop@sender.example",
    "text": "Thank you, {{ subscriber.name }}",
    "html": '<p>Thank you, {{ subscriber.name }}</p><a href="https://shop.example/">shop</a>',
}


async def server(client: Client, name: str = "relay") -> int:
    made = await client.ok("POST", "/delivery-servers", json={"name": name, "host": "127.0.0.1", "port": 2526, "mfrom": "b.sender.example"})
    return int(made["id"])


def body(server_id: int, *recipients: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**RECEIPT, "delivery_server_id": server_id, "recipients": list(recipients), **changes}


async def test_a_message_is_taken_shown_and_answered_again(ada: Client, eve: Client, pool: Pool) -> None:
    way = await server(ada)
    await ada.ok("POST", "/headers", json={"name": "X-Kind", "value": "receipt {{ subscriber.order }}", "mail_classes": ["transactional"]})
    await ada.ok("POST", "/headers", json={"name": "X-News", "value": "n", "mail_classes": ["marketing"]})
    wanted = body(
        way,
        {"email": "Ann@Shore.example", "data": {"order": 7, "name": "Ann", "items": [{"sku": "a"}]}, "headers": {"X-Order": "o-7"},
         "metadata": {"order": "7"}},
        {"email": "ben@hill.example", "data": {"order": 8}, "headers": {"X-Order": "o-8"}},
        name="receipts", metadata={"shop": "1"}, track_links=True,
    )  # fmt: skip
    response = await ada.call("POST", "/messages", json=wanted, headers={"idempotency-key": "one"})
    assert response.status_code == 202, response.text
    made = response.json()
    assert response.headers["location"] == f"/api/v1/messages/{made['id']}"
    assert (made["recipients"], made["outcomes"], made["metadata"]) == (2, {"queued": 2}, {"shop": "1"})
    assert made["mail_class"] == "transactional"
    again = await ada.call("POST", "/messages", json=wanted, headers={"idempotency-key": "one"})
    assert (again.json(), again.headers["idempotent-replayed"]) == (made, "true")
    await ada.refused(422, "POST", "/messages", json={**wanted, "subject": "x"}, headers={"idempotency-key": "one"})
    assert await ada.ok("GET", f"/messages/{made['id']}") == made
    found = (await ada.ok("GET", f"/messages/{made['id']}/recipients"))["items"]
    assert [(each["email"], each["state"], each["metadata"]) for each in found] == [
        ("Ann@shore.example", "queued", {"order": "7"}), ("ben@hill.example", "queued", {}),
    ]  # fmt: skip
    assert [each["id"] for each in (await ada.ok("GET", "/messages"))["items"]] == [made["id"]]
    for path in (f"/messages/{made['id']}", f"/messages/{made['id']}/recipients"):
        await eve.refused(404, "GET", path)
    assert (await eve.ok("GET", "/messages"))["items"] == []
    assert (await ada.ok("GET", "/campaigns"))["items"] == [], "a stream is no campaign"
    async with connection(pool) as conn:
        content = await campaigns.content(conn, made["campaign_id"], 1)
    assert [name for name, _ in content.headers] == ["X-Kind", "X-Order"]


async def test_everything_wrong_is_named_by_its_place_and_nothing_is_sent(ada: Client, pool: Pool) -> None:
    way = await server(ada)
    answer = await ada.refused(422, "POST", "/messages", json=body(
        way,
        {"email": "ok@a.example"},
        {"email": "no at"},
        {"email": "b@a.example", "data": {"Bad Name": 1}},
        {"email": "c@a.example", "data": {"order": "7\r\nBcc: x@y.example"}},
        {"email": "d@a.example", "headers": {"X-A": "a\nb"}},
    ))  # fmt: skip
    fields = [each["field"] for each in answer["errors"]]
    assert fields == ["recipients[1].email", "recipients[2].data.Bad Name", "recipients[4].headers.X-A", "recipients[3].data"]
    assert "(and 3 more)" in answer["detail"]
    assert await pool.fetchval("select count(*) from messages") == await pool.fetchval("select count(*) from campaigns") == 0


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("recipients", {"recipients": []}),
        ("recipients", {"recipients": [{"email": "a@b.example"}] * 1001}),
        ("subject", {"subject": "a\nb"}),
        ("text", {"text": "", "html": ""}),
        ("html", {"html": "{{ x | nothing }}"}),
        ("html", {"html": "<p>{% if x %}</p>", "text": None}),
        ("list_id", {"mail_class": "marketing"}),
        ("headers.Subject", {"headers": {"Subject": "x"}}),
        ("headers.X-A", {"headers": {"X-A": "{{ x | nothing }}"}}),
        ("recipients[].headers.Bcc", {"recipients": [{"email": "a@b.example", "headers": {"Bcc": "x@y.example"}}]}),
        ("headers.X-A", {"headers": {"X-A": "1"}, "recipients": [{"email": "a@b.example", "headers": {"x-a": "2"}}]}),
        ("metadata", {"metadata": {str(n): "" for n in range(51)}}),
        ("recipients[0].nmae", {"recipients": [{"email": "a@b.example", "nmae": "x"}]}),
        ("recipients[0].data", {"recipients": [{"email": "a@b.example", "data": {"a": "x" * 70_000}}]}),
        ("from_email", {"from_email": "x"}),
    ],
)
async def test_what_cannot_be_sent_is_refused(ada: Client, field: str, changes: dict[str, Any]) -> None:
    answer = await ada.refused(422, "POST", "/messages", json=body(await server(ada), {"email": "a@b.example"}, **changes))
    assert answer["errors"][0]["field"] == field, answer


async def test_a_text_part_is_made_from_the_html_unless_none_is_wanted(ada: Client, pool: Pool) -> None:
    way = await server(ada)
    html = "<p>Hi {{ subscriber.name }}</p>"
    for text, expected in ((None, "Hi {{ subscriber.name }}"), ("", "")):
        wanted = {**body(way, {"email": "a@b.example"}, html=html), "text": text}
        made = await ada.ok("POST", "/messages", json={name: value for name, value in wanted.items() if value is not None})
        query = "select content->>'text' from message_parts join messages m using (part) where m.id = $1"
        stored = await pool.fetchval(query, made["id"])
        assert stored.strip() == expected


async def test_ways_and_lists_of_others_do_not_exist(ada: Client, eve: Client) -> None:
    way = await server(ada)
    theirs = await eve.ok("POST", "/lists", json={"name": "theirs"})
    await eve.refused(404, "POST", "/messages", json=body(way, {"email": "a@b.example"}))
    await ada.refused(404, "POST", "/messages", json=body(way, {"email": "a@b.example"}, list_id=theirs["id"], mail_class="autoresponder"))


async def test_a_stream_of_lines_is_taken_whole_or_not_at_all(ada: Client, pool: Pool) -> None:
    way = await server(ada)
    content = {name: value for name, value in body(way).items() if name != "recipients"}
    lines = [msgspec.json.encode(content)]
    lines += [msgspec.json.encode({"email": f"p{n}@a.example", "data": {"order": n}, "headers": {"X-N": f"{n}"}}) for n in range(2500)]
    headers = {"content-type": "application/x-ndjson"}
    made = await ada.ok("POST", "/messages/stream", content=b"\n".join(lines) + b"\n\n", headers=headers)
    assert (made["recipients"], made["first_number"]) == (2500, 1)
    row = await pool.fetchrow("select email, data::text from recipients where campaign_id = $1 and number = 2500", made["campaign_id"])
    assert row is not None
    assert (row[0], msgspec.json.decode(row[1])) == ("p2499@a.example", {"order": 2499, "recipient headers": {"X-N": "2499"}})
    assert await pool.fetchval("select array_agg(length(done) order by batch) from batches") == [500] * 5
    lines[1800] = b'{"email": "p1799@a.example", "data": {"order": "1\\n2"}, "headers": {}}'
    lines[2200] = b'{"email": "p'
    answer = await ada.refused(422, "POST", "/messages/stream", content=b"\n".join(lines), headers=headers)
    assert [each["field"] for each in answer["errors"]] == ["recipients[1799].data", "recipients[2199]"]
    for wrong in (b"", lines[0], b"[]\n" + lines[1], lines[0] + b"\n" + b" " * 300_000):
        await ada.refused(422, "POST", "/messages/stream", content=wrong, headers=headers)
    assert await pool.fetchval("select count(*) from messages") == 1


async def test_a_thousand_calls_make_one_stream(ada: Client, pool: Pool) -> None:
    way = await server(ada)
    before = await pool.fetchval("select count(*) from pg_class")
    first = await ada.ok("POST", "/messages", json=body(way, {"email": "p@a.example"}))
    tables = await pool.fetchval("select count(*) from pg_class")
    for n in range(40):
        made = await ada.ok("POST", "/messages", json=body(way, {"email": f"p{n}@a.example"}, text=f"text {n}"))
        assert made["campaign_id"] == first["campaign_id"]
    assert await pool.fetchval("select count(*) from pg_class") == tables > before
    other = await ada.ok("POST", "/messages", json=body(await server(ada, "other"), {"email": "p@a.example"}))
    assert other["campaign_id"] != first["campaign_id"]
