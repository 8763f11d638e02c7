"""Bench of the delivery contract: engine CPU per message with the journal, and of the same build with its writes going to a null file.

    python -m bench.bench_contract [--messages N] [--pairs N] [--unread] [--json]

Two engines send the same campaigns, in turn: `contract` as it is, and `null file`, which writes its records to /dev/null, so that nothing
is on disk, nothing is synced and nobody reads anything. The ratio is the median over pairs of runs that follow each other, each pair in
the other order than the one before, so that what disturbs the machine disturbs both; CPU per message, never a rate. `--unread` adds
`written, not read`, whose ledger and accounting files stand still: what the writing alone costs. Only the journal differs: it is replaced
in the bench's own child process, production code knows nothing of it. Stores and sink are private. Less than three minutes.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import msgspec

import engine.__main__
import engine.app
from bench import end_to_end, measure, newsletter
from bench.end_to_end import Bench, Case
from config.settings import Settings
from control import machine
from domain.errors import Unavailable
from journal.accounting_files import AccountingFiles
from journal.ledger import Ledger
from journal.segment_files import Position
from journal.segments import Journal
from store import accounting, batch_queue, embedded

CONTRACT: Final = "contract"
UNREAD: Final = "written, not read"
NULL: Final = "null file"
GOAL: Final = 1.15
_MODE: Final = "BENCH_JOURNAL"  # tells the engine's process what to be; read here only
_LONGEST_SECONDS: Final = 60.0
_FLUSH_SECONDS: Final = 1.2
_LEASE_SECONDS: Final = "600"  # batches that nobody settles must not be leased again


class NullJournal(Journal):
    """Takes every record, and one write(2) per turn puts them into /dev/null."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._null = os.open(os.devnull, os.O_WRONLY)

    def write(self) -> None:
        """As the journal does it."""
        if data := self.records.take():
            os.write(self._null, data)


class IdleLedger(Ledger):
    """Reads nothing."""

    async def run(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()

    async def flush_through(self, position: Position, *, timeout_seconds: float = 60.0) -> None:
        """As if it were done."""


class IdleFiles(AccountingFiles):
    """Reads nothing."""

    async def run(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()

    async def flush(self) -> None:
        """As if it were done."""


class ContractBench(Bench):
    """One engine with one of the three journals."""

    mode = CONTRACT

    async def start(self, mode: str, directory: Path) -> None:
        """Let this engine run, and no other; what it keeps on disk is below `directory`, so that nobody takes over its journal."""
        if self._engines is not None:
            await self._engines.stop()
        # One whose ledger is not real leaves its journal behind and does not say that it ended: for ten seconds it would have its share
        # of the connections
        await self._pool.execute("update engines set stopped_at = now() where stopped_at is null")
        self.mode = mode
        (child,) = (child for child in machine.children(Settings(), engines=1) if child.name == "engine.0")
        own = {_MODE: mode, "SLUICE_NODE__STATE_DIRECTORY": str(directory), "SLUICE_ENGINE__LEASE_SECONDS": _LEASE_SECONDS}
        argv = machine.python("bench.bench_contract", "--slot", "0")  # with that variable it is an engine
        self._engines = self._supervisor([msgspec.structs.replace(child, argv=argv, environment=own)])
        await self._engines.start()

    async def send(self, case: Case, server: int, recipients: int) -> float:
        """Send one campaign; returns microseconds of engine CPU per message."""
        _, http, _ = await self.sink(case.delay_ms)
        mailing_list = await self._list(recipients)
        self.pin()
        before = (await asyncio.to_thread(end_to_end._counters, http))["messages"]
        spent = measure.cpu_seconds(*self.engine_pids())
        campaign = await self._pool.fetchval(
            end_to_end._INSERT, self._user, case.name, mailing_list, server, newsletter.SUBJECT, newsletter.FROM_NAME,
            newsletter.FROM_EMAIL, newsletter.TEXT, newsletter.HTML,
        )  # fmt: skip
        await batch_queue.publish_change(self._redis, "campaigns")
        began = time.monotonic()
        while True:
            sent = (await asyncio.to_thread(end_to_end._counters, http))["messages"] - before
            if sent >= recipients and (self.mode != CONTRACT or (await accounting.totals(self._pool, campaign)).delivered >= recipients):
                break
            if time.monotonic() - began > _LONGEST_SECONDS:
                raise Unavailable(f"{self.mode}: {sent} of {recipients} messages in {_LONGEST_SECONDS:g} s; fewer --messages")
            await asyncio.sleep(0.05)
        await asyncio.sleep(_FLUSH_SECONDS)
        spent = measure.cpu_seconds(*self.engine_pids()) - spent
        sent = (await asyncio.to_thread(end_to_end._counters, http))["messages"] - before
        if sent != recipients:
            raise Unavailable(f"{self.mode}: the sink counted {sent} of {recipients} messages")
        # Nobody would ever settle what the other two have sent
        await self._pool.execute("update batches set state = 'settled', owner = null, lease_until = null where campaign_id = $1", campaign)
        await self._pool.execute("update campaigns set state = 'completed', finished_at = now() where id = $1", campaign)
        return spent / recipients * 1e6


@contextlib.asynccontextmanager
async def opened(backends: embedded.Backends, directory: Path) -> AsyncIterator[ContractBench]:
    """A bench whose processes are gone at the end."""
    bench = ContractBench(backends, directory)
    try:
        await bench.open()
        yield bench
    finally:
        await bench.close()


async def run(backends: embedded.Backends, root: Path, messages: int, pairs: int, others: tuple[str, ...]) -> dict[str, Any]:
    """`pairs` times the contract and the null file, in alternating order, and `others` behind them."""
    case = Case(name="contract", recipients=messages)
    found: dict[str, list[float]] = {mode: [] for mode in (CONTRACT, NULL, *others)}
    watch = measure.Watch()
    async with opened(backends, root) as bench:
        smtp, _, _ = await bench.sink(case.delay_ms)
        server = await bench._server(case, smtp)
        for number in range(pairs):
            for mode in (*((CONTRACT, NULL) if number % 2 else (NULL, CONTRACT)), *others):
                await bench.start(mode, root / f"{number} {mode}")
                await bench.send(case, server, end_to_end.WARM_UP)
                found[mode].append(await bench.send(case, server, messages))
    _, foreign = watch.stop()
    ratios = {mode: sorted(a / b for a, b in zip(found[mode], found[NULL], strict=True)) for mode in (CONTRACT, *others)}
    return {
        "messages": messages,
        "pairs": pairs,
        "cpu_us_per_message": {mode: round(statistics.median(values), 2) for mode, values in found.items()},
        "least_cpu_us_per_message": {mode: round(min(values), 2) for mode, values in found.items()},  # the least disturbed
        "ratio": round(statistics.median(ratios[CONTRACT]), 3),
        "ratios": {mode: [round(value, 3) for value in values] for mode, values in ratios.items()},
        "goal": GOAL,
        "foreign_cpu": foreign,
    }


def main() -> int:
    """Run and print. Exit code 1: the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--unread", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="sluice-bench-"))
    root.chmod(0o711)
    keep = False
    try:
        with embedded.resolve("embedded:", "embedded:", root / "state") as backends:
            found = asyncio.run(run(backends, root, options.messages, options.pairs, (UNREAD,) if options.unread else ()))
    except Unavailable as error:
        keep = True
        print(f"{error}; logs: {root}", file=sys.stderr)
        return 2
    finally:
        if not keep:
            shutil.rmtree(root, ignore_errors=True)
    if options.json:
        print(json.dumps(found))
    else:
        for mode, value in found["cpu_us_per_message"].items():
            print(f"{mode:<20} {value:8.2f} us of engine CPU per message (median; least {found['least_cpu_us_per_message'][mode]:.2f})")
        for mode, ratios in found["ratios"].items():
            goal = f"; goal: at most {GOAL}" if mode == CONTRACT else ""
            print(
                f"{mode + ' / ' + NULL:<29} {statistics.median(ratios):6.3f} (median of {len(ratios)} pairs, "
                f"{ratios[0]:.3f} to {ratios[-1]:.3f}){goal}"
            )
        print(f"others used {found['foreign_cpu']:.2f} cores meanwhile")
    return 1 if found["ratio"] > GOAL else 0


def engine_main() -> int:
    """The engine's own `main`, with the journal that is asked for."""
    changes: dict[str, dict[str, type]] = {NULL: {"Journal": NullJournal}, UNREAD: {"Ledger": IdleLedger, "AccountingFiles": IdleFiles}}
    for name, replaced in changes.get(os.environ[_MODE], {}).items():
        setattr(engine.app, name, replaced)
    return engine.__main__.main()


if __name__ == "__main__":
    if _MODE in os.environ:
        sys.exit(engine_main())
    sys.exit(main())
