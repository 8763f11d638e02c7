"""ext.accounting_lines against its slow twin, and as PowerMTA's consumers read them."""

import csv
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.accounting import DEFAULT_COLUMNS
from ext import accounting_lines, journal_record
from tests.ext.records import KINDS, outcome, outcomes
from tests.reference import journal_record as twin


def csv_row(block: bytes, kinds: str = "dbt") -> dict[str, str]:
    (row,) = csv.reader(io.StringIO(accounting_lines.csv_lines(block, kinds).decode()))
    assert len(row) == 23
    return dict(zip(DEFAULT_COLUMNS, row, strict=True))


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
    assert accounting_lines.csv_lines(block, "dbt") == b"".join(expected)


def test_a_delivery_line_reads_as_powermta_writes_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        line = accounting_lines.csv_lines(outcome("d", diagnostic="250 2.0.0 Ok: queued"), "d").decode()
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
    assert [line[:1] for line in accounting_lines.csv_lines(block, "dbt").splitlines()] == [b"d", b"b", b"b", b"t"]
    assert accounting_lines.csv_lines(block, "") == b""


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
    lines = accounting_lines.csv_lines(outcome("b", diagnostic=said, mta=said), "b")
    assert lines.count(b"\n") == 1
    assert len(lines.decode().splitlines()) == 1
    assert csv_row(outcome("b", diagnostic=said))["dsnDiag"] == "smtp;" + twin.BLANK.sub(" ", said.encode()[:512].decode("utf-8", "ignore"))


def test_a_line_of_nothing_but_quotes_stays_within_its_room():
    """In a process of its own, whose allocator looks for octets that were written behind the end."""
    look = (
        "from ext import accounting_lines; from tests.ext.records import outcome; "
        "block = outcome(queue='/' + 999 * chr(34)); line = accounting_lines.csv_lines(block, 'd'); "
        "assert all(accounting_lines.csv_lines(n * block, 'd') == n * line for n in range(1, 100))"
    )
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
