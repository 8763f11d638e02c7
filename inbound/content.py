"""A received message as octets, before anybody reads it: what is refused, and what its own header says of its envelope. Pure.

By lengths and linear patterns only: everything here runs while the sender waits, in the loop that serves all others.
"""

import re
from typing import Final

MAX_LINE_OCTETS: Final = 16384  # RFC 5321 §4.5.3.1.6 asks for 1000, but reports return messages whose senders knew no limit
MAX_RECEIVED_HEADERS: Final = 100  # RFC 5321 §6.3
MAX_HEADER_BYTES: Final = 256 * 1024

ADDRESS = re.compile(
    r"([A-Za-z0-9!#$&'*+/=?^_`{|}~.-]{1,64})@([A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+)"
)  # no quotes, no %-hack, no routes
_RETURN_PATH = re.compile(rb"^return-path[ \t]*:[ \t]*<?([^<>\s\x00-\x1f\x7f]{0,254})>?", re.IGNORECASE | re.MULTILINE)
_FROM = re.compile(rb"^from[ \t]*:((?:[^\n]*\n[ \t])*[^\n]*)", re.IGNORECASE | re.MULTILINE)


def refusal(content: bytes) -> str:
    """The reply for content that breaks RFC 5321 §2.3.8 or has endless lines; "" for content that is fine.

    `content` begins and ends with CRLF.
    Bare CR, bare LF and NUL are how one message becomes two somewhere behind us (S1).
    """
    lines = content.count(b"\r\n")
    if content.count(b"\n") != lines or content.count(b"\r") != lines:
        return "550 5.6.0 Bare CR or LF in the message"
    if b"\0" in content:
        return "550 5.6.0 NUL in the message"
    start = 2
    while start < len(content):  # jumps as far as a line may reach, so the number of lines does not matter
        end = content.rfind(b"\r\n", start, start + MAX_LINE_OCTETS)
        if end < 0:
            return f"550 5.6.0 Line longer than {MAX_LINE_OCTETS - 2} octets"
        start = end + 2
    header = content[: content.find(b"\r\n\r\n", 2) + 1 or len(content)][: 1 << 20]
    if header.lower().count(b"\r\nreceived:") > MAX_RECEIVED_HEADERS:
        return "554 5.4.6 Mail loop: too many Received headers"
    return ""


def header_of(content: bytes) -> bytes:
    """The header block, without the empty line, cut at 256 KiB."""
    return content[: content.find(b"\r\n\r\n") + 2 or len(content)][:MAX_HEADER_BYTES]


def sender_of(content: bytes) -> str:
    """The envelope sender of a mail that was delivered already: its Return-Path; where there is none, the From address."""
    header = header_of(content)
    path = _RETURN_PATH.search(header)
    if path is not None:
        return path[1].decode("latin-1")
    field = _FROM.search(header)
    address = ADDRESS.search(field[1][:8192].decode("latin-1")) if field else None
    return address[0] if address else ""


def with_crlf(message: bytes) -> bytes:
    """A message with the line ends of the wire, without the `From ` line that some programs put in front of it."""
    if message.startswith(b"From "):
        message = message.partition(b"\n")[2]
    message = message.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return message if message.endswith(b"\r\n") or not message else message + b"\r\n"
