"""Bytes of a recipient list in, rows ready to store and refused rows out. Pure; any size in constant memory.

CSV is RFC 4180 with a header line, in UTF-8 (a BOM is taken off); NDJSON is one object per line. Whatever is wrong with one
row refuses that row only; what is wrong with the file as a whole raises Invalid. Row 1 is the first row after the header of
a CSV file, or the first line of an NDJSON file; a row with line breaks inside quotes is one row, blank lines are none.
The input may be cut anywhere: `feed` keeps what is not complete yet.
"""

import csv
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, Literal

import msgspec

from domain.address import parse
from domain.errors import Invalid

Format = Literal["csv", "ndjson"]
Kind = Literal["text", "number", "date", "list"]

MAX_RECORD_BYTES: Final = 1024 * 1024
MAX_VALUE_CHARACTERS: Final = 131072  # the limit of the csv module, for NDJSON as well
MAX_FIELDS: Final = 200
FIELD_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}").fullmatch
FIELD_NAME_RULE: Final = "a field name is a letter a-z and then up to 63 of a-z, 0-9 and _"

_DATE = re.compile(r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])(?:T.*)?").fullmatch
_MAGIC: Final = {
    b"\x1f\x8b": "is gzip data; send it uncompressed",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; export it as CSV",
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
}
_encode = msgspec.json.Encoder().encode

Row = tuple[int, str, str, str]  # row, email, email key, merge data as a JSON object


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """A row that was not taken. `field` is empty where the row as a whole is wrong."""

    row: int
    field: str
    reason: str


class RowReader:
    """Base of the two formats: keeps the counts, checks values, remembers which fields were seen.

    `known` are the fields the list has; a field that is not among them is collected in `new_fields` when `create_fields`,
    refused otherwise.
    """

    def __init__(self, known: dict[str, Kind], create_fields: bool) -> None:
        self.known = dict(known)
        self.create_fields = create_fields
        self.new_fields: dict[str, Kind] = {}
        self.rows_read = 0
        self.rows: list[Row] = []
        self.refusals: list[Refusal] = []
        self._carry = b""
        self._started = False
        self._skipping = False  # inside a line that is too long

    def take(self) -> tuple[list[Row], list[Refusal]]:
        """What was read since the last call."""
        taken = self.rows, self.refusals
        self.rows, self.refusals = [], []
        return taken

    def feed(self, block: bytes) -> None:
        """Read what is complete in the input so far. Raises Invalid when the file as a whole cannot be read."""
        self._carry += block
        if not self._started:
            if len(self._carry) < 4 and block:
                return
            self._start()
        self._cut(False)

    def finish(self) -> None:
        """Read the last line, ended or not. Raises Invalid when there was no header."""
        if not self._started:
            self._start()
        self._cut(True)

    def _start(self) -> None:
        self._started = True
        for magic, what in _MAGIC.items():
            if self._carry.startswith(magic):
                raise Invalid("body", what)
        if self._carry.startswith(b"\xef\xbb\xbf"):
            self._carry = self._carry[3:]

    def _cut(self, final: bool) -> None:
        if self._skipping:
            end = self._carry.find(b"\n")
            if end < 0:
                self._carry = b""
                return
            self._carry = self._carry[end + 1 :]
            self._skipping = False
        end = len(self._carry) if final else self._carry.rfind(b"\n") + 1
        complete, self._carry = self._carry[:end], self._carry[end:]
        if complete or final:
            self._read(complete, final)
        if len(self._carry) > MAX_RECORD_BYTES:
            self._too_long()
            self._carry = b""
            self._skipping = True

    def _read(self, complete: bytes, final: bool) -> None:
        raise NotImplementedError

    def _too_long(self) -> None:
        raise NotImplementedError

    def _refuse(self, field: str, reason: str) -> None:
        self.refusals.append(Refusal(self.rows_read, field, reason))

    def _add_field(self, name: str, kind: Kind, where: str) -> None:
        """Learn a field the list does not have. Raises Invalid when it may not be created."""
        if not FIELD_NAME(name):
            better = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
            advice = f"; call it {better}" if FIELD_NAME(better) else ""
            raise Invalid(where, f"{name[:80]!r} cannot be a field: {FIELD_NAME_RULE}{advice}")
        if not self.create_fields:
            raise Invalid(where, f"the list has no field {name!r}; create it first, or allow this import to create fields")
        if len(self.known) >= MAX_FIELDS:
            raise Invalid(where, f"more than {MAX_FIELDS} fields")
        self.known[name] = self.new_fields[name] = kind


class CsvReader(RowReader):
    """RFC 4180, separated by commas."""

    def __init__(self, known: dict[str, Kind], create_fields: bool) -> None:
        super().__init__(known, create_fields)
        self._names: list[str] | None = None  # the columns besides email, in order
        self._width = 0
        self._email_column = 0
        self._typed: list[tuple[str, Kind]] = []
        self._pending: list[str] = []  # lines of a record whose quotes are still open

    def _too_long(self) -> None:
        if self._names is None:
            raise Invalid("header", "the first line does not end within 1 MiB; is it a text file with line breaks (LF or CRLF)?")
        if self._pending:
            self._parse([], True)
        self.rows_read += 1
        self._refuse("", "is longer than 1 MiB")

    def _read(self, complete: bytes, final: bool) -> None:
        try:
            text, clean = complete.decode("utf-8"), True
        except UnicodeDecodeError:
            text, clean = complete.decode("utf-8", "surrogateescape"), False
        if "\0" in text:
            clean = False
        # only LF ends a line here, as the csv module is told: str.splitlines would also cut at U+2028 and others
        lines = text.split("\n")
        last = lines.pop()
        lines = [line + "\n" for line in lines]
        if last:
            lines.append(last)
        self._parse(lines, final, clean)

    def _parse(self, lines: list[str], final: bool, clean: bool = True) -> None:
        if self._pending:
            clean = False  # they may come from a block that was not
            lines = self._pending + lines
            self._pending = []
        waiting = deque(lines)
        while waiting:
            waiting = self._parse_until_error(waiting, final, clean)

    def _parse_until_error(self, lines: deque[str], final: bool, clean: bool) -> deque[str]:
        """Read records until the input ends or one of them is broken; returns the lines behind the broken one."""
        consumed: list[str] = []  # lines of the record being read

        def feed() -> Iterator[str]:
            while lines:
                line = lines.popleft()
                consumed.append(line)
                yield line

        reader = csv.reader(feed(), strict=True)
        take = self._take_record
        try:
            for record in reader:
                consumed.clear()
                take(record, clean)
        except csv.Error as error:
            if not lines and "unexpected end of data" in str(error):
                # quotes are open: more lines may close them, up to the limit of a record
                size = sum(map(len, consumed))
                if not final and size <= MAX_RECORD_BYTES:
                    self._pending = consumed
                    return lines
                reason = "a quote is opened and not closed" + (" within 1 MiB" if not final else "")
            else:
                reason = _csv_reason(str(error))
            if self._names is None:
                raise Invalid("header", reason) from None
            self.rows_read += 1
            self._refuse("", reason)
            # A stray quote swallows what follows: give back every line behind the one it stands in
            lines.extendleft(reversed(consumed[1:]))
        return lines

    def _take_record(self, record: list[str], clean: bool) -> None:
        if self._names is None:
            self._take_header(record)
            return
        if not record:
            return  # a blank line
        self.rows_read += 1
        if len(record) != self._width:
            surplus = len(record) - self._width
            count = "one column" if abs(surplus) == 1 else f"{abs(surplus)} columns"
            self._refuse("", f"{count} too {'many' if surplus > 0 else 'few'}: {len(record)} where the header has {self._width}")
            return
        email = record.pop(self._email_column)
        if not clean:
            for name, value in zip(("email", *self._names), (email, *record), strict=True):
                reason = _bad_text(value)
                if reason:
                    self._refuse(name, reason)
                    return
        try:
            address = parse(email)
            data = dict(zip(self._names, record, strict=True))
            if self._typed:
                _convert(data, self._typed)
        except Invalid as error:
            self._refuse(error.field, error.reason)
            return
        self.rows.append((self.rows_read, address.text, address.key, _encode(data).decode()))

    def _take_header(self, record: list[str]) -> None:
        if not record:
            return
        names = [name.strip().lower() for name in record]
        if any("\0" in name for name in names):
            raise Invalid("header", "contains NUL characters; is it UTF-16? Save it as UTF-8")
        if len(names) > MAX_FIELDS:
            raise Invalid("header", f"has {len(names)} columns, more than {MAX_FIELDS}")
        if "email" not in names:
            separator = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), "")
            if separator:
                raise Invalid("header", f"the columns are separated by {separator!r}; save it with commas")
            raise Invalid("header", f"no column is named email; the first line names the columns (found: {', '.join(names)[:120]})")
        for i, name in enumerate(names):
            if name in names[:i]:
                raise Invalid("header", f"the column {name[:80]!r} is named twice")
            if name != "email" and name not in self.known:
                self._add_field(name, "text", "header")
        self._width = len(names)
        self._email_column = names.index("email")
        self._names = [name for name in names if name != "email"]
        self._typed = [(name, self.known[name]) for name in self._names if self.known[name] != "text"]

    def finish(self) -> None:
        """Read the last line, ended or not. Raises Invalid when there was no header."""
        super().finish()
        if self._names is None:
            raise Invalid("header", "the file is empty; its first line names the columns, one of them email")


class NdjsonReader(RowReader):
    """One JSON object per line: `email` and any custom fields, flat. Values: text, number, true, false, null, list of text."""

    _decode = msgspec.json.Decoder(dict[str, Any]).decode

    def _too_long(self) -> None:
        self.rows_read += 1
        self._refuse("", "is longer than 1 MiB")

    def _read(self, complete: bytes, final: bool) -> None:
        for line in complete.split(b"\n"):
            line = line.strip(b" \t\r")
            if not line:
                continue
            self.rows_read += 1
            try:
                self._take_object(line)
            except Invalid as error:
                self._refuse(error.field, error.reason)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                self._refuse("", f"is not a JSON object: {error}"[:200])

    def _take_object(self, line: bytes) -> None:
        data = self._decode(line)
        email = data.pop("email", None)
        if not isinstance(email, str):
            raise Invalid("email", "is missing" if email is None else "must be text")
        address = parse(email)
        for name, value in data.items():
            kind = _check_value(name, value)
            if name not in self.known:
                self._add_field(name, kind, name if FIELD_NAME(name) else "")
        typed = [(name, self.known[name]) for name in data if self.known[name] != "text"]
        if typed:
            _convert(data, typed)
        self.rows.append((self.rows_read, address.text, address.key, _encode(data).decode()))


def reader(format: Format, known: dict[str, Kind], create_fields: bool = True) -> RowReader:
    """The reader of a format, for a list that has the fields `known`."""
    return CsvReader(known, create_fields) if format == "csv" else NdjsonReader(known, create_fields)


def check_values(data: dict[str, Any], known: dict[str, Kind]) -> dict[str, Any]:
    """Merge data of one subscriber as it is stored. Raises Invalid naming the field `data.<name>`."""
    for name, value in data.items():
        try:
            if name not in known:
                raise Invalid(name, "the list has no such field; create it first")
            _check_value(name, value)
            if known[name] != "text":
                _convert(data, [(name, known[name])])
        except Invalid as error:
            raise Invalid(f"data.{name}"[:100], error.reason) from None
    return data


def _csv_reason(said: str) -> str:
    if "field limit" in said:
        return "a value is longer than 128 KiB, or its quotes are not closed"
    if "new-line character" in said:
        return "a carriage return stands outside quotes; lines end in LF or CRLF"
    return "text follows a closing quote; a quote inside a value is written twice"


def _bad_text(value: str) -> str:
    if "\0" in value:
        return "contains a NUL character"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    return ""


def _check_value(name: str, value: object) -> Kind:
    """The kind a value has. Raises Invalid for what merge data cannot hold."""
    if isinstance(value, str):
        if len(value) > MAX_VALUE_CHARACTERS:
            raise Invalid(name, f"is longer than {MAX_VALUE_CHARACTERS} characters")
        reason = _bad_text(value)
        if reason:
            raise Invalid(name, reason)
        return "text"
    if value is None or isinstance(value, bool):
        return "text"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        for item in value:
            _check_value(name, item)
        return "list"
    raise Invalid(name, "must be text, a number, true, false, null or a list of texts")


def _convert(data: dict[str, Any], typed: list[tuple[str, Kind]]) -> None:
    """Turn the text of typed fields into what their kind says; empty text is kept. Raises Invalid."""
    for name, kind in typed:
        value = data[name]
        if not isinstance(value, str) or not value:
            continue
        if kind == "number":
            try:
                number = float(value)
            except ValueError:
                raise Invalid(name, "must be a number", value) from None
            if not -1e300 < number < 1e300 or "_" in value:
                raise Invalid(name, "must be a number", value)
            data[name] = int(value) if value.strip().lstrip("+-").isdecimal() and len(value) < 19 else number
        elif kind == "date":
            if not _DATE(value):
                raise Invalid(name, "must be a date, YYYY-MM-DD", value)
        elif kind == "list":
            data[name] = [item.strip() for item in value.split(",")]
