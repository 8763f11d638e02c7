"""The slow, obvious twin of ext.journal_record: struct, csv and datetime instead of C."""

import csv
import io
import re
import struct
from datetime import UTC, datetime, timedelta

HEAD = struct.Struct("<cBhiiiiiqqq")
TAIL = struct.Struct("<qqqq")
FRAME = struct.Struct("<II")

TABLE = []
for _value in range(256):
    _crc = _value
    for _ in range(8):
        _crc = (_crc >> 1) ^ (0x82F63B78 if _crc & 1 else 0)
    TABLE.append(_crc)

BLANK = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    return FRAME.pack(len(payload), crc32c(payload)) + payload


def head(
    kind: str, campaign: int, batch: int, number: int, position: int, attempt: int, epoch: int, connection: int, server: int, at: int
) -> bytes:
    return HEAD.pack(kind.encode(), 0, attempt, batch, number, position, epoch, connection, campaign, server, at)


def pack_intent(*fields: int) -> bytes:
    return frame(head("i", *fields))


def cut(text: str, longest: int) -> bytes:
    raw = text.encode("utf-8", "replace")
    while len(raw) > longest or not is_utf8(raw):
        raw = raw[: min(longest, len(raw) - 1)]
    return raw


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def pack_outcome(kind: str, *fields: int | str) -> bytes:
    numbers, texts = fields[:13], fields[13:]
    body = head(kind, *numbers[:9]) + TAIL.pack(*numbers[9:])  # type: ignore[arg-type]
    for index, text in enumerate(texts):
        raw = cut(str(text), 512 if index == 3 else 1000)
        body += struct.pack("<H", len(raw)) + raw
    return frame(body)


def unpack(payload: bytes) -> tuple[int | str, ...]:
    kind, _, attempt, batch, number, position, epoch, connection, campaign, server, at = HEAD.unpack_from(payload)
    first = (kind.decode(), campaign, batch, number, position, attempt, epoch, connection, server, at)
    if kind in (b"i", b"w"):
        return first
    offset = HEAD.size + TAIL.size
    texts = []
    for _ in range(10):
        (size,) = struct.unpack_from("<H", payload, offset)
        texts.append(payload[offset + 2 : offset + 2 + size].decode())
        offset += 2 + size
    return (*first, *TAIL.unpack_from(payload, HEAD.size), *texts)


def copy_row(record: tuple[int | str, ...], kind: str) -> bytes:
    (
        _,
        campaign,
        batch,
        number,
        _,
        attempt,
        _,
        connection,
        server,
        at,
        _,
        _,
        _,
        size,
        recipient,
        _,
        status,
        diagnostic,
        category,
        mta,
        *_,
    ) = record

    def text(value: object) -> str:
        return str(value).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r").replace("\0", " ")

    when = (datetime(1970, 1, 1) + timedelta(microseconds=int(at))).strftime("%Y-%m-%d %H:%M:%S.%f+00")
    cells = [campaign, number, attempt, kind, when, batch, server, connection, max(-(2**31), min(int(size), 2**31 - 1))]
    return ("\t".join([*map(str, cells), *map(text, (status, category, diagnostic, mta, recipient))]) + "\n").encode()


def csv_line(record: tuple[int | str, ...], status_text: str) -> bytes:
    kind, campaign, *_ = record
    (at, queued_at, _, _, size, recipient, sender, status, diagnostic, category, mta, source, destination, esmtp, queue) = record[9:]
    shown = "b" if kind == "x" else str(kind)
    code = status or {"d": "2.0.0", "t": "4.0.0", "u": "4.0.0"}.get(shown, "5.0.0")

    def when(microseconds: int | str) -> str:
        if int(microseconds) <= 0:
            return ""
        return datetime.fromtimestamp(int(microseconds) // 1_000_000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S%z")

    def safe(value: object) -> str:
        text = str(value)
        return ("'" if text[:1] in tuple("=+-@\t\r") else "") + BLANK.sub(" ", text)

    vmta = str(queue).rpartition("/")[2] if "/" in str(queue) else ""
    cells = [
        shown, when(at), when(queued_at), safe(sender), safe(recipient), "",
        "relayed" if shown == "d" else "delayed" if shown in "tu" else "failed", safe(f"{code} ({status_text})"),
        BLANK.sub(" ", f"smtp;{diagnostic}") if diagnostic else "", safe(mta),
        "" if shown == "d" else "message-expired" if kind == "x" and not category else safe(category),
        "api", "", "smtp", safe(source), safe(destination), safe(esmtp),
        str(size) if shown == "d" else "", "" if vmta == "{default}" else safe(vmta), f"c{campaign}", "", safe(queue), "",
    ]  # fmt: skip
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode()
