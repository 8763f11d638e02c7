"""`python -m journal show|replay DIR`: looks into a journal directory, or hands it to this node's ledger. `sluice journal` runs it.

Exit codes: 0 ok, 1 the answer is no (damage was found, the owner lives), 2 it could not run.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from config import load, logs
from config.settings import Settings
from domain.errors import Conflict, SluiceError
from journal import inspection, recovery
from journal.segments import Journal, JournalOwned
from store import accounting, embedded, migrate, postgres
from store.postgres import Pool

T = TypeVar("T")

# An engine shows itself every second; one that is cut off from PostgreSQL for longer cannot extend its leases either
ALIVE_SECONDS = 30.0


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """What `replay` did with one journal."""

    directory: str
    engine_id: str
    carried_bytes: int
    in_doubt: int
    batches_released: int
    strays: int
    kept: bool


def main() -> int:
    """Do what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sluice journal", description="Look into journals, or hand a dead engine's to this node.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what stands in a journal")
    show.add_argument("--ledger", action="store_true", help="ask PostgreSQL as well how far it has read")
    replay = commands.add_parser("replay", help="hand a dead engine's journal to this node's ledger")
    replay.add_argument("--keep", action="store_true", help="leave the directory where it is")
    for command in (show, replay):
        command.add_argument("directory", type=Path)
        command.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logs.configure("warning")
    try:
        found = inspection.journals_in(options.directory)
        return _show(found, options) if options.command == "show" else _replay(found, options)
    except (Conflict, JournalOwned) as error:
        print(f"sluice: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"sluice: {error.filename or options.directory}: {error.strerror or error}", file=sys.stderr)
    except SluiceError as error:
        print(f"sluice: {error}", file=sys.stderr)
    return 2


def _with_pool(work: Callable[[Settings, Pool], Awaitable[T]]) -> T:
    """Run `work` with the database of the settings, started when it is a private one."""
    config = os.environ.get("SLUICE_CONFIG")
    settings = load.load(Path(config) if config else None)
    with embedded.resolve(settings.database.url, settings.redis.url, load.state_directory(settings)) as backends:

        async def opened() -> T:
            await migrate.apply(backends.database_url)
            pool = await postgres.open_pool(backends.database_url, 4, settings.database.command_timeout_seconds)
            try:
                return await work(settings, pool)
            finally:
                await pool.close()

        return asyncio.run(opened())


# --- show -------------------------------------------------------------------------------------------------------------------


def _show(directories: list[Path], options: argparse.Namespace) -> int:
    shown = [inspection.inspect(directory) for directory in directories]
    if options.ledger:

        async def ask(_: Settings, pool: Pool) -> None:
            for facts in shown:
                facts.ledger_cursor = await accounting.cursor(pool, facts.engine_id)

        _with_pool(ask)
    if options.json:
        _write_json(shown)
    else:
        for facts in shown:
            _print(facts)
    return 1 if any(facts.damage for facts in shown) else 0


def _print(facts: inspection.JournalFacts) -> None:
    records = ", ".join(f"{facts.records[kind]:,} {name}" for kind, name in inspection.KINDS.items() if kind in facts.records)
    doubt = ": possible duplicates, named by replay" if facts.open_intents and not facts.owner else ""
    lines = [
        ("journal", facts.directory),
        ("engine", facts.engine_id or "not known"),
        ("owner", f"alive: {facts.owner}" if facts.owner else "dead"),
        ("segments", f"{len(facts.segments):,} with {facts.bytes:,} bytes"),
        ("records", records or "none"),
        ("open intents", f"{facts.open_intents:,}{doubt}"),
        ("accounting files", _cursor(facts.accounting_files_cursor)),
    ]
    if facts.ledger_cursor is not None:
        lines.append(("ledger", _cursor(facts.ledger_cursor)))
    for name, value in lines:
        print(f"{name:<17} {value}")
    for segment in facts.segments:
        created = f"{segment.created_at:%Y-%m-%d %H:%M:%S}" if segment.created_at else ""
        torn = f", {segment.torn_bytes:,} torn bytes behind them" if segment.torn_bytes else ""
        print(f"  {segment.file}  {created} UTC  {segment.bytes:>13,} bytes  {segment.records:>10,} records{torn}")
    for intent in facts.intents:
        print(
            f"  open: campaign {intent.campaign_id} recipient {intent.number} attempt {intent.attempt} "
            f"delivery server {intent.delivery_server_id} at {intent.at:%Y-%m-%d %H:%M:%S} UTC"
        )
    for damage in facts.damage:
        behind = "" if damage.next_good is None else f"; the next good record is at offset {damage.next_good}"
        print(f"  DAMAGE {damage.file}: offset {damage.offset}: {damage.reason}{behind}")


def _cursor(cursor: tuple[int, int] | None) -> str:
    return f"read up to segment {cursor[0]} offset {cursor[1]}" if cursor else "nothing read yet"


# --- replay -----------------------------------------------------------------------------------------------------------------


def _replay(directories: list[Path], options: argparse.Namespace) -> int:
    done: list[Replayed] = []

    async def work(settings: Settings, pool: Pool) -> None:
        for directory in directories:
            done.append(await _hand_over(directory.resolve(), settings, pool, keep=options.keep))
            if not options.json:
                _say(done[-1])

    _with_pool(work)
    if options.json:
        _write_json(done)
    return 0


async def _hand_over(directory: Path, settings: Settings, pool: Pool, *, keep: bool) -> Replayed:
    """Replay one journal here. Raises JournalOwned and Conflict when its owner lives, JournalError at damage, Unavailable."""
    engine_id = inspection.engine_id_of(directory)
    seen = await accounting.last_seen(pool, engine_id)
    here = seen is not None and seen.node == load.node_name(settings)
    # On the machine where it was written the lock tells whether its owner lives; a copy of it has a lock of its own
    in_place = here and seen is not None and Path(seen.journal_directory).resolve() == directory
    if seen is not None and not in_place and not seen.stopped and seen.seconds_ago < ALIVE_SECONDS:
        raise Conflict(
            f"{directory}: engine {engine_id} on node {seen.node} was alive {seen.seconds_ago:.0f} s ago; "
            f"stop it, and try again {ALIVE_SECONDS:.0f} s after its end"
        )
    try:
        journal = await asyncio.to_thread(Journal, directory, engine_id=engine_id)
    except JournalOwned as error:
        raise JournalOwned(f"{error} ({inspection.owner_of(directory) or 'it has just ended'})") from None
    finished = await recovery.replay(
        journal,
        pool,
        load.accounting_path(settings),
        records=tuple(settings.accounting.records),
        max_size_bytes=settings.accounting.max_size_bytes,
        elsewhere=not in_place,
        keep=keep,
    )
    return Replayed(
        directory=str(directory), engine_id=engine_id, carried_bytes=finished.carried_bytes, in_doubt=finished.in_doubt,
        batches_released=finished.released, strays=finished.strays, kept=keep,
    )  # fmt: skip


def _say(done: Replayed) -> None:
    print(f"{done.directory}: the journal of engine {done.engine_id} is in the ledger")
    print(f"  {done.carried_bytes:,} bytes were new to it")
    print(f"  {done.in_doubt:,} messages were in doubt; each has its u record now")
    print(f"  {done.batches_released:,} batches were released")
    if done.strays:
        print(f"  {done.strays:,} records belong to campaigns that are gone")
    print("  the directory was kept" if done.kept else "  the directory was removed")


def _write_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


if __name__ == "__main__":
    sys.exit(main())
