"""Clicks and opens over real sockets: a redirect only to where the campaign leads, every verdict, nothing from a changed token."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from domain import links
from domain.links import LinkParts
from inbound.tracking import BURST_LINKS, GIF
from store import tracking
from store.postgres import Pool
from tests.inbound.conftest import World
from tests.inbound.test_web import Site

BROWSER = b"Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/148.0"
URLS = ["https://a.example/?x=1&y=2#z", "http://b.example/", "", "https://d.example/", "https://e.example/"]


@pytest.fixture
async def site(pool: Pool, world: World) -> AsyncIterator[Site]:
    async with pool.acquire() as conn:
        await tracking.keep_links(conn, world.campaign_id, URLS)
    async with Site(pool, world).running() as made:
        yield made


def click(world: World, link: int, own: str = "") -> str:
    key = world.keyring.derive
    token = links.token(key("click"), LinkParts(world.user_id, world.campaign_id, 1))
    token += links.link_part(key("click-link"), world.user_id, world.campaign_id, link)
    return token + (f"/{links.seal_destination(key('click-destination'), token, own)}" if own else "")


def pixel(world: World) -> str:
    return links.token(world.keyring.derive("open"), LinkParts(world.user_id, world.campaign_id, 1))


async def get(site: Site, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    agent = headers.pop("agent", BROWSER.decode())
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    more += f"Connection: close\r\nUser-Agent: {agent}\r\n"
    answer = await site.raw(f"{method} {path} HTTP/1.1\r\nHost: t\r\n{more}\r\n".encode("latin-1"))
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), content


async def test_a_click_is_redirected_to_where_the_campaign_leads(site: Site, world: World) -> None:
    for link, url in enumerate(URLS, 1):
        status, headers, _ = await get(site, f"/c/{click(world, link)}")
        if url:
            assert (status, headers["location"]) == (302, url)
            assert headers["cache-control"] == "no-store"
        else:
            assert (status, "location" in headers) == (404, False)
    assert [(visit.kind, visit.link, visit.number) for visit in site.visits][:2] == [("c", 1, 1), ("c", 2, 1)]
    assert site.visits[0].agent == BROWSER.decode()


async def test_an_appended_query_does_not_break_a_link(site: Site, world: World) -> None:
    assert (await get(site, f"/c/{click(world, 1)}?fbclid=x"))[1]["location"] == URLS[0]


async def test_a_personal_link_leads_where_its_signature_says(site: Site, world: World) -> None:
    url = "https://p.example/?n=1&u=https://other.example/"
    status, headers, _ = await get(site, f"/c/{click(world, 3, url)}")
    assert (status, headers["location"]) == (302, url)


async def test_only_web_addresses_are_redirected_to_even_if_signed(site: Site, world: World) -> None:
    for url in ("javascript:alert(1)", "data:,x", "//evil.example", "ftp://a.example"):
        status, headers, _ = await get(site, f"/c/{click(world, 3, url)}")
        assert (status, "location" in headers) == (404, False)
    assert site.visits == []


async def test_no_changed_token_redirects_or_counts(site: Site, world: World) -> None:
    personal = click(world, 3, "https://p.example/")
    spellings: list[str] = []
    for path in (click(world, 1), personal):
        spellings += [path[:at] + ("A" if path[at] != "A" else "B") + path[at + 1 :] for at in range(len(path))]
        spellings += [path[:-1], path + "A", path + "=", "%41" + path, path + "%00", path.upper(), path + "/", path * 40]
    head, _, tail = personal.rpartition("/")
    spellings += [f"{click(world, 1)}/{tail}", tail, head[:-8], "", "/", f"{pixel(world)}{head[-8:]}", world.token, "x" * 60_000]
    other = LinkParts(world.user_id + 1, world.campaign_id, 1)
    derive = world.keyring.derive
    stranger = links.token(derive("click"), other) + links.link_part(derive("click-link"), other.user_id, other.campaign_id, 1)
    answers = []
    for at in range(0, len(spellings), 20):
        answers += await asyncio.gather(*(get(site, f"/c/{text}") for text in [*spellings, stranger][at : at + 20]))
    assert {status for status, _, _ in answers} <= {404, 400}
    assert not any("location" in headers for _, headers, _ in answers)
    assert site.visits == []


async def test_the_pixel_is_an_image_that_nobody_keeps(site: Site, world: World) -> None:
    status, headers, body = await get(site, f"/o/{pixel(world)}")
    assert (status, headers["content-type"], body) == (200, "image/gif", GIF)
    assert "no-store" in headers["cache-control"]
    assert [(visit.kind, visit.link, visit.bot) for visit in site.visits] == [("o", 0, "")]
    status, headers, _ = await get(site, f"/o/{click(world, 1)[:-8]}")
    assert (status, headers["content-type"]) == (404, "text/html; charset=utf-8")


@pytest.mark.parametrize(
    ("method", "headers", "verdict"),
    [
        ("GET", {}, ""),
        ("HEAD", {}, "head"),
        ("GET", {"Sec_Purpose": "prefetch;prerender"}, "prefetch"),
        ("GET", {"X_Moz": "prefetch"}, "prefetch"),
        ("GET", {"agent": "Mozilla/5.0 (compatible; bingbot/2.0)"}, "agent"),
        ("GET", {"agent": "Barracuda Sentinel (EE)"}, "agent"),
        ("GET", {"agent": "python-requests/2.32"}, "agent"),
        ("GET", {"agent": ""}, "agent"),
        ("GET", {"agent": "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)"}, ""),
    ],
)
async def test_machines_get_the_same_answer_and_another_verdict(
    site: Site, world: World, method: str, headers: dict[str, str], verdict: str
) -> None:
    status, found, body = await get(site, f"/c/{click(world, 1)}", method, **headers)
    assert (status, found["location"]) == (302, URLS[0])
    assert (method == "HEAD") == (body == b"")
    assert [visit.bot for visit in site.visits] == [verdict]


async def test_a_thousand_visits_of_one_token_are_one(site: Site, world: World, pool: Pool) -> None:
    for _ in range(20):
        await asyncio.gather(*(get(site, f"/c/{click(world, 1)}") for _ in range(50)))
    assert len(site.visits) == 1
    site.now += 61
    await get(site, f"/c/{click(world, 1)}")
    assert len(site.visits) == 2
    assert await pool.fetchval("select state from subscribers") == "subscribed"


async def test_all_links_at_once_are_a_scanners(site: Site, world: World) -> None:
    own = click(world, 3, "https://p.example/")
    for path in (click(world, 1), click(world, 2), own, click(world, 4), click(world, 5)):
        await get(site, f"/c/{path}")
    assert [visit.bot for visit in site.visits] == [""] * (BURST_LINKS - 1) + ["burst", "burst"]
    site.now += 100
    await get(site, f"/c/{click(world, 2)}")
    assert site.visits[-1].bot == ""


async def test_links_take_no_post(site: Site, world: World) -> None:
    for path in (f"/c/{click(world, 1)}", f"/o/{pixel(world)}"):
        status, headers, _ = await site.ask("POST", path, b"x=1")
        assert (status, headers["allow"], "location" in headers) == (405, "get, head", False)
    assert site.visits == []


async def test_known_links_work_while_the_database_is_away(site: Site, world: World, pool: Pool) -> None:
    assert (await get(site, f"/c/{click(world, 1)}"))[0] == 302
    await pool.close()
    assert (await get(site, f"/c/{click(world, 2)}"))[1]["location"] == URLS[1]
    assert (await get(site, f"/o/{pixel(world)}"))[0] == 200
    assert (await get(site, f"/c/{click(world, 3, 'https://p.example/')}"))[0] == 302
    assert len(site.visits) == 4


async def test_links_nobody_asked_for_yet_ask_for_patience_while_the_database_is_away(site: Site, world: World, pool: Pool) -> None:
    await pool.close()
    status, headers, _ = await get(site, f"/c/{click(world, 1)}")
    assert (status, headers["retry-after"], "location" in headers) == (503, "60", False)
