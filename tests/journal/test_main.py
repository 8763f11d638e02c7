"""`sluice journal`: a dead node's journal is handed to this node as a command, once, and never while its owner lives."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from journal.accounting_files import AccountingFiles
from journal.segment_files import segment_path
from journal.segments import Journal
from store import accounting
from store.postgres import Pool
from tests.journal.records import intent, outcome
from tests.journal.test_recovery import DEAD, die
from tests.store.campaigns import make_campaign

ROOT = Path(__file__).parents[2]
Sluice = Callable[..., "asyncio.Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture
def sluice(fresh_database_url: str, redis_url: str, tmp_path: Path) -> Sluice:
    """Runs `sluice journal WORDS…` on the node `here`."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")} | {
            "PYTHONPATH": str(ROOT),
            "SLUICE_DATABASE_URL": fresh_database_url,
            "SLUICE_REDIS_URL": redis_url,
            "SLUICE_NODE__STATE_DIRECTORY": str(tmp_path / "state"),
            "SLUICE_NODE__NAME": "here",
        }
        return subprocess.run([sys.executable, "-m", "control.cli", "journal", *words], capture_output=True, text=True, env=own,
                              cwd=tmp_path, timeout=60, check=False)  # fmt: skip

    return lambda *words: asyncio.ensure_future(asyncio.to_thread(run, *words))


def csv_lines(tmp_path: Path) -> list[str]:
    return sorted(
        f"{cells[0]} {cells[4].partition('@')[0]}"
        for path in (tmp_path / "state" / "accounting").glob("*.csv")
        for cells in (line.split(",") for line in path.read_text().splitlines()[1:])
    )


async def test_a_dead_nodes_journal_is_handed_over_once(sluice: Sluice, pool: Pool, tmp_path: Path):
    campaign = await make_campaign(pool, 12)
    await die(pool, tmp_path / "dead-node", campaign)
    await pool.execute("update engines set seen_at = now() - interval '1 minute'")
    shutil.copytree(tmp_path / "dead-node" / DEAD, tmp_path / "disk" / "other name")

    done = await sluice("replay", "--json", "--keep", "disk")
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)
    assert {name: said[name] for name in ("engine_id", "in_doubt", "batches_released", "strays", "kept")} == {
        "engine_id": DEAD, "in_doubt": 2, "batches_released": 2, "strays": 0, "kept": True,
    }  # fmt: skip
    assert said["carried_bytes"] > 0
    audit = await accounting.audit(pool, campaign)
    assert (audit.delivered, audit.queued, audit.possible_duplicates, audit.clean) == (4, 8, 2, True)
    assert csv_lines(tmp_path) == ["d r1", "d r2", "d r3", "d r4", "t r5"]

    shown = await sluice("show", "--ledger", "--json", "disk/other name")
    (facts,) = json.loads(shown.stdout)
    assert facts["records"] == {"i": 8, "w": 1, "d": 4, "t": 1, "u": 2}
    assert facts["open_intents"] == 0
    assert facts["ledger_cursor"] == facts["accounting_files_cursor"] != [0, 0]

    again = await sluice("replay", "disk/other name")
    assert (again.returncode, again.stderr) == (0, "")
    assert "0 bytes were new to it" in again.stdout
    assert "the directory was removed" in again.stdout
    assert list((tmp_path / "disk").iterdir()) == []
    assert await accounting.audit(pool, campaign) == audit
    assert len(csv_lines(tmp_path)) == 5


async def test_a_file_of_this_node_with_the_dead_nodes_name_is_never_cut(sluice: Sluice, pool: Pool, tmp_path: Path):
    campaign = await make_campaign(pool, 12)
    await die(pool, tmp_path / "dead-node", campaign)
    await pool.execute("update engines set stopped_at = now()")
    # The dead node had written lines of its own, at the very path that this node uses
    theirs = Journal(tmp_path / "dead-node" / DEAD, engine_id=DEAD)
    files = AccountingFiles(theirs, tmp_path / "state" / "accounting" / "acct.csv")
    await files.flush()
    files.close()
    theirs.append(outcome("d", 7, campaign=campaign))
    theirs.close()
    (path,) = (tmp_path / "state" / "accounting").glob("*.csv")
    ours = path.read_bytes() + b"a line of this node\n"
    path.write_bytes(ours)
    done = await sluice("replay", "dead-node")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == ours
    (fresh,) = (other for other in path.parent.glob("*.csv") if other != path)
    assert [line.partition(",")[0] for line in fresh.read_text().splitlines()] == ["type", "d"]


async def test_a_living_owner_is_not_replayed(sluice: Sluice, pool: Pool, tmp_path: Path):
    campaign = await make_campaign(pool, 4)
    journal = Journal(tmp_path / "node" / "here.0.1", engine_id="here.0.1")
    journal.append(intent(1, campaign=campaign))
    journal.write()
    locked = await sluice("replay", "node")
    assert (locked.returncode, locked.stdout) == (1, "")
    assert "another process owns this journal" in locked.stderr
    assert f"here.0.1 {os.getpid()}" in locked.stderr
    shown = await sluice("show", "node")
    assert shown.returncode == 0
    assert f"alive: here.0.1 {os.getpid()}" in shown.stdout

    # A copy is not locked, but its owner was seen a moment ago
    shutil.copytree(tmp_path / "node", tmp_path / "copy")
    await pool.execute(
        "insert into engines (id, node, pid, journal_directory) values ('here.0.1', 'there', 1, $1)", str(tmp_path / "node" / "here.0.1")
    )
    copied = await sluice("replay", "copy")
    assert copied.returncode == 1
    assert "engine here.0.1 on node there was alive" in copied.stderr
    assert await pool.fetchval("select count(*) from accounting") == 0
    journal.close()


async def test_damage_stops_a_replay_and_is_named_with_file_and_offset(sluice: Sluice, pool: Pool, tmp_path: Path):
    campaign = await make_campaign(pool, 12)
    await die(pool, tmp_path / "node", campaign)
    await pool.execute("update engines set seen_at = now() - interval '1 minute'")
    path = segment_path(tmp_path / "node" / DEAD, 1)
    data = bytearray(path.read_bytes())
    offset = data.rindex(outcome("d", 4, campaign=campaign))
    data[offset + 9] ^= 0xFF
    path.write_bytes(data)
    shown = await sluice("show", "node")
    assert shown.returncode == 1
    assert f"DAMAGE {path}: offset {offset}: this is not a journal record; the next good record is at offset" in shown.stdout
    done = await sluice("replay", "node")
    assert done.returncode == 2
    assert f"{path}: offset {offset}: this is not a journal record" in done.stderr
    assert path.exists()
    assert await pool.fetchval("select count(*) from accounting where kind = 'd'") == 3


async def test_what_is_no_journal_is_said_so(sluice: Sluice, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for command in ("show", "replay"):
        done = await sluice(command, "empty")
        assert done.returncode == 2
        assert "this is no journal and holds none" in done.stderr
