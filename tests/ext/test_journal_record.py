"""ext.journal_record against its slow twin, and against every cut and every damaged byte."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.accounting import AccountingRecord
from ext import accounting_lines, journal_record, ledger_rows
from tests.ext.records import NOW, numbers, outcome, outcomes
from tests.reference import journal_record as twin


def test_fields_have_the_order_of_the_accounting_record():
    names = AccountingRecord.__struct_fields__
    record = dict(zip(names, journal_record.unpack(outcome("b", due_at=5)[8:]), strict=True))
    assert AccountingRecord(**record).due_at == 5  # type: ignore[arg-type]


def test_the_checksum_is_crc32c_with_and_without_hardware():
    assert journal_record.crc32c(b"123456789") == 0xE3069283
    for size in (0, 1, 7, 8, 9, 63, 64, 1000):
        data = random.Random(size).randbytes(size)
        assert journal_record.crc32c(data) == journal_record.crc32c_by_table(data) == twin.crc32c(data)


@given(outcomes)
@settings(max_examples=100)
def test_outcomes_are_packed_and_unpacked_as_the_twin_does(fields: tuple[int | str, ...]):
    packed = journal_record.pack_outcome(*fields)  # type: ignore[arg-type]
    assert packed == twin.pack_outcome(*fields)  # type: ignore[arg-type]
    assert journal_record.unpack(packed[8:]) == twin.unpack(packed[8:])
    assert journal_record.scan(packed) == ([twin.unpack(packed[8:])], len(packed))


@given(numbers)
def test_intents_are_packed_and_unpacked_as_the_twin_does(fields: tuple[int, ...]):
    packed = journal_record.pack_intent(*fields)
    assert packed == twin.pack_intent(*fields)
    assert journal_record.unpack(packed[8:]) == ("i", *fields)
    assert journal_record.unpack(journal_record.pack_withdrawal(*fields)[8:]) == ("w", *fields)


@pytest.mark.parametrize("text", ["x" * 2000, "ü" * 700, "\N{SNOWMAN}" * 400, "\N{ROCKET}" * 300, "\ud800" * 600, "a\ud800" + "ü" * 600])
def test_over_long_text_is_cut_between_two_characters(text: str):
    fields = ("b", *range(9), 0, 0, 0, 0, *([text] * 10))
    packed = journal_record.pack_outcome(*fields)
    assert packed == twin.pack_outcome(*fields)
    assert len(packed) < journal_record.LONGEST_RECORD


@pytest.mark.parametrize("kind", ["", "i", "w", "dd", "é", "z", "\N{SNOWMAN}"])
def test_a_kind_that_is_no_outcome_is_refused(kind: str):
    with pytest.raises(ValueError, match="kind"):
        outcome(kind)


def test_numbers_too_large_for_a_column_are_held_at_its_end():
    record = journal_record.unpack(outcome("t", batch=2**40, number=2**40, position=0, attempt=99999)[8:])
    assert (record[2], record[3], record[5]) == (2**31 - 1, 2**31 - 1, 32767)


def test_a_block_cut_anywhere_gives_its_whole_records_and_says_where_they_end():
    records = [outcome("d"), journal_record.pack_intent(1, 2, 3, 4, 5, 6, 7, 8, 9), outcome("b", diagnostic="550 né")]
    block = b"".join(records)
    ends = [0, len(records[0]), len(records[0]) + len(records[1]), len(block)]
    for cut in range(len(block) + 1):
        whole = max(end for end in ends if end <= cut)
        found, end = journal_record.scan(block[:cut])
        assert (len(found), end) == (ends.index(whole), whole)
        assert journal_record.whole(block[:cut]) == whole


def end_of_good(block: bytes) -> int:
    try:
        return journal_record.whole(block)
    except journal_record.Garbage as garbage:
        return garbage.offset


def test_a_damaged_byte_is_never_taken_for_a_record():
    records = [outcome("d"), outcome("b", number=2), outcome("t", number=3)]
    block = b"".join(records)
    start = len(records[0])
    for at in range(start, start + len(records[1])):
        damaged = block[:at] + bytes([block[at] ^ 0x55]) + block[at + 1 :]
        assert end_of_good(damaged) == start
        assert journal_record.find(damaged, start + 1) == start + len(records[1])


def test_a_torn_end_has_no_record_behind_it():
    block = outcome("d") + outcome("b")
    for cut in range(1, len(outcome("b"))):
        torn = block[:-cut]
        assert journal_record.find(torn, len(outcome("d"))) == -1


@given(st.binary(max_size=300))
def test_random_bytes_are_garbage_or_unfinished_never_a_crash(data: bytes):
    assert end_of_good(data) == 0
    with pytest.raises(journal_record.Garbage):
        journal_record.unpack(data)
    for function in (
        journal_record.kinds,
        ledger_rows.touched,
        lambda block: accounting_lines.csv_lines(block, "d"),
        lambda b: ledger_rows.copy_rows(b, {}, ()),
    ):
        if data:
            with pytest.raises(journal_record.Garbage):
                function(data)


def test_an_intent_is_open_until_any_outcome_or_its_withdrawal():
    def intent(number: int) -> bytes:
        return journal_record.pack_intent(7, 1, number, number - 1, 1, 1, 3, 2, NOW)

    intents = journal_record.OpenIntents()
    intents.feed(b"".join(map(intent, (1, 2, 3, 4))), 1)
    intents.feed(outcome("u", number=1) + journal_record.pack_withdrawal(7, 1, 2, 1, 1, 1, 3, 2, NOW) + outcome("t", number=5), 2)
    assert [record[3] for record in intents.records()] == [3, 4]
    intents.feed(intent(4) + intent(6), 3)
    assert sorted(intents.before(3)) == [intent(3)]
    assert len(intents) == 3
    with pytest.raises(journal_record.Garbage):
        intents.feed(b"x" * 100, 4)


@pytest.mark.parametrize("seed", range(8))
def test_open_intents_are_those_that_a_dict_would_hold(seed: int):
    dice, intents = random.Random(seed), journal_record.OpenIntents()
    expected: dict[tuple[int, int, int], tuple[int, bytes]] = {}
    most = (5, 40, 700, 5000)[seed % 4]  # the table grows, and its places are taken and freed in every order
    for block in range(20):
        records = []
        for _ in range(1000):
            campaign, number, attempt = dice.choice((1, 2**40)), dice.randrange(most), dice.choice((1, 2))
            if dice.random() < 0.5:
                record = journal_record.pack_intent(campaign, 1, number, 0, attempt, 1, 3, 2, block)
                expected[campaign, number, attempt] = (block, record)
            else:
                record = journal_record.pack_withdrawal(campaign, 1, number, 0, attempt, 1, 3, 2, block)
                expected.pop((campaign, number, attempt), None)
            records.append(record)
        intents.feed(b"".join(records), block)
        assert len(intents) == len(expected)
    assert intents.before(2**62) == [record for _, record in expected.values()]
    assert intents.before(10) == [record for held_in, record in expected.values() if held_in < 10]
    assert [record[4] for record in intents.records()] == [journal_record.unpack(record[8:])[4] for _, record in expected.values()]


def test_records_are_taken_in_the_order_they_came():
    records = journal_record.Records()
    assert (len(records), records.take()) == (0, b"")
    for number in range(5000):  # more than it keeps the memory of
        records.append(outcome("d", number=number))
    assert records.take() == b"".join(outcome("d", number=number) for number in range(5000))
    records.append(outcome("u"))
    assert (len(records), records.take(), records.take()) == (len(outcome("u")), outcome("u"), b"")


def test_records_are_counted_by_kind():
    block = outcome("d") * 3 + outcome("u") + journal_record.pack_intent(1, 2, 3, 4, 5, 6, 7, 8, 9) * 2
    assert journal_record.kinds(block) == {"d": 3, "u": 1, "i": 2}
    assert journal_record.kinds(b"") == {}
