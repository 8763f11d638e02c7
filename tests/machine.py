"""Real Sluice processes for end-to-end tests: engines, a sink, and waiting for what they do.

Everything is bounded: a process that does not get ready, or a condition that does not come true, fails the test with the
process's own words in the message.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from store import batch_queue, postgres
from store.postgres import Pool

ROOT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_SECONDS = 90.0
PATIENCE_SECONDS = 90.0  # when a test waits that long, something hangs

Within = Callable[[Sequence[str]], tuple[str, ...]]  # a command -> the command that runs it somewhere


class Process:
    """One of our processes, started as the supervisor starts it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.ready: dict[str, str] = {}

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to this very process."""
        self.process.send_signal(number)

    def connections(self, port: int) -> int:
        """How many TCP connections it has to `port` of this machine, also while it is stopped."""
        mine = set()
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                mine.add(str(descriptor.readlink()))
        # Columns: number, local and remote address as hex:HEX, state, …, inode; a header line first
        rows = [line.split() for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]]
        return sum(row[2].endswith(f":{port:04X}") and f"socket:[{row[9]}]" in mine for row in rows)

    async def stop(self) -> int:
        """SIGTERM, then wait; returns the exit code."""
        if self.process.returncode is None:
            self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), PATIENCE_SECONDS)


async def start(name: str, *argv: str, environment: dict[str, str], log: Path, within: Within = tuple) -> Process:
    """Run `python -m …` and wait for its ready line `NAME ready key=value …`; `within` says in what, as `NameServer.command` does."""
    with log.open("ab") as errors:
        child = await asyncio.create_subprocess_exec(
            *within((sys.executable, "-m", *argv)), stdout=asyncio.subprocess.PIPE, stderr=errors, cwd=ROOT,
            env={**os.environ, **environment},
        )  # fmt: skip
    process = Process(name, child, log)
    assert child.stdout is not None
    try:
        async with asyncio.timeout(READY_TIMEOUT_SECONDS):
            while line := (await child.stdout.readline()).decode():
                if " ready" in line:
                    process.ready = dict(re.findall(r"(\w+)=(\S+)", line))
                    return process
    except TimeoutError:
        child.kill()
    raise AssertionError(f"{name} did not get ready:\n{log.read_text()[-4000:]}")


class Machine:
    """The processes of one test and where they keep their things."""

    def __init__(self, directory: Path, database_url: str, redis_url: str) -> None:
        self.directory = directory
        self.environment = {
            "SLUICE_DATABASE_URL": database_url,
            "SLUICE_REDIS_URL": redis_url,
            "SLUICE_NODE__STATE_DIRECTORY": str(directory),
        }
        self.within: Within = tuple
        self.processes: list[Process] = []
        self.sink_http = ""
        self.sink_port = 0

    async def start(self, name: str, *argv: str, **environment: str) -> Process:
        """Start one more process; it is stopped with the machine."""
        log = self.directory / f"{name}.log"
        process = await start(name, *argv, environment={**self.environment, **environment}, log=log, within=self.within)
        self.processes.append(process)
        return process

    async def engine(self, slot: int = 0, **environment: str) -> Process:
        """Start an engine."""
        return await self.start(f"engine{slot}", "engine", "--slot", str(slot), **environment)

    async def sink(self, *options: str) -> Process:
        """Start the sink on free ports."""
        process = await self.start("sink", "bench.sink", "--port", "0", "--http-port", "0", *options)
        self.sink_port = int(process.ready["smtp"].rpartition(":")[2])
        self.sink_http = "http://" + process.ready["http"]
        return process

    async def sink_bytes(self, path: str) -> bytes:
        """Ask the sink's HTTP side."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session, session.get(self.sink_http + path) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.read()

    async def sink_json(self, path: str) -> Any:
        """Ask the sink's JSON API."""
        return json.loads(await self.sink_bytes(path))

    def words(self) -> str:
        """What the processes said last, for the message of a failed test."""
        return "\n".join(f"--- {p.name}\n{p.log.read_text()[-3000:]}" for p in self.processes)

    async def explain(self) -> str:
        """The state of things, for the message of a test that waited in vain."""
        lines = [self.words()]
        conn = await postgres.connect(self.environment["SLUICE_DATABASE_URL"])
        client = batch_queue.connect(self.environment["SLUICE_REDIS_URL"], 5.0)
        try:
            for query in (
                "select id, state, recipients, batches from campaigns",
                "select batch, attempt, state, owner, lease_until, length(done) as size, bit_count(done) as done from batches "
                "where state <> 'settled' limit 10",
                "select count(*) as retries, min(due_at) as first from retries",
                "select kind::text, count(*) from accounting group by 1",
                "select * from journal_cursors",
            ):
                lines += [f"--- {query}", *(str(dict(row)) for row in await conn.fetch(query))]
            for key in await client.keys("sluice:*"):
                kind = await client.type(key)
                value = await (client.llen(key) if kind == b"list" else client.get(key))
                lines.append(f"--- {key!r} {value!r}")
        finally:
            await conn.close(timeout=5)
            await client.aclose()
        return "\n".join(lines)


@contextlib.asynccontextmanager
async def machine(directory: Path, database_url: str, redis_url: str) -> AsyncIterator[Machine]:
    """A machine whose processes are gone at the end, whatever happens."""
    made = Machine(directory, database_url, redis_url)
    try:
        yield made
    finally:
        for process in made.processes:
            if process.process.returncode is None:
                process.kill(signal.SIGCONT)
                process.process.kill()
        await asyncio.gather(*(p.process.wait() for p in made.processes))


async def until(condition: Callable[[], Awaitable[Any]], what: str, seconds: float, machine: Machine) -> Any:
    """Wait until `condition` returns something true, and return that.

    `seconds` is what it takes at most on a machine that does nothing else. This one may: it is given a minute and a half at least.
    A test that promises a time measures it itself.
    """
    seconds = max(seconds, PATIENCE_SECONDS)
    try:
        async with asyncio.timeout(seconds):
            while not (value := await condition()):
                await asyncio.sleep(0.05)
            return value
    except TimeoutError:
        raise AssertionError(f"not within {seconds:g} s: {what}\n{await machine.explain()}") from None


async def campaign_state(pool: Pool, campaign: int) -> str:
    """The state a campaign is in."""
    return str(await pool.fetchval("select state from campaigns where id = $1", campaign))
