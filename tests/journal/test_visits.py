"""journal.visits: every visit that was written is in PostgreSQL once, whenever the process or the server goes away."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from config import tasks
from domain.errors import JournalError, Unavailable
from journal.visits import Held, Visits
from store import tracking
from store.postgres import Pool, PooledConnection
from store.tracking import Visit
from tests.store.campaigns import make_campaign


def visit(campaign: int, number: int, link: int = 1, bot: str = "") -> Visit:
    return Visit(campaign, number, "c" if link else "o", link, 1_772_600_767.5 + number, bot, "Mozilla/5.0 é")


async def numbers(pool: Pool) -> list[int]:
    return [row["number"] for row in await pool.fetch("select number from events order by at, number")]


async def test_visits_are_carried_over_once_and_finished_files_go(pool: Pool, tmp_path: Path) -> None:
    campaign = await make_campaign(pool, 2)
    visits = Visits(tmp_path / "v", file_bytes=150)
    for number in range(1, 11):
        visits.add(visit(campaign, number))
    assert len(visits.files()) > 2
    for _ in range(2):
        await visits.catch_up(pool)
    assert await numbers(pool) == list(range(1, 11))
    assert len(visits.files()) == 1
    visits.add(visit(campaign, 11, link=0))
    await visits.catch_up(pool)
    assert await numbers(pool) == list(range(1, 12))
    row = await pool.fetchrow("select kind::text, link, extract(epoch from at)::float8 as at, bot, agent from events where number = 11")
    assert row is not None
    assert dict(row) == {"kind": "o", "link": 0, "at": 1_772_600_778.5, "bot": "", "agent": "Mozilla/5.0 é"}
    visits.close()


async def test_what_a_dead_process_left_is_carried_over_by_the_next(pool: Pool, tmp_path: Path) -> None:
    campaign = await make_campaign(pool, 2)
    first = Visits(tmp_path / "v")
    for number in (1, 2):
        first.add(visit(campaign, number))
    await first.catch_up(pool)
    first.add(visit(campaign, 3))
    path = first.files()[0]
    first.close()
    with path.open("ab") as file:
        file.write(b'[1,2,"c"')  # torn
    second = Visits(tmp_path / "v")
    second.add(visit(campaign, 4))
    await second.catch_up(pool)
    assert await numbers(pool) == [1, 2, 3, 4]
    assert path not in second.files()
    assert await pool.fetchval("select count(*) from journal_cursors where journal = $1", path.name) == 0
    second.close()


async def test_a_repeated_transaction_counts_nothing_twice(pool: Pool) -> None:
    campaign = await make_campaign(pool, 2)
    for _ in range(3):
        await tracking.record(pool, "x.visits", 0, 10, [visit(campaign, 1)], timeout_seconds=5)
    assert await numbers(pool) == [1]
    assert await tracking.position(pool, "x.visits", timeout_seconds=5) == 10


async def test_visits_of_campaigns_that_are_gone_hold_nothing_up(pool: Pool, tmp_path: Path) -> None:
    campaign = await make_campaign(pool, 2)
    visits = Visits(tmp_path / "v")
    for other in (campaign, 999_999, campaign):
        visits.add(visit(other, 1))
    (tmp_path / "v" / "0.visits").write_bytes(b"no visit\n")
    await visits.catch_up(pool)
    assert await numbers(pool) == [1, 1]
    visits.close()


async def test_a_full_disk_loses_visits_and_says_how_many(pool: Pool, tmp_path: Path) -> None:
    campaign = await make_campaign(pool, 2)
    visits = Visits(tmp_path / "v", budget_bytes=200)
    for number in range(1, 6):
        visits.add(visit(campaign, number))
    assert visits.recorded + visits.lost == 5
    assert visits.lost > 0
    await visits.catch_up(pool)
    assert len(await numbers(pool)) == visits.recorded
    visits.close()


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    visits = Visits(tmp_path / "v")
    with pytest.raises(JournalError, match="another process"):
        Visits(tmp_path / "v")
    visits.close()
    Visits(tmp_path / "v").close()


async def test_people_and_machines_are_told_apart_in_the_report(pool: Pool) -> None:
    campaign = await make_campaign(pool, 4)
    async with pool.acquire() as conn:
        await tracking.keep_links(conn, campaign, ["https://a.example/", "https://b.example/", ""])
    at = 1_772_600_767.0
    events = [
        Visit(campaign, 1, "o", 0, at, "", "x"),
        Visit(campaign, 1, "c", 1, at, "", "x"),
        Visit(campaign, 1, "c", 1, at + 100, "", "x"),
        Visit(campaign, 2, "c", 2, at, "head", "x"),
        *(Visit(campaign, 3, "c", link, at + link, "burst" if link == 3 else "", "x") for link in (1, 2, 3)),
        Visit(campaign, 3, "c", 1, at + 3600, "", "x"),
        Visit(campaign, 4, "o", 0, at, "prefetch", "x"),
    ]
    await tracking.record(pool, "x.visits", 0, 1, events, timeout_seconds=5)
    async with pool.acquire() as conn:
        found = await tracking.report(conn, campaign)
    assert (found.opens, found.openers, found.bot_opens) == (1, 2, 1)
    assert (found.clicks, found.clickers, found.bot_clicks) == (3, 2, 4)
    assert [(each.link, each.clicks, each.clickers, each.bot_clicks) for each in found.links] == [(1, 3, 2, 1), (2, 0, 0, 2), (3, 0, 0, 1)]
    assert [each.url for each in found.links] == ["https://a.example/", "https://b.example/", ""]


async def test_who_opens_or_clicks_before_anybody_can_have_read_is_a_machine(pool: Pool) -> None:
    campaign = await make_campaign(pool, 3)
    at = 1_772_600_767.0
    await pool.execute(
        "insert into accounting select $1, n, 1, 'd', to_timestamp($2::float8), 1, 1, 1, 1, '', '', '', '', '' "
        "from generate_series(1, 2) n",
        campaign,
        at,
    )
    events = [
        Visit(campaign, 1, "c", 1, at - 1, "", "x"),  # while the server still looks at it
        Visit(campaign, 1, "o", 0, at + 1, "", "x"),
        Visit(campaign, 1, "c", 1, at + 3, "", "x"),
        Visit(campaign, 2, "o", 0, at + 1.5, "", "x"),
        Visit(campaign, 3, "o", 0, at, "", "x"),  # its delivery is not recorded yet
    ]
    await tracking.record(pool, "x.visits", 0, 1, events, timeout_seconds=5)
    async with pool.acquire() as conn:
        found = await tracking.report(conn, campaign)
    assert (found.opens, found.openers, found.bot_opens) == (1, 2, 2)
    assert (found.clicks, found.clickers, found.bot_clicks) == (1, 1, 1)


def test_the_names_of_files_tell_their_order(tmp_path: Path) -> None:
    visits = Visits(tmp_path / "v", file_bytes=1)
    for number in range(3):
        visits.add(visit(1, number))
    written = [path.read_bytes() for path in visits.files()]
    assert [b",%d," % number in line for number, line in enumerate(written)] == [True] * 3
    assert all(path.stat().st_mode & 0o007 == 0 for path in visits.files())
    visits.close()


async def test_what_is_held_is_carried_out_in_order_and_once_however_often_it_breaks_off(pool: Pool, tmp_path: Path) -> None:
    campaign = await make_campaign(pool, 2)
    await pool.execute("create table done (number int)")
    visits = Visits(tmp_path / "v", file_bytes=400)
    for number in range(1, 9):
        if number % 2:
            visits.add(visit(campaign, number))
        else:
            assert await visits.hold(Held("unsubscribe", 1, campaign, number, b"", b"", 1.5))
    assert len(visits.files()) > 1
    settled: list[int] = []
    breaks = [4, 4, 6]

    async def carry_out(conn: PooledConnection, held: Held) -> Callable[[], None]:
        assert held.number % 2 == 0
        await conn.execute("insert into done values ($1)", held.number)
        before = await conn.fetch("select number from events order by number")
        assert [row["number"] for row in before] == list(range(1, held.number, 2)), "the visits before it are there"
        if breaks and breaks[0] == held.number:
            raise Unavailable(f"broken off at {breaks.pop(0)}")
        return lambda: settled.append(held.number)

    try:
        for _ in range(3):
            with pytest.raises(Unavailable):
                await visits.catch_up(pool, carry_out)
        await visits.catch_up(pool, carry_out)
        await visits.catch_up(pool, carry_out)
        assert settled == [2, 4, 6, 8]
        assert [row["number"] for row in await pool.fetch("select number from done")] == [2, 4, 6, 8]
        assert await numbers(pool) == [1, 3, 5, 7]
    finally:
        await pool.execute("drop table done")
        visits.close()


async def test_many_who_hold_at_once_are_all_kept(pool: Pool, tmp_path: Path) -> None:
    visits = Visits(tmp_path / "v", file_bytes=2000)
    kept = await asyncio.gather(*(visits.hold(Held("abuse", 1, 1, number, b"q", b"\xff" * 50, 1.5)) for number in range(100)))
    assert all(kept)
    assert len(visits.files()) > 5
    seen: list[int] = []

    async def carry_out(conn: PooledConnection, held: Held) -> Callable[[], None]:
        assert held.body == b"\xff" * 50
        return lambda: seen.append(held.number)

    await visits.catch_up(pool, carry_out)
    assert seen == list(range(100))
    visits.close()


async def test_while_it_runs_what_is_held_is_carried_out_at_once_and_trouble_is_told(pool: Pool, tmp_path: Path) -> None:
    visits = Visits(tmp_path / "v", interval_seconds=3600.0)
    done = asyncio.Event()
    stuck = asyncio.Event()

    async def carry_out(conn: PooledConnection, held: Held) -> Callable[[], None]:
        if held.number == 2:
            raise RuntimeError("a bug")
        return done.set

    reader = asyncio.create_task(visits.run(pool, carry_out, stuck.set))
    async with asyncio.timeout(60):
        assert await visits.hold(Held("abuse", 1, 1, 1, b"", b"", 1.5))
        await done.wait()
        assert await visits.hold(Held("abuse", 1, 1, 2, b"", b"", 1.5))
        await stuck.wait()
    assert visits.trouble == "a bug"
    assert not reader.done(), "the next try may be better"
    await tasks.end([reader], 5.0)
    visits.close()
