"""Results that others report, as CSV: whose address bounced, complained, unsubscribed or is to be suppressed. Pure; any size.

Two shapes, told apart by the header line (names in any case and order, columns that are not needed are passed over):

    address,type,when,text      type: hard, soft, complaint, unsubscribe or suppress; `when` and `text` may be missing or empty
    type,timeLogged,rcpt,…      PowerMTA's accounting files: b and rb are read as a reply is, f is a complaint, other types are skipped

One row that is wrong is refused with number, field and reason, the others are read. Row 1 is the first behind the header.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from domain import address, suppression_key
from domain.bounce import CATEGORIES, HARD_CATEGORIES, BounceClass
from domain.errors import Invalid
from domain.import_rows import CsvReader

Result = Literal["hard", "soft", "complaint", "unsubscribe", "suppress"]

MAX_TEXT_CHARACTERS: Final = 500
_TYPES: Final[dict[str, Result]] = {
    "hard": "hard", "soft": "soft", "complaint": "complaint", "unsubscribe": "unsubscribe", "suppress": "suppress",
}  # fmt: skip
_POWERMTA: Final = frozenset({"b", "rb", "f", "d", "t", "tq", "r", "rs", "x", "s", "c", "u"})
# what a column may be called; the first that is there counts
_ADDRESS: Final = ("address", "email", "recipient", "rcpt", "header_to", "header_original-rcpt-to")
_WHEN: Final = ("when", "at", "date", "timestamp", "timelogged")
_TEXT: Final = ("text", "note", "diagnostic", "dsndiag")
_NOT_COMPLAINTS: Final = frozenset({"not-spam", "auth-failure"})
_IN_BRACKETS: Final = re.compile(r"<([^<>]{1,320})>\s*$")
_STATUS: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_QUOTED_FORMULA: Final = re.compile(r"'[=+\-@\t\r]")


class ResultRow(msgspec.Struct, frozen=True, gc=False):
    """One result. `key` is a `domain.suppression_key`; a pattern in rows of type suppress only. `when` None: not said."""

    row: int
    key: str
    result: Result
    when: datetime | None
    text: str


class ResultReader(CsvReader):
    """Reads a file cut anywhere: `feed`, `finish`, and after each `take_results`. `classify` is `BounceRules.classify` (code, text).

    `default` is the type of every row of a file without a column `type`; without a default that column is needed.
    """

    def __init__(self, classify: Callable[[int, str], BounceClass], default: Result | None = None) -> None:
        super().__init__({}, False)
        self.skipped = 0  # rows of PowerMTA's other types
        self._classify = classify
        self._default = default
        self._results: list[ResultRow] = []
        self._at: dict[str, int] = {}

    def take_results(self) -> list[ResultRow]:
        """What was read since the last call; refused rows are in `take()`."""
        taken, self._results = self._results, []
        return taken

    def _take_header(self, record: list[str]) -> None:
        if not record:
            return
        names = [name.strip().lower() for name in record]
        self._at = {name: number for number, name in reversed(list(enumerate(names)))}
        if not any(name in self._at for name in _ADDRESS):
            if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
                raise Invalid("header", "the columns are not separated by commas; save it with commas")
            raise Invalid("header", f"no column is named address (or email, rcpt); found: {', '.join(names)[:120]}")
        if "type" not in self._at and self._default is None:
            raise Invalid("header", f"no column is named type ({', '.join(_TYPES)}); found: {', '.join(names)[:120]}")
        self._names = names
        self._width = len(names)

    def _take_record(self, record: list[str], clean: bool) -> None:
        if self._names is None:
            self._take_header(record)
            return
        if not record:
            return
        self.rows_read += 1
        if len(record) != self._width:
            self._refuse("", f"has {len(record)} columns where the header has {self._width}")
            return
        try:
            found = self._result(record)
        except Invalid as error:
            self._refuse(error.field, error.reason)
            return
        if found is None:
            self.skipped += 1
        else:
            self._results.append(found)

    def _cell(self, record: list[str], names: tuple[str, ...]) -> str:
        for name in names:
            at = self._at.get(name)
            if at is not None and record[at].strip():
                return record[at].strip()
        return ""

    def _result(self, record: list[str]) -> ResultRow | None:
        said = self._cell(record, ("type",)).lower()
        text = self._cell(record, _TEXT)
        if said in _POWERMTA:
            result = self._of_powermta(said, record, text)
            if result is None:
                return None
        elif said in _TYPES:
            result = _TYPES[said]
        elif not said and self._default is not None:
            result = self._default
        else:
            raise Invalid("type", f"must be {', '.join(_TYPES)}, or b, rb, f of a PowerMTA file, not {said[:40]!r}")
        if _has_surrogates(text):
            raise Invalid("text", "is not UTF-8")
        text = _CONTROL.sub(" ", _unquoted(text))[:MAX_TEXT_CHARACTERS].strip()
        return ResultRow(self.rows_read, self._key(record, result), result, self._when(record), text)

    def _key(self, record: list[str], result: Result) -> str:
        given = _unquoted(self._cell(record, _ADDRESS))
        if found := _IN_BRACKETS.search(given):
            given = found[1]
        if result == "suppress":
            return suppression_key.parse(given, "address")
        if given.startswith("*@"):
            raise Invalid("address", "is a pattern; that goes with rows of type suppress only")
        return address.key(given, "address")

    def _when(self, record: list[str]) -> datetime | None:
        given = self._cell(record, _WHEN)
        if not given:
            return None
        try:
            if given.isascii() and given.isdigit():
                return datetime.fromtimestamp(int(given), UTC)
            read = datetime.fromisoformat(given)
            return read if read.tzinfo is not None else read.replace(tzinfo=UTC)
        except (ValueError, OverflowError, OSError):
            raise Invalid(
                "when", "must be a time such as 2026-11-21 20:15:00+0000 (UTC where no offset is given) or POSIX seconds"
            ) from None

    def _of_powermta(self, kind: str, record: list[str], diagnostic: str) -> Result | None:
        if kind == "f":
            return None if self._cell(record, ("feedbacktype",)).lower() in _NOT_COMPLAINTS else "complaint"
        if kind not in ("b", "rb") or self._cell(record, ("dsnaction",)).lower() in ("delayed", "relayed", "delivered", "expanded"):
            return None
        status = _STATUS.match(self._cell(record, ("dsnstatus",)))
        reply = diagnostic.removeprefix("smtp;").strip()
        if status and not reply[:1].isdigit():
            reply = f"{status[0]} {reply}"
        means = self._classify(0, reply)
        category = self._cell(record, ("bouncecat",)).lower()
        if means.category == "other" and category in CATEGORIES:  # whoever wrote the file knew more than it says
            return "hard" if category in HARD_CATEGORIES and not (status and status[0].startswith("4")) else "soft"
        return "hard" if means.hard else "soft"


def _unquoted(cell: str) -> str:
    """Without the apostrophe that our own export puts before what a spreadsheet would run."""
    return cell[1:] if _QUOTED_FORMULA.match(cell) else cell


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
