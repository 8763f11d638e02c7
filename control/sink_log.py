"""Sink logs: what a receiver logged as accepted, read for `sluice audit --against`.

One JSON object a line with `message_id` and `recipient`; other fields are left alone. The built-in sink writes it (docs/sink.md), and
whatever an operator's own test receivers write can be brought into this form.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from domain.errors import Invalid

if TYPE_CHECKING:
    from collections.abc import Callable

    from store.acceptances import Accepted

BYTES_AT_ONCE: Final = 8 * 1024 * 1024


class _Line(msgspec.Struct, gc=False):
    message_id: str
    recipient: str


class SinkLogs:
    """Several logs as one stream of (recipient numbers, addresses), a few megabytes at a time."""

    def __init__(self, paths: Iterable[Path], number: "Callable[[str], int]") -> None:
        """`number`: the recipient's number of a Message-ID, 0 for mail that is not the campaign's."""
        self.other_mail = 0
        self._number = number
        self._parts = self._read([(path, path.open("rb")) for path in paths])

    def next(self) -> "Accepted":
        """The next part; empty lists at the end. Raises Invalid naming file and line, and OSError."""
        return next(self._parts, ([], []))

    def _read(self, files: list[tuple[Path, BinaryIO]]) -> "Iterator[Accepted]":
        for path, file in files:
            with file:
                line, rest = 1, b""
                while data := file.read(BYTES_AT_ONCE):
                    block, newline, rest = (rest + data).rpartition(b"\n")
                    if newline:
                        numbers, addresses = self._sorted(_decode(path, line, block))
                        line += block.count(b"\n") + 1
                        if numbers:
                            yield numbers, addresses
                # A receiver that was killed leaves half a line, and had not replied yet
                if rest.endswith(b"}"):
                    numbers, addresses = self._sorted(_decode(path, line, rest))
                    if numbers:
                        yield numbers, addresses

    def _sorted(self, lines: list[_Line]) -> "Accepted":
        """Ours and others'."""
        number_of = self._number
        numbers = [number_of(line.message_id) for line in lines]
        # PostgreSQL has no NUL in text; an address with one is nobody's
        addresses = [line.recipient.replace("\0", " ") for line in lines]
        others = numbers.count(0)
        if others:
            self.other_mail += others
            addresses = [address for number, address in zip(numbers, addresses, strict=True) if number]
            numbers = [number for number in numbers if number]
        return numbers, addresses


_line = msgspec.json.Decoder(_Line)


def _decode(path: Path, first: int, block: bytes) -> list[_Line]:
    try:
        return _line.decode_lines(block)
    except (msgspec.DecodeError, UnicodeDecodeError):
        for number, text in enumerate(block.split(b"\n"), first):
            try:
                if text.strip():
                    _line.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                reason = f"line {number} is no JSON object with message_id and recipient ({error}); give the log that a sink wrote"
                raise Invalid(str(path), reason) from None
        raise
