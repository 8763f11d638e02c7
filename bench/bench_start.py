"""Bench of recovery: from the start of an engine to its first accepted mail, and from the end of a dead engine's leases to its successor's.

    python -m bench.bench_start [--runs N] [--takeover] [--json]

Everything else runs already (private PostgreSQL and Valkey, the sink), a campaign waits, and the clock runs from the fork of
`python -m engine` until the sink has accepted a message. `fresh`: the campaign was just started and its recipients are not numbered yet.
`after a kill`: another engine was sending it and was killed with -9 a moment before, so its journal is to be finished first for its
batches, while others wait to be sent. `--takeover` kills the only engine of another node, whose journal cannot be read here, and measures
from the end of its leases (30 s, the default) until an engine of this node holds them; a minute for each run.
"""

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

from bench import end_to_end, measure
from bench.end_to_end import Bench, Case
from config.settings import Settings
from control import machine
from domain.errors import Unavailable
from store import embedded

GOAL_SECONDS: Final = 3.0
TAKEOVER_GOAL_SECONDS: Final = 30.0
_RECIPIENTS: Final = 20_000
_LONGEST_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 0.01
CASE: Final = Case(name="start", recipients=_RECIPIENTS)


class StartBench(Bench):
    """Starts engines by hand, without a supervisor that would start them again."""

    processes: tuple[asyncio.subprocess.Process, ...] = ()

    async def start(self, node: str = "here") -> asyncio.subprocess.Process:
        """`python -m engine`, whose journals are those of `node`."""
        own = {
            "SLUICE_NODE__STATE_DIRECTORY": str(self._directory),
            "SLUICE_NODE__NAME": node,
            "SLUICE_JOURNAL__DIRECTORY": str(self._directory / node / "journal"),
            "SLUICE_ACCOUNTING__PATH": str(self._directory / node / "acct.csv"),
            "SLUICE_INBOUND__PUBLIC_URL": "http://127.0.0.1:8080",
        }
        environment = machine.environment(None, database_url=self._backends.database_url, redis_url=self._backends.redis_url, more=own)
        environment.pop("SLUICE_CONFIG", None)
        with (self._directory / "engine.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(*machine.python("engine"), stdout=log, stderr=log, env=environment)
        self.processes += (process,)
        return process

    async def kill(self) -> None:
        """Let no engine of ours be left."""
        for process in self.processes:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
            await process.wait()
        self.processes = ()

    async def campaign(self, server: int) -> int:
        """Start one; nobody has numbered its recipients yet."""
        async with self.pool.acquire() as connection:
            return await self.insert_campaign(connection, CASE, server, recipients=_RECIPIENTS)

    async def forget(self) -> None:
        """What is left of the campaigns is nobody's."""
        await self.kill()
        await self._pool.execute("update campaigns set state = 'cancelled', finished_at = now() where finished_at is null")
        await self._redis.flushdb()

    async def accepted(self, http: str) -> int:
        """Messages the sink has taken so far."""
        return int((await asyncio.to_thread(end_to_end._counters, http))["messages"])

    async def until_more(self, http: str, than: int) -> float:
        """Wait until the sink has taken more than `than`; returns when that was seen (monotonic)."""
        end = time.monotonic() + _LONGEST_SECONDS
        while await self.accepted(http) <= than:
            if time.monotonic() > end:
                raise Unavailable(f"no mail within {_LONGEST_SECONDS:g} s; the engine's log: {self._directory / 'engine.log'}")
            await asyncio.sleep(_LOOK_SECONDS)
        return time.monotonic()

    async def fresh(self, server: int, http: str) -> float:
        """Seconds from the start of the only engine to the first mail of a campaign nobody has touched."""
        await self.campaign(server)
        before = await self.accepted(http)
        began = time.monotonic()
        await self.start()
        took = await self.until_more(http, before) - began
        await self.forget()
        return took

    async def after_a_kill(self, server: int, http: str) -> float:
        """The same for the successor of an engine that was killed while it sent; its last mail is not taken for the successor's."""
        await self.campaign(server)
        before = await self.accepted(http)
        await self.start()
        await self.until_more(http, before + 500)
        await self.kill()
        await asyncio.sleep(0.3)  # what was on the wire has arrived
        before = await self.accepted(http)
        if before >= _RECIPIENTS:
            raise Unavailable("the campaign was over before its engine could be killed")
        began = time.monotonic()
        await self.start()
        took = await self.until_more(http, before) - began
        await self.forget()
        return took

    async def takeover(self, server: int, http: str) -> float:
        """Seconds from the end of the leases of a dead engine of another node until another one holds its first batch."""
        campaign = await self.campaign(server)
        before = await self.accepted(http)
        gone = await self.start("elsewhere")
        await self.until_more(http, before)
        gone.kill()
        await gone.wait()
        owned = "select min(batch), max(lease_until) from batches where campaign_id = $1 and owner like 'elsewhere.%'"
        batch, ends_at = (await self._pool.fetchrow(owned, campaign)) or (None, None)
        if batch is None:
            raise Unavailable("it held no batch when it was killed")
        await self.start()
        held = "select clock_timestamp() from batches where campaign_id = $1 and batch = $2 and (owner like 'here.%' or state = 'settled')"
        while (now := await self._pool.fetchval(held, campaign, batch)) is None:
            await asyncio.sleep(0.05)
        await self.forget()
        return float((now - ends_at).total_seconds())


async def run(backends: embedded.Backends, root: Path, runs: int, takeover: bool) -> dict[str, Any]:
    """All of it; each kind of start `runs` times, in turn."""
    bench = StartBench(backends, root)
    watch = measure.Watch()
    found: dict[str, list[float]] = {"fresh": [], "after a kill": []}
    try:
        await bench.open()
        smtp, http, _ = await bench.sink(CASE.delay_ms)
        server = await bench._server(CASE, smtp)
        for _ in range(runs):
            found["fresh"].append(await bench.fresh(server, http))
            found["after a kill"].append(await bench.after_a_kill(server, http))
        if takeover:
            found["takeover"] = [await bench.takeover(server, http)]
    finally:
        await bench.kill()
        await bench.close()
    _, foreign = watch.stop()
    return {
        "seconds": {name: [round(value, 2) for value in values] for name, values in found.items()},
        "median": {name: round(statistics.median(values), 2) for name, values in found.items()},
        "goal_seconds": {"fresh": GOAL_SECONDS, "after a kill": GOAL_SECONDS, "takeover": TAKEOVER_GOAL_SECONDS},
        "lease_seconds": Settings().engine.lease_seconds,
        "foreign_cpu": foreign,
    }


def main() -> int:
    """Run and print. Exit code 1: a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--takeover", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with end_to_end.private() as (backends, root):
        found = asyncio.run(run(backends, root, options.runs, options.takeover))
    if options.json:
        print(json.dumps(found))
    else:
        for name, values in found["seconds"].items():
            what = "end of lease to next owner" if name == "takeover" else f"engine start to first mail, {name}"
            print(
                f"{what:<42} {found['median'][name]:6.2f} s (median of {len(values)}, {min(values):.2f} to {max(values):.2f}); "
                f"goal: at most {found['goal_seconds'][name]:g} s"
            )
        print(f"others used {found['foreign_cpu']:.2f} cores meanwhile")
    return 1 if any(found["median"][name] > found["goal_seconds"][name] for name in found["median"]) else 0


if __name__ == "__main__":
    sys.exit(main())
