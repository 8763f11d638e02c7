"""Forwarding of mail that people send to our domains: who gets it, under which envelope sender, and when it is left alone. Pure.

Addresses of duty (RFC 2142) go to `forward_to` and complaints to `abuse_to`; then alias rules `pattern:target`, first match wins. The
envelope sender is rewritten (SRS0) so that SPF holds for the next hop and what comes back is known to be ours.
"""

import base64
import hashlib
import hmac
import re
from typing import Final, NamedTuple

import msgspec

from domain import address
from domain.errors import Invalid

MAX_ALIASES: Final = 1000
MAX_WILDCARDS: Final = 3  # in one pattern
ROLES: Final = frozenset({"abuse", "postmaster", "root"})
MAX_RECEIVED: Final = 30  # a mail that went through more is in a loop
MAX_LINE_OCTETS: Final = 998  # RFC 5321 §4.5.3.1.6: we take longer ones and send none
MARKER: Final = "X-Sluice-Forwarded"
SRS_DAYS: Final = 21

_SRS: Final = "srs0="
_HASH_CHARACTERS: Final = 8  # of base32: 40 bits, over an address whose mail nobody acts upon
_MAX_LOCAL_OCTETS: Final = 64  # RFC 5321 §4.5.3.1.1
_ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_PATTERN = re.compile(r"\*|[^\s@:]{1,64}@[^\s@:]{1,253}")
_AUTOMATIC = re.compile(
    rb"^(?:auto-submitted:(?![ \t]*no\b)|precedence:[ \t]*(?:bulk|junk|list|auto[_-]reply)"
    rb"|x-auto-response-suppress:|list-id:|x-autoreply:)",
    re.IGNORECASE | re.MULTILINE,
)
_RECEIVED = re.compile(rb"^received:", re.IGNORECASE | re.MULTILINE)
_MARKED = re.compile(rb"^" + MARKER.lower().encode() + rb":[ \t]*([0-9a-f]{8})", re.IGNORECASE | re.MULTILINE)


class Alias(NamedTuple):
    """One rule: mail to an address that `pattern` matches goes to `target`."""

    pattern: str
    target: str

    def matches(self, recipient: str) -> bool:
        """Whether it is for `recipient`, which is in lower case."""
        return re.fullmatch(".*".join(map(re.escape, self.pattern.split("*"))), recipient) is not None


def parse_aliases(text: str) -> tuple[Alias, ...]:
    """Rules `pattern:target`, one per line; empty lines and lines that begin with # do not count. Raises Invalid with the line."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        pattern, colon, target = (part.strip() for part in line.rpartition(":"))
        if not colon:
            raise Invalid("aliases", f"line {number}: write pattern:target, such as reply@example.com:support@example.org", line)
        if not _PATTERN.fullmatch(pattern) or pattern.count("*") > MAX_WILDCARDS:
            reason = f"line {number}: the pattern must be an address, in which at most {MAX_WILDCARDS} * stand for anything, or * alone"
            raise Invalid("aliases", reason, pattern)
        try:
            found.append(Alias(pattern.lower(), address.parse(target).wire))
        except Invalid as error:
            raise Invalid("aliases", f"line {number}: the target {error.reason}", target) from None
    if len(found) > MAX_ALIASES:
        raise Invalid("aliases", f"at most {MAX_ALIASES} rules are allowed, not {len(found)}")
    return tuple(found)


class Routes(msgspec.Struct, frozen=True):
    """Who gets what. `complaints` are local parts that receive complaints, besides `abuse`; "" for a target: nobody."""

    aliases: tuple[Alias, ...] = ()
    forward_to: str = ""
    abuse_to: str = ""
    complaints: frozenset[str] = frozenset()

    def target(self, recipient: str) -> tuple[str, bool]:
        """(the address that gets mail for `recipient`, whether it is an address of duty); ("", …): nobody does."""
        recipient = recipient.lower()
        local = recipient.rpartition("@")[0]
        if local == "abuse" or local in self.complaints:
            duty = self.abuse_to or self.forward_to
        else:
            duty = self.forward_to if local in ROLES else ""
        if duty:
            return duty, True
        return next((alias.target for alias in self.aliases if alias.matches(recipient)), ""), False


def why_not(content: bytes, mail_from: str, *, duty: bool, installation: str) -> str:
    """Why a mail is not forwarded, "" when it is. `installation` is what marks mail that we forwarded before.

    Automatic mail stays here, or two robots talk for ever; addresses of duty get it, because reports of machines are sent there.
    """
    header = content[: content.find(b"\r\n\r\n") + 2 or len(content)][: 1 << 20]
    if any(mark[1].decode() == installation for mark in _MARKED.finditer(header)):
        return "it was forwarded here before"
    if len(_RECEIVED.findall(header)) > MAX_RECEIVED:
        return f"it has more than {MAX_RECEIVED} Received fields"
    if not duty and (not mail_from or _AUTOMATIC.search(header)):
        return "it is automatic mail"
    return ""


def unsendable(content: bytes) -> str:
    """Why a mail cannot go out as it is, "" when it can: our listener and mailboxes take what no server may be sent (S1)."""
    lines = content.count(b"\r\n")
    if content.count(b"\r") != lines or content.count(b"\n") != lines or b"\0" in content:
        return "it holds a bare CR, a bare LF or NUL"
    if _has_longer_lines(content, MAX_LINE_OCTETS):
        return f"it has lines of more than {MAX_LINE_OCTETS} octets"
    return ""


def _has_longer_lines(content: bytes, octets: int) -> bool:
    """Whether a line of `content`, without its CRLF, has more than `octets`."""
    start = 0
    while start < len(content):  # jumps as far as a line may reach, so the number of lines does not matter
        end = content.rfind(b"\r\n", start, start + octets + 2)
        if end < 0:
            return len(content) - start > octets
        start = end + 2
    return False


def rewritten(key: bytes, sender: str, domain: str, day: int) -> str:
    """The envelope sender below `domain`, one of ours: SRS0=hash=day=host=local@domain. `day` counts from 1970-01-01 UTC.

    The null sender stays; one that does not fit in 64 octets becomes it.
    """
    local, at, host = sender.rpartition("@")
    if not at:
        return ""
    stamp = _ALPHABET[day >> 5 & 31] + _ALPHABET[day & 31]
    made = f"SRS0={_hash(key, stamp, host, local)}={stamp}={host}={local}"
    return f"{made}@{domain}" if len(made) <= _MAX_LOCAL_OCTETS and made.isascii() else ""


def read_rewritten(key: bytes, recipient: str, day: int) -> str | None:
    """The sender that an address of ours was made from, in any case; None when `key` did not make it or it is older than 21 days."""
    local = recipient.rpartition("@")[0]
    parts = local.split("=", 4)
    if not local.lower().startswith(_SRS) or len(parts) != 5:
        return None
    _, given, stamp, host, sender = parts
    if not hmac.compare_digest(given.upper().encode(), _hash(key, stamp, host, sender).encode()):
        return None
    stamp = stamp.upper()
    then = _ALPHABET.find(stamp[:1]) << 5 | _ALPHABET.find(stamp[1:2])
    return f"{sender}@{host}" if (day - then) % 1024 <= SRS_DAYS or (then - day) % 1024 == 1 else None


def _hash(key: bytes, stamp: str, host: str, local: str) -> str:
    text = "\0".join((stamp, host, local)).lower().encode()
    return base64.b32encode(hmac.digest(key, text, hashlib.sha256)).decode()[:_HASH_CHARACTERS]
