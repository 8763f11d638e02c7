"""The disk under a running engine is full or fails (fault matrix 16, 17; R5, R10): it stops, says why, goes on, and nobody gets two.

The proof at the end is the operator's own: `sluice audit --against` with what the sink logged.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from journal import inspection
from store import batch_queue
from store.postgres import Pool
from tests.machine import ROOT, Machine, Process, campaign_state, until
from tests.store import seed

CONNECTIONS = 10
WINDOW = 4  # the default BDAT window
RECIPIENTS = 6000
LIMITS: dict[str, object] = {"max_connections": CONNECTIONS, "max_messages_per_second": 1500.0}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0755", "sluice-test", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("a tmpfs can only be mounted by root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Use up every block that is left; returns the file that does."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return ballast


async def messages(machine: Machine) -> int:
    """How many messages the sink has accepted."""
    return int((await machine.sink_json("/api/v1/counters"))["messages"])


async def begun(machine: Machine, count: int) -> None:
    async def enough() -> bool:
        return await messages(machine) > count

    await until(enough, f"more than {count} messages sent", 60.0, machine)


async def trouble(machine: Machine) -> str:
    """What the engine says in its heartbeat."""
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    try:
        found = [json.loads(value) for key in await client.keys("sluice:*") if b"status" in key and (value := await client.get(key))]
        return " ".join(json.dumps(each) for each in found)
    finally:
        await client.aclose()


async def against(machine: Machine, campaign: int) -> dict[str, Any]:
    """The operator's audit; it must end well."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "control.cli", "audit", str(campaign), "--json", "--against", str(machine.directory / "accepted.jsonl"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT, env={**os.environ, **machine.environment},
    )  # fmt: skip
    out, errors = await asyncio.wait_for(child.communicate(), 60.0)
    assert child.returncode == 0, out.decode() + errors.decode()
    return dict(json.loads(out))


async def finished_without_a_copy(machine: Machine, pool: Pool, campaign: int) -> None:
    """The campaign ends; everybody has one copy and one end."""

    async def is_completed() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(is_completed, "campaign completed", 90.0, machine)
    found = await against(machine, campaign)
    assert (found["input"], found["delivered"], found["possible_duplicates"]) == (RECIPIENTS, RECIPIENTS, 0)
    assert {name: count for name, count in found["against"].items() if count} == {"accepted": RECIPIENTS, "recipients": RECIPIENTS}


async def running(machine: Machine, pool: Pool, **environment: str) -> tuple[Process, int]:
    """A sink, an engine, and a campaign."""
    await machine.sink("--accepted", str(machine.directory / "accepted.jsonl"), "--accepted-before-reply", "--reply-delay", "2")
    engine = await machine.engine(0, **environment)
    return engine, await seed.campaign(pool, recipients=RECIPIENTS, port=machine.sink_port, limits=LIMITS)


async def test_a_full_disk_stops_sending_and_space_lets_it_go_on(machine: Machine, pool: Pool, small_disk: Path) -> None:
    _, campaign = await running(machine, pool, SLUICE_JOURNAL__DIRECTORY=str(small_disk / "journal"))
    await begun(machine, 1000)
    ballast = fill(small_disk)

    async def says_so() -> bool:
        return "No space left on device" in await trouble(machine)

    await until(says_so, "the engine says that the disk is full", 10.0, machine)
    accepted = await messages(machine)
    await asyncio.sleep(1.5)  # two tries of the engine to go on
    assert await messages(machine) == accepted
    (journal,) = (small_disk / "journal").iterdir()
    facts = inspection.inspect(journal)
    assert facts.damage == []
    # R10: nothing left without its intent on disk; R5: at most one window per connection without its outcome
    assert accepted <= facts.records["i"]
    assert facts.open_intents <= CONNECTIONS * WINDOW

    ballast.unlink()
    freed = time.monotonic()
    await begun(machine, accepted)
    assert time.monotonic() - freed < 10.0, "it tries every second; ten are for a machine that has much else to do"
    assert await campaign_state(pool, campaign) == "running"
    await finished_without_a_copy(machine, pool, campaign)


async def test_an_engine_that_is_stopped_while_its_disk_is_full_loses_nobody(machine: Machine, pool: Pool, small_disk: Path) -> None:
    where = {"SLUICE_JOURNAL__DIRECTORY": str(small_disk / "journal"), "SLUICE_ENGINE__DRAIN_TIMEOUT_SECONDS": "5"}
    engine, campaign = await running(machine, pool, **where)
    await begun(machine, 1000)
    ballast = fill(small_disk)

    async def says_so() -> bool:
        return "No space left on device" in await trouble(machine)

    await until(says_so, "the engine says that the disk is full", 10.0, machine)
    assert await engine.stop() == 1
    log = engine.log.read_text()
    assert "Traceback" not in log
    assert "No space left on device" in log
    ballast.unlink()
    await machine.engine(1, **where)

    async def is_completed() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(is_completed, "campaign completed", 90.0, machine)
    # What was accepted after the last write has no outcome: it is in doubt, named, and tried again
    found = await against(machine, campaign)
    assert (found["input"], found["delivered"]) == (RECIPIENTS, RECIPIENTS)
    assert found["against"]["duplicates_announced"] <= found["possible_duplicates"] <= CONNECTIONS * WINDOW


async def test_a_full_disk_under_the_accounting_files_does_not_stop_sending(machine: Machine, pool: Pool, small_disk: Path) -> None:
    ballast = fill(small_disk)
    _, campaign = await running(machine, pool, SLUICE_ACCOUNTING__PATH=str(small_disk / "acct.csv"))
    await finished_without_a_copy(machine, pool, campaign)
    ballast.unlink()

    def lines() -> list[str]:
        return [line for path in small_disk.glob("acct-*.csv") for line in path.read_text().splitlines() if line.startswith("d,")]

    async def complete() -> bool:
        return len(lines()) >= RECIPIENTS

    await until(complete, "every line in the accounting files", 15.0, machine)
    assert len({line.split(",")[4] for line in lines()}) == len(lines()) == RECIPIENTS


@contextlib.asynccontextmanager
async def failing(pid: int, path: Path, call: str, error: str) -> AsyncIterator[None]:
    """While it lasts, system call `call` of process `pid` on the file `path` answers with `error`."""
    child = await asyncio.create_subprocess_exec(
        "strace", "-f", "-q", "-p", str(pid), "-P", str(path), "-e", f"trace={call}", "-e", f"inject={call}:error={error}",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert child.stderr is not None
    try:
        async with asyncio.timeout(60.0):
            # Its first line is about the first call it let fail
            while "INJECTED" not in (line := (await child.stderr.readline()).decode()):
                if not line or "not permitted" in line:
                    pytest.skip(f"strace cannot be used here: {line}")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        await child.communicate()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("call", "error"), [("write", "EIO"), ("fdatasync", "EIO")])
async def test_a_failing_file_is_left_for_a_new_one(machine: Machine, pool: Pool, call: str, error: str) -> None:
    engine, campaign = await running(machine, pool)
    await begun(machine, 500)
    (journal,) = (machine.directory / "journal").iterdir()
    (first,) = journal.glob("*.journal")
    async with failing(engine.pid, first, call, error):

        async def has_moved_on() -> bool:
            # The file that failed may be carried over and gone already
            return any(path.name > first.name for path in journal.glob("*.journal"))

        await until(has_moved_on, "a new segment", 10.0, machine)
        accepted = await messages(machine)
        await begun(machine, accepted)
    await finished_without_a_copy(machine, pool, campaign)
