"""DKIM keys: their states, which of them sign for a domain, and the DNS record that receivers look for (RFC 6376 §3.6.1, 8463 §4).

    waiting ──▶ active ──▶ retiring
       └──────────────────────▲

A `waiting` key has been made and its record can be published; nothing is signed with it yet. One key per domain and algorithm
is `active`: it signs. A `retiring` key signs no more, but its record must stay published until the mail it signed is delivered.
"""

import base64
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Final, Literal

import msgspec

from domain.errors import Invalid

Algorithm = Literal["rsa-sha256", "ed25519-sha256"]
State = Literal["waiting", "active", "retiring"]

RSA: Final = "rsa-sha256"
ED25519: Final = "ed25519-sha256"
WAITING: Final = "waiting"
ACTIVE: Final = "active"
RETIRING: Final = "retiring"

MIN_RSA_BITS: Final = 1024  # RFC 8301 §3.2: verifiers must not take less
ADVISED_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 4096  # and need not take more
MAX_STRING: Final = 255  # of one character-string of a TXT record
MAX_NAME: Final = 253

_selector = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*").fullmatch


class DkimKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key pair of one domain. `public_key`: DER SubjectPublicKeyInfo (RSA) or the 32 octets (Ed25519), as the record says it."""

    id: int
    user_id: int
    domain: str  # A-labels, lower case
    selector: str
    algorithm: Algorithm
    bits: int
    public_key: bytes
    private_key_sealed: bytes  # PKCS #8, sealed with the row id (S11)
    state: State
    created_at: datetime
    activated_at: datetime | None
    retired_at: datetime | None

    @property
    def record_name(self) -> str:
        """Where its public half is looked for."""
        return f"{self.selector}._domainkey.{self.domain}"

    @property
    def record(self) -> str:
        """The text of its TXT record."""
        kind = "rsa" if self.algorithm == RSA else "ed25519"
        return f"v=DKIM1; k={kind}; p={base64.b64encode(self.public_key).decode()}"

    @property
    def zone_line(self) -> str:
        """The record as a line of a zone file; a long text is cut into strings that receivers join again."""
        text = self.record
        strings = " ".join(f'"{text[at : at + MAX_STRING]}"' for at in range(0, len(text), MAX_STRING))
        return f"{self.record_name}. IN TXT ({strings})" if len(text) > MAX_STRING else f"{self.record_name}. IN TXT {strings}"


def seal_context(key_id: int) -> bytes:
    """What a private key is sealed with, besides the secret of the installation (S11)."""
    return b"dkim_keys:%d" % key_id


def check_selector(selector: str, domain: str) -> str:
    """The selector in lower case. Raises Invalid."""
    selector = selector.lower()
    if not _selector(selector):
        raise Invalid("selector", "must be letters, digits and hyphens, as in a host name, at most 63 between two dots", selector)
    if len(f"{selector}._domainkey.{domain}") > MAX_NAME:
        raise Invalid("selector", f"makes the name of the DNS record longer than {MAX_NAME} characters", selector)
    return selector


def signing_domains(from_domain: str, mfrom_domain: str) -> list[str]:
    """Whose keys may sign, best first: the From domain and those above it (aligned, RFC 7489 §3.1.1), then the MFROM domain likewise.

    The top label alone is never one.
    """
    found: dict[str, None] = {}
    for domain in (from_domain, mfrom_domain):
        labels = domain.lower().split(".")
        for at in range(len(labels) - 1):
            found.setdefault(".".join(labels[at:]))
    return list(found)


def choose(keys: Iterable[DkimKey], domains: list[str]) -> list[DkimKey]:
    """The active keys of the first of `domains` that has any: RSA first, then Ed25519, which fewer receivers know (RFC 8463 §3)."""
    by_domain: dict[str, list[DkimKey]] = {}
    for key in keys:
        if key.state == ACTIVE:
            by_domain.setdefault(key.domain, []).append(key)
    for domain in domains:
        if domain in by_domain:
            return sorted(by_domain[domain], key=lambda key: (key.algorithm != RSA, key.id))
    return []
