"""Segments: the append-only journal of one process on local disk. An outcome exists when it is here.

A journal is a directory: `lock` (held with flock by its owner for as long as it lives; free = the owner is dead) and the segments
that `journal.segment_files` describes.

Written with one write(2) per turn of the event loop, which survives `kill -9`; fsync follows in a thread, at most once per
interval, which survives a power cut (R1). After a failed write nothing is written until `reopen` has made a new segment
(R5); after a failed fsync the next turn goes to a new segment, and fsync is never tried again on the old one.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from domain.errors import JournalError
from ext.journal_record import Records
from journal.segment_files import START, Position, end_of, is_unfinished, pack_header, segment_numbers, segment_path

LOCK_NAME: Final = "lock"
_SYNC_TROUBLE_SECONDS: Final = 3600.0
_MAKING: Final = ".making-"
_REMOVED: Final = ".removed-"

_log = logging.getLogger(__name__)


class JournalOwned(JournalError):
    """A living process holds the lock of this journal."""


class Journal:
    """The writing side; at most one in the world per directory.

    Opening a directory that has segments goes on behind them in a new one. Raises JournalError when somebody else holds the
    lock, or what is there is no journal; damage among its records is for its readers to find.
    """

    def __init__(
        self,
        directory: Path,
        *,
        engine_id: str,
        segment_bytes: int = 4 * 1024 * 1024,
        fsync_interval_seconds: float = 0.1,
        disk_budget_bytes: int = 4 * 1024 * 1024 * 1024,
        readers: tuple[str, ...] = ("ledger", "accounting_files"),
    ) -> None:
        """`readers`: no segment is removed before every one of these has said, with `passed`, that it is behind it."""
        self.directory = directory
        self.engine_id = engine_id
        self.sync_failures = 0
        self._sync_failed_at = float("-inf")
        self._sync_reason = ""
        self.failure = ""  # why nothing is written at the moment; empty: all is well
        self._segment_bytes = segment_bytes
        self._fsync_interval_seconds = fsync_interval_seconds
        self._disk_budget_bytes = disk_budget_bytes
        self._passed = dict.fromkeys(readers, START)
        self.records = Records()  # what the next `write` takes; the hot path packs into it
        self.append: Callable[[bytes], None] = self.records.append
        self._pending_bytes = b""  # taken, but the write failed: the first to go out after `reopen`
        self._fd = -1
        self._segment = 0
        self._offset = 0
        self._synced = 0
        self._header_end = 0
        self._before: tuple[int, int, int] | None = None  # segment, offset and what was synced of the segment before
        self._unsynced: list[int] = []  # descriptors of finished segments whose last records are not on disk yet
        self._sync_broken = False
        self._closed_sizes: dict[int, int] = {}
        self._dirty = asyncio.Event()
        self._sync_task: asyncio.Task[None] | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._lock_fd = take_lock(directory) if directory.exists() else _make_locked(directory)
        try:
            os.pwrite(self._lock_fd, f"{engine_id} {os.getpid()}\n".encode().ljust(80), 0)
            self._find_end()
            self.inherited = self._segment > 0  # begun by somebody who is dead now
            if not self.inherited:
                self._open_segment(0, 0)
        except OSError as error:
            os.close(self._lock_fd)
            raise JournalError(f"{directory}: the journal cannot be opened: {error.strerror}") from error
        except BaseException:
            os.close(self._lock_fd)
            raise

    # --- what others ask ----------------------------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """The end of what is written: readers may read up to here."""
        return Position(self._segment, self._offset)

    @property
    def used_bytes(self) -> int:
        """What the segments take on disk."""
        return sum(self._closed_sizes.values()) + self._offset

    @property
    def over_budget(self) -> bool:
        """Whether readers lag so far behind that nothing more may be leased until they have caught up."""
        return self.used_bytes > self._disk_budget_bytes

    @property
    def sync_trouble(self) -> str:
        """What an operator should know of the disk, for an hour after each failed fsync; empty: nothing."""
        if time.monotonic() - self._sync_failed_at > _SYNC_TROUBLE_SECONDS:
            return ""
        return (
            f"{self.directory}: the disk failed to keep the journal {self.sync_failures} times since the start, last with "
            f"{self._sync_reason}; a power cut now could lose outcomes: look at the disk"
        )

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Put all that was appended into the journal with one write(2). After it returns, what was intended may be sent.

        Raises JournalError when the disk refuses it; the records are kept and go out first after `reopen`.
        """
        if self.failure:
            raise JournalError(self.failure)
        data = self.records.take()
        if self._pending_bytes:
            data, self._pending_bytes = self._pending_bytes + data, b""
        if not data:
            return
        if self._fd < 0 or self._sync_broken or self._offset >= self._segment_bytes:
            self._pending_bytes = data
            self._next_segment()
            self._pending_bytes = b""
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were written")
        except OSError as error:
            self._pending_bytes = data
            # Readers know the end from `position` and from the next header; cutting is for whoever looks at a dead journal
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._offset)
            self._fail("write", error)
        self._offset += len(data)
        self._dirty.set()

    def reopen(self) -> None:
        """After a failed write: begin a new segment and write what was kept. Raises JournalError; try again later."""
        self.failure = ""
        if self._fd >= 0 and self._before is not None and self._offset == self._header_end:
            # Nothing ever went into this one: make it anew, or a disk that stays full collects empty segments
            self._unsynced.append(self._fd)
            segment_path(self.directory, self._segment).unlink(missing_ok=True)
            self._fd, (self._segment, self._offset, self._synced) = -1, self._before
        self._next_segment()
        self.write()

    def _fail(self, what: str, error: OSError) -> None:
        path = segment_path(self.directory, self._segment)
        self.failure = f"{path}: {what} at offset {self._offset} failed: {error.strerror}; nothing is sent until the journal can be written"
        raise JournalError(self.failure) from error

    def _next_segment(self) -> None:
        fd, segment, offset, synced = self._fd, self._segment, self._offset, self._synced
        try:
            self._open_segment(offset, synced)
        except OSError as error:
            self._fail("opening the next segment", error)
        self._closed_sizes[segment] = offset
        self._before = (segment, offset, synced)
        if fd >= 0:
            if self._sync_broken:
                os.close(fd)
            else:
                self._unsynced.append(fd)
        self._sync_broken = False

    def _open_segment(self, previous_end: int, previous_synced: int) -> None:
        """Create the segment after `self._segment` and go on there. Raises OSError and leaves no file behind."""
        segment = self._segment + 1
        path = segment_path(self.directory, segment)
        header = pack_header(segment, self.engine_id, previous_end, previous_synced)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o640)
        try:
            if os.write(fd, header) != len(header):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        self._fd, self._segment, self._offset, self._synced = fd, segment, len(header), 0
        self._header_end = len(header)

    def _find_end(self) -> None:
        """Go to the end of what an earlier owner wrote; a segment of which not even the header was whole is taken away."""
        numbers = segment_numbers(self.directory)
        if numbers and is_unfinished(segment_path(self.directory, numbers[-1])):
            segment_path(self.directory, numbers.pop()).unlink()
        if not numbers:
            return
        self._segment, self._offset = end_of(self.directory, numbers)
        self._closed_sizes = {number: segment_path(self.directory, number).stat().st_size for number in numbers[:-1]}

    # --- group commit -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to fsync in the background; call it in the running event loop."""
        if self._sync_task is None:
            self._executor = ThreadPoolExecutor(1, "journal-fsync")
            self._sync_task = asyncio.get_running_loop().create_task(self._sync_for_ever(), name="journal-fsync")

    async def _sync_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            finished, self._unsynced = self._unsynced, []
            segment, offset = self._segment, self._offset
            fd = -1 if self._sync_broken else self._fd
            failed = await loop.run_in_executor(self._executor, self._sync_files, finished, fd)
            self._synced_or_not(failed, segment, offset)
            await asyncio.sleep(self._fsync_interval_seconds)

    def _sync_files(self, finished: list[int], fd: int) -> str:
        """fsync in a thread: finished segments, which are closed, then the current one (-1: none). Returns what went wrong."""
        failed = ""
        for old in finished:
            try:
                os.fdatasync(old)
            except OSError as error:
                failed = error.strerror or str(error)
            os.close(old)
        try:
            if fd >= 0:
                os.fdatasync(fd)
            if finished or not self._synced:  # the names of new segments
                directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        except OSError as error:
            failed = error.strerror or str(error)
        return failed

    def _synced_or_not(self, failed: str, segment: int, offset: int) -> None:
        if failed:
            # The kernel may have dropped the pages and will not say so twice: what follows goes to another file
            self.sync_failures += 1
            self._sync_failed_at, self._sync_reason = time.monotonic(), failed
            _log.error("%s: fsync failed: %s; the journal goes on in a new file", segment_path(self.directory, segment), failed)
            self._sync_broken = segment == self._segment
        elif segment == self._segment:
            self._synced = max(self._synced, offset)

    def sync(self) -> None:
        """fsync here and now; for programs without an event loop and for the end. Raises JournalError."""
        finished, self._unsynced = self._unsynced, []
        failed = self._sync_files(finished, -1 if self._sync_broken else self._fd)
        self._synced_or_not(failed, self._segment, self._offset)
        if failed:
            raise JournalError(f"{segment_path(self.directory, self._segment)}: fsync failed: {failed}")

    # --- readers ------------------------------------------------------------------------------------------------------

    def passed(self, reader: str, cursor: Position) -> None:
        """Say how far a reader has come; segments that every reader has passed are removed."""
        self._passed[reader] = cursor
        needed = min(position.segment for position in self._passed.values())
        for segment in [number for number in self._closed_sizes if number < needed]:
            segment_path(self.directory, segment).unlink(missing_ok=True)
            del self._closed_sizes[segment]

    # --- the end ------------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End the background fsync; `close` follows."""
        if self._sync_task is not None:
            self._sync_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sync_task
            self._sync_task = None
        if self._executor is not None:
            await asyncio.to_thread(self._executor.shutdown, wait=True)
            self._executor = None

    def close(self, *, remove: bool = False) -> None:
        """Write what is pending, fsync, let go of the lock. `remove`: every reader is done, take the directory away, too.

        Raises JournalError when the last records cannot be written; the lock is free all the same.
        """
        if self._lock_fd < 0:
            return
        try:
            if self.failure:
                self.reopen()
            self.write()
            self.sync()
            if remove:
                remove_directory(self.directory)
        finally:
            for fd in (*self._unsynced, self._fd, self._lock_fd):
                if fd >= 0:
                    os.close(fd)
            self._unsynced = []
            self._fd = self._lock_fd = -1


def take_lock(directory: Path) -> int:
    """Take the lock of a journal directory. Returns its descriptor. Raises JournalOwned when a living process holds it."""
    path = directory / LOCK_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    except OSError as error:
        raise JournalError(f"{path}: the journal cannot be locked: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed the directory in the meantime: a lock on a file without a name locks nothing
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    except OSError:
        pass
    os.close(fd)
    raise JournalOwned(f"{path}: another process owns this journal; stop it first")


def _make_locked(directory: Path) -> int:
    """Make a journal directory that is locked from the moment others can see it. Returns the lock's descriptor."""
    hidden = directory.with_name(f"{_MAKING}{directory.name}")
    try:
        hidden.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = take_lock(hidden)
        try:
            hidden.rename(directory)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        raise JournalError(f"{directory}: the journal directory cannot be made: {error.strerror}") from error
    return fd


def remove_directory(directory: Path) -> None:
    """Take a journal away that every reader is done with, in one step: a crash in between leaves only rubbish to sweep."""
    rubbish = directory.with_name(f"{_REMOVED}{directory.name}")
    directory.rename(rubbish)
    _delete(rubbish)


def sweep(root: Path, *, older_than_seconds: float = 60.0) -> None:
    """Delete what a crash left of journals that were being made or removed."""
    for path in root.iterdir():
        if path.name.startswith((_MAKING, _REMOVED)):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > older_than_seconds:
                    _delete(path)


def _delete(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            path.unlink(missing_ok=True)
        directory.rmdir()
