"""Click ids out, postbacks in, and the abuse form: whose they are is proved, repeated ones change nothing."""

import time
from pathlib import Path

import pytest

from compose.campaign import CompiledCampaign
from domain import links
from domain.campaign import Recipient
from domain.links import LinkParts
from store import campaigns, conversions, egress, inbound, messages, postgres
from store.conversions import S2sSettings
from store.postgres import Pool, transaction
from tests.inbound.conftest import World
from tests.inbound.test_tracking import click, get
from tests.inbound.test_tracking import site as site
from tests.inbound.test_web import Site


def user_token(world: World, user_id: int = 0) -> str:
    return links.token(world.keyring.derive("s2s"), LinkParts(user_id or world.user_id, 0, 0))


async def converts(pool: Pool, world: World) -> None:
    await pool.execute("update campaigns set track_conversions = true where id = $1", world.campaign_id)


async def test_a_click_brings_an_id_along_and_its_postback_counts_once(site: Site, world: World, pool: Pool) -> None:
    _, headers, _ = await get(site, f"/c/{click(world, 1)}")
    assert headers["location"] == "https://a.example/?x=1&y=2#z", "the campaign wants none"
    await converts(pool, world)
    site.now += 61
    _, headers, _ = await get(site, f"/c/{click(world, 1)}")
    before, _, click_id = headers["location"].removesuffix("#z").rpartition("click_id=")
    assert before == "https://a.example/?x=1&y=2&"
    _, headers, _ = await get(site, f"/c/{click(world, 3, 'https://p.example/a')}")
    assert headers["location"] == f"https://p.example/a?click_id={click_id}"

    path = f"/s/{user_token(world)}?click_id={click_id}"
    assert (await get(site, f"{path}&value=19,90&unit=%24&channel=ads&transaction_id=t1"))[::2] == (200, b"recorded\n")
    assert (await get(site, f"{path}&value=19,90&unit=%24&channel=ads&transaction_id=t1"))[::2] == (200, b"known\n")
    assert (await site.ask("POST", f"/s/{user_token(world)}", f"click_id={click_id}&value=5&transaction_id=t2".encode()))[0] == 200
    assert (await get(site, path, "HEAD"))[0] == 405
    async with pool.acquire() as conn:
        found = await conversions.report(conn, world.campaign_id)
    assert (found.conversions, found.converters) == (2, 1)
    assert [(each.channel, each.unit, each.value) for each in found.channels] == [("", "", 5.0), ("ads", "$", 19.9)]


async def test_a_user_names_the_parameters_himself(site: Site, world: World, pool: Pool) -> None:
    await converts(pool, world)
    async with transaction(pool) as conn:
        named = S2sSettings(parameter="cid", value_parameter="payout", unit="$", channel="voluum")
        await conversions.set_settings(conn, world.user_id, named)
    _, headers, _ = await get(site, f"/c/{click(world, 2)}")
    click_id = headers["location"].removeprefix("http://b.example/?cid=")
    assert (await get(site, f"/s/{user_token(world)}?cid={click_id}&payout=7"))[0] == 200
    row = await pool.fetchrow("select number, value::int as value, unit, channel from conversions")
    assert row is not None
    assert tuple(row) == (1, 7, "$", "voluum")


@pytest.mark.parametrize(
    ("query", "status"),
    [("", 400), ("click_id=x", 404), ("click_id={id}&value=nan", 400), ("click_id={id}&value=abc", 400), ("click_id={id}&value=1e15", 400),
     ("click_id={id}&unit=" + "x" * 101, 400), ("click_id={id}&channel=a%0Ab", 400), ("click_id={other}", 404), ("%ff", 400)],
)  # fmt: skip
async def test_what_is_no_postback_of_ours_is_refused(site: Site, world: World, pool: Pool, query: str, status: int) -> None:
    key = world.keyring.derive("click-id")
    good, other = (links.token(key, LinkParts(user, world.campaign_id, 1)) for user in (world.user_id, world.user_id + 1))
    assert (await get(site, f"/s/{user_token(world)}?{query.format(id=good, other=other)}"))[0] == status
    assert (await get(site, f"/s/{user_token(world)[:-1]}x?click_id={good}"))[0] == 404
    assert await pool.fetchval("select count(*) from conversions") == 0


async def test_a_reader_reports_abuse_and_gets_no_more_mail_of_this_user(site: Site, world: World, pool: Pool) -> None:
    _, _, page = await get(site, f"/u/{world.token}")
    assert f'href="/a/{world.token}"'.encode() in page
    status, _, page = await get(site, f"/a/{world.token}")
    assert (status, b"<textarea" in page) == (200, True)
    assert (await get(site, f"/a/{world.token}", "HEAD"))[0] == 200
    assert await pool.fetchval("select count(*) from suppressions") == 0, "looking changes nothing"
    for _ in range(2):
        assert (await site.ask("POST", f"/a/{world.token}", b"reason=unasked&comment=Stop%0Anow%00"))[0] == 200
    assert site.told == 1
    found = await pool.fetch("select user_id, list_id, email_key, reason from suppressions where reason = 'complained'")
    assert [tuple(row) for row in found] == [(world.user_id, None, "ada@reader.example", "complained")]
    row = await pool.fetchrow("select kind, action, effect, details->>'reason' as reason, details->>'comment' as comment from feedback")
    assert row is not None
    assert tuple(row) == ("f", "abuse", "complained", "unasked", "Stop\nnow")
    changed = world.token[:-2] + ("AA" if world.token[-2:] != "AA" else "BB")
    assert (await site.ask("POST", f"/a/{changed}", b""))[0] == 404


async def test_what_comes_while_postgresql_is_away_is_kept_and_carried_out_once(
    world: World, pool: Pool, fresh_database_url: str, tmp_path: Path
) -> None:
    gone = await postgres.open_pool(fresh_database_url, 1)
    gone.terminate()
    click_id = links.token(world.keyring.derive("click-id"), LinkParts(world.user_id, world.campaign_id, 1))
    path = f"/s/{user_token(world)}?click_id={click_id}&value=3&transaction_id=t9"
    before = time.time()
    async with Site(gone, world, tmp_path / "r").running() as away:
        for _ in range(2):  # trackers repeat themselves
            assert (await get(away, path))[::2] == (200, b"kept\n")
            assert (await away.ask("POST", f"/a/{world.token}", b"reason=unasked"))[0] == 200
        assert (await get(away, path.replace("value=3&transaction_id=t9", "value=nan")))[::2] == (200, b"kept\n")
        assert (await get(away, f"/s/{user_token(world)}?click_id=x"))[0] == 404
        assert (await get(away, path.replace(f"/s/{user_token(world)}", "/s/x")))[0] == 404
    after = time.time()
    async with Site(gone, world, budget_bytes=10).running() as full:
        assert (await get(full, path))[0] == 503
    async with Site(pool, world, tmp_path / "r").running() as back:
        # Behind what was kept, of which the number that is none is said in the log, and done with
        assert (await back.ask("POST", f"/u/{world.token}"))[0] == 200
    rows = await pool.fetch("select number, value::int as value, transaction, extract(epoch from at)::float8 as at from conversions")
    assert [tuple(row)[:3] for row in rows] == [(1, 3, "t9")]
    assert before - 0.01 <= rows[0]["at"] <= after + 0.01
    assert await pool.fetchval("select count(*) from suppressions where reason = 'complained'") == 1
    assert await pool.fetchval("select count(*) from feedback") == 1


async def test_the_copy_of_an_unsubscribe_is_a_message_of_its_own(world: World, pool: Pool) -> None:
    await pool.execute("update campaigns set from_email = 'news@mailer.example' where id = $1", world.campaign_id)
    for expected in (True, False):
        async with transaction(pool) as conn:
            done = await inbound.unsubscribe(
                conn, world.user_id, world.campaign_id, 1, note="x", timeout_seconds=5, copy_to="leavers@mailer.example"
            )
        assert done is expected
    rows = await pool.fetch("select number, email, data::text as data from recipients where campaign_id <> $1", world.campaign_id)
    assert [row["email"] for row in rows] == ["leavers@mailer.example"]
    async with pool.acquire() as conn:
        [message] = await messages.list_messages(conn, world.user_id, None, 10)
        content = await campaigns.content(conn, message.campaign_id, message.part)
        way = await egress.get(conn, world.user_id, message.delivery_server_id)
    recipient = Recipient(rows[0]["number"], -1, rows[0]["email"], rows[0]["data"].encode())
    [built] = CompiledCampaign(content, way, world.keyring, "http://127.0.0.1:8080").build([recipient], composed_at=1.7e9, attempt=1)
    assert isinstance(built, tuple)
    assert b"\r\nSubject: Unsubscribed: Ada@reader.example\r\n" in built[2]
    assert b"has left the list News (campaign" in built[2].replace(b"=20", b" ")
    assert b"List-Unsubscribe" not in built[2]
