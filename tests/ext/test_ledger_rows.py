"""ext.ledger_rows against its slow twin: rows, retries and progress, and which of two words about a recipient counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext import journal_record, ledger_rows
from tests.ext.records import NOW, outcome, outcomes
from tests.reference import journal_record as twin


@given(st.lists(st.tuples(outcomes, st.booleans()), max_size=6), st.booleans())
@settings(max_examples=50)
def test_copy_rows_are_those_of_the_twin(records: list[tuple[tuple[int | str, ...], bool]], known: bool):
    fixed = []
    for index, (fields, due) in enumerate(records):
        changed = list(fields)
        changed[1], changed[2], changed[4], changed[9] = 7, 1, index, abs(int(fields[9])) % 4_000_000_000_000_000
        changed[12] = 5 if due else 0
        fixed.append(tuple(changed))
    block = b"".join(journal_record.pack_outcome(*fields) for fields in fixed)  # type: ignore[arg-type]
    done = {(7, 1): (bytearray(b"\x00"), 8)}
    rows, retries, totals, strays = ledger_rows.copy_rows(block, done, {7} if known else set())
    unpacked = [twin.unpack(journal_record.pack_outcome(*fields)[8:]) for fields in fixed]  # type: ignore[arg-type]
    if not known:
        assert (rows, retries, totals, strays) == (b"", [], {}, len(records))
        return
    assert rows == b"".join(twin.copy_row(record, str(record[0])) for record in unpacked)
    settled = [index for index, record in enumerate(unpacked) if str(record[0]) in "dbxsc" or int(record[12]) > 0]
    assert [index for index in range(8) if done[7, 1][0][0] & (0x80 >> index)] == settled
    assert [retry[:2] for retry in retries] == [(7, r[3]) for r in unpacked if str(r[0]) in "tu" and int(r[12]) > 0]
    assert sum(totals.get(7, [0])) == len(records)


def test_the_second_terminal_record_of_a_recipient_becomes_uncertain():
    done = {(7, 1): (bytearray(b"\x00"), 3)}
    block = outcome("d") + outcome("b") + outcome("t", due_at=NOW) + outcome("u") + outcome("d", number=3)
    rows, retries, totals, strays = ledger_rows.copy_rows(block, done, [7])
    assert [line.split(b"\t")[3] for line in rows.splitlines()] == [b"d", b"u", b"t", b"u", b"d"]
    assert (retries, totals, strays) == ([], {7: [2, 0, 0, 0, 0, 1, 2]}, 0)
    assert done[7, 1][0] == b"\xa0"
    assert ledger_rows.touched(block) == ([(7, 1)], [7])


def test_a_position_outside_its_batch_is_a_stray():
    rows, *_, strays = ledger_rows.copy_rows(outcome("d", position=3) + outcome("d", position=-1), {(7, 1): (bytearray(1), 3)}, {7})
    assert (rows.count(b"\n"), strays) == (1, 1)
    with pytest.raises(ValueError, match="bitmap"):
        ledger_rows.copy_rows(outcome("d", position=30), {(7, 1): (bytearray(1), 300)}, {7})
