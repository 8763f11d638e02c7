"""Engines stopped, told to end, cut off from their node and starved under load (rows 3-5, 16, 35, 36, P3, P8, R4, R5)."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from store import accounting
from store.postgres import Pool
from tests.faults import load
from tests.machine import Machine, until

WINDOW = 4  # the default BDAT window


@pytest.mark.parametrize("chunking", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["bdat", "data"])
async def test_a_stopped_engine_loses_its_batches_and_sends_nothing_of_them_afterwards(
    machine: Machine, pool: Pool, chunking: bool
) -> None:
    options = ("--reply-delay", "2", *(() if chunking else ("--no-chunking",)))
    campaign = await load.start(machine, pool, rate=1200, sink=options, state="draft", retry_schedule_seconds=[1.0])
    engines = [await machine.engine(0, **load.SHORT_LEASES), await machine.engine(1, **load.SHORT_LEASES)]
    stopped = engines[1]
    await pool.execute("update campaigns set state = 'preparing'")
    await campaign.begun(2000)

    async def owns() -> bool:
        return bool(await pool.fetchval("select exists (select from batches where owner = $1)", stopped.ready["id"]))

    async def stands_still_with_batches() -> bool:
        stopped.kill(signal.SIGSTOP)
        if not await owns():
            stopped.kill(signal.SIGCONT)  # it was about to lease the next ones
            return False
        return True

    await until(stands_still_with_batches, "an engine is stopped that holds batches", 10.0, machine)
    # Its share of eight is four, but more for a moment where it has not heard of the other one for long
    in_doubt = stopped.connections(machine.sink_port) * (WINDOW if chunking else 1)

    async def passed_on() -> bool:
        return not await owns()

    await until(passed_on, "the batches of the stopped engine are called back", 30.0, machine)
    await asyncio.sleep(1.0)  # others send them
    resumed_at = await pool.fetchval("select clock_timestamp()")
    stopped.kill(signal.SIGCONT)

    async def goes_on() -> bool:
        return bool(await pool.fetchval("select seen_at > $2 from engines where id = $1", stopped.ready["id"], resumed_at))

    await until(goes_on, "the stopped engine goes on", 10.0, machine)  # whatever it still had in hand has left by then
    await campaign.completed()

    async def all_announced() -> bool:
        return campaign.doubled() <= await campaign.announced()

    # Others end the campaign; that it sent some of it as well, the stopped one says when its ledger comes to it
    await until(all_announced, "every second copy has its `u` record", 10.0, machine)
    await campaign.reconcile(duplicates=in_doubt)
    for engine in engines:
        assert engine.process.returncode is None, machine.words()


@pytest.mark.slow
async def test_a_stopped_feeder_is_replaced(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool, recipients=20_000, rate=1000)
    first = await machine.engine(0, **load.SHORT_LEASES)
    await machine.engine(1, **load.SHORT_LEASES)
    await campaign.begun(500)
    first.kill(signal.SIGSTOP)
    locked = (
        "select pid from pg_locks l join pg_database d on d.oid = l.database where l.locktype = 'advisory' and l.granted "
        "and d.datname = current_database()"
    )
    holder = await pool.fetchval(locked)

    async def replaced() -> bool:
        return await pool.fetchval(locked) not in (None, holder)

    await until(replaced, "another engine feeds", 30.0, machine)
    await campaign.goes_on(messages=100)
    first.kill(signal.SIGCONT)
    await pool.execute("update campaigns set state = 'cancelling'")

    async def cancelled() -> bool:
        return bool(await pool.fetchval("select bool_and(state = 'cancelled') from campaigns"))

    await until(cancelled, "campaign cancelled", 30.0, machine)


async def test_sigterm_under_load_ends_soon_without_a_duplicate(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool, recipients=6000, rate=100)  # not done before the third has come and gone
    await machine.engine(9, **load.SMALL_BATCHES)
    for turn in range(3):
        engine = await machine.engine(turn, **load.SMALL_BATCHES)
        await campaign.goes_on(messages=100)
        begun = time.monotonic()
        assert await engine.stop() == 0, machine.words()
        assert time.monotonic() - begun < 10.0
    assert await campaign.accepted() < campaign.recipients, "all of them had something to leave"
    await campaign.hurry()
    await campaign.reconcile()

    async def carried_over() -> bool:
        return all(".9." in path.name for path in (machine.directory / "journal").iterdir())

    await until(carried_over, "every journal but the living engine's is carried over", 10.0, machine)


async def test_sigterm_with_peers_that_never_answer_ends_at_the_limit(machine: Machine, pool: Pool) -> None:
    script = machine.directory / "script.toml"
    script.write_text('[[rule]]\nstage = "dot"\naction = "hang"\n')
    campaign = await load.start(machine, pool, recipients=2000, sink=("--script", str(script)))
    engine = await machine.engine(0, SLUICE_ENGINE__DRAIN_TIMEOUT_SECONDS="2")

    async def all_hang() -> bool:
        return bool((await machine.sink_json("/api/v1/counters"))["verdicts"]["hung"] >= 2)

    await until(all_hang, "connections wait for the reply to their final dot", 30.0, machine)
    begun = time.monotonic()
    assert await engine.stop() == 0, machine.words()
    took = time.monotonic() - begun
    assert 1.5 < took < 20.0, "about three seconds; without a limit it would be the ten minutes a final dot may take"
    assert await pool.fetchval("select count(*) from batches where owner is not null") == 0
    kinds = await pool.fetch("select kind::text, count(*) from accounting where campaign_id = $1 group by 1", campaign.campaign)
    assert {row[0] for row in kinds} == {"u", "t"}, "cut connections are uncertain, never refused"
    assert all(row[1] <= load.CONNECTIONS * WINDOW for row in kinds)


@pytest.mark.slow
async def test_sigterm_and_sigkill_a_second_later(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool, rate=1500, sink=("--reply-delay", "700"))
    await machine.engine(0, **load.SMALL_BATCHES)
    killed = await machine.engine(1, **load.SMALL_BATCHES)
    await asyncio.sleep(4.0)
    killed.kill(signal.SIGTERM)
    await asyncio.sleep(1.0)
    with contextlib.suppress(ProcessLookupError):
        killed.kill(signal.SIGKILL)
    await pool.execute("update campaigns set state = 'cancelling'")

    async def cancelled() -> bool:
        return bool(await pool.fetchval("select bool_and(state = 'cancelled') from campaigns"))

    await until(cancelled, "campaign cancelled", 60.0, machine)
    assert (await accounting.audit(pool, campaign.campaign)).clean, await machine.explain()
    assert not await pool.fetchval("select count(*) from accounting where campaign_id = $1 and kind in ('b', 'x')", campaign.campaign)


@pytest.mark.slow
async def test_an_engine_of_another_node_takes_over_after_the_leases_have_ended(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool, recipients=6000, rate=1500)
    elsewhere = str(machine.directory / "elsewhere")
    await machine.engine(0, **load.SHORT_LEASES)
    gone = await machine.engine(
        1, SLUICE_NODE__NAME="elsewhere", SLUICE_JOURNAL__DIRECTORY=elsewhere, SLUICE_ACCOUNTING__PATH=elsewhere + ".csv",
        **load.SHORT_LEASES,
    )  # fmt: skip
    await campaign.begun(1500)
    gone.kill(signal.SIGKILL)
    # Its journal cannot be read from here: what it had sent and not yet carried over is sent twice, and named when it is replayed
    await campaign.completed()
    await machine.engine(2, SLUICE_NODE__NAME="elsewhere", SLUICE_JOURNAL__DIRECTORY=elsewhere, SLUICE_ACCOUNTING__PATH=elsewhere + ".csv")

    async def replayed() -> bool:
        return len(list(Path(elsewhere).glob("elsewhere.*"))) == 1

    await until(replayed, "the journal of the dead engine is carried over", 20.0, machine)
    await campaign.reconcile(duplicates=1000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a tmpfs")
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


async def test_nothing_is_sent_while_the_journal_has_no_room(machine: Machine, pool: Pool, small_disk: Path) -> None:
    campaign = await load.start(machine, pool, recipients=8000, rate=500)
    engine = await machine.engine(
        0, SLUICE_JOURNAL__DIRECTORY=str(small_disk / "journal"), SLUICE_JOURNAL__SEGMENT_BYTES="1048576", **load.SMALL_BATCHES
    )
    await campaign.begun(500)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))

    async def stands_still() -> bool:
        before = await campaign.accepted()
        await asyncio.sleep(1.0)
        return await campaign.accepted() == before

    await until(stands_still, "sending stops", 20.0, machine)
    assert engine.process.returncode is None, machine.words()
    filler.unlink()
    await campaign.goes_on(messages=100)
    await campaign.hurry()
    await campaign.reconcile()


@pytest.mark.slow
async def test_an_engine_without_a_free_descriptor_goes_on_when_it_has_some(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool, recipients=6000, rate=1500)
    engine = await machine.engine(0, **load.SMALL_BATCHES)
    await campaign.begun(1000)
    before = resource.prlimit(engine.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(engine.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    await pool.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name = 'sluice' "
        "and pid <> pg_backend_pid()"
    )
    await asyncio.sleep(3.0)
    resource.prlimit(engine.pid, resource.RLIMIT_NOFILE, before)
    assert engine.process.returncode is None, machine.words()
    await campaign.reconcile()


async def test_sighup_applies_within_a_second_and_a_broken_file_changes_nothing(machine: Machine, pool: Pool) -> None:
    file = machine.directory / "sluice.toml"
    file.write_text("[engine]\nheld_batches = 2\nbatch_recipients = 100\n")
    engine = await machine.engine(0, SLUICE_CONFIG=str(file))

    async def said(words: str) -> None:
        async def in_log() -> bool:
            return words in engine.log.read_text()

        await until(in_log, words, 5.0, machine)

    file.write_text("[engine]\nheld_batches = 3\nbatch_recipients = 50\nlease_seconds = 20.0\n")
    engine.kill(signal.SIGHUP)
    await said("applied='engine.batch_recipients, engine.held_batches' after_a_restart='engine.lease_seconds'")
    file.write_text("[engine]\nheld_batches = -1\nno_such_key = 1\n")
    engine.kill(signal.SIGHUP)
    await said("settings refused, the old ones stay")
    campaign = await load.start(machine, pool, recipients=1000)
    await campaign.reconcile()
    assert await pool.fetchval("select batches from campaigns where id = $1", campaign.campaign) == 20, "batch_recipients = 50"


def _libfaketime() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return str(found[0]) if found else ""


@pytest.mark.skipif(not _libfaketime(), reason="libfaketime is not installed")
async def test_the_clock_jumps(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool, rate=1500)
    clock = machine.directory / "clock"
    clock.write_text("+0")
    await machine.engine(
        0, LD_PRELOAD=_libfaketime(), FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1", FAKETIME_DONT_FAKE_MONOTONIC="1",
        **load.SMALL_BATCHES,
    )  # fmt: skip
    for step, jump in enumerate(("+3600", "-3600", "+315360000", "+0"), 1):
        await campaign.begun(1200 * step)
        clock.write_text(jump)
    await campaign.reconcile()
