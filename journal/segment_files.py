"""Segment files: how a journal looks on disk, and reading it.

A segment `NNNNNNNN.journal` is a header and records of `ext.journal_record`. The header says whose journal it is, and where the
segment before it ends: bytes behind that end were half written when the disk was full, and are nobody's.
"""

import os
import struct
import time
from pathlib import Path
from typing import Final, NamedTuple

from domain.errors import JournalError
from ext import journal_record

MAGIC: Final = b"SLUICEJ\n"
VERSION: Final = 1
SUFFIX: Final = ".journal"

# magic, version, length of the engine id, segment, created at (microseconds), end of the segment before, how much of it was
# known to be on disk; then the engine id and the CRC-32C of all of it
_HEAD = struct.Struct("<8sHHIQQQ")
_CRC = struct.Struct("<I")
_MOST_BYTES_READ = 1 << 18


class JournalDamaged(JournalError):
    """What stands in a journal is not what was written there; trying again does not help."""


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

    Raises JournalDamaged, naming the file, when it is not a segment or one of another version.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD.size + 65535 + _CRC.size)
    if head[:8] not in (MAGIC, MAGIC[: len(head)]) and head.strip(b"\0"):
        raise JournalDamaged(f"{path}: offset 0: this is no journal segment; move the file away to go on without it")
    if len(head) >= 10:
        version = int.from_bytes(head[8:10], "little")
        if head[:8] == MAGIC and version != VERSION:
            raise JournalDamaged(
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
        raise JournalDamaged(f"{path}: offset 0: the header of this segment is damaged; move the file away to go on without it")
    return Header(segment, body[_HEAD.size :].decode(), created_at, previous_end, previous_synced, size)


def is_unfinished(path: Path) -> bool:
    """Whether the writer of a segment was stopped before its header was whole."""
    try:
        return read_header(path) is None
    except JournalDamaged:
        return False


class Reader:
    """Reads blocks of whole records behind a cursor; as many readers as you like, also while the owner writes."""

    def __init__(self, directory: Path, cursor: Position = START, *, inherited: bool = False) -> None:
        """`inherited`: the writer, or one before it, may have lost the last moments of a segment to a power cut."""
        self.directory = directory
        self._inherited = inherited
        self.cursor = cursor  # everything before it was read and dealt with
        self.next = cursor  # the end of the block that `read` returned last
        self.torn = 0  # bytes dropped behind the last record of a dead journal
        self._fd = -1
        self._open_segment = 0
        self._header_size = 0
        self._end: int | None = None  # of the open segment, as the next one tells it
        self._damage_follows = False  # the next segment has a header that cannot be read
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
        last segment is dropped. Raises JournalDamaged with file and offset on anything else that is not a record, and JournalError
        when the disk does not give it.
        """
        try:
            block = self._read(max(most_bytes, 2 * journal_record.LONGEST_RECORD), until)
        except OSError as error:
            raise JournalError(f"{self.directory}: the journal cannot be read: {error.strerror}") from error
        if not block:
            self.cursor = self.next  # there is nothing but headers in between
        return block

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
                    self._refuse_unless_torn(offset, end, alive=until is not None and not self._inherited)
            if (end is None and not self._damage_follows) or (until is not None and segment == until.segment):
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
                    raise JournalDamaged(f"{path}: this segment is missing, yet {segment_path(self.directory, newer[0])} is there")
                return False
            header = read_header(path)
            if header is None:
                if segment_path(self.directory, segment + 1).exists():
                    raise JournalDamaged(f"{path}: offset 0: this segment has no header, yet another one follows")
                return False
            self._fd = os.open(path, os.O_RDONLY)
            self._open_segment, self._header_size, self._end, self._synced = segment, header.size, None, 0
            self._damage_follows = False
        if self._end is None and (until is None or until.segment > segment):
            following = segment_path(self.directory, segment + 1)
            try:
                after = read_header(following) if following.exists() else None
            except JournalDamaged:
                after, self._damage_follows = None, True  # said when we get there: first what stands before it
            if after is not None:
                self._end, self._synced = after.previous_end, after.previous_synced
        self.next = Position(segment, max(offset, self._header_size))
        return True

    def _refuse_unless_torn(self, offset: int, end: int | None, *, alive: bool) -> None:
        """Nothing good starts at `offset`, where a record should; `end`: where the segment is said to end."""
        path = segment_path(self.directory, self._open_segment)
        rest = os.pread(self._fd, (os.fstat(self._fd).st_size if end is None else end) - offset, offset)
        follows = journal_record.find(rest, 0)
        if not follows:
            return  # whoever writes it has just finished this record: the next `read` finds it
        # With another segment behind it: a power cut may take the last moments of a segment and leave the next one
        if follows < 0 and not alive and (end is None or offset >= self._synced):
            self.torn = len(rest)
            return
        behind = f"; the next good record is at offset {offset + follows}" if follows > 0 else ""
        raise JournalDamaged(
            f"{path}: offset {offset}: this is not a journal record{behind}; keep the file and ask for help before going on"
        )


def end_of(directory: Path, numbers: list[int]) -> Position:
    """Where the records of the segments `numbers` end: behind the last whole one, or behind its header where it has none.

    Where something else stands among them it is the end of the file: readers must get to the damage and stop there by themselves,
    because what stands before it is as true as ever. Raises JournalDamaged when nothing stands before it: the only segment is none of
    this version. JournalError: the disk does not give it.
    """
    path = segment_path(directory, numbers[-1])
    try:
        header = read_header(path)
        with Reader(directory, Position(numbers[-1], 0 if header is None else header.size)) as reader:
            while reader.read():
                reader.advance()
            return reader.cursor
    except JournalDamaged:
        if len(numbers) == 1:
            read_header(path)
        return Position(numbers[-1], path.stat().st_size)
    except OSError as error:
        raise JournalError(f"{path}: the journal cannot be read: {error.strerror}") from error


def _whole(block: bytes) -> int:
    """How many bytes of `block` are whole records, from its start to the first that is not."""
    try:
        return journal_record.whole(block)
    except journal_record.Garbage as garbage:
        return garbage.offset
