"""Reads a received message within bounds: header fields, parts, decoded text; nothing a sender writes costs more than its size.

Our own reader, not the standard library's: a report needs a few headers and one or two of its parts, and building every part as
objects costs ten times what the classification does. Lenient as the library's compat32 policy: broken structure is read as far as it
goes, never an exception. What the limits of S17 cut off is named in `Reader.exceeded`.
"""

import binascii
import re
from collections.abc import Iterator
from typing import Final

MAX_BYTES: Final = 10 * 1024 * 1024
MAX_HEADER_LINES: Final = 1000
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_DEPTH: Final = 20
MAX_PARTS: Final = 200
MAX_BOUNDARY: Final = 256  # RFC 2046 §5.1.1 says 70; longer ones are seen, regular expressions are not made of them
MAX_TEXT_BYTES: Final = 96 * 1024  # of one part, encoded; what a report says stands in its first screen

# Entities whose body is a message or its header
ENTERED: Final = (
    b"message/rfc822",
    b"message/global",
    b"message/news",
    b"text/rfc822-headers",
    b"text/rfc822-header",
    b"message/global-headers",
)

# Only text charsets: Python also knows "codecs" that decompress, parse host names or open files (bad input 24)
_CHARSETS: Final = {
    name: codec
    for codec, names in (
        ("utf-8", "utf-8 utf8 us-ascii ascii ansi_x3.4-1968 unknown-8bit 7bit 8bit"),
        ("cp1252", "iso-8859-1 iso8859-1 iso_8859-1 latin1 latin-1 l1 windows-1252 cp1252 x-ansi"),
        ("cp1254", "iso-8859-9 windows-1254 latin5"),
        *((f"iso8859-{number}", f"iso-8859-{number} iso8859-{number}") for number in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)),
        *((f"cp{number}", f"windows-{number} cp{number} cp-{number}") for number in (1250, 1251, 1253, 1255, 1256, 1257, 1258)),
        *((f"cp{number}", f"ibm{number} cp{number}") for number in (437, 850, 866)),
        ("iso8859-8", "iso-8859-8-i"),
        ("koi8-r", "koi8-r koi8r koi8"),
        ("koi8-u", "koi8-u"),
        ("tis-620", "tis-620 windows-874"),
        ("iso2022_jp_ext", "iso-2022-jp iso2022-jp iso-2022-jp-ms csiso2022jp"),
        ("cp932", "shift_jis shift-jis sjis x-sjis windows-31j cp932 ms_kanji"),
        ("euc_jp", "euc-jp eucjp x-euc-jp"),
        ("gb18030", "gb2312 gb_2312-80 gbk gb18030 cp936 x-gbk euc-cn"),
        ("hz", "hz-gb-2312"),
        ("big5hkscs", "big5 big5-hkscs cp950"),
        ("cp949", "euc-kr ks_c_5601-1987 ksc5601 cp949 uhc"),
        ("iso2022_kr", "iso-2022-kr"),
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16le"),
        ("utf-16-be", "utf-16be"),
    )
    for name in names.split()
}

_FIELD = re.compile(rb"^([!-9;-~]{1,100})[ \t]*:[ \t]*(.*(?:\n[ \t].*)*)", re.MULTILINE)
_FIELDS = re.compile(rb"(?:>?From .*+\n)?+(?:[!-9;-~]++[ \t]*+:.*+(?:\n[ \t].*+)*+(?:\n|\Z))*+")  # as many field lines as stand at the top
_USUAL_FIELD = re.compile(rb"^(?:content-type|subject|from|to|date|message-id|mime-version|received):", re.MULTILINE | re.IGNORECASE)
_PARAMETER = re.compile(rb';\s*([\w*-]{1,40})\s*=\s*(?:"((?:[^"\\]|\\.)*)"?|([^\s;]+))')
_GUESSED_BOUNDARY = re.compile(rb"^--([^\n]{1,200}?)[ \t]*\nContent-[^\n:]{1,40}:", re.MULTILINE | re.IGNORECASE)
_WORD = re.compile(r"=\?([\w.:+-]{1,40})(?:\*[\w-]{0,20})?\?([bqBQ])\?([^?\s]{0,2000})\?=(?:\s+(?==\?))?")
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/=\s]")
_TAG_END = re.compile(r"<(?:br|/p|/div|/tr|/li|/h\d|/table|/td|p|div|li|tr)\b[^<>]{0,2000}>", re.IGNORECASE)
_UNSHOWN_START = re.compile(r"<(style|script|head|title)\b", re.IGNORECASE)
_TAG = re.compile(r"<[/!]?[a-zA-Z][\w:-]{0,40}(?:\s[^<>]{0,4000})?/?>|<!--[^<>]{0,4000}-->")  # and not `<user@example.com>`
_ENTITIES: Final = {"&nbsp;": " ", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&#64;": "@", "&#43;": "+", "&amp;": "&"}


class Part:
    """One entity: its header fields and where its body lies in the message. `media` is lower case, `text/plain` where none is given."""

    __slots__ = ("_fields", "depth", "end", "headers", "media", "start", "type_line")

    def __init__(self, fields: list[tuple[bytes, bytes]], start: int, end: int, depth: int) -> None:
        self._fields = fields
        self.start = start
        self.end = end
        self.depth = depth
        self.headers = {name.lower(): value for name, value in reversed(fields)}  # the first of each name
        self.type_line = self.headers.get(b"content-type", b"")
        self.media = self.type_line.split(b";", 1)[0].strip().lower()
        if b"/" not in self.media:
            self.media = b"text/plain"

    def all(self, name: bytes) -> list[bytes]:
        """Every value of a field, in order; `name` in lower case."""
        return [value for field, value in self._fields if field.lower() == name]

    def names(self) -> set[bytes]:
        """The names of all fields, lower case."""
        return set(self.headers)

    def parameter(self, name: bytes) -> bytes:
        """A parameter of Content-Type, or empty."""
        for found in _PARAMETER.finditer(self.type_line[:4096]):
            if found[1].lower().split(b"*", 1)[0] == name:
                return found[2] if found[2] is not None else found[3]
        return b""

    def header(self, name: bytes) -> str:
        """The first field of that name as text, unfolded, encoded words decoded; empty where it is missing."""
        value = self.headers.get(name)
        return decoded_words(value) if value else ""


class Reader:
    """Reads one message. `exceeded` names the first limit it went over, or is empty."""

    def __init__(self, message: bytes) -> None:
        self.exceeded = ""
        if len(message) > MAX_BYTES:
            self.exceeded = "size"
            message = message[:MAX_BYTES]
        self.data = message.replace(b"\r\n", b"\n") if b"\r\n" in message else message
        self._parts = 1
        self.root = self._entity(0, len(self.data), 0)

    def _entity(self, start: int, end: int, depth: int) -> Part:
        data = self.data
        if data.startswith((b"From ", b">From "), start):  # an mbox line in front
            start = min(end, data.find(b"\n", start, end) + 1 or end)
        if data.startswith(b"\n", start) and start < end:
            return Part([], start + 1, end, depth)
        blank = data.find(b"\n\n", start, end)
        body = end if blank < 0 else blank + 2
        head = data[start : end if blank < 0 else blank]
        if len(head) > MAX_HEADER_BYTES or head.count(b"\n") >= MAX_HEADER_LINES:
            head = self._cut_head(head)
        else:
            fields = _FIELDS.match(head)
            odd = fields.end() if fields else 0
            if odd < len(head) and not _USUAL_FIELD.search(head, odd):  # the blank line is missing
                body = start + odd
                head = head[:odd]
        return Part(_FIELD.findall(head), body, end, depth)

    def _cut_head(self, head: bytes) -> bytes:
        self.exceeded = self.exceeded or "header"
        lines = head[: 8 * MAX_HEADER_BYTES].split(b"\n", MAX_HEADER_LINES)[:MAX_HEADER_LINES]
        return b"\n".join(line[:998] for line in lines)  # RFC 5322 §2.1.1

    def body(self, part: Part) -> bytes:
        """The body as it stands, still encoded."""
        return self.data[part.start : part.end]

    def children(self, part: Part) -> list[Part]:
        """The entities right below: those of a multipart, or the one message inside a message/rfc822. Empty for anything else."""
        if part.media.startswith(b"multipart/"):
            return self._split(part)
        if part.media in ENTERED:
            return self._below(part, part.start, part.end)
        return []

    def _below(self, part: Part, start: int, end: int) -> list[Part]:
        if part.depth >= MAX_DEPTH:
            self.exceeded = self.exceeded or "depth"
            return []
        if self._parts >= MAX_PARTS:
            self.exceeded = self.exceeded or "parts"
            return []
        self._parts += 1
        return [self._entity(start, end, part.depth + 1)]

    def _split(self, part: Part) -> list[Part]:
        data = self.data
        boundary = part.parameter(b"boundary").rstrip()
        if len(boundary) > MAX_BOUNDARY:
            self.exceeded = self.exceeded or "boundary"
            return []
        if not boundary or data.find(b"--" + boundary, part.start, part.end) < 0:
            guess = _GUESSED_BOUNDARY.search(data, part.start, min(part.end, part.start + MAX_HEADER_BYTES))
            if guess is None:
                return []
            boundary = guess[1]
        mark = b"\n--" + boundary
        found: list[Part] = []
        opened = -1
        at = part.start - 1 if part.start and data.startswith(mark, part.start - 1) else data.find(mark, part.start, part.end)
        if at < 0 and data.startswith(mark[1:], part.start):
            at = part.start - 1
        while at >= 0:
            after = at + len(mark)
            closing = data.startswith(b"--", after)
            line_end = data.find(b"\n", after, part.end)
            if closing or line_end < 0 or not data[after:line_end].strip():  # else: only the beginning of a longer boundary
                if opened >= 0:
                    below = self._below(part, opened, max(opened, at))
                    if not below:
                        return found
                    found += below
                opened = -1 if closing or line_end < 0 else line_end + 1
                if closing:
                    break
            at = data.find(mark, after, part.end)
        if opened >= 0:
            found += self._below(part, opened, part.end)
        return found

    def walk(self, part: Part | None = None) -> Iterator[Part]:
        """The entity and all below it, in order; a message/rfc822 is named but not entered."""
        part = part or self.root
        yield part
        if part.media.startswith(b"multipart/"):
            for child in self.children(part):
                yield from self.walk(child)

    def content(self, part: Part, limit: int = MAX_TEXT_BYTES) -> bytes:
        """The body, transfer encoding taken off. At most `limit` bytes of the encoded body are read."""
        raw = self.data[part.start : min(part.end, part.start + limit)]
        encoding = part.headers.get(b"content-transfer-encoding", b"").strip().lower()
        if encoding == b"base64":
            return from_base64(raw)
        if encoding == b"quoted-printable":
            return binascii.a2b_qp(raw)
        return raw

    def text(self, part: Part, limit: int = MAX_TEXT_BYTES) -> str:
        """The body as text; HTML without its tags."""
        charset = part.parameter(b"charset") if b"harset" in part.type_line or b"HARSET" in part.type_line else b""
        text = decode(self.content(part, limit), charset)
        return without_tags(text) if part.media == b"text/html" else text


def from_base64(raw: bytes) -> bytes:
    """Decode as much as is base64; what is not is left out."""
    if b"-" in raw or b"<" in raw or b":" in raw:
        raw = _NOT_BASE64.sub(b"", raw)
    try:
        return binascii.a2b_base64(raw)
    except binascii.Error:
        clean = re.sub(rb"[^A-Za-z0-9+/]", b"", raw)
        return binascii.a2b_base64(clean[: len(clean) // 4 * 4])


def decode(raw: bytes, charset: bytes) -> str:
    """Bytes to text: by the charset where it is a known one of text, else UTF-8, else what the bytes look like. Never raises."""
    if not charset and b"\x1b$" in raw:
        charset = b"iso-2022-jp"
    codec = _CHARSETS.get(charset.strip(b" \"'").lower().decode("latin-1"), "utf-8")
    try:
        return raw.decode(codec)
    except (UnicodeDecodeError, ValueError):
        if codec == "utf-8":
            return raw.decode("cp1252", "replace")
        return raw.decode(codec, "replace")


def decoded_words(value: bytes) -> str:
    """A header field's value as text: unfolded, encoded words (RFC 2047) decoded, raw 8-bit read as UTF-8 or Latin-1."""
    text = decode(value[:MAX_HEADER_BYTES], b"")
    if "\n" in text:
        text = " ".join(text.split())
    return _WORD.sub(_word, text).strip() if "=?" in text else text.strip()


def _word(found: re.Match[str]) -> str:
    coded = found[3].encode("utf-8", "replace")
    raw = from_base64(coded) if found[2] in "bB" else binascii.a2b_qp(coded, header=True)
    return decode(raw, found[1].encode("ascii", "replace"))


def without_tags(html: str) -> str:
    """The text of an HTML page, a line for each block."""
    shown = []
    at = 0
    while opening := _UNSHOWN_START.search(html, at):  # not one expression: its backtracking would be quadratic in the openings
        shown.append(html[at : opening.start()])
        end = html.find(f"</{opening[1]}", opening.end())
        at = html.find(">", end if end >= 0 else opening.end()) + 1
        if not at:
            break
    else:
        shown.append(html[at:])
    text = _TAG.sub("", _TAG_END.sub("\n", "".join(shown).replace("\n", " ")))
    for entity, plain in _ENTITIES.items():
        text = text.replace(entity, plain)
    return text
