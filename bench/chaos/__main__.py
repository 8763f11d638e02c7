"""`python -m bench.chaos`, `sluice chaos`, `make chaos`: harm a fleet on purpose and count. docs/delivery-contract.md is the manual.

Exit codes: 0 every promise was kept, 1 one was broken, 2 it could not run.
"""

import argparse
import asyncio
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from bench.chaos import matrix, report, storm
from bench.chaos.catalogue import CANNOT, FAULTS
from bench.chaos.fault import CannotRun, Fault
from bench.chaos.runner import FLEET_NEEDS, Options, Run, Runner, summed
from config import logs
from domain.errors import SluiceError

QUICK_RECIPIENTS: Final = 6_000
QUICK_RATE: Final = 2000.0


def parser() -> argparse.ArgumentParser:
    """The options; `sluice chaos` hands the same ones on."""
    made = argparse.ArgumentParser(prog="sluice chaos", description="Harm a fleet on purpose, and count what became of everybody.")
    add = made.add_argument
    add("--quick", action="store_true", help="every process fault once, within three minutes")
    add("--fault", action="append", default=[], metavar="NAME", help="this fault only (repeatable; --list shows them)")
    add("--seeds", type=_at_least(1), default=1, metavar="N", help="runs of each fault, with seeds that count up (%(default)s)")
    add("--seed", type=int, default=1, metavar="S", help="the first seed; the same one makes the same choices (%(default)s)")
    add("--jobs", type=_at_least(1), default=1, metavar="N", help="fleets at a time, each with stores of its own (%(default)s)")
    add("--minutes", type=float, metavar="M", help="mixed chaos instead: a random fault every 20 s for that long")
    add("--kills", type=_at_least(1), metavar="N", help="kill storm instead: that many kill -9 of engines under full load")
    add("--terms", type=_at_least(1), metavar="N", help="drain storm instead: that many SIGTERM of engines under full load")
    add("--recipients", type=_at_least(400), metavar="N", help=f"of each run (20000; {QUICK_RECIPIENTS} with --quick)")
    add("--rate", type=float, metavar="N", help=f"messages a second over all delivery servers (1200; {QUICK_RATE:g} with --quick)")
    add("--on-uncertain", choices=("retry", "assume_delivered", "fail"), default="retry", help="of the delivery servers (%(default)s)")
    add("--database-url", default="", metavar="URL", help="this PostgreSQL instead of one of our own (an empty database)")
    add("--redis-url", default="", metavar="URL", help="this Redis instead of one of our own (its keys may be lost)")
    add("--smtp", metavar="HOST:PORT", help="this SMTP server instead of our sinks; needs --accepted")
    add("--accepted", type=Path, metavar="FILE", help="where it appends {message_id, recipient} for each message before it says 250")
    add("--directory", type=Path, metavar="DIR", help="keep everything here (default: a temporary directory, kept when a promise broke)")
    add("--list", action="store_true", help="show every fault and end")
    add("--json", action="store_true", help="write a list of objects to standard output at the end")
    return made


def _at_least(least: int):  # type: ignore[no-untyped-def]
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be {least} or more")
        return int(text)

    return number


def chosen(arguments: argparse.Namespace) -> list[Fault]:
    """The faults that were asked for, ordered so that a fleet is used as long as possible. Raises SluiceError."""
    if arguments.fault:
        by_name = {fault.name: fault for fault in FAULTS}
        unknown = [name for name in arguments.fault if name not in by_name]
        if unknown:
            raise SluiceError(f"no fault is called {', '.join(unknown)}; --list shows them")
        return [by_name[name] for name in arguments.fault]
    faults = [fault for fault in FAULTS if fault.process] if arguments.quick else list(FAULTS)
    groups: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        groups.setdefault(tuple(sorted(fault.needs & FLEET_NEEDS)), []).append(fault)
    return [fault for group in groups.values() for fault in group]


def options_from(arguments: argparse.Namespace, directory: Path) -> Options:
    """Checked options. Raises SluiceError."""
    smtp = None
    if arguments.smtp:
        host, colon, port = arguments.smtp.rpartition(":")
        if not (colon and host and port.isdigit()):
            raise SluiceError("--smtp: write HOST:PORT")
        if arguments.accepted is None:
            raise SluiceError("--smtp: needs --accepted FILE, or nobody knows what that server took")
        smtp = (host.strip("[]"), int(port))
    foreign = bool(arguments.database_url or smtp)
    if arguments.jobs > 1 and (foreign or arguments.redis_url):
        raise SluiceError("--jobs: several fleets need stores and sinks of their own; leave it out with foreign servers")
    return Options(
        directory=directory,
        recipients=arguments.recipients or (QUICK_RECIPIENTS if arguments.quick else 20_000),
        rate=arguments.rate if arguments.rate is not None else (QUICK_RATE if arguments.quick else 1200.0),
        on_uncertain=arguments.on_uncertain,
        database_url=arguments.database_url,
        redis_url=arguments.redis_url,
        smtp=smtp,
        accepted=arguments.accepted,
        quick=arguments.quick,
        # A foreign server may know the addresses of an earlier run
        first_load=int(time.time()) if foreign else 1,
    )


async def play(arguments: argparse.Namespace, options: Options) -> tuple[list[Run], list[CannotRun]]:
    """Run what was asked for."""
    cannot: list[CannotRun] = [] if arguments.fault or arguments.quick else list(CANNOT)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    began = time.monotonic()
    async with Runner(options, report.say) as runner:
        faults = []
        for fault in chosen(arguments):
            reason = runner.why_not(fault)
            if reason:
                cannot.append(CannotRun(fault.row, fault.name, reason))
            else:
                faults.append(fault)
        if arguments.minutes or arguments.kills or arguments.terms:
            playing = _storms(arguments, runner, faults)
        else:
            plays = [(fault, seed) for fault in faults for seed in range(arguments.seed, arguments.seed + arguments.seeds)]
            playing = matrix.quick(runner, plays, began, cannot) if arguments.quick else matrix.play(runner, plays, arguments.jobs)
        work, told = asyncio.ensure_future(playing), asyncio.ensure_future(stop.wait())
        await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            raise KeyboardInterrupt
        found = work.result()
    return found, cannot


async def _storms(arguments: argparse.Namespace, runner: Runner, faults: Sequence[Fault]) -> list[Run]:
    runs: list[Run] = []
    if arguments.kills:
        runs.append(await storm.signals(runner, arguments.kills, signal.SIGKILL, arguments.seed, report.say))
    if arguments.terms:
        runs.append(await storm.signals(runner, arguments.terms, signal.SIGTERM, arguments.seed, report.say))
    if arguments.minutes:
        able = [fault for fault in faults if fault.mixed or arguments.fault]
        runs.append(await storm.mixed(runner, able, arguments.minutes, arguments.seed, report.say))
    for number, run in enumerate(runs, 1):
        report.line(run, number, len(runs))
    return runs


def main(argv: list[str] | None = None) -> int:
    """See the module."""
    arguments = parser().parse_args(argv)
    logs.configure("warning")
    if arguments.list:
        report.catalogue(FAULTS, CANNOT)
        return 0
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="sluice-chaos-"))
    if arguments.directory is None:
        directory.chmod(0o711)  # run as root, PostgreSQL is somebody else's process and must pass through
    keep = arguments.directory is not None
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)  # our own pool says every time that the killed server is away
    try:
        options = options_from(arguments, directory.absolute())
        chosen(arguments)
        report.say(f"everything is kept in {directory} while it runs")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            runs, cannot = loop.run(play(arguments, options))
    except SluiceError as error:
        report.say(f"sluice chaos: {error}", "bold red")
        return 2
    except KeyboardInterrupt:
        report.say("stopped")
        return 130
    finally:
        if not keep and "runs" not in locals():
            shutil.rmtree(directory, ignore_errors=True)
    report.table(runs, cannot)
    broken = any(run.broken for run in runs) or not runs
    if not keep and not broken:
        shutil.rmtree(directory, ignore_errors=True)
    elif broken:
        report.say(f"logs, journals and accepted files: {directory}")
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(summed(runs)), indent=2))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
