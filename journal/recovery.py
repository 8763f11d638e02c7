"""Recovery: what a dead owner's journal still has to say.

A free lock means that the owner is dead. Whoever finds it takes the lock, names every message in doubt (an intent without an
outcome, R10), carries all of it into PostgreSQL and the accounting files, releases the owner's leases and removes the directory.
Killed at any point it can be done again, with the same result: the records in doubt are in the dead journal before anything
is derived from it, and everything after that is behind a cursor.
"""

import asyncio
import logging
import time
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from domain import states
from domain.errors import JournalError
from ext import journal_record
from journal.accounting_files import AccountingFiles
from journal.ledger import Ledger
from journal.segment_files import JournalDamaged, Reader
from journal.segments import Journal, JournalOwned, sweep
from store import accounting
from store.postgres import Pool

DOUBT: Final = "sending process died after the content may have left, possible duplicate"
_ASK_AGAIN_SECONDS: Final = 60.0  # for a damaged journal
_TRY_AGAIN_SECONDS: Final = 5.0  # for a disk that is full or does not answer

# As `ext.journal_record.OpenIntents.records` gives it: kind, then the fields of domain.accounting.Intent
Intent: TypeAlias = tuple[str, int, int, int, int, int, int, int, int, int]

_log = logging.getLogger(__name__)


class _Refusal(NamedTuple):
    """Why a journal was not finished is said once, and it is not tried again every second."""

    tried_at: float
    pause: float
    reason: str
    carried: bool  # it is damaged, and what stands before the damage is in PostgreSQL: nothing more will come of it


_refused: dict[Path, _Refusal] = {}


async def adopt(
    journal_root: Path,
    own_id: str,
    pool: Pool,
    accounting_path: Path,
    *,
    records: tuple[str, ...] = ("d", "b", "t"),
    max_size_bytes: int = 250 * 1024 * 1024,
) -> list[str]:
    """Finish the journal of every dead owner below `journal_root`. Returns their ids; cheap when there are none.

    A journal that is damaged is left where it is, with everything before the damage carried over, and said so in the log; one that the
    disk does not give, or does not let us finish, is tried again.
    Raises Unavailable when PostgreSQL does not answer; what is left over is found by the next call.
    """
    adopted: list[str] = []
    for directory in [directory for directory in _refused if not directory.exists()]:
        del _refused[directory]  # an operator has moved it away
    if not journal_root.is_dir():
        return adopted
    sweep(journal_root)
    for directory in sorted(journal_root.iterdir()):
        if directory.name == own_id or directory.name.startswith(".") or not directory.is_dir():
            continue
        before = _refused.get(directory)
        if before and time.monotonic() - before.tried_at < before.pause:
            continue
        opened = False
        try:
            journal = await asyncio.to_thread(_open, directory)
            opened = True
            await replay(journal, pool, accounting_path, records=records, max_size_bytes=max_size_bytes)
        except JournalOwned:
            continue
        except JournalError as error:
            damaged = isinstance(error, JournalDamaged)
            if before is None:
                _log.error("the journal of a dead engine is not taken over: %s", error)
            pause = _ASK_AGAIN_SECONDS if damaged else _TRY_AGAIN_SECONDS
            _refused[directory] = _Refusal(time.monotonic(), pause, str(error), opened and damaged)
            continue
        _refused.pop(directory, None)
        adopted.append(directory.name)
    return adopted


def is_refused(directory: Path) -> bool:
    """Whether the journal `directory` is damaged, all that can be read of it is in PostgreSQL, and it was left where it is.

    As far as this process has tried. One that could not be read at all, or not be finished, still has something to say: the recipients
    of its batches must wait.
    """
    refusal = _refused.get(directory)
    return refusal is not None and refusal.carried


def troubles() -> list[str]:
    """Why journals of dead engines were not finished, in words: their recipients may wait for it."""
    return [f"the journal of a dead engine is not taken over: {refusal.reason}" for refusal in _refused.values()]


def _open(directory: Path) -> Journal:
    if not directory.exists():
        raise JournalOwned(f"{directory}: somebody else has just finished it")
    return Journal(directory, engine_id=directory.name)


class Finished(NamedTuple):
    """What finishing a journal did."""

    in_doubt: int  # messages that got a `u` record
    carried_bytes: int  # of journal that PostgreSQL did not have yet
    released: int  # batches that others may lease now
    strays: int  # records of campaigns or batches that are gone


async def replay(
    journal: Journal,
    pool: Pool,
    accounting_path: Path,
    *,
    records: tuple[str, ...] = ("d", "b", "t"),
    max_size_bytes: int = 250 * 1024 * 1024,
    elsewhere: bool = False,
    keep: bool = False,
) -> Finished:
    """Finish one journal whose owner is dead and remove it, unless it is to `keep`. `elsewhere`: it was written on another node.

    Raises JournalDamaged (after carrying over what stands before the damage), JournalError when the disk refuses, and Unavailable.
    The lock is free afterwards.
    """
    ledger = Ledger(journal, pool)
    files = AccountingFiles(journal, accounting_path, records=records, max_size_bytes=max_size_bytes, elsewhere=elsewhere)
    finished = False
    try:
        try:
            in_doubt = await asyncio.to_thread(_intents_in_doubt, journal)
        except JournalError:
            # Outcomes before the damage are as true as ever: without them their recipients would be mailed again
            await ledger.catch_up()
            raise
        if in_doubt:
            await _name(journal, pool, in_doubt)
        await ledger.catch_up()
        released = await accounting.release_owner(pool, journal.engine_id)
        try:
            await files.flush()
        except OSError as error:
            raise JournalError(
                f"{accounting_path}: the accounting file of {journal.engine_id} cannot be finished: {error.strerror}"
            ) from error
        finished = True
        _log.info("journal of %s finished: %d in doubt, %d batches released", journal.engine_id, len(in_doubt), released)
        return Finished(len(in_doubt), ledger.carried_bytes, released, ledger.strays)
    finally:
        ledger.close()
        files.close()
        # Also when we are cancelled: the lock must be free for whoever tries next
        await asyncio.to_thread(journal.close, remove=finished and not keep)


def _intents_in_doubt(journal: Journal) -> list[Intent]:
    intents = journal_record.OpenIntents()
    with Reader(journal.directory, inherited=True) as reader:
        while block := reader.read(until=journal.position):
            intents.feed(block, reader.next.segment)
            reader.advance()
    return intents.records()


async def _name(journal: Journal, pool: Pool, in_doubt: list[Intent]) -> None:
    """Write the `u` record of each message in doubt into the journal, and what its delivery server wants done with it (R8)."""
    policies = await accounting.on_uncertain(pool, {intent[8] for intent in in_doubt})
    known = await accounting.recipients_in_doubt(pool, [(intent[1], intent[3]) for intent in in_doubt])
    now = time.time_ns() // 1000
    for intent in in_doubt:
        email, queued_at = known.get((intent[1], intent[3]), ("", 0))
        policy = policies.get(intent[8], "retry")
        # The verdict stands before its `u`: should we be killed in the middle of this write, it must not be sent again
        if policy == "assume_delivered":
            journal.append(_outcome(states.KIND_DELIVERY, intent, now, queued_at, email, "2.0.0", f"assumed delivered: {DOUBT}", ""))
        elif policy == "fail":  # no bounce: no refusal was read (P5)
            journal.append(_outcome(states.KIND_EXPIRY, intent, now, queued_at, email, "5.4.2", f"given up: {DOUBT}", "bad-connection"))
        journal.append(_outcome(states.KIND_UNCERTAIN, intent, now, queued_at, email, "4.4.2", DOUBT, "bad-connection"))
    journal.write()
    await asyncio.to_thread(journal.sync)


def _outcome(kind: str, intent: Intent, now: int, queued_at: int, email: str, status: str, diagnostic: str, category: str) -> bytes:
    return journal_record.pack_outcome(
        kind, *intent[1:9], now, queued_at, 0, 0, 0, email, "", status, diagnostic, category, "", "", "", "", ""
    )
