"""journal.ledger: from the journal into PostgreSQL, exactly once, whatever PostgreSQL does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from domain.errors import JournalError, Unavailable
from ext import journal_record
from journal.ledger import Ledger
from journal.segment_files import Reader, segment_numbers, segment_path
from journal.segments import Journal
from store import accounting, postgres
from store.postgres import Pool
from tests.journal.records import NOW, intent, outcome
from tests.store.campaigns import make_campaign


@contextlib.asynccontextmanager
async def running(ledger: Ledger) -> AsyncIterator[None]:
    task = asyncio.create_task(ledger.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def make(directory: Path, **options: int) -> Journal:
    return Journal(directory, engine_id="node.1.1", readers=("ledger",), **options)


async def test_outcomes_reach_postgresql_and_flush_through_says_when(pool: Pool, tmp_path: Path):
    campaign = await make_campaign(pool, 10)
    journal = make(tmp_path / "j")
    ledger = Ledger(journal, pool, interval_seconds=30)
    async with running(ledger):
        await ledger.flush_through(journal.position)  # nothing was written yet
        for number in range(1, 11):
            journal.append(intent(number, campaign=campaign))
            journal.append(outcome("t" if number == 3 else "d", number, campaign=campaign, due_at=NOW if number == 3 else 0))
        journal.write()
        await ledger.flush_through(journal.position, timeout_seconds=10)
        assert ledger.cursor == journal.position
        assert (ledger.lag_bytes, ledger.open_intents, ledger.trouble) == (0, 0, "")
    audit = await accounting.audit(pool, campaign)
    assert (audit.delivered, audit.queued, audit.clean) == (9, 1, True)
    assert await pool.fetchval("select count(*) from batches where state = 'settled'") == 3
    with pytest.raises(Unavailable, match="ended"):
        await ledger.flush_through(journal.position)


async def test_a_second_ledger_goes_on_where_the_first_was_killed(pool: Pool, tmp_path: Path):
    campaign = await make_campaign(pool, 8)
    journal = make(tmp_path / "j", segment_bytes=600)
    for number in range(1, 5):
        journal.append(outcome("d", number, campaign=campaign))
        journal.write()
    await Ledger(journal, pool).catch_up()
    for number in range(5, 9):
        journal.append(outcome("d", number, campaign=campaign))
        journal.write()
    await asyncio.gather(*(Ledger(journal, pool).catch_up() for _ in range(3)), return_exceptions=True)
    await Ledger(journal, pool).catch_up()
    audit = await accounting.audit(pool, campaign)
    assert (audit.delivered, audit.possible_duplicates, audit.clean) == (8, 0, True)
    assert await pool.fetchval("select count(*) from accounting") == 8


async def test_a_commit_that_came_through_without_an_answer_is_not_repeated(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    campaign = await make_campaign(pool, 4)
    journal = make(tmp_path / "j")
    record = accounting.record
    answers = []

    async def lose_the_answer(*arguments: object, **options: object) -> int | None:
        answers.append(await record(*arguments, **options))  # type: ignore[arg-type]
        if len(answers) == 1:
            raise Unavailable("PostgreSQL did not answer: connection was closed")
        return answers[-1]

    monkeypatch.setattr(accounting, "record", lose_the_answer)
    ledger = Ledger(journal, pool, interval_seconds=0.01)
    async with running(ledger):
        journal.append(outcome("d", 1, campaign=campaign))
        journal.write()
        await ledger.flush_through(journal.position, timeout_seconds=10)
        journal.append(outcome("d", 2, campaign=campaign))
        journal.write()
        await ledger.flush_through(journal.position, timeout_seconds=10)
    assert len(answers) == 2
    assert await pool.fetchval("select array_agg(number order by number) from accounting") == [1, 2]


async def test_killed_connections_cost_nothing(pool: Pool, fresh_database_url: str, tmp_path: Path):
    campaign = await make_campaign(pool, 40)
    own = await postgres.open_pool(fresh_database_url, 2)
    journal = make(tmp_path / "j")
    ledger = Ledger(journal, own, interval_seconds=0.001)
    async with running(ledger):
        for number in range(1, 41):
            journal.append(outcome("d", number, campaign=campaign))
            journal.write()
            if number % 10 == 0:
                await pool.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() "
                    "and datname = current_database() and pid not in (select pg_backend_pid())"
                )
            await asyncio.sleep(0.002)
        await ledger.flush_through(journal.position, timeout_seconds=20)
    audit = await accounting.audit(pool, campaign)
    assert (audit.delivered, audit.possible_duplicates, audit.clean) == (40, 0, True)
    own.terminate()


async def test_away_postgresql_is_named_and_made_up_for(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    campaign = await make_campaign(pool, 4)
    journal = make(tmp_path / "j")
    ledger = Ledger(journal, pool, interval_seconds=0.01)
    cursor = accounting.cursor

    async def away(*_: object, **__: object) -> accounting.Cursor:
        raise Unavailable("PostgreSQL did not answer: refused")

    monkeypatch.setattr(accounting, "cursor", away)
    async with running(ledger):
        journal.append(outcome("d", 1, campaign=campaign))
        journal.write()
        with pytest.raises(Unavailable, match="did not reach .* refused"):
            await ledger.flush_through(journal.position, timeout_seconds=0.05)
        assert "safe in the journal" in ledger.trouble
        monkeypatch.setattr(accounting, "cursor", cursor)
        await ledger.flush_through(journal.position, timeout_seconds=10)
        async with asyncio.timeout(60):
            while ledger.trouble:
                await asyncio.sleep(0.01)


async def test_open_intents_move_on_when_their_segment_goes(pool: Pool, tmp_path: Path):
    campaign = await make_campaign(pool, 40)
    journal = make(tmp_path / "j", segment_bytes=900)
    ledger = Ledger(journal, pool, interval_seconds=0.001)
    async with running(ledger):
        for number in range(1, 31):
            journal.append(intent(number, campaign=campaign))
            journal.write()
            if number not in (2, 17):
                journal.append(outcome("d", number, campaign=campaign))
                journal.write()
            await ledger.flush_through(journal.position, timeout_seconds=10)
            await asyncio.sleep(0.003)
        async with asyncio.timeout(60):
            while len(segment_numbers(tmp_path / "j")) > 2:
                await asyncio.sleep(0.01)
    left = journal_record.OpenIntents()
    with Reader(tmp_path / "j") as reader:
        while block := reader.read(until=journal.position):
            left.feed(block, reader.next.segment)
            reader.advance()
    assert sorted(record[3] for record in left.records()) == [2, 17]


async def test_garbage_in_the_journal_ends_the_ledger_with_its_place(pool: Pool, tmp_path: Path):
    campaign = await make_campaign(pool, 4)
    journal = make(tmp_path / "j")
    for number in (1, 2, 3):
        journal.append(outcome("d", number, campaign=campaign))
    journal.write()
    path = segment_path(tmp_path / "j", 1)
    content = bytearray(path.read_bytes())
    content[-len(outcome("d", 3, campaign=campaign)) - 5] ^= 1
    path.write_bytes(content)
    ledger = Ledger(journal, pool, interval_seconds=0.01)
    task = asyncio.create_task(ledger.run())
    with pytest.raises(Unavailable, match="offset"):
        await ledger.flush_through(journal.position, timeout_seconds=10)
    with pytest.raises(JournalError, match=r"00000001\.journal: offset"):
        await task
