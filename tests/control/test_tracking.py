"""Followed links through the API: refused when saved, fixed when started, reported to their owner only."""

from store import tracking
from store.postgres import Pool, connection
from store.tracking import Visit
from tests.control.conftest import Client
from tests.control.test_campaigns import draft

HTML = '<body><a href="https://a.example/?x=1&amp;y=2">a</a><a href="https://b.example/{{ subscriber.id }}">b</a></body>'


async def test_links_are_fixed_when_the_campaign_starts(ada: Client, eve: Client, pool: Pool) -> None:
    made = await draft(ada, html=HTML, track_links=True, track_opens=True, utm_source="news", utm_medium="e mail")
    assert (made["track_links"], made["track_opens"], made["utm_source"], made["utm_medium"]) == (True, True, "news", "e mail")
    path = f"/campaigns/{made['id']}"
    assert (await ada.ok("GET", f"{path}/tracking"))["links"] == []
    assert (await ada.ok("PATCH", path, json={"utm_medium": "email"}))["utm_medium"] == "email"
    await ada.ok("POST", f"{path}/start")
    visits = [Visit(made["id"], 1, kind, link, 1.7e9, "", "x") for kind, link in (("o", 0), ("c", 1))]
    await tracking.record(pool, "x.visits", 0, 1, visits, timeout_seconds=5)
    found = await ada.ok("GET", f"{path}/tracking")
    assert [each["url"] for each in found["links"]] == ["https://a.example/?x=1&y=2&utm_source=news&utm_medium=email", ""]
    assert (found["openers"], found["clickers"], found["links"][0]["clicks"]) == (1, 1, 1)
    await eve.refused(404, "GET", f"{path}/tracking")
    assert await tracking.links(pool, eve.user_id, made["id"], timeout_seconds=5) == {}
    async with connection(pool) as conn:
        assert await conn.fetchval("select count(*) from campaign_links") == 2


async def test_a_link_that_cannot_be_followed_is_refused_when_it_is_saved(ada: Client) -> None:
    made = await draft(ada)
    path = f"/campaigns/{made['id']}"
    answer = await ada.refused(422, "PATCH", path, json={"html": '<a href="javascript:x">x</a>', "track_links": True})
    assert answer["errors"][0]["field"] == "html"
    assert "line 1, column 9" in answer["errors"][0]["reason"]
    await ada.ok("PATCH", path, json={"html": '<a href="javascript:x">x</a>'})
    await ada.refused(422, "PATCH", path, json={"track_links": True})
    await ada.refused(422, "PATCH", path, json={"utm_source": "a\nb"})
