"""ext.journal_record against its slow twin, and against every cut and every damaged byte."""

import csv
import io
import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.accounting import DEFAULT_COLUMNS, AccountingRecord
from ext import journal_record
from tests.reference import journal_record as twin

NOW = 1_795_284_094_426_911
KINDS = "dbxsctu"
i32 = st.integers(-(2**31), 2**31 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
any_text = st.text(st.characters(exclude_categories=()), max_size=20)
numbers = st.tuples(i64, i32, i32, i32, st.integers(0, 32767), i32, i32, i64, i64)
outcomes = st.builds(
    lambda kind, head, tail, texts: (kind, *head, *tail, *texts),
    st.sampled_from(KINDS), numbers, st.tuples(i64, i64, i64, i64), st.lists(any_text, min_size=10, max_size=10),
)  # fmt: skip


def outcome(kind: str = "d", *, number: int = 1, position: int | None = None, **fields: object) -> bytes:
    record = {
        "campaign_id": 7, "batch": 1, "number": number, "position": number - 1 if position is None else position, "attempt": 1, "epoch": 1,
        "connection": 3, "delivery_server_id": 2, "at": NOW, "queued_at": NOW - 5_000_000, "first_attempt_at": 0, "due_at": 0, "size": 100,
        "recipient": "a@example.com", "sender": "b@example.net", "status": "2.0.0", "diagnostic": "250 ok", "category": "",
        "mta": "mx.example.com (192.0.2.1)", "source_ip": "192.0.2.9", "destination_ip": "192.0.2.1",
        "esmtp": "PIPELINING,8BITMIME", "queue": "example.com/vmta1",
    } | fields  # fmt: skip
    return journal_record.pack_outcome(kind, *record.values())  # type: ignore[arg-type]


def csv_row(block: bytes, kinds: str = "dbt") -> dict[str, str]:
    (row,) = csv.reader(io.StringIO(journal_record.csv_lines(block, kinds).decode()))
    assert len(row) == 23
    return dict(zip(DEFAULT_COLUMNS, row, strict=True))


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
        journal_record.touched,
        lambda block: journal_record.csv_lines(block, "d"),
        lambda b: journal_record.copy_rows(b, {}, ()),
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
    rows, retries, totals, strays = journal_record.copy_rows(block, done, {7} if known else set())
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
    rows, retries, totals, strays = journal_record.copy_rows(block, done, [7])
    assert [line.split(b"\t")[3] for line in rows.splitlines()] == [b"d", b"u", b"t", b"u", b"d"]
    assert (retries, totals, strays) == ([], {7: [2, 0, 0, 0, 0, 1, 2]}, 0)
    assert done[7, 1][0] == b"\xa0"
    assert journal_record.touched(block) == ([(7, 1)], [7])


def test_a_position_outside_its_batch_is_a_stray():
    rows, *_, strays = journal_record.copy_rows(outcome("d", position=3) + outcome("d", position=-1), {(7, 1): (bytearray(1), 3)}, {7})
    assert (rows.count(b"\n"), strays) == (1, 1)
    with pytest.raises(ValueError, match="bitmap"):
        journal_record.copy_rows(outcome("d", position=30), {(7, 1): (bytearray(1), 300)}, {7})


@pytest.fixture(params=["UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kolkata"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@given(st.lists(outcomes, max_size=5))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_lines_are_those_of_the_twin_in_every_zone(zone: str, records: list[tuple[int | str, ...]]):
    fixed = []
    for fields in records:
        changed = list(fields)
        changed[9], changed[10] = (abs(int(value)) % 4_000_000_000_000_000 for value in fields[9:11])
        changed[16] = "5.1.1"
        fixed.append(tuple(changed))
    block = b"".join(journal_record.pack_outcome(*fields) for fields in fixed)  # type: ignore[arg-type]
    expected = [
        twin.csv_line(twin.unpack(journal_record.pack_outcome(*fields)[8:]), "bad destination mailbox address")  # type: ignore[arg-type]
        for fields in fixed
        if str(fields[0]) in "dbxt"
    ]
    assert journal_record.csv_lines(block, "dbt") == b"".join(expected)


def test_a_delivery_line_reads_as_powermta_writes_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        line = journal_record.csv_lines(outcome("d", diagnostic="250 2.0.0 Ok: queued"), "d").decode()
    finally:
        monkeypatch.undo()
        time.tzset()
    assert line == (
        "d,2026-11-21 19:01:34+0100,2026-11-21 19:01:29+0100,b@example.net,a@example.com,,relayed,2.0.0 (success),"
        'smtp;250 2.0.0 Ok: queued,mx.example.com (192.0.2.1),,api,,smtp,192.0.2.9,192.0.2.1,"PIPELINING,8BITMIME",100,vmta1,c7,,'
        "example.com/vmta1,\n"
    )


def test_expiries_are_bounces_and_only_the_wanted_types_are_written():
    expired = csv_row(outcome("x", category="", status="4.4.7"))
    assert (expired["type"], expired["bounceCat"], expired["dsnAction"], expired["dsnStatus"]) == (
        "b", "message-expired", "failed", "4.4.7 (delivery time expired)",
    )  # fmt: skip
    assert csv_row(outcome("x", category="content-related"))["bounceCat"] == "content-related"
    assert csv_row(outcome("t", category="quota-issues"))["dsnAction"] == "delayed"
    assert csv_row(outcome("b"))["dlvSize"] == ""
    block = b"".join(outcome(kind) for kind in KINDS) + journal_record.pack_intent(1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert [line[:1] for line in journal_record.csv_lines(block, "dbt").splitlines()] == [b"d", b"b", b"b", b"t"]
    assert journal_record.csv_lines(block, "") == b""


@pytest.mark.parametrize(
    ("status", "kind", "shown"),
    [
        ("", "d", "2.0.0 (success)"),
        ("", "b", "5.0.0 (undefined status)"),
        ("", "t", "4.0.0 (undefined status)"),
        ("5.2.1", "b", "5.2.1 (mailbox disabled, not accepting messages)"),
        ("4.2.99", "t", "4.2.99 (mailbox-related failure)"),
        ("5.99.99", "b", "5.99.99 (undefined status)"),
        ("=1+1", "b", "'=1+1 (undefined status)"),
    ],
)
def test_a_status_is_shown_with_its_words(status: str, kind: str, shown: str):
    assert csv_row(outcome(kind, status=status))["dsnStatus"] == shown


def test_the_default_virtual_mta_is_empty_in_its_column():
    assert csv_row(outcome(queue="example.com/{default}"))["vmta"] == ""
    assert csv_row(outcome(queue="example.com"))["vmta"] == ""
    assert csv_row(outcome(queue="name.rollup/v,1"))["vmta"] == "v,1"


@pytest.mark.parametrize("start", list("=+-@\t\r"))
def test_a_cell_that_a_spreadsheet_would_run_is_quoted(start: str):
    row = csv_row(outcome("b", recipient=f"{start}cmd|' /C calc'!A0", category=f"{start}1"))
    assert row["rcpt"].startswith("'")
    assert row["bounceCat"].startswith("'")


def test_whatever_a_server_says_stays_on_one_line():
    said = "".join(map(chr, range(0x250))) + "\u2028\u2029\u202e\u2066," + '"quoted"\r\n'
    lines = journal_record.csv_lines(outcome("b", diagnostic=said, mta=said), "b")
    assert lines.count(b"\n") == 1
    assert len(lines.decode().splitlines()) == 1
    assert csv_row(outcome("b", diagnostic=said))["dsnDiag"] == "smtp;" + twin.BLANK.sub(" ", said.encode()[:512].decode("utf-8", "ignore"))
