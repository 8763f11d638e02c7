"""Inspection: what stands in a journal directory, for people. Reads only, also while the owner writes, and goes on behind damage."""

import contextlib
import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from domain import states
from domain.errors import JournalError
from ext import journal_record
from journal.accounting_files import CURSOR_NAME
from journal.segment_files import Header, read_header, segment_numbers, segment_path
from journal.segments import LOCK_NAME

INTENT: Final = "i"
WITHDRAWAL: Final = "w"
# What the letters of records mean, in the order in which they are shown
KINDS: Final = {INTENT: "intents", WITHDRAWAL: "intents withdrawn"} | states.TERMINAL_KINDS | {
    states.KIND_TRANSIENT: "deferrals",
    states.KIND_UNCERTAIN: "uncertain",
}  # fmt: skip
MOST_INTENTS: Final = 100
_BYTES_AT_ONCE: Final = 4 * 1024 * 1024


class SegmentFacts(msgspec.Struct, kw_only=True):
    """One segment file."""

    file: str
    created_at: datetime | None
    bytes: int
    records: int = 0
    torn_bytes: int = 0  # behind the last record, half written when the owner died; nobody's


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """A place where something else stands than what must."""

    file: str
    offset: int
    reason: str
    next_good: int | None = None  # offset of the next good record


class OpenIntent(msgspec.Struct, frozen=True, kw_only=True):
    """A message whose content may have left and that has no outcome."""

    campaign_id: int
    number: int
    attempt: int
    delivery_server_id: int
    connection: int
    at: datetime


class JournalFacts(msgspec.Struct, kw_only=True):
    """What stands in one journal directory."""

    directory: str
    engine_id: str = ""
    owner: str = ""  # engine id and process id of whoever holds the lock; empty: the owner is dead
    segments: list[SegmentFacts] = msgspec.field(default_factory=list)
    bytes: int = 0
    records: dict[str, int] = msgspec.field(default_factory=dict)  # kind -> count
    open_intents: int = 0
    intents: list[OpenIntent] = msgspec.field(default_factory=list)  # the oldest of them
    accounting_files_cursor: tuple[int, int] | None = None  # (segment, offset): before it everything is in the accounting files
    ledger_cursor: tuple[int, int] | None = None  # the same for PostgreSQL, when it was asked
    damage: list[Damage] = msgspec.field(default_factory=list)


def journals_in(directory: Path) -> list[Path]:
    """`directory` when it is a journal, else the journals right below it. Raises JournalError when there are none."""
    if not directory.is_dir():
        raise JournalError(f"{directory}: there is no such directory")
    if segment_numbers(directory) or (directory / LOCK_NAME).exists():
        return [directory]
    found = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".") and segment_numbers(path))
    if not found:
        raise JournalError(f"{directory}: this is no journal and holds none; a journal is a directory with NNNNNNNN.journal files")
    return found


def engine_id_of(directory: Path) -> str:
    """Whose journal it is, as its segments say; the directory may have been copied under another name. Raises JournalError."""
    for number in segment_numbers(directory):
        header = read_header(segment_path(directory, number))
        if header is not None:
            return header.engine_id
    return directory.name


def owner_of(directory: Path) -> str:
    """Who holds the lock: engine id and process id. Empty when nobody does."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "unknown"
    else:
        return ""
    finally:
        os.close(fd)


def inspect(directory: Path) -> JournalFacts:
    """Read all of one journal. Raises OSError."""
    facts = JournalFacts(directory=str(directory), owner=owner_of(directory))
    intents = journal_record.OpenIntents()
    numbers = segment_numbers(directory)
    headers: dict[int, Header] = {}
    for number in numbers:
        path = segment_path(directory, number)
        try:
            header = read_header(path)
        except JournalError as error:
            facts.damage.append(Damage(file=str(path), offset=0, reason=str(error).removeprefix(f"{path}: offset 0: ")))
            continue
        if header is not None:
            headers[number] = header
            facts.engine_id = facts.engine_id or header.engine_id
        elif number != numbers[-1]:
            facts.damage.append(Damage(file=str(path), offset=0, reason="this segment has no header, yet another one follows"))
    for number in range(numbers[0], numbers[-1] + 1) if numbers else ():
        if number not in numbers:
            facts.damage.append(Damage(file=str(segment_path(directory, number)), offset=0, reason="this segment is missing"))
        elif number in headers:
            _segment(segment_path(directory, number), headers[number], headers.get(number + 1), facts, intents)
    facts.bytes = sum(segment.bytes for segment in facts.segments)
    facts.open_intents = len(intents)
    facts.intents = [
        OpenIntent(
            campaign_id=fields[1], number=fields[3], attempt=fields[5], connection=fields[7], delivery_server_id=fields[8],
            at=_instant(fields[9]),
        )
        for fields in intents.records()[:MOST_INTENTS]
    ]  # fmt: skip
    facts.accounting_files_cursor = _files_cursor(directory)
    return facts


def _segment(path: Path, header: Header, after: Header | None, facts: JournalFacts, intents: journal_record.OpenIntents) -> None:
    size = path.stat().st_size
    end = size if after is None else min(size, after.previous_end)
    confirmed = 0 if after is None else after.previous_synced
    segment = SegmentFacts(file=path.name, created_at=_instant(header.created_at), bytes=size)
    facts.segments.append(segment)
    if after is not None and size < after.previous_end and size < confirmed:
        reason = f"the file ends here, yet its records were on disk up to offset {confirmed}"
        facts.damage.append(Damage(file=str(path), offset=size, reason=reason))
    with path.open("rb") as file:
        offset = header.size
        while offset < end:
            file.seek(offset)
            block = file.read(min(_BYTES_AT_ONCE, end - offset))
            good = _good(block)
            if good:
                counted = journal_record.kinds(block[:good])
                segment.records += sum(counted.values())
                for kind, count in counted.items():
                    facts.records[kind] = facts.records.get(kind, 0) + count
                intents.feed(block[:good], header.segment)
                offset += good
                continue
            file.seek(offset)
            rest = file.read(end - offset)
            following = journal_record.find(rest, 1)
            if following < 0 and offset >= confirmed:
                segment.torn_bytes = len(rest)
                return
            next_good = offset + following if following > 0 else None
            facts.damage.append(Damage(file=str(path), offset=offset, reason="this is not a journal record", next_good=next_good))
            if next_good is None:
                return
            offset = next_good


def _good(block: bytes) -> int:
    try:
        return journal_record.whole(block)
    except journal_record.Garbage as garbage:
        return garbage.offset


def _files_cursor(directory: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        found = msgspec.json.decode((directory / CURSOR_NAME).read_bytes(), type=dict[str, msgspec.Raw])
        return int(bytes(found["segment"])), int(bytes(found["offset"]))
    return None


def _instant(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)
