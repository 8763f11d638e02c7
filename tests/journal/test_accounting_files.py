"""journal.accounting_files: PowerMTA's file names and lines, none lost and none twice."""

import asyncio
import csv
import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from domain.accounting import DEFAULT_COLUMNS
from journal.accounting_files import CURSOR_NAME, HEADER, AccountingFiles
from journal.segments import Journal
from tests.journal.records import intent, outcome

NOON = time.mktime((2026, 3, 1, 12, 0, 0, 0, 0, -1))
DAY = 86400


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "j", engine_id="e", readers=("accounting_files",))


def make(journal: Journal, tmp_path: Path, clock: float = NOON, **options: object) -> AccountingFiles:
    return AccountingFiles(journal, tmp_path / "out" / "acct.csv", clock=lambda: clock, **options)  # type: ignore[arg-type]


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def recipients(tmp_path: Path) -> list[int]:
    """The recipients of every line of every file, in order, headers checked."""
    found = []
    for path in sorted((tmp_path / "out").iterdir()):
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        assert tuple(rows[0]) == DEFAULT_COLUMNS
        for row in rows[1:]:
            assert len(row) == 23
            found.append(int(row[4].removeprefix("r").partition("@")[0]))
    return found


def put(journal: Journal, *numbers: int) -> None:
    for number in numbers:
        journal.append(intent(number))
        journal.append(outcome("d", number))
    journal.write()


async def test_a_file_begins_with_the_header_and_has_a_line_per_wanted_outcome(journal: Journal, tmp_path: Path):
    files = make(journal, tmp_path)
    await files.flush()
    assert not (tmp_path / "out").exists()
    for number, kind in enumerate("dbxsctu", 1):
        journal.append(outcome(kind, number, diagnostic='550 5.1.1 no, "such" user'))
    journal.write()
    await files.flush()
    assert names(tmp_path) == ["acct-2026-03-01-0000.csv"]
    assert recipients(tmp_path) == [1, 2, 3, 6]
    assert (tmp_path / "out" / names(tmp_path)[0]).read_bytes().startswith(HEADER)
    put(journal, 8)
    await files.flush()
    assert recipients(tmp_path) == [1, 2, 3, 6, 8]


async def test_a_full_file_is_followed_by_the_next_number(journal: Journal, tmp_path: Path):
    files = make(journal, tmp_path, max_size_bytes=1000)
    put(journal, *range(1, 21))
    await files.flush()
    assert recipients(tmp_path) == list(range(1, 21))
    sizes = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert len(sizes) > 3
    assert max(sizes) <= 1000


async def test_a_line_longer_than_a_file_may_be_is_written_all_the_same(journal: Journal, tmp_path: Path):
    files = make(journal, tmp_path, max_size_bytes=10)
    put(journal, 1, 2)
    await files.flush()
    assert recipients(tmp_path) == [1, 2]
    assert len(names(tmp_path)) == 2


async def test_midnight_begins_a_new_day_at_number_0(journal: Journal, tmp_path: Path):
    now = [NOON]
    files = AccountingFiles(journal, tmp_path / "out" / "acct.csv", clock=lambda: now[0])
    put(journal, 1)
    await files.flush()
    now[0] += DAY
    await files.flush()
    assert len(names(tmp_path)) == 1
    put(journal, 2)
    await files.flush()
    assert names(tmp_path) == ["acct-2026-03-01-0000.csv", "acct-2026-03-02-0000.csv"]


async def test_processes_of_one_machine_never_share_a_file(tmp_path: Path):
    journals = [Journal(tmp_path / f"j{n}", engine_id=f"e{n}") for n in range(5)]
    writers = [make(journal, tmp_path, max_size_bytes=900) for journal in journals]
    for turn in range(4):
        for n, journal in enumerate(journals):
            put(journal, *range(100 * n + 10 * turn, 100 * n + 10 * turn + 10))
        await asyncio.gather(*(writer.flush() for writer in writers))
    assert sorted(recipients(tmp_path)) == [100 * n + i for n in range(5) for i in range(40)]
    assert len(names(tmp_path)) == int(names(tmp_path)[-1][-8:-4]) + 1


def crash(journal: Journal, tmp_path: Path, name: str) -> Path:
    """What lies on disk at this moment, in a place of its own: as if the process had been killed now."""
    image = tmp_path / name
    shutil.copytree(tmp_path / "out", image / "out")
    shutil.copytree(journal.directory, image / "j")
    return image


@pytest.mark.parametrize("max_size", [10**6, 1200])
async def test_killed_at_any_write_no_line_is_lost_or_doubled(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_size: int
):
    files = make(journal, tmp_path, max_size_bytes=max_size)
    put(journal, 1, 2, 3)
    await files.flush()
    images: list[Path] = []
    write, fdatasync, replace = os.write, os.fdatasync, Path.replace

    def cut_write(fd: int, data: bytes) -> int:
        images.append(crash(journal, tmp_path, f"image{len(images)}"))
        return write(fd, data[: len(data) // 2 + 1])

    def late_fdatasync(fd: int) -> None:
        images.append(crash(journal, tmp_path, f"image{len(images)}"))
        fdatasync(fd)

    def late_replace(path: Path, target: Path) -> Path:
        images.append(crash(journal, tmp_path, f"image{len(images)}"))
        return replace(path, target)

    put(journal, *range(4, 12))
    monkeypatch.setattr(os, "write", cut_write)
    monkeypatch.setattr(os, "fdatasync", late_fdatasync)
    monkeypatch.setattr(Path, "replace", late_replace)
    await files.flush()
    monkeypatch.undo()
    images.append(crash(journal, tmp_path, "last"))
    assert recipients(tmp_path) == list(range(1, 12))
    assert len(images) > 5
    for image in images:
        cursor = image / "j" / CURSOR_NAME
        cursor.write_text(cursor.read_text().replace(str(tmp_path / "out"), str(image / "out")))
        successor = make(Journal(image / "j", engine_id="e"), image, max_size_bytes=max_size)
        await successor.flush()
        for path in (image / "out").iterdir():
            if path.stat().st_size == 0:  # created a moment before the crash, and in no cursor file yet
                path.unlink()
        assert recipients(image) == list(range(1, 12)), image


async def test_a_full_disk_is_named_and_made_up_for(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = make(journal, tmp_path, flush_interval_seconds=0.01)
    task = asyncio.create_task(files.run())
    put(journal, 1)
    async with asyncio.timeout(60):
        while files.cursor != journal.position:
            await asyncio.sleep(0.01)
    write = os.write
    room = [300]

    def full(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(fd, data[: room[0]])
        room[0] -= written
        return written

    journal.append(outcome("d", 2))
    journal.append(outcome("d", 3))
    journal.write()
    monkeypatch.setattr(os, "write", full)
    async with asyncio.timeout(60):
        while "No space left" not in files.trouble:
            await asyncio.sleep(0.01)
    monkeypatch.undo()
    async with asyncio.timeout(60):
        while files.trouble or files.cursor != journal.position:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    files.close()
    assert recipients(tmp_path) == [1, 2, 3]
    assert len(names(tmp_path)) == 1


async def test_a_full_disk_while_a_new_file_begins_leaves_no_empty_files_and_no_line_twice(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = make(journal, tmp_path, max_size_bytes=1000)
    put(journal, 1)
    await files.flush()
    put(journal, *range(2, 12))
    write = os.write
    calls = []

    def third_fails(fd: int, data: bytes) -> int:
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(os, "write", third_fails)
    with pytest.raises(OSError, match="No space left"):
        await files.flush()
    await files.flush()
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_size > 0
    assert sorted(recipients(tmp_path)) == list(range(1, 12))


async def test_a_consumer_may_take_files_away(journal: Journal, tmp_path: Path):
    files = make(journal, tmp_path)
    put(journal, 1)
    await files.flush()
    files.close()
    (tmp_path / "out" / "acct-2026-03-01-0000.csv").unlink()
    put(journal, 2)
    successor = make(journal, tmp_path)
    await successor.flush()
    assert recipients(tmp_path) == [2]


async def test_segments_go_when_the_files_have_passed_them(tmp_path: Path):
    journal = Journal(tmp_path / "j", engine_id="e", readers=("accounting_files",), segment_bytes=600)
    files = make(journal, tmp_path, flush_interval_seconds=0.005)
    task = asyncio.create_task(files.run())
    put(journal, 1, 2)
    put(journal, 3, 4)
    put(journal, 5)
    async with asyncio.timeout(60):
        while len(list((tmp_path / "j").glob("*.journal"))) > 1:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert recipients(tmp_path) == [1, 2, 3, 4, 5]
