"""journal.inspection: what stands in a journal, damage named with file and offset, and nothing changed by looking."""

from pathlib import Path

import pytest

from domain.errors import JournalError
from journal import inspection
from journal.segment_files import read_header, segment_numbers, segment_path
from journal.segments import Journal
from tests.journal.records import intent, outcome


def make(directory: Path, *, segment_bytes: int = 10**6) -> Journal:
    journal = Journal(directory, engine_id="node.1.abc", segment_bytes=segment_bytes)
    for number in range(1, 9):
        journal.append(intent(number))
    journal.write()
    for number in range(1, 7):
        journal.append(outcome("d" if number < 5 else "b", number))
        journal.write()
    return journal


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("segment_bytes", [10**6, 500])
def test_records_are_counted_and_open_intents_named(tmp_path: Path, segment_bytes: int):
    make(tmp_path / "j", segment_bytes=segment_bytes).close()
    before = files(tmp_path / "j")
    facts = inspection.inspect(tmp_path / "j")
    assert (facts.engine_id, facts.owner, facts.damage) == ("node.1.abc", "", [])
    assert facts.records == {"i": 8, "d": 4, "b": 2}
    assert (facts.open_intents, [found.number for found in facts.intents]) == (2, [7, 8])
    assert (len(facts.segments) > 1) == (segment_bytes == 500)
    assert sum(segment.records for segment in facts.segments) == 14
    assert facts.bytes == sum(map(len, before.values())) - len(before["lock"])
    assert files(tmp_path / "j") == before


def test_a_living_owner_is_named_and_not_disturbed(tmp_path: Path):
    journal = make(tmp_path / "j")
    assert inspection.inspect(tmp_path / "j").owner.startswith("node.1.abc ")
    journal.append(outcome("u", 7))
    journal.write()
    facts = inspection.inspect(tmp_path / "j")
    assert (facts.records["u"], facts.open_intents) == (1, 1)
    journal.close()
    assert inspection.inspect(tmp_path / "j").owner == ""


def test_a_torn_end_is_no_damage(tmp_path: Path):
    make(tmp_path / "j").close()
    path = segment_path(tmp_path / "j", 1)
    path.write_bytes(path.read_bytes()[:-7])
    facts = inspection.inspect(tmp_path / "j")
    assert (facts.damage, facts.records["b"], facts.segments[0].torn_bytes) == ([], 1, len(outcome("b", 6)) - 7)


def test_every_place_of_damage_is_named_and_what_is_behind_it_counted(tmp_path: Path):
    make(tmp_path / "j").close()
    path = segment_path(tmp_path / "j", 1)
    header = read_header(path)
    assert header is not None
    data = bytearray(path.read_bytes())
    first, third = header.size, header.size + 2 * len(intent(1))
    for offset in (first + 20, third + 20):
        data[offset] ^= 0xFF
    path.write_bytes(data)
    facts = inspection.inspect(tmp_path / "j")
    assert [(damage.file, damage.offset, damage.next_good) for damage in facts.damage] == [
        (str(path), first, first + len(intent(1))),
        (str(path), third, third + len(intent(1))),
    ]
    assert facts.records == {"i": 6, "d": 4, "b": 2}


def test_missing_and_foreign_segments_are_named(tmp_path: Path):
    make(tmp_path / "j", segment_bytes=500).close()
    numbers = segment_numbers(tmp_path / "j")
    segment_path(tmp_path / "j", numbers[1]).unlink()
    segment_path(tmp_path / "j", numbers[2]).write_bytes(b"something else, much longer than the header of a segment would be")
    facts = inspection.inspect(tmp_path / "j")
    assert [(Path(damage.file).name, damage.offset) for damage in facts.damage] == [("00000003.journal", 0), ("00000002.journal", 0)]
    assert "no journal segment" in facts.damage[0].reason
    assert "missing" in facts.damage[1].reason


def test_a_directory_of_journals_is_told_from_a_journal(tmp_path: Path):
    make(tmp_path / "root" / "a").close()
    make(tmp_path / "root" / "copied").close()
    (tmp_path / "root" / "empty").mkdir()
    assert inspection.journals_in(tmp_path / "root") == [tmp_path / "root" / "a", tmp_path / "root" / "copied"]
    assert inspection.journals_in(tmp_path / "root" / "a") == [tmp_path / "root" / "a"]
    assert inspection.engine_id_of(tmp_path / "root" / "copied") == "node.1.abc"
    for nothing in ("root/empty", "root/not there"):
        with pytest.raises(JournalError, match=r"no such directory|holds none"):
            inspection.journals_in(tmp_path / nothing)
