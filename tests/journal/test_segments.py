"""journal.segments and journal.segment_files: what was written is read, whatever happened to the writer or the disk."""

import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from domain.errors import JournalError
from ext import journal_record
from journal.segment_files import START, VERSION, Position, Reader, read_header, segment_numbers, segment_path
from journal.segments import Journal, JournalOwned, sweep, take_lock
from tests.journal.records import intent, outcome


def make(directory: Path, **options: int) -> Journal:
    return Journal(directory, engine_id="node.1.1", **options)  # type: ignore[arg-type]


def read_all(directory: Path, until: Position | None = None, *, inherited: bool = False) -> bytes:
    found = b""
    with Reader(directory, inherited=inherited) as reader:
        while block := reader.read(until=until):
            found += block
            reader.advance()
        assert until is None or reader.cursor == until
    return found


def numbers_of(block: bytes) -> list[int]:
    return [int(record[3]) for record in journal_record.scan(block)[0]]


def test_what_is_written_is_read_in_order(tmp_path: Path):
    journal = make(tmp_path / "j")
    for turn in range(10):
        journal.append(intent(2 * turn))
        journal.append(outcome("d", 2 * turn + 1))
        before = journal.position
        assert read_all(tmp_path / "j", before) == read_all(tmp_path / "j")
        journal.write()
        assert journal.position > before
    assert numbers_of(read_all(tmp_path / "j", journal.position)) == list(range(20))
    journal.close()
    assert numbers_of(read_all(tmp_path / "j")) == list(range(20))


def test_a_turn_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = make(tmp_path / "j")
    sizes = []
    write = os.write

    def count(fd: int, data: bytes) -> int:
        sizes.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(os, "write", count)
    for number in range(100):
        journal.append(outcome("d", number))
    journal.write()
    journal.write()
    assert sizes == [sum(len(outcome("d", number)) for number in range(100))]


def test_segments_follow_each_other_and_go_when_every_reader_has_passed(tmp_path: Path):
    journal = make(tmp_path / "j", segment_bytes=1000)
    for number in range(50):
        journal.append(outcome("d", number))
        journal.write()
    assert numbers_of(read_all(tmp_path / "j", journal.position)) == list(range(50))
    last = journal.position.segment
    assert segment_numbers(tmp_path / "j") == list(range(1, last + 1))
    journal.passed("ledger", Position(5, 0))
    assert segment_numbers(tmp_path / "j") == list(range(1, last + 1))
    used = journal.used_bytes
    journal.passed("accounting_files", Position(3, 0))
    assert segment_numbers(tmp_path / "j") == list(range(3, last + 1))
    assert journal.used_bytes < used
    journal.passed("accounting_files", journal.position)
    journal.passed("ledger", journal.position)
    assert segment_numbers(tmp_path / "j") == [last]
    assert journal.used_bytes == segment_path(tmp_path / "j", last).stat().st_size


def test_the_disk_budget_says_stop(tmp_path: Path):
    journal = make(tmp_path / "j", segment_bytes=1000, disk_budget_bytes=5000)
    assert not journal.over_budget
    while not journal.over_budget:
        journal.append(outcome("d", 1))
        journal.write()
    assert 5000 < journal.used_bytes < 6000


def test_a_second_owner_is_refused_and_the_lock_ends_with_its_owner(tmp_path: Path):
    journal = make(tmp_path / "j")
    with pytest.raises(JournalOwned, match=r"j/lock: another process owns this journal"):
        make(tmp_path / "j")
    journal.close()
    again = make(tmp_path / "j")
    assert again.inherited
    again.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_removed_directory_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path / "j").close()
    opened = os.open

    def remove_first(path: Path, flags: int, mode: int = 0o777) -> int:
        fd = opened(path, flags, mode)
        if Path(path).name == "lock":
            Path(path).unlink()
            Path(path).write_text("somebody else's")
        return fd

    monkeypatch.setattr(os, "open", remove_first)
    with pytest.raises(JournalOwned):
        take_lock(tmp_path / "j")


def test_what_a_crash_left_of_making_and_removing_is_swept(tmp_path: Path):
    for name in (".making-a", ".removed-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    (tmp_path / "c").mkdir()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    sweep(tmp_path, older_than_seconds=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_torn_end_is_dropped_wherever_it_is_torn(tmp_path: Path):
    journal = make(tmp_path / "j")
    for number in range(3):
        journal.append(outcome("d", number))
    journal.append(intent(3))
    journal.write()
    journal.close()
    path = segment_path(tmp_path / "j", 1)
    content = path.read_bytes()
    last = len(intent(3))
    for cut in range(1, last):
        path.write_bytes(content[:-cut])
        assert numbers_of(read_all(tmp_path / "j")) == [0, 1, 2]
    with Reader(tmp_path / "j") as reader:
        reader.read()
        reader.advance()
        assert reader.read() == b""
        assert reader.torn == 1
    path.write_bytes(content + bytes(5000))
    assert numbers_of(read_all(tmp_path / "j")) == [0, 1, 2, 3]


def test_a_header_torn_anywhere_is_no_segment_yet(tmp_path: Path):
    journal = make(tmp_path / "j", segment_bytes=100)
    for number in range(2):
        journal.append(outcome("d", number))
        journal.write()
    journal.close()
    second = segment_path(tmp_path / "j", 2)
    header = read_header(second)
    assert header is not None
    content = second.read_bytes()
    for cut in range(header.size):
        second.write_bytes(content[:cut])
        assert numbers_of(read_all(tmp_path / "j")) == [0]
    successor = make(tmp_path / "j")
    assert segment_numbers(tmp_path / "j") == [1]
    successor.append(outcome("d", 9))
    successor.write()
    assert numbers_of(read_all(tmp_path / "j", successor.position)) == [0, 9]


def test_garbage_in_the_middle_stops_with_file_and_offset(tmp_path: Path):
    journal = make(tmp_path / "j")
    for number in range(5):
        journal.append(outcome("d", number))
    journal.write()
    end = journal.position
    journal.close()
    path = segment_path(tmp_path / "j", 1)
    content = bytearray(path.read_bytes())
    header = read_header(path)
    assert header is not None
    bad = header.size + 2 * len(outcome("d", 2))
    for at in (bad, bad + 3, bad + 6, bad + 50):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        for until in (None, end):
            with Reader(tmp_path / "j") as reader:
                assert numbers_of(reader.read(until=until)) == [0, 1]
                reader.advance()
                with pytest.raises(JournalError, match=rf"00000001\.journal: offset {bad}: .* next good record is at offset"):
                    reader.read(until=until)
        # Whoever takes it over is stopped at the same place, with everything before it in hand
        heir = make(tmp_path / "j")
        assert heir.position == Position(1, len(damaged))
        heir.close()
        with Reader(tmp_path / "j", inherited=True) as reader:
            assert numbers_of(reader.read(until=heir.position)) == [0, 1]
            reader.advance()
            with pytest.raises(JournalError, match=f"offset {bad}"):
                reader.read(until=heir.position)


def test_a_damaged_end_of_a_segment_before_the_last_is_garbage(tmp_path: Path):
    journal = make(tmp_path / "j", segment_bytes=500)
    for number in range(6):
        journal.append(outcome("d", number))
        journal.write()
    end = journal.position
    journal.sync()
    journal.close()
    path = segment_path(tmp_path / "j", 1)
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(JournalError, match=r"00000001\.journal: offset"):
        read_all(tmp_path / "j", end)
    path.unlink()
    with pytest.raises(JournalError, match=r"00000002\.journal|00000001\.journal"):
        with Reader(tmp_path / "j", Position(1, len(content) - 5)) as reader:
            reader.read()


def test_a_power_cut_may_take_the_unsynced_end_of_a_segment_before_the_last(tmp_path: Path):
    journal = make(tmp_path / "j", segment_bytes=800)
    journal.append(outcome("d", 0))
    journal.write()
    journal.sync()
    for number in range(1, 6):
        journal.append(outcome("d", number))
        journal.write()
    journal.close()
    path = segment_path(tmp_path / "j", 1)
    content = path.read_bytes()
    kept = numbers_of(read_all(tmp_path / "j"))
    assert kept == list(range(6))
    path.write_bytes(content[:-3])
    lost = numbers_of(read_all(tmp_path / "j", inherited=True))
    assert lost[0] == 0
    assert set(range(6)) - set(lost) == {numbers_of(content[-len(outcome("d", 1)) :])[0]}
    path.write_bytes(content[: content.index(outcome("d", 0)) + 10])  # what fsync had confirmed may not be missing
    with pytest.raises(JournalError, match="offset"):
        read_all(tmp_path / "j", inherited=True)


def test_another_version_is_refused_by_name(tmp_path: Path):
    make(tmp_path / "j").close()
    path = segment_path(tmp_path / "j", 1)
    content = bytearray(path.read_bytes())
    content[8] = VERSION + 1
    path.write_bytes(content)
    with pytest.raises(JournalError, match=rf"00000001.journal: journal version {VERSION + 1}, this Sluice reads version {VERSION}"):
        make(tmp_path / "j")
    path.write_bytes(b"something else entirely" * 10)
    with pytest.raises(JournalError, match="no journal segment"):
        read_all(tmp_path / "j")
    content[8] = VERSION
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalError, match="header of this segment is damaged"):
        read_all(tmp_path / "j")


def test_a_reader_goes_on_from_any_record(tmp_path: Path):
    journal = make(tmp_path / "j", segment_bytes=700)
    places = [START]
    for number in range(12):
        journal.append(outcome("d", number))
        journal.write()
        places.append(journal.position)
    for index, place in enumerate(places):
        with Reader(tmp_path / "j", place) as reader:
            found = []
            while block := reader.read(until=journal.position):
                found += numbers_of(block)
                reader.advance()
        assert found == list(range(index, 12))


def test_what_a_full_disk_refused_is_written_first_when_there_is_room(tmp_path: Path):
    """RLIMIT_FSIZE stands in for a full disk: a write is cut short, the next is refused."""
    journal = make(tmp_path / "j")
    journal.append(outcome("d", 0))
    journal.write()
    room = segment_path(tmp_path / "j", 1).stat().st_size + 100
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        for number in (1, 2):
            journal.append(outcome("d", number))
        with pytest.raises(JournalError, match="nothing is sent until"):
            journal.write()
        assert journal.failure
        journal.append(outcome("d", 3))
        with pytest.raises(JournalError):
            journal.write()
        for _ in range(3):
            with pytest.raises(JournalError):
                journal.reopen()
        assert segment_numbers(tmp_path / "j") == [1, 2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    position = journal.position
    assert numbers_of(read_all(tmp_path / "j", position)) == [0]
    journal.reopen()
    assert journal.failure == ""
    journal.append(outcome("d", 4))
    journal.write()
    assert numbers_of(read_all(tmp_path / "j", journal.position)) == [0, 1, 2, 3, 4]
    journal.close()
    assert numbers_of(read_all(tmp_path / "j")) == [0, 1, 2, 3, 4]


def test_a_half_written_turn_that_could_not_be_cut_off_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = make(tmp_path / "j")
    journal.append(outcome("d", 0))
    journal.write()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(outcome("d", 1)) + 9]))
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    for number in (1, 2, 3):
        journal.append(outcome("d", number))
    with pytest.raises(JournalError):
        journal.write()
    monkeypatch.undo()
    journal.reopen()
    assert numbers_of(read_all(tmp_path / "j", journal.position)) == [0, 1, 2, 3]
    journal.close()
    assert numbers_of(read_all(tmp_path / "j")) == [0, 1, 2, 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_file_system_stops_writing_and_goes_on_when_there_is_room(tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this kernel does not let us mount a tmpfs")
    try:
        (small / "ballast").write_bytes(bytes(40_000))
        journal = make(small / "j")
        written = 0
        with pytest.raises(JournalError, match="No space left|bytes were written"):
            while True:
                journal.append(outcome("d", written))
                journal.write()
                written += 1
        with pytest.raises(JournalError):
            journal.reopen()
        assert segment_numbers(small / "j") == [1]
        (small / "ballast").unlink()
        journal.reopen()
        assert numbers_of(read_all(small / "j", journal.position)) == list(range(written + 1))
        journal.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)


async def test_records_are_synced_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced = []
    fdatasync = os.fdatasync

    def note(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", note)
    journal = Journal(tmp_path / "j", engine_id="e", fsync_interval_seconds=0.01, segment_bytes=600)
    journal.start()
    for number in range(10):
        journal.append(outcome("d", number))
        journal.write()
        await asyncio.sleep(0.003)
    newest = segment_path(tmp_path / "j", journal.position.segment)
    async with asyncio.timeout(60):
        while not synced or synced[-1] != newest.stat().st_size:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    count = len(synced)
    assert count >= journal.position.segment
    await asyncio.sleep(0.05)
    assert len(synced) == count  # nothing new, nothing synced
    await journal.stop()
    journal.close()


async def test_a_failed_fsync_moves_to_a_new_segment_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path / "j", engine_id="e", fsync_interval_seconds=0.005)
    failed = []
    fdatasync = os.fdatasync

    def fail_first_segment(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "00000001.journal":
            failed.append(fd)
            raise OSError(errno.EIO, "Input/output error")
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", fail_first_segment)
    journal.start()
    for number in range(4):
        journal.append(outcome("d", number))
        journal.write()
        await asyncio.sleep(0.02)
    async with asyncio.timeout(60):
        while not journal.sync_failures:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.02)
    assert (journal.sync_failures, len(failed)) == (1, 1)
    assert journal.position.segment == 2
    await journal.stop()
    journal.close()
    assert numbers_of(read_all(tmp_path / "j")) == [0, 1, 2, 3]


WRITER = """
import sys
from pathlib import Path
from journal.segments import Journal
from tests.journal.records import intent, outcome
journal = Journal(Path(sys.argv[1]), engine_id="e", segment_bytes=20000)
number = 0
while True:
    for _ in range(7):
        number += 1
        journal.append(outcome("d", number))
    journal.write()
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("turns", [1, 30, 200])
def test_what_was_written_survives_kill_9(tmp_path: Path, turns: int):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(turns)]
    with pytest.raises(JournalOwned):
        make(tmp_path / "j")
    process.send_signal(signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().split("\n")[:-1] if line]
    process.wait()
    found = numbers_of(read_all(tmp_path / "j"))
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= said[-1]
    successor = make(tmp_path / "j")
    assert successor.inherited
    assert numbers_of(read_all(tmp_path / "j", successor.position)) == found
    successor.append(outcome("u", 0))
    successor.close()
    assert numbers_of(read_all(tmp_path / "j"))[-1] == 0
