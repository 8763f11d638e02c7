"""The slow, obvious twin of the reply parser in ext/smtp_protocol: the whole input at once, split and read line by line.

RFC 5321 §4.2.1: `ddd-text` lines ended by one `ddd text` (or bare `ddd`) line, every line ended by CRLF.
"""

from typing import NamedTuple

MAX_REPLY_BYTES = 65536
MAX_REPLY_LINES = 100
MAX_TEXT_BYTES = 2048


class Reply(NamedTuple):
    """A whole reply; `text` is its lines without code, joined by LF, cut at 2 KiB."""

    code: int
    text: bytes


class Broken(NamedTuple):
    """The input breaks the rules here; nothing after it counts."""


def read_replies(data: bytes) -> list[Reply | Broken]:
    """Every complete reply in `data`, in order; ends with Broken where a rule is broken."""
    replies: list[Reply | Broken] = []
    texts: list[bytes] = []
    code = b""
    size = 0
    *lines, rest = data.split(b"\n")
    for line in lines:
        if not line.endswith(b"\r"):
            return [*replies, Broken()]
        line = line[:-1]
        head, separator, text = line[:3], line[3:4], line[4:]
        if len(head) < 3 or any(byte not in b"0123456789" for byte in head) or separator not in (b"", b" ", b"-"):
            return [*replies, Broken()]
        if not 200 <= int(head) <= 599 or (texts and head != code):
            return [*replies, Broken()]
        code = head
        size += len(line) + 2
        texts.append(text)
        if len(texts) > MAX_REPLY_LINES or size >= MAX_REPLY_BYTES:
            return [*replies, Broken()]
        if separator != b"-":
            replies.append(Reply(int(code), b"\n".join(texts)[:MAX_TEXT_BYTES]))
            texts, size = [], 0
    if size + len(rest) >= MAX_REPLY_BYTES:
        replies.append(Broken())
    return replies
