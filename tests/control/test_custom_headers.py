"""Custom headers through the API: by class and server, refused when they could break a message, fixed when a campaign starts."""

from store import campaigns, engines
from store.postgres import Pool, connection
from tests.control.conftest import Client
from tests.control.test_campaigns import draft


async def headers_of(pool: Pool, campaign_id: int) -> list[str]:
    async with connection(pool) as conn:
        content = await campaigns.content(conn, campaign_id)
    assert await engines.campaign_content(pool, campaign_id) == (content, content.mail_class)
    return [name for name, _ in content.headers]


async def test_a_header_goes_where_its_class_and_server_say(ada: Client, eve: Client, pool: Pool) -> None:
    one = await draft(ada, name="one")
    other = await draft(ada, name="other", mail_class="transactional")
    for name, more in (
        ("X-All", {}),
        ("X-Marketing", {"mail_classes": ["marketing", "autoresponder"]}),
        ("X-One", {"delivery_server_id": one["delivery_server_id"]}),
        ("X-Both", {"delivery_server_id": other["delivery_server_id"], "mail_classes": ["transactional"]}),
    ):
        await ada.ok("POST", "/headers", json={"name": name, "value": "%Campaign:ID%", **more})
    await eve.ok("POST", "/headers", json={"name": "X-Eve", "value": "x"})
    assert await headers_of(pool, one["id"]) == ["X-All", "X-Marketing", "X-One"]
    assert await headers_of(pool, other["id"]) == ["X-All", "X-Both"]


async def test_a_started_campaign_keeps_its_headers(ada: Client, pool: Pool) -> None:
    made = await draft(ada)
    first = await ada.ok("POST", "/headers", json={"name": "X-First", "value": "1"})
    await ada.ok("POST", f"/campaigns/{made['id']}/start")
    await ada.ok("DELETE", f"/headers/{first['id']}")
    await ada.ok("POST", "/headers", json={"name": "X-Second", "value": "2"})
    assert await headers_of(pool, made["id"]) == ["X-First"]
    plain = await draft(ada, name="plain")
    assert await headers_of(pool, plain["id"]) == ["X-Second"]


async def test_what_could_break_a_message_is_refused_by_field(ada: Client, eve: Client) -> None:
    for field, body in (
        ("name", {"name": "Subject", "value": "x"}),
        ("name", {"name": "X Y", "value": "x"}),
        ("value", {"name": "X-A", "value": "a\r\nBcc: x@y.example"}),
        ("value", {"name": "X-A", "value": "{{ x | nothing }}"}),
        ("value", {"name": "X-A", "value": ""}),
        ("mail_classes[0]", {"name": "X-A", "value": "x", "mail_classes": ["spam"]}),
    ):
        answer = await ada.refused(422, "POST", "/headers", json=body)
        assert answer["errors"][0]["field"] == field, answer
    server = await eve.ok("POST", "/delivery-servers", json={"name": "e", "host": "127.0.0.1"})
    await ada.refused(404, "POST", "/headers", json={"name": "X-A", "value": "x", "delivery_server_id": server["id"]})
    assert (await ada.ok("GET", "/headers"))["items"] == []


async def test_two_of_one_name_hold_the_start_and_say_why(ada: Client) -> None:
    made = await draft(ada)
    for value in "ab":
        await ada.ok("POST", "/headers", json={"name": "X-Same", "value": value})
    answer = await ada.refused(422, "POST", f"/campaigns/{made['id']}/start")
    assert "same name" in answer["detail"]


async def test_headers_of_others_do_not_exist(ada: Client, eve: Client) -> None:
    made = await ada.ok("POST", "/headers", json={"name": "X-A", "value": "x", "mail_classes": ["marketing"]})
    assert (made["mail_classes"], made["delivery_server_id"]) == (["marketing"], None)
    await eve.refused(404, "DELETE", f"/headers/{made['id']}")
    assert (await eve.ok("GET", "/headers"))["items"] == []
    assert [each["name"] for each in (await ada.ok("GET", "/headers"))["items"]] == ["X-A"]
    await ada.ok("DELETE", f"/headers/{made['id']}")
    await ada.refused(404, "DELETE", f"/headers/{made['id']}")
