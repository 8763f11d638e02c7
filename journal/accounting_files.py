"""Accounting files: carries the journal into PowerMTA-style CSV, `<stem>-YYYY-MM-DD-NNNN.csv`.

Each engine process writes files of its own: a number belongs to whoever creates the name first (O_EXCL), so the names are
the ones PowerMTA's consumers know, and no two processes ever write to one file. A file begins with the header line and ends at
midnight (local) or at its largest size.

What is in the files stands in `accounting_files.cursor` in the journal's directory: how far the journal was read, and how long each
file was at that moment. After a crash the files are cut back to that length and go on, so no line is lost or doubled.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from domain.accounting import DEFAULT_COLUMNS
from ext import accounting_lines
from journal.segment_files import START, JournalDamaged, Position, Reader
from journal.segments import Journal

READER_NAME: Final = "accounting_files"
CURSOR_NAME: Final = "accounting_files.cursor"
HEADER: Final = ",".join(DEFAULT_COLUMNS).encode() + b"\n"
_BYTES_BETWEEN_CHECKPOINTS: Final = 16 * 1024 * 1024
_LONGEST_PAUSE_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)


class _Checkpoint(msgspec.Struct):
    """The content of the cursor file. The last of `files` is the one being written."""

    segment: int
    offset: int
    files: list[tuple[str, int]]  # path, length in bytes


def next_file(path: Path, day: str) -> tuple[int, Path]:
    """Create the next free number of a day: `acct.csv` becomes `acct-2026-01-31-0000.csv`. An open descriptor, and its name.

    A number belongs to whoever creates it first, whatever process that is. Raises OSError.
    """
    directory, stem, suffix = path.parent, f"{path.stem}-{day}-", path.suffix or ".csv"
    directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    taken = [found.stem[len(stem) :] for found in directory.glob(f"{stem}*{suffix}")]
    number = max((int(text) for text in taken if text.isdecimal()), default=-1) + 1
    while True:
        made = directory / f"{stem}{number:04d}{suffix}"
        try:
            return os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640), made
        except FileExistsError:
            number += 1


class AccountingFiles:
    """One journal's way into accounting files. `trouble` says why it lags, in words; empty: it does not."""

    def __init__(
        self,
        journal: Journal,
        path: Path,
        *,
        records: tuple[str, ...] = ("d", "b", "t"),
        max_size_bytes: int = 250 * 1024 * 1024,
        flush_interval_seconds: float = 1.0,
        clock: Callable[[], float] = time.time,
        elsewhere: bool = False,
    ) -> None:
        """`path`: the stem and suffix, `…/acct.csv`. `records`: the types that are written; expiries are `b`.

        `elsewhere`: the journal comes from another node. The files it names are that node's, so new ones are begun; lines
        behind the last checkpoint may stand in both.
        """
        self.trouble = ""
        self._journal = journal
        self._path = path
        self._kinds = "".join(records)
        self._max_size_bytes = max_size_bytes
        self._flush_interval_seconds = flush_interval_seconds
        self._clock = clock
        self._elsewhere = elsewhere
        self._reader = Reader(journal.directory, inherited=journal.inherited)
        self._checkpoint = _Checkpoint(*START, [])
        self._cursor_read = False
        self._fd = -1
        self._file = ""
        self._day = ""
        self._size = 0
        self._length_unsure = False  # a failed write may have left bytes behind `_size`
        self._flushing = asyncio.Lock()

    @property
    def cursor(self) -> Position:
        """Everything before it is in the files, for good."""
        return Position(self._checkpoint.segment, self._checkpoint.offset)

    async def run(self) -> None:
        """Carry over until cancelled. Raises JournalError when the journal itself cannot be read."""
        pause = self._flush_interval_seconds
        while True:
            try:
                await self.flush()
            except OSError as error:
                pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)
                if not self.trouble:
                    _log.warning("accounting files: %s", error)
                self.trouble = f"{error.filename or self._file or self._path}: the accounting file cannot be written: {error.strerror}"
            else:
                pause, self.trouble = self._flush_interval_seconds, ""
                self._journal.passed(READER_NAME, self.cursor)
            await asyncio.sleep(pause)

    async def flush(self) -> None:
        """Carry over everything that is in the journal now. Raises OSError, after which it can be tried again, and JournalError."""
        async with self._flushing:
            # Files are written and synced in a thread: a slow disk must not hold up the connections
            work = asyncio.ensure_future(asyncio.to_thread(self._carry, self._journal.position))
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                with contextlib.suppress(Exception):
                    await work
                raise

    def close(self) -> None:
        """Close the files. `flush` before it, or what is new waits for whoever replays the journal."""
        self._reader.close()
        with contextlib.suppress(OSError):  # what counts was synced before the checkpoint
            self._close_file()

    # --- in the thread --------------------------------------------------------------------------------------------------

    def _carry(self, until: Position) -> None:
        if not self._cursor_read:
            self._take_up()
        if self._fd >= 0 and self._day != self._today():
            self._close_file()
        since = 0
        while block := self._reader.read(until=until):
            self._write_lines(accounting_lines.csv_lines(block, self._kinds))
            self._reader.advance()
            since += len(block)
            if since >= _BYTES_BETWEEN_CHECKPOINTS:
                self._save()
                since = 0
        if self._reader.cursor != self.cursor:
            self._save()

    def _today(self) -> str:
        return time.strftime("%Y-%m-%d", time.localtime(self._clock()))

    def _take_up(self) -> None:
        """Go on where this journal's files were left: cut off what came after the last checkpoint."""
        try:
            content = (self._journal.directory / CURSOR_NAME).read_bytes()
        except FileNotFoundError:
            content = msgspec.json.encode(_Checkpoint(*START, []))
        try:
            found = msgspec.json.decode(content, type=_Checkpoint)
        except msgspec.MsgspecError as error:
            path = self._journal.directory / CURSOR_NAME
            raise JournalDamaged(f"{path}: this is no cursor of accounting files ({error}); what is in the files cannot be told") from error
        if self._elsewhere:
            # The same path on this node is a file of this node's: never cut it. What we write ourselves is remembered again
            self._elsewhere, found.files = False, []
        for name, size in found.files:
            # A consumer may have taken a finished file away; that is its right
            with contextlib.suppress(FileNotFoundError):
                if size == 0 and name != found.files[-1][0]:
                    Path(name).unlink()
                elif Path(name).stat().st_size > size:
                    os.truncate(name, size)
        self._file = ""
        if found.files:
            name, size = found.files[-1]
            with contextlib.suppress(FileNotFoundError):
                self._fd = os.open(name, os.O_WRONLY | os.O_APPEND)
                self._file, self._size = name, os.fstat(self._fd).st_size
                self._day = Path(name).stem[len(self._path.stem) + 1 :][:10]
        self._checkpoint = found
        self._reader.cursor = Position(found.segment, found.offset)
        self._cursor_read = True

    def _write_lines(self, lines: bytes) -> None:
        """Append whole lines, beginning a new file where one is full. All of them, or OSError and the reader stays where it is."""
        before = (self._file, self._size)
        start = 0
        try:
            while start < len(lines):
                if self._fd < 0 or self._day != self._today():
                    self._new_file()
                room = self._max_size_bytes - max(self._size, len(HEADER))
                end = len(lines) if len(lines) - start <= room else lines.rfind(b"\n", start, start + max(room, 0)) + 1
                if end <= start:
                    if self._size > len(HEADER):
                        self._close_file()
                        continue
                    end = lines.index(b"\n", start) + 1
                self._append(lines[start:end])
                start = end
        except OSError:
            if self._fd >= 0 and self._file == before[0]:
                self._size = before[1]
                self._length_unsure = True
            else:
                # Lines of this block may stand in an older file as well: go back to the last checkpoint, as after a crash
                self.close()
                self._cursor_read = False
            raise

    def _append(self, data: bytes) -> None:
        if self._length_unsure:
            os.ftruncate(self._fd, self._size)
            self._length_unsure = False
        if self._size == 0:
            data = HEADER + data
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._size += len(data)

    def _new_file(self) -> None:
        """Create the next free number of today. It is in the cursor file before anything is in it."""
        self._close_file()
        day = self._today()
        fd, path = next_file(self._path, day)
        try:
            self._store(_Checkpoint(self._checkpoint.segment, self._checkpoint.offset, [*self._checkpoint.files, (str(path), 0)]))
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        self._fd, self._file, self._day, self._size, self._length_unsure = fd, str(path), day, 0, False

    def _close_file(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def _save(self) -> None:
        """Make what was written last, and then say so."""
        if self._fd >= 0:
            os.fdatasync(self._fd)
        cursor = self._reader.cursor
        self._store(_Checkpoint(cursor.segment, cursor.offset, [(self._file, self._size)] if self._file else []))

    def _store(self, checkpoint: _Checkpoint) -> None:
        write_checkpoint(self._journal.directory / CURSOR_NAME, checkpoint)
        self._checkpoint = checkpoint


def write_checkpoint(path: Path, checkpoint: msgspec.Struct) -> None:
    """Put `checkpoint` in place of the file at `path` as JSON: whoever reads it finds the old one or the new one, whole."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(msgspec.json.encode(checkpoint))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
