"""`python -m bench` (`sluice bench`): reproduces every number we publish, as ratios in one run. docs/performance.md explains them.

Private stores, engines, sink and peers are started on free loopback ports under a directory of this run, which is removed at the end.
With two cores or more a single sender is alone on the first one, sink and stores are on the others. Nothing is asserted: goals that are
missed are printed as missed, and the exit code stays 0.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench import end_to_end, goals, measure, newsletter, peers, pieces
from bench.end_to_end import Bench, Case
from bench.measure import Report, Row, Sample
from domain.errors import SluiceError
from store import embedded

ENGINE = "engine, DATA, 20 connections"
WINDOW = 5  # BDAT messages in flight: so many letters fit into the 64 KiB that leave in one write
FILES_FOR_5000 = 5200  # descriptors


class Run:
    """One run: cases in order, rows as they come."""

    def __init__(self, bench: Bench, directory: Path, *, runs: int, quick: bool, only: str) -> None:
        self._bench = bench
        self._directory = directory
        self._runs = runs
        self._quick = quick
        self._only = only
        self.rows: list[Row] = []

    def _wants(self, name: str) -> bool:
        return not self._only or self._only in name

    def add(self, row: Row) -> None:
        """Keep a row and say it, so that a long run can be followed."""
        self.rows.append(row)
        say(line(row))

    async def _engine(self, case: Case, runs: int = 0, *, note: str = "") -> None:
        if not self._wants(case.name):
            return
        try:
            self.add(measure.row(case.name, await self._bench.measure(case, runs or self._runs), note=note))
        except SluiceError as error:
            self.add(measure.skipped(case.name, str(error)))

    async def _peer(self, name: str, runs: int, once: Callable[[], Sample], *, note: str = "") -> None:
        if self._wants(name):
            self.add(await asyncio.to_thread(peers.rows_of, name, runs, once, note=note))

    async def everything(self) -> None:
        """The cases. The first three rows alternate run by run, because the goal that matters most is their ratio."""
        bench, runs, quick = self._bench, self._runs, self._quick
        _, _, sink = await bench.sink(0.0)
        smtp, _, _ = await bench.sink(0.0)
        others = peers.Peers(int(smtp.rpartition(":")[2]), sink, self._directory)
        await bench.engines(1)
        if self._wants(ENGINE):
            await self._beside_each_other(others, 30_000 if quick else 60_000)
        for case in (
            Case(name="engine, DATA, 10 connections, 20 ms", recipients=3000, connections=10, delay_ms=20.0),
            Case(name="engine, BDAT window 5, 10 connections, 20 ms", recipients=16_000, connections=10, window=WINDOW, delay_ms=20.0),
            Case(name="engine, DATA, 32 connections, 80 ms", recipients=2400, connections=32, delay_ms=80.0),
        ):
            await self._engine(case, 1 if quick else runs)
        if quick:
            return
        await self._peer("floor, BDAT window 5, 10 connections", runs, lambda: others.floor(200_000, window=WINDOW))
        await self._engine(Case(name="engine, BDAT window 5, 10 connections", recipients=60_000, connections=10, window=WINDOW))
        await self._engine(Case(name="engine, STARTTLS, DATA, 20 connections", recipients=60_000, security="starttls"))
        await self._engine(Case(name="engine, DATA, 20 connections, 100 kB", recipients=20_000, repeat=13))
        if raise_file_limit(FILES_FOR_5000):
            await self._engine(Case(name="engine, DATA, 5,000 connections, 50 ms", recipients=100_000, connections=5000, delay_ms=50.0), 1)
        else:
            self.add(measure.skipped("engine, DATA, 5,000 connections, 50 ms", f"needs {FILES_FOR_5000} open files (ulimit -n)"))
        await self._peer("aiosmtplib + EmailMessage, 20 connections", runs, lambda: others.python("aiosmtplib", 1000))
        await self._peer("aiosmtplib, constant octets, 20 connections", runs, lambda: others.python("aiosmtplib-constant", 8000))
        await self._peer("smtplib + EmailMessage, 1 connection", runs, lambda: others.python("smtplib", 1000))
        await self._peer("smtplib, constant octets, 1 connection", runs, lambda: others.python("smtplib-constant", 5000))
        await self._peer("nodemailer pool + Handlebars, 20 connections", runs, lambda: others.nodemailer(3000))
        if len(measure.cores()) > 1:
            await bench.engines(2)
            note = "queue to accounting, sink and stores on the same cores"
            await self._engine(Case(name="2 engines, DATA, 20 connections, 100,000 recipients", recipients=100_000), note=note)
            await self._engine(Case(name="2 engines, BDAT window 5, 100,000 recipients", recipients=100_000, window=WINDOW), note=note)
            await self._engine(Case(name="2 engines, DATA, 20 connections, 100 kB", recipients=20_000, repeat=13), note=note)
        else:
            self.add(measure.skipped("2 engines", "this machine has one core"))

    async def _beside_each_other(self, others: peers.Peers, recipients: int) -> None:
        case = Case(name=ENGINE, recipients=recipients)
        server = await self._bench.prepare(case)
        floor: list[Sample] = []
        source: list[Sample] = []
        engine: list[Sample] = []
        missing = "" if peers.smtp_source_path() else "smtp-source is not installed (Debian: apt install postfix)"
        for _ in range(self._runs):
            floor.append(await asyncio.to_thread(others.floor, recipients))
            if not missing:
                source.append(await asyncio.to_thread(others.smtp_source, recipients))
            engine.append(await self._bench.once(case, server))
        self.add(measure.row("floor, C, constant, DATA, 20 connections", floor))
        name = "smtp-source -d -s 20, C, constant"
        self.add(measure.skipped(name, missing) if missing else measure.row(name, source))
        self.add(measure.row(case.name, engine))


def raise_file_limit(wanted: int) -> bool:
    """Let this process and its children open so many files. False: the hard limit is lower."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return False
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True


# --- printing -------------------------------------------------------------------------------------------------------------------

HEAD = f"{'':<58}{'msg/s':>9}{'CPU us':>9}{'sink us':>9}{'store us':>9}{'ratio':>7}{'foreign':>9}"


def line(row: Row) -> str:
    """One row of the table."""
    if row.skipped:
        return f"{row.name:<58} skipped: {row.skipped}"

    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'' if value is None else format(value, f',.{digits}f'):>{width}}"

    noisy = " ~" if (row.foreign_cpu or 0.0) >= measure.NOISY_CORES else ""
    return (
        f"{row.name:<58}{cell(row.messages_per_second, 9, 0)}{cell(row.cpu_us_per_message, 9, 2)}{cell(row.sink_cpu_us_per_message, 9, 1)}"
        f"{cell(row.store_cpu_us_per_message, 9, 1)}{cell(row.ratio, 7, 2)}{cell(row.foreign_cpu, 9, 2)}{noisy}"
    )


def say(text: str) -> None:
    """A line for whoever waits, on standard error."""
    print(text, file=sys.stderr, flush=True)


def table(report: Report) -> str:
    """The whole report for people."""
    about = report.machine
    lines = [
        f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB, Linux {about['kernel']}, Python {about['python']}",
        f"flags: {' '.join(about['cpu_flags']) or '-'}; " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        f"stores: {about['stores']}",
        f"message: {about['message_bytes']:,} octets; TLS: {about['tls']}; signing: {about['signing']}; fsync: {about['fsync']}",
        f"{about['seconds']:.0f} s, {about['runs']} runs each, medians; CPU us = microseconds of CPU per message; "
        "~ = others used a third of a core or more meanwhile",
        "",
        HEAD,
        *map(line, report.rows),
        "",
    ]
    lines += [f"goal {g.number:>2}  {'met   ' if g.met else 'MISSED'}  {g.value:>10,.2f}  ({g.goal})  {g.name}" for g in report.goals]
    return "\n".join(lines)


async def _run(backends: embedded.Backends, directory: Path, chosen: argparse.Namespace) -> list[Row]:
    async with end_to_end.opened(backends, directory) as bench:
        run = Run(bench, directory, runs=chosen.runs, quick=chosen.quick, only=chosen.only)
        await run.everything()
        return run.rows


def _parts(backends: embedded.Backends, directory: Path, runs: int) -> list[Row]:
    """The parts alone, after the engines are gone."""
    made: list[Row] = []
    groups: tuple[Callable[[], list[Row]], ...] = (
        lambda: pieces.composition(8000, runs),
        lambda: pieces.reply_parser(40_000, runs),
        lambda: pieces.journal(100_000, directory, backends.database_url),
        lambda: pieces.stores(20_000, backends.redis_url, backends.database_url, runs),
    )
    for group in groups:
        for row in group():
            made.append(row)
            say(line(row))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="sluice bench", description="Measure Sluice and what it is compared with, in one run.")
    parser.add_argument("--quick", action="store_true", help="under two minutes: floor, smtp-source, engine, reply delays (goals 1 and 6)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each case; the median is shown (default 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains TEXT; `parts` for the parts alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object {machine, rows, goals}")
    chosen = parser.parse_args(arguments)
    if chosen.runs < 1:
        parser.error("--runs: at least 1")
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="sluice-bench-"))
    directory.chmod(0o711)  # private PostgreSQL runs as another user when we are root
    say(HEAD)
    failed = True
    try:
        with embedded.resolve("embedded:", "embedded:", directory) as backends:
            rows = asyncio.run(_run(backends, directory, chosen))
            if not chosen.quick and chosen.only in ("", "parts"):
                rows += _parts(backends, directory, chosen.runs)
            stores = backends.chosen.replace(str(directory), "").replace(", private in /", " in ")
        failed = False
    finally:
        if failed:
            say(f"the logs are kept in {directory / 'log'}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    goals.add_ratios(rows)
    report = Report(
        machine=measure.machine(
            stores=stores,
            peers={"smtp-source": measure.program_version("postconf", "-d", "mail_version"), "node": measure.program_version("node", "-v")},
            message_bytes=len(newsletter.wire()[2]),
            tls="STARTTLS where said", signing="none", fsync="journal every 0.1 s, PostgreSQL every commit, Valkey every second",
            runs=chosen.runs, load_before=round(os.getloadavg()[2], 2), seconds=round(time.monotonic() - began, 1),
        ),
        rows=rows,
        goals=goals.judge(rows),
    )  # fmt: skip
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if chosen.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
