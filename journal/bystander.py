"""Bystander: carries the journal of an owner that lives but is silent into PostgreSQL, without its lock.

A process that is stopped (SIGSTOP) or cut off from PostgreSQL keeps its lock and its leases run out. What it has written by then is
in its journal only; whoever sends its batches on must know it first. The journal itself is only read. When the owner goes on, its
own ledger finds that the cursor has moved, and goes on from there.
"""

import asyncio
from pathlib import Path
from typing import Final, cast

from journal.ledger import Ledger
from journal.segment_files import START, Position, end_of, segment_numbers
from journal.segments import Journal
from store.postgres import Pool


class _ReadOnly:
    """What a ledger needs of a journal to read it up to where it ends now."""

    inherited: Final = True  # the owner may have been stopped in the middle of a record

    def __init__(self, directory: Path, position: Position) -> None:
        self.directory = directory
        self.engine_id = directory.name
        self.position = position
        self.used_bytes = 0


async def carry_over(directory: Path, pool: Pool) -> int:
    """Carry what is in the journal `directory` now into PostgreSQL. Returns bytes.

    Raises Unavailable; Conflict when its owner, or another bystander, did the same at the same time; JournalDamaged when something else
    than records stands among them, after what stands before it was carried over; JournalError when the disk does not give it.
    """
    end = await asyncio.to_thread(_end, directory)
    ledger = Ledger(cast(Journal, _ReadOnly(directory, end)), pool)
    try:
        await ledger.catch_up()
    finally:
        ledger.close()
    return ledger.carried_bytes


def _end(directory: Path) -> Position:
    numbers = segment_numbers(directory)
    return end_of(directory, numbers) if numbers else START
