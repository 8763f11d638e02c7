"""Segments: the append-only journal of one process on local disk. An outcome exists when it is here.

A journal is a directory: `lock` (held with flock by its owner for as long as it lives; free = the owner is dead) and segments
`NNNNNNNN.journal`. A segment is a header and records of `ext.journal_record`. Its header also says where the segment before
it ends: bytes behind that end were half written when the disk was full, and are nobody's.

Written with one write(2) per turn of the event loop, which survives `kill -9`; fsync follows in a thread, at most once per
interval, which survives a power cut (R1). After a failed write nothing is written until `reopen` has made a new segment
(R5); after a failed fsync the next turn goes to a new segment, and fsync is never tried again on the old one.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from domain.errors import JournalError
from ext import journal_record

MAGIC: Final = b"SLUICEJ\n"
VERSION: Final = 1
SUFFIX: Final = ".journal"
LOCK_NAME: Final = "lock"

# magic, version, length of the engine id, segment, created at (microseconds), end of the segment before, how much of it was
# known to be on disk; then the engine id and the CRC-32C of all of it
_HEAD = struct.Struct("<8sHHIQQQ")
_CRC = struct.Struct("<I")
_MOST_BYTES_READ = 1 << 20


class JournalOwned(JournalError):
    """A living process holds the lock of this journal."""


class Position(NamedTuple):
    """A place in a journal: between two records, or (0, 0) for its very beginning."""

    segment: int
    offset: int


START: Final = Position(0, 0)


class Header(NamedTuple):
    """What the first bytes of a segment say."""

    segment: int
    engine_id: str
    created_at: int
    previous_end: int
    previous_synced: int
    size: int


def segment_path(directory: Path, segment: int) -> Path:
    """Where segment number `segment` lies."""
    return directory / f"{segment:08d}{SUFFIX}"


def segment_numbers(directory: Path) -> list[int]:
    """The segments that exist, in order."""
    return sorted(int(path.stem) for path in directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())


def pack_header(segment: int, engine_id: str, previous_end: int, previous_synced: int) -> bytes:
    """The header of a new segment."""
    name = engine_id.encode()
    created_at = time.time_ns() // 1000
    body = _HEAD.pack(MAGIC, VERSION, len(name), segment, created_at, previous_end, previous_synced) + name
    return body + _CRC.pack(journal_record.crc32c(body))


def read_header(path: Path) -> Header | None:
    """The header of a segment; None when its writer was stopped before it was whole.

    Raises JournalError, naming the file, when it is not a segment or one of another version.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD.size + 65535 + _CRC.size)
    if head[:8] not in (MAGIC, MAGIC[: len(head)]) and head.strip(b"\0"):
        raise JournalError(f"{path}: offset 0: this is no journal segment; move the file away to go on without it")
    if len(head) >= 10:
        version = int.from_bytes(head[8:10], "little")
        if head[:8] == MAGIC and version != VERSION:
            raise JournalError(
                f"{path}: journal version {version}, this Sluice reads version {VERSION}; replay it with the Sluice that wrote it"
            )
    if len(head) < _HEAD.size or not head.strip(b"\0"):
        return None
    _, _, name_size, segment, created_at, previous_end, previous_synced = _HEAD.unpack_from(head)
    size = _HEAD.size + name_size + _CRC.size
    if len(head) < size:
        return None
    body = head[: size - _CRC.size]
    if _CRC.unpack_from(head, len(body))[0] != journal_record.crc32c(body):
        raise JournalError(f"{path}: offset 0: the header of this segment is damaged; move the file away to go on without it")
    return Header(segment, body[_HEAD.size :].decode(), created_at, previous_end, previous_synced, size)


class Journal:
    """The writing side; at most one in the world per directory.

    Opening a directory that has segments goes on behind them in a new one. Raises JournalError when somebody else holds the
    lock, or what is there cannot be read.
    """

    def __init__(
        self,
        directory: Path,
        *,
        engine_id: str,
        segment_bytes: int = 64 * 1024 * 1024,
        fsync_interval_seconds: float = 0.1,
        disk_budget_bytes: int = 4 * 1024 * 1024 * 1024,
        readers: tuple[str, ...] = ("ledger", "accounting_files"),
    ) -> None:
        """`readers`: no segment is removed before every one of these has said, with `passed`, that it is behind it."""
        self.directory = directory
        self.engine_id = engine_id
        self.sync_failures = 0
        self.failure = ""  # why nothing is written at the moment; empty: all is well
        self._segment_bytes = segment_bytes
        self._fsync_interval_seconds = fsync_interval_seconds
        self._disk_budget_bytes = disk_budget_bytes
        self._passed = dict.fromkeys(readers, START)
        self._pending: list[bytes] = []
        # Called once per record on the hot path: the list's own method, without a frame of ours around it
        self.append: Callable[[bytes], None] = self._pending.append
        self._pending_bytes = b""  # joined, but the write failed: the first to go out after `reopen`
        self._fd = -1
        self._segment = 0
        self._offset = 0
        self._synced = 0
        self._unsynced: list[int] = []  # descriptors of finished segments whose last records are not on disk yet
        self._sync_broken = False
        self._closed_sizes: dict[int, int] = {}
        self._dirty = asyncio.Event()
        self._sync_task: asyncio.Task[None] | None = None
        self._executor: ThreadPoolExecutor | None = None
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(f"{directory}: the journal directory cannot be made: {error.strerror}") from error
        self._lock_fd = take_lock(directory)
        try:
            os.pwrite(self._lock_fd, f"{engine_id} {os.getpid()}\n".encode().ljust(80), 0)
            self._previous_end = self._find_end()
            self._open_segment()
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

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Put all that was appended into the journal with one write(2). After it returns, what was intended may be sent.

        Raises JournalError when the disk refuses it; the records are kept and go out first after `reopen`.
        """
        if self.failure:
            raise JournalError(self.failure)
        if self._pending_bytes:
            self._pending.insert(0, self._pending_bytes)
            self._pending_bytes = b""
        if not self._pending:
            return
        data = b"".join(self._pending) if len(self._pending) > 1 else self._pending[0]
        self._pending.clear()
        if self._sync_broken or self._offset >= self._segment_bytes:
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
        self._next_segment()
        self.write()

    def _fail(self, what: str, error: OSError) -> None:
        path = segment_path(self.directory, self._segment)
        self.failure = f"{path}: {what} at offset {self._offset} failed: {error.strerror}; nothing is sent until the journal can be written"
        raise JournalError(self.failure) from error

    def _next_segment(self) -> None:
        previous = (self._fd, self._segment, self._offset, self._previous_end, self._synced)
        self._previous_end = self._offset
        try:
            self._open_segment()
        except OSError as error:
            self._fd, self._segment, self._offset, self._previous_end, self._synced = previous
            self._fail("opening the next segment", error)
        self._closed_sizes[previous[1]] = previous[2]
        if self._sync_broken:
            self._sync_broken = False
            os.close(previous[0])
        else:
            self._unsynced.append(previous[0])

    def _open_segment(self) -> None:
        """Create the segment after `self._segment`. Raises OSError and leaves no file behind."""
        segment = self._segment + 1
        path = segment_path(self.directory, segment)
        header = pack_header(segment, self.engine_id, self._previous_end, self._synced)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o640)
        try:
            if os.write(fd, header) != len(header):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        self._fd, self._segment, self._offset, self._synced = fd, segment, len(header), 0

    def _find_end(self) -> int:
        """Where what an earlier owner wrote ends; takes a segment away of which not even the header was whole."""
        numbers = segment_numbers(self.directory)
        header = read_header(segment_path(self.directory, numbers[-1])) if numbers else None
        if numbers and header is None:
            segment_path(self.directory, numbers.pop()).unlink()
            header = read_header(segment_path(self.directory, numbers[-1])) if numbers else None
        if header is None:
            return 0
        self._closed_sizes = {number: segment_path(self.directory, number).stat().st_size for number in numbers}
        self._segment = numbers[-1]
        with Reader(self.directory, Position(numbers[-1], header.size)) as reader:
            while reader.read():
                reader.advance()
            return reader.cursor.offset

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
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._unsynced = []
            self._fd = self._lock_fd = -1


class Reader:
    """Reads blocks of whole records behind a cursor; as many readers as you like, also while the owner writes."""

    def __init__(self, directory: Path, cursor: Position = START) -> None:
        self.directory = directory
        self.cursor = cursor  # everything before it was read and dealt with
        self.next = cursor  # the end of the block that `read` returned last
        self.torn = 0  # bytes dropped behind the last record of a dead journal
        self._fd = -1
        self._open_segment = 0
        self._header_size = 0
        self._end: int | None = None  # of the open segment, as the next one tells it
        self._synced = 0  # below it, what the next segment calls whole must be whole

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def advance(self) -> None:
        """The last block is dealt with: the next `read` starts behind it."""
        self.cursor = self.next

    def read(self, most_bytes: int = _MOST_BYTES_READ, until: Position | None = None) -> bytes:
        """The whole records behind `cursor`, about `most_bytes` of one segment; empty when there is nothing more.

        `until`: the `position` of a journal that is being written. Without it the journal's owner is dead: a torn end of the
        last segment is dropped. Raises JournalError with file and offset on anything else that is not a record.
        """
        try:
            return self._read(max(most_bytes, 2 * journal_record.LONGEST_RECORD), until)
        except OSError as error:
            raise JournalError(f"{self.directory}: the journal cannot be read: {error.strerror}") from error

    def _read(self, most_bytes: int, until: Position | None) -> bytes:
        self.next = self.cursor
        while self._enter_segment(until):
            segment, offset = self.next
            end = until.offset if until is not None and segment == until.segment else self._end
            room = most_bytes if end is None else min(most_bytes, end - offset)
            if room > 0:
                block = os.pread(self._fd, room, offset)
                whole = _whole(block)
                if whole:
                    self.next = Position(segment, offset + whole)
                    return block[:whole]
                # No record starts here. It may be the end that a dying owner or a power cut left; but not if records follow it
                if block or end is not None:
                    self._refuse_unless_torn(offset, end, alive=until is not None)
            if end is None or (until is not None and segment == until.segment):
                return b""  # the last segment is read
            self.next = Position(segment + 1, 0)
        return b""

    def _enter_segment(self, until: Position | None) -> bool:
        """Make the segment of `next` the open one. False: there is none yet."""
        segment, offset = self.next
        if segment == 0:
            numbers = segment_numbers(self.directory)
            if not numbers:
                return False
            self.next = Position(numbers[0], 0)
            return self._enter_segment(until)
        if self._fd < 0 or self._open_segment != segment:
            self.close()
            path = segment_path(self.directory, segment)
            if not path.exists():
                newer = [number for number in segment_numbers(self.directory) if number > segment]
                if newer:
                    raise JournalError(f"{path}: this segment is missing, yet {segment_path(self.directory, newer[0])} is there")
                return False
            header = read_header(path)
            if header is None:
                if segment_path(self.directory, segment + 1).exists():
                    raise JournalError(f"{path}: offset 0: this segment has no header, yet another one follows")
                return False
            self._fd = os.open(path, os.O_RDONLY)
            self._open_segment, self._header_size, self._end, self._synced = segment, header.size, None, 0
        if self._end is None and (until is None or until.segment > segment):
            following = segment_path(self.directory, segment + 1)
            after = read_header(following) if following.exists() else None
            if after is not None:
                self._end, self._synced = after.previous_end, after.previous_synced
        self.next = Position(segment, max(offset, self._header_size))
        return True

    def _refuse_unless_torn(self, offset: int, end: int | None, *, alive: bool) -> None:
        """Nothing good starts at `offset`, where a record should; `end`: where the segment is said to end."""
        path = segment_path(self.directory, self._open_segment)
        rest = os.pread(self._fd, (os.fstat(self._fd).st_size if end is None else end) - offset, offset)
        follows = journal_record.find(rest, 1)
        # With another segment behind it: a power cut may take the last moments of a segment and leave the next one
        if follows < 0 and not alive and (end is None or offset >= self._synced):
            self.torn = len(rest)
            return
        behind = f"; the next good record is at offset {offset + follows}" if follows > 0 else ""
        raise JournalError(f"{path}: offset {offset}: this is not a journal record{behind}; keep the file and ask for help before going on")


def _whole(block: bytes) -> int:
    """How many bytes of `block` are whole records, from its start to the first that is not."""
    try:
        return journal_record.whole(block)
    except journal_record.Garbage as garbage:
        return garbage.offset


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


def remove_directory(directory: Path) -> None:
    """Take a journal away that every reader is done with, in one step: a crash in between leaves only rubbish to sweep."""
    rubbish = directory.with_name(f".removed-{directory.name}")
    directory.rename(rubbish)
    sweep(rubbish)


def sweep(rubbish: Path) -> None:
    """Delete a directory that `remove_directory` has renamed."""
    for path in rubbish.iterdir():
        path.unlink(missing_ok=True)
    rubbish.rmdir()
