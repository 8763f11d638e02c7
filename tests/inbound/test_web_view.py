"""The web view: what was sent, rendered again, for whoever holds the link; nothing else."""

from collections.abc import AsyncIterator

import pytest

from compose.campaign import CompiledCampaign
from domain import links
from domain.errors import Invalid
from domain.links import LinkParts
from store import feed, inbound
from store.postgres import Pool
from tests.compose.test_campaign import parsed
from tests.inbound.conftest import World
from tests.inbound.test_web import PUBLIC_URL, Site
from tests.store import seed

HTML = (
    "<html><body>\n<p>Hello {{ subscriber.first_name }}, &amp; {{ 'now' | date: '%H:%M:%S' }}</p>\n"
    '<a href="https://a.example/{{ subscriber.id }}">a</a><a href="https://b.example/">b</a><a href="{{ links.web_view }}">w</a>\n'
    "<script>x</script></body></html>"
)


class Sent(World):
    """A sent campaign of three recipients."""

    def token(self, number: int = 2, *, user_id: int = 0) -> str:  # type: ignore[override]
        return links.token(self.keyring.derive("web-view"), LinkParts(user_id or self.user_id, self.campaign_id, number))


@pytest.fixture
async def sent(pool: Pool, world: World) -> Sent:
    campaign = await seed.campaign(pool, recipients=3, html=HTML)
    await pool.execute("update campaigns set track_links = true, track_opens = true where id = $1", campaign)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 2)
    await pool.execute("update batches set queued_at = now() - interval '1 day' where campaign_id = $1 and batch = 1", campaign)
    user = await pool.fetchval("select user_id from campaigns where id = $1", campaign)
    return Sent(world.keyring, user, 0, campaign, 0, "")


@pytest.fixture
async def site(pool: Pool, sent: Sent) -> AsyncIterator[Site]:
    async with Site(pool, sent).running() as made:
        yield made


async def test_the_page_is_the_html_part_octet_for_octet(site: Site, sent: Sent, pool: Pool) -> None:
    status, headers, body = await site.ask("GET", f"/w/{sent.token()}")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    made = await inbound.sent(pool, sent.user_id, sent.campaign_id, 2, timeout_seconds=5)
    assert made is not None
    compiled = CompiledCampaign(made.content, made.server, sent.keyring, PUBLIC_URL)
    answer = compiled.build([made.recipient], composed_at=made.composed_at, attempt=1)[0]
    assert not isinstance(answer, Invalid)
    part = parsed(answer[2]).get_body(("html",))
    assert part is not None
    octets = part.get_payload(decode=True)
    assert isinstance(octets, bytes)
    assert octets.replace(b"\r\n", b"\n").rstrip(b"\n") == body
    assert b"Hello Ada 2" in body
    assert body.count(b"/c/") == 2
    assert f"/w/{sent.token()}".encode() in body


async def test_pages_run_no_programs_and_are_kept_nowhere(site: Site, sent: Sent) -> None:
    _, headers, _ = await site.ask("GET", f"/w/{sent.token()}")
    assert "script-src" not in headers["content-security-policy"]
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "allow-scripts" not in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"


async def test_what_is_not_ours_or_was_not_sent_is_not_there(site: Site, sent: Sent) -> None:
    token = sent.token()
    others = [token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :] for at in range(len(token))]
    others += [sent.token(3), sent.token(99), sent.token(user_id=sent.user_id + 1), token[:-1], token + "A", ""]
    others.append(links.token(sent.keyring.derive("unsubscribe"), LinkParts(sent.user_id, sent.campaign_id, 2)))
    for text in others:
        assert (await site.ask("GET", f"/w/{text}"))[0] == 404


async def test_a_deleted_server_and_other_data_change_nothing(site: Site, sent: Sent, pool: Pool) -> None:
    before = await site.ask("GET", f"/w/{sent.token()}")
    await pool.execute("update delivery_servers set deleted_at = now()")
    await pool.execute("update subscribers set data = '{}', state = 'unsubscribed'")
    assert (await site.ask("GET", f"/w/{sent.token()}"))[2] == before[2]


async def test_what_was_tried_again_through_another_server_is_shown_as_it_was_delivered(site: Site, sent: Sent, pool: Pool) -> None:
    _, _, first = await site.ask("GET", f"/w/{sent.token()}")
    fallback = await pool.fetchval(
        "insert into delivery_servers (user_id, name, host, port, security, link_domain) "
        "values ($1, 'other', 'o.example', 25, 'none', 'o.example') returning id",
        sent.user_id,
    )
    await pool.execute(
        "insert into batches (campaign_id, batch, attempt, first_number, last_number, numbers, queued_at, done) "
        "values ($1, 9, 2, 2, 2, '{2}', now() - interval '1 hour', '0')",
        sent.campaign_id,
    )
    await pool.execute(
        "insert into accounting (campaign_id, number, attempt, kind, at, batch, delivery_server_id, connection, size, status, category, "
        "diagnostic, mta, recipient) values ($1, 2, 2, 'd', now(), 9, $2, 1, 1, '2.0.0', '', '', '', ''), "
        "($1, 2, 1, 't', now() - interval '1 day', 1, $2, 1, 1, '4.0.0', '', '', '', '')",
        sent.campaign_id,
        fallback,
    )
    made = await inbound.sent(pool, sent.user_id, sent.campaign_id, 2, timeout_seconds=5)
    assert made is not None
    assert made.server.id == fallback
    _, _, body = await site.ask("GET", f"/w/{sent.token()}")
    assert b"https://o.example/c/" in body
    assert b"https://o.example/" not in first
    assert body != first


async def test_head_shows_nothing_and_post_is_refused(site: Site, sent: Sent) -> None:
    status, headers, body = await site.ask("HEAD", f"/w/{sent.token()}")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 100
    assert (await site.ask("POST", f"/w/{sent.token()}"))[0] == 405


async def test_while_the_database_is_away_the_page_asks_for_patience(site: Site, sent: Sent, pool: Pool) -> None:
    await pool.close()
    status, headers, _ = await site.ask("GET", f"/w/{sent.token()}")
    assert (status, headers["retry-after"]) == (503, "60")
