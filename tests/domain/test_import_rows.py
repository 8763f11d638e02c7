"""The reader of recipient lists: the same answer wherever the input is cut."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.errors import Invalid
from domain.import_rows import Format, RowReader, check_values, reader
from tests.reference.recipients import COUNT, FAULTY, make_recipients


def read(data: bytes, step: int, format: Format = "csv") -> RowReader:
    """Feed `data` in pieces of `step` bytes."""
    rows = reader(format, {})
    for at in range(0, len(data), step):
        rows.feed(data[at : at + step])
    rows.finish()
    return rows


MIXED = (
    '\ufeffemail,name,"note"\r\n'
    'a@x.example,"A ""quoted"", name","two\r\nlines"\r\n'
    "\r\n"
    "b@x.example,no note\n"
    'c@x.example,"closed"early,x\r\n'
    "d@x.example,\u2028,\x85\r\n"
    'e@x.example,5" pipe,"\u660e"\n'
    'f@x.example,"open,x\n'
    "g@x.example,last,"
).encode()


def test_the_answer_does_not_depend_on_where_the_input_is_cut() -> None:
    whole = read(MIXED, len(MIXED))
    assert [(row[0], row[1], json.loads(row[3])) for row in whole.rows] == [
        (1, "a@x.example", {"name": 'A "quoted", name', "note": "two\r\nlines"}),
        (4, "d@x.example", {"name": "\u2028", "note": "\x85"}),
        (5, "e@x.example", {"name": '5" pipe', "note": "\u660e"}),
        (7, "g@x.example", {"name": "last", "note": ""}),
    ]
    assert [(refusal.row, refusal.reason[:20]) for refusal in whole.refusals] == [
        (2, "one column too few: "),
        (3, "text follows a closi"),
        (6, "a quote is opened an"),
    ]
    for step in range(1, len(MIXED)):
        cut = read(MIXED, step)
        assert (cut.rows, cut.refusals, cut.rows_read) == (whole.rows, whole.refusals, whole.rows_read), step


def test_faulty_rows_are_refused_and_no_others() -> None:
    rows = read(make_recipients(), 1000)
    duplicates = {row for row, (_, kind) in FAULTY.items() if kind == "duplicate"}
    assert rows.rows_read == COUNT
    assert {refusal.row: refusal.field for refusal in rows.refusals} == {
        row: field for row, (field, _) in FAULTY.items() if row not in duplicates
    }


def test_bytes_that_are_no_text_refuse_their_row() -> None:
    rows = read(b"email,name\na@x.example,ok\nb@x.example,\xff\xfe\nc@x.example,\xc3\xa9\n", 7)
    assert [row[1] for row in rows.rows] == ["a@x.example", "c@x.example"]
    assert [(refusal.row, refusal.field, refusal.reason) for refusal in rows.refusals] == [(2, "name", "is not UTF-8")]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), min_size=2, max_size=2),
        max_size=8,
    ),
    st.integers(1, 40),
)
def test_what_the_csv_module_writes_is_what_is_read(values: list[list[str]], step: int) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(["email", "a", "b"])
    for i, row in enumerate(values):
        writer.writerow([f"u{i}@x.example", *row])
    rows = read(out.getvalue().encode(), step)
    assert not rows.refusals
    assert [json.loads(row[3]) for row in rows.rows] == [{"a": row[0], "b": row[1]} for row in values]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.integers(1, 50), st.sampled_from(["csv", "ndjson"]))
def test_no_bytes_break_the_reader(data: bytes, step: int, format: Format) -> None:
    try:
        rows = read((b"email,a\n" if format == "csv" else b"") + data, step, format)
    except Invalid:
        return
    numbers = [row[0] for row in rows.rows] + [refusal.row for refusal in rows.refusals]
    assert sorted(numbers) == list(range(1, rows.rows_read + 1))


def test_values_of_one_subscriber() -> None:
    assert check_values({"age": "7", "tags": "a, b"}, {"age": "number", "tags": "list"}) == {"age": 7, "tags": ["a", "b"]}
    for data, field in (({"x": "1"}, "data.x"), ({"age": "old"}, "data.age"), ({"age": {}}, "data.age")):
        with pytest.raises(Invalid) as caught:
            check_values(dict(data), {"age": "number"})
        assert caught.value.field == field
