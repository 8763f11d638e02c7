"""Ledger: carries the journal into PostgreSQL, in blocks, behind a cursor that moves in the same transaction.

It may lag for as long as PostgreSQL is away; delivery goes on until leases run out or the journal's disk budget is used up.
Whatever happened to a transaction, the cursor in PostgreSQL says where to go on.
"""

import asyncio
import contextlib
import logging
from typing import Final

from domain.errors import JournalError, Unavailable
from ext import journal_record, ledger_rows
from journal.segment_files import START, Position, Reader
from journal.segments import Journal
from store import accounting
from store.postgres import Pool
from store.trouble import is_store_trouble, sentence

READER_NAME: Final = "ledger"
MOST_BYTES_PER_TRANSACTION: Final = 4 * 1024 * 1024
_LONGEST_PAUSE_SECONDS: Final = 1.0

_log = logging.getLogger(__name__)


class Ledger:
    """One journal's way into PostgreSQL. `trouble` says why it lags, in words; empty: it does not."""

    def __init__(
        self,
        journal: Journal,
        pool: Pool,
        *,
        interval_seconds: float = 0.2,
        statement_timeout_seconds: float = 30.0,
    ) -> None:
        self.trouble = ""
        self.strays = 0  # records of campaigns that are gone
        self.carried_bytes = 0  # of journal, so far
        self._journal = journal
        self._pool = pool
        self._interval_seconds = interval_seconds
        self._statement_timeout_seconds = statement_timeout_seconds
        self._reader = Reader(journal.directory, inherited=journal.inherited)
        self._cursor = START  # everything before it was carried over
        self._stored = START  # what PostgreSQL has as the cursor; differs where there are only headers in between
        self._cursor_known = False
        self._open = journal_record.OpenIntents()
        self._fed = START  # how much of the journal `_open` has seen; behind `_cursor` where a bystander carried it over
        self._released_segment = 0
        self._wake = asyncio.Event()
        self._waiting: list[tuple[Position, asyncio.Future[None]]] = []
        self._ended: BaseException | None = None

    @property
    def cursor(self) -> Position:
        """Everything before it is in PostgreSQL."""
        return self._cursor

    @property
    def open_intents(self) -> int:
        """Messages whose content may have left and that have no outcome yet, as far as the ledger has read."""
        return len(self._open)

    @property
    def lag_bytes(self) -> int:
        """About how much of the journal is not in PostgreSQL yet (exact within one segment)."""
        end, cursor = self._journal.position, self._cursor
        return end.offset - cursor.offset if end.segment == cursor.segment else self._journal.used_bytes

    async def run(self) -> None:
        """Carry over until cancelled. Raises JournalError when the journal itself cannot be read: sending must stop then."""
        pause = self._interval_seconds
        try:
            while True:
                try:
                    await self.catch_up()
                except Exception as error:
                    if isinstance(error, JournalError) or not is_store_trouble(error):
                        raise
                    pause = min(_LONGEST_PAUSE_SECONDS, max(2 * pause, 0.2))
                    self._note_trouble(f"outcomes are safe in the journal but not in PostgreSQL: {sentence(error)}")
                else:
                    pause = self._interval_seconds
                    self._note_trouble("")
                    self._release()
                await self._pause(pause)
        except BaseException as error:
            self._ended = error
            self._wake_waiting()
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Close the file that is open; for whoever does not use `run`."""
        self._reader.close()

    async def flush_through(self, position: Position, *, timeout_seconds: float = 60.0) -> None:
        """Return when everything before `position` is in PostgreSQL. `run` must be running. Raises Unavailable after the time-out."""
        if self._ended is not None:
            raise Unavailable(f"the ledger has ended: {self._ended or 'it was stopped'}")
        if self._cursor_known and self.cursor >= position:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (position, future)
        self._waiting.append(entry)
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_seconds):
                await future
        except TimeoutError:
            raise Unavailable(f"the ledger did not reach {position} in {timeout_seconds:g} s; {self.trouble or 'it is behind'}") from None
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(entry)

    async def catch_up(self) -> None:
        """Carry over everything that is in the journal now. Raises what the first failing transaction raises, and JournalError."""
        until = self._journal.position
        if not self._cursor_known:
            known = await accounting.cursor(self._pool, self._journal.engine_id, timeout_seconds=self._statement_timeout_seconds)
            self._cursor = self._stored = self._reader.cursor = Position(*known)
            self._cursor_known = True
        while self._cursor < until:
            blocks: list[tuple[bytes, Position]] = []
            taken = 0
            damage: JournalError | None = None
            try:
                while taken < MOST_BYTES_PER_TRANSACTION and (block := self._reader.read(until=until)):
                    self._reader.advance()
                    blocks.append((block, self._reader.cursor))
                    taken += len(block)
            except JournalError as error:
                damage = error  # outcomes that stand before it are as true as ever: first they are carried over
            if blocks:
                await self._carry(blocks)
                self.carried_bytes += taken
            if damage is not None:
                raise damage
            if not blocks:
                self._cursor = self._reader.cursor
                break
        self._wake_waiting()

    async def _carry(self, blocks: list[tuple[bytes, Position]]) -> None:
        batches: set[accounting.BatchKey] = set()
        campaigns: set[int] = set()
        for block, _ in blocks:
            touched, about = ledger_rows.touched(block)
            batches.update(touched)
            campaigns.update(about)

        def make_rows(progress: accounting.Progress, existing: set[int]) -> accounting.LedgerRows:
            rows = accounting.LedgerRows([], [], {}, 0)
            for block, _ in blocks:
                copy, retries, totals, strays = ledger_rows.copy_rows(block, progress, existing)
                rows.copy.append(copy)
                rows.retries.extend(retries)
                for campaign, counts in totals.items():
                    rows.totals[campaign] = [a + b for a, b in zip(rows.totals.get(campaign, [0] * 7), counts, strict=True)]
                rows = rows._replace(strays=rows.strays + strays)
            return rows

        # From here on only PostgreSQL knows whether it happened, until it has said so
        self._cursor_known = False
        end = blocks[-1][1]
        strays = await accounting.record(
            self._pool,
            self._journal.engine_id,
            self._stored,
            end,
            batches,
            campaigns,
            make_rows,
            timeout_seconds=self._statement_timeout_seconds,
        )
        if self._fed >= self._cursor:
            for block, position in blocks:
                self._open.feed(block, position.segment)
            self._fed = end
        self._cursor, self._stored, self._cursor_known = end, end, True
        if strays:
            self.strays += strays
            _log.warning("%d records of journal %s belong to campaigns or batches that are gone", strays, self._journal.engine_id)
        self._wake_waiting()

    def _release(self) -> None:
        """Let segments go that are carried over; intents in them that have no outcome yet move to the newest segment.

        Nothing is awaited here, so between looking and writing no outcome can come in: what is moved is truly open.
        """
        cursor = self._cursor
        if cursor.segment <= self._released_segment:
            return
        try:
            self._journal.write()
            with Reader(self._journal.directory, min(self._fed, cursor)) as ahead:
                while block := ahead.read(until=self._journal.position):
                    self._open.feed(block, ahead.next.segment)
                    ahead.advance()
            self._fed = cursor
            moved = self._open.before(cursor.segment)
            for record in moved:
                self._journal.append(record)
            self._journal.write()
        except JournalError:
            return  # the engine's own write says so, too; these segments stay until the journal can be written again
        for record in moved:
            self._open.feed(record, self._journal.position.segment)
        self._journal.passed(READER_NAME, cursor)
        self._released_segment = cursor.segment

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    def _wake_waiting(self) -> None:
        for position, future in self._waiting:
            if not future.done():
                if self._ended is not None:
                    future.set_exception(Unavailable(f"the ledger has ended: {self._ended or 'it was stopped'}"))
                elif self.cursor >= position:
                    future.set_result(None)

    def _note_trouble(self, sentence: str) -> None:
        if sentence and not self.trouble:
            _log.warning("ledger of %s: %s", self._journal.engine_id, sentence)
        elif self.trouble and not sentence:
            _log.info("ledger of %s has caught up", self._journal.engine_id)
        self.trouble = sentence
