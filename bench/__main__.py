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

from bench import cases, end_to_end, goals, measure, newsletter, pieces
from bench.measure import Report, Row
from compose import signing_lanes
from config import logs
from store import embedded

# --- printing -------------------------------------------------------------------------------------------------------------------

HEAD = f"{'':<58}{'msg/s':>9}{'CPU us':>9}{'sink us':>9}{'store us':>9}{'ratio':>7}{'foreign':>9}"


def line(row: Row) -> str:
    """One row of the table."""
    if row.bytes_per_connection is not None:
        return f"{row.name:<58} {row.bytes_per_connection:,.0f} bytes each, {row.connections:,} of them"
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


async def _run(backends: embedded.Backends, directory: Path, chosen: argparse.Namespace, groups: list[str]) -> list[Row]:
    async with end_to_end.opened(backends, directory) as bench:
        run = cases.Run(
            bench, directory, lambda row: say(line(row)), runs=chosen.runs, quick=chosen.quick, groups=groups,
            texts=[text for text in chosen.only if text not in cases.GROUPS], node_directory=chosen.node_directory,
        )  # fmt: skip
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
    minutes = sum(minutes for _, minutes in cases.GROUPS.values())
    parser = argparse.ArgumentParser(
        prog="sluice bench", description="Measure Sluice and what it is compared with, in one run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"groups, with minutes on two cores (together about {minutes:.0f}):\n"
        + "\n".join(f"  {name:<12}{about[1]:>4g}  {about[0]}" for name, about in cases.GROUPS.items()),
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="under two minutes: the groups core, signed, delay (goals 1, 3 and 6)")
    parser.add_argument("--runs", type=int, help="runs of each case; the median is shown (default 3)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WHAT", help="a group, or rows whose name contains WHAT (repeatable)"
    )
    parser.add_argument("--without", action="append", default=[], metavar="GROUP", help="leave it out, for instance deep (repeatable)")
    parser.add_argument("--node-directory", type=Path, metavar="DIRECTORY",
                        help="where nodemailer, handlebars, Haraka are installed (npm install --prefix DIRECTORY ...); else the first two "
                        "are installed for the run")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object {machine, rows, goals}")
    chosen = parser.parse_args(arguments)
    logs.configure("warning")
    chosen.runs = 3 if chosen.runs is None else chosen.runs
    if unknown := [name for name in chosen.without if name not in cases.GROUPS]:
        parser.error(f"--without: no group {unknown[0]}; there are {', '.join(cases.GROUPS)}")
    groups = [name for name in cases.GROUPS if name in (chosen.only or (cases.QUICK if chosen.quick else cases.GROUPS))]
    groups = [name for name in groups if name not in chosen.without]
    if chosen.runs < 1:
        parser.error("--runs: at least 1")
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="sluice-bench-"))
    directory.chmod(0o711)  # private PostgreSQL runs as another user when we are root
    say(HEAD)
    failed = True
    try:
        with embedded.resolve("embedded:", "embedded:", directory) as backends:
            rows = asyncio.run(_run(backends, directory, chosen, groups))
            if "parts" in groups:
                rows += _parts(backends, directory, chosen.runs)
            stores = backends.chosen.replace(str(directory), "").replace(", private in /", " in ")
        failed = False
    finally:
        if failed:
            say(f"the logs are kept in {directory / 'log'}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    if not rows:
        parser.error(f"--only: no group and no row is called so: {', '.join(chosen.only)}; the groups are {', '.join(cases.GROUPS)}")
    goals.add_ratios(rows)
    report = Report(
        machine=measure.machine(
            stores=stores,
            peers={"Postfix": measure.program_version("postconf", "-d", "mail_version"), "node": measure.program_version("node", "-v")},
            message_bytes=len(newsletter.wire()[2]),
            tls="STARTTLS where said",
            signing=f"RSA-2048 where said, 8 lanes {'there' if signing_lanes.load() else 'not there'}",
            fsync="journal every 0.1 s, PostgreSQL every commit, Valkey every second",
            runs=chosen.runs, load_before=round(os.getloadavg()[2], 2), seconds=round(time.monotonic() - began, 1),
        ),
        rows=rows,
        goals=goals.judge(rows),
    )  # fmt: skip
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if chosen.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
