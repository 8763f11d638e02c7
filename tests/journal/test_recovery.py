"""journal.recovery: a dead engine's journal is finished exactly once, by whoever finds it, however often that one is killed."""

import asyncio
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from domain.errors import Unavailable
from ext import journal_record
from journal import recovery
from journal.accounting_files import CURSOR_NAME, AccountingFiles
from journal.segment_files import Reader, segment_path
from journal.segments import Journal
from store import accounting
from store.postgres import Pool
from tests.journal.records import NOW, intent, outcome
from tests.store.campaigns import make_campaign

DEAD = "node.1.dead"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has refused no journal yet."""
    monkeypatch.setattr(recovery, "_refused", {})


async def die(pool: Pool, root: Path, campaign: int, *, segment_bytes: int = 10**6) -> None:
    """Leave the journal of an engine that held every batch: 1-4 delivered, 5 deferred, 6 withdrawn, 7 and 8 in doubt, 9-12 not begun."""
    await pool.execute("insert into engines (id, node, pid, journal_directory) values ($1, 'node', 1, $2)", DEAD, str(root / DEAD))
    await pool.execute("update batches set state = 'queued', owner = $1, epoch = 1, lease_until = now() + interval '30 s'", DEAD)
    server = await pool.fetchval("select min(id) from delivery_servers")
    journal = Journal(root / DEAD, engine_id=DEAD, segment_bytes=segment_bytes)
    for number in range(1, 9):
        journal.append(intent(number, campaign=campaign, server=server))
        journal.write()
    for number in range(1, 5):
        journal.append(outcome("d", number, campaign=campaign))
    journal.append(outcome("t", 5, campaign=campaign, due_at=NOW))
    journal.append(journal_record.pack_withdrawal(campaign, 2, 6, 1, 1, 1, 3, server, NOW))
    journal.write()
    journal.close()


async def adopt(pool: Pool, root: Path) -> list[str]:
    return await recovery.adopt(root, "node.1.me", pool, root.parent / "out" / "acct.csv")


def lines(root: Path) -> list[str]:
    """Type and recipient of every accounting line."""
    found = []
    for path in sorted((root.parent / "out").glob("*.csv")):
        for line in path.read_text().splitlines()[1:]:
            cells = line.split(",")
            found.append(f"{cells[0]} {cells[4].partition('@')[0]}")
    return found


async def check(pool: Pool, campaign: int, root: Path) -> None:
    """Everything is as one undisturbed recovery leaves it."""
    assert list(root.iterdir()) == []
    audit = await accounting.audit(pool, campaign)
    assert (audit.delivered, audit.queued, audit.possible_duplicates, audit.clean) == (4, 8, 2, True)
    uncertain = await pool.fetch("select number, recipient, diagnostic from accounting where kind = 'u' order by number")
    assert [tuple(row) for row in uncertain] == [(n, f"r{n}@example.com", recovery.DOUBT) for n in (7, 8)]
    batches = await pool.fetch("select batch, state, owner, done from batches order by batch")
    assert [(row["state"], row["owner"], row["done"].as_string()) for row in batches] == [
        ("settled", None, "1111"), ("pending", None, "1000"), ("pending", None, "0000"),
    ]  # fmt: skip
    assert await pool.fetchval("select stopped_at is not null from engines where id = $1", DEAD)
    assert lines(root) == ["d r1", "d r2", "d r3", "d r4", "t r5"]


async def test_a_dead_engines_journal_is_finished(pool: Pool, tmp_path: Path):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    assert await adopt(pool, root) == []
    await die(pool, root, campaign)
    assert await adopt(pool, root) == [DEAD]
    await check(pool, campaign, root)
    assert await adopt(pool, root) == []


async def test_a_living_engines_journal_and_ones_own_are_left_alone(pool: Pool, tmp_path: Path):
    root = tmp_path / "journal"
    living = Journal(root / "node.1.living", engine_id="node.1.living")
    Journal(root / "node.1.me", engine_id="node.1.me").close()
    assert await adopt(pool, root) == []
    living.append(intent(1))
    living.close()


async def test_several_who_find_it_at_once_finish_it_once(pool: Pool, tmp_path: Path):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign, segment_bytes=500)
    results = await asyncio.gather(*(adopt(pool, root) for _ in range(4)))
    assert sorted(results) == [[], [], [], [DEAD]]
    await check(pool, campaign, root)


@pytest.mark.parametrize(
    ("policy", "expected", "done"), [("assume_delivered", ["d", "u"], "1011"), ("fail", ["x", "u"], "1011"), ("retry", ["u"], "1000")]
)
async def test_the_delivery_server_says_what_becomes_of_a_message_in_doubt(
    pool: Pool, tmp_path: Path, policy: str, expected: list[str], done: str
):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await pool.execute("update delivery_servers set limits = jsonb_build_object('on_uncertain', $1::text)", policy)
    await die(pool, root, campaign)
    await adopt(pool, root)
    for number in (7, 8):
        assert sorted(record.kind for record in await accounting.records_of(pool, campaign, number)) == sorted(expected)
    assert (await pool.fetchval("select done from batches where batch = 2")).as_string() == done
    assert (await accounting.audit(pool, campaign)).clean


async def test_a_torn_end_is_dropped_and_its_message_is_in_doubt(pool: Pool, tmp_path: Path):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign)
    path = segment_path(root / DEAD, 1)
    path.write_bytes(path.read_bytes()[:-7])  # the withdrawal of 6
    assert await adopt(pool, root) == [DEAD]
    assert await pool.fetchval("select array_agg(number order by number) from accounting where kind = 'u'") == [6, 7, 8]


async def test_a_cursor_that_cannot_be_read_keeps_its_journal_and_stops_nobody(pool: Pool, tmp_path: Path):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign)
    (root / DEAD / CURSOR_NAME).write_bytes(b"{")
    assert await adopt(pool, root) == []
    assert CURSOR_NAME in recovery.troubles()[0]
    assert await pool.fetchval("select count(*) from accounting where kind = 'u'") == 2
    assert await pool.fetchval("select count(*) from batches where owner = $1", DEAD) == 0


async def test_a_damaged_journal_is_kept_and_what_stands_before_the_damage_is_used(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await pool.execute("update batches set state = 'queued', owner = $1, lease_until = now() + interval '30 s'", DEAD)
    journal = Journal(root / DEAD, engine_id=DEAD)
    for number in (1, 2, 3):
        journal.append(outcome("d", number, campaign=campaign))
    journal.write()
    journal.append(outcome("d", 4, campaign=campaign))
    path = segment_path(root / DEAD, 1)
    content = bytearray(path.read_bytes())
    journal.reopen()  # another segment behind the damaged one
    journal.close()
    content[-300] ^= 1
    path.write_bytes(content)
    assert await adopt(pool, root) == []
    assert await adopt(pool, root) == []
    assert len([record for record in caplog.records if "00000001.journal: offset" in record.getMessage()]) == 1
    assert (root / DEAD).is_dir()
    assert 1 <= (await accounting.totals(pool, campaign)).delivered < 3
    assert await pool.fetchval("select count(*) from batches where owner = $1", DEAD) == 3  # they end with their leases


async def test_without_postgresql_nothing_is_lost_and_the_next_call_does_it(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign)

    async def away(*_: object, **__: object) -> int | None:
        raise Unavailable("PostgreSQL did not answer")

    monkeypatch.setattr(accounting, "record", away)
    with pytest.raises(Unavailable):
        await adopt(pool, root)
    with Reader(root / DEAD) as reader:
        intents = journal_record.OpenIntents()
        while block := reader.read():
            intents.feed(block, reader.next.segment)
            reader.advance()
    assert len(intents) == 0  # those in doubt have their records already
    monkeypatch.undo()
    assert await adopt(pool, root) == [DEAD]
    await check(pool, campaign, root)


async def test_lines_the_dead_engine_had_written_are_not_written_again(pool: Pool, tmp_path: Path):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign)
    journal = Journal(root / DEAD, engine_id=DEAD)
    files = AccountingFiles(journal, tmp_path / "out" / "acct.csv")
    await files.flush()
    files.close()
    journal.close()
    with next((tmp_path / "out").glob("*.csv")).open("a") as file:
        file.write("d,half a line that no cursor knows of")
    await adopt(pool, root)
    await check(pool, campaign, root)


ADOPTER = """
import asyncio, os, sys
from pathlib import Path
from journal import recovery, segments
from journal.accounting_files import AccountingFiles
from journal.segments import Journal
from store import accounting, postgres

owner, name, moment = sys.argv[1:4]
holder = {"Journal": Journal, "accounting": accounting, "AccountingFiles": AccountingFiles, "os": os, "segments": segments}[owner]
function = getattr(holder, name)

def kill(*arguments, **options):
    if moment == "before":
        os.kill(os.getpid(), 9)
    result = function(*arguments, **options)
    if moment == "after" and not asyncio.iscoroutine(result):
        os.kill(os.getpid(), 9)
    if asyncio.iscoroutine(result):
        return kill_later(result)
    return result

async def kill_later(result):
    await result
    os.kill(os.getpid(), 9)

setattr(holder, name, kill)

async def main():
    pool = await postgres.open_pool(sys.argv[4], 3)
    await recovery.adopt(Path(sys.argv[5]), "node.1.other", pool, Path(sys.argv[5]).parent / "out" / "acct.csv")

asyncio.run(main())
"""

# In the order they are come by, so that each is reached by the next adopter
STEPS = [
    ("accounting", "on_uncertain", "before"), ("accounting", "on_uncertain", "after"), ("Journal", "write", "before"),
    ("Journal", "write", "after"), ("accounting", "_move_cursor", "before"), ("accounting", "_settle", "before"),
    ("accounting", "_count", "after"), ("accounting", "record", "after"), ("accounting", "release_owner", "before"),
    ("accounting", "release_owner", "after"), ("AccountingFiles", "_append", "before"), ("AccountingFiles", "_append", "after"),
    ("AccountingFiles", "_store", "before"), ("AccountingFiles", "_store", "after"), ("AccountingFiles", "flush", "after"),
    ("Journal", "sync", "before"), ("Journal", "sync", "after"), ("segments", "remove_directory", "before"),
    ("segments", "_delete", "before"),
]  # fmt: skip


async def test_killed_at_any_step_and_done_again_it_is_done_once(pool: Pool, fresh_database_url: str, tmp_path: Path):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign, segment_bytes=500)
    for step in STEPS:
        process = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", ADOPTER, *step, fresh_database_url, str(root)],
            check=False,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.returncode == -9, (step, process.stderr)
    await adopt(pool, root)
    for rubbish in root.iterdir():
        assert rubbish.name.startswith(".removed-")
        for path in rubbish.iterdir():
            path.unlink()
        rubbish.rmdir()
    await check(pool, campaign, root)


async def test_a_journal_that_could_not_be_read_at_all_keeps_its_batches_waiting(pool: Pool, tmp_path: Path):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign)
    path = segment_path(root / DEAD, 1)
    content = bytearray(path.read_bytes())
    content[8] += 1  # a version that this Sluice does not read
    path.write_bytes(content)
    assert await adopt(pool, root) == []
    assert not recovery.is_refused(root / DEAD), "its outcomes are in no table: whoever sent its batches on would send them twice"
    assert "journal version" in recovery.troubles()[0]
    shutil.rmtree(root / DEAD)
    await adopt(pool, root)
    assert recovery.troubles() == []


async def test_a_damaged_header_in_the_last_segment_loses_no_outcome_before_it(pool: Pool, tmp_path: Path):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign)
    content = bytearray(segment_path(root / DEAD, 1).read_bytes())
    content[20] ^= 0xFF
    segment_path(root / DEAD, 2).write_bytes(content)
    assert await adopt(pool, root) == []
    assert recovery.is_refused(root / DEAD)
    assert (await accounting.totals(pool, campaign)).delivered == 4


async def test_a_full_disk_is_no_damage_and_the_batches_wait_until_it_has_room(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    campaign, root = await make_campaign(pool, 12), tmp_path / "journal"
    await die(pool, root, campaign)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        assert await adopt(pool, root) == []
    assert not recovery.is_refused(root / DEAD)
    assert "No space left" in recovery.troubles()[0]
    monkeypatch.setattr(recovery, "_refused", {})  # as if some seconds had passed
    assert await adopt(pool, root) == [DEAD]
    await check(pool, campaign, root)
