"""What a sender domain says in the DNS, and what that is worth: SPF (RFC 7208), DMARC (RFC 7489, 9091), DKIM, MX. Pure; asks nobody."""

import re
from collections.abc import Sequence
from typing import Final

import msgspec

# Whose DMARC policies let nobody else send in their name (B1)
PUBLIC_DOMAINS: Final = frozenset((
    "gmail.com", "googlemail.com", "yahoo.com", "ymail.com", "aol.com", "outlook.com", "hotmail.com", "live.com", "msn.com", "icloud.com",
    "me.com", "mac.com", "gmx.de", "gmx.net", "gmx.com", "web.de", "mail.ru", "yandex.ru", "yandex.com", "proton.me", "protonmail.com",
))  # fmt: skip


class DomainFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found about one domain; None: it could not be looked up."""

    name: str
    exists: bool | None  # it, or a zone above it that is more than a top-level domain, has a SOA record (B5)
    mx: tuple[str, ...] | None  # "." is a null MX (RFC 7505)
    has_address: bool | None
    txt: tuple[str, ...] | None

    @property
    def takes_mail(self) -> bool | None:
        """Whether somebody could answer to it (RFC 5321 §5.1)."""
        if self.mx:
            return self.mx != (".",)
        return None if self.mx is None else self.has_address


class KeyFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One DKIM key that signs: where its record should be, what it should say, and what is there (None: not looked up)."""

    name: str
    domain: str
    bits: int
    expected: str
    found: tuple[str, ...] | None


class SenderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the DNS says about the sender of some mail. `hosts`: host -> whether it has an address."""

    sender: DomainFacts
    return_path: DomainFacts
    dmarc_name: str  # where a policy was found, or was looked for first
    dmarc: tuple[str, ...] | None
    keys: tuple[KeyFacts, ...]
    hosts: dict[str, bool | None]
    reply_to: DomainFacts | None = None  # where it is another than the sender's
    beside: tuple[KeyFacts, ...] = ()  # those that sign for the CFBL-Address alone (RFC 9477 §3.1.3)


def parents(domain: str) -> list[str]:
    """The domain and those above it, down to two labels."""
    labels = domain.split(".")
    return [".".join(labels[at:]) for at in range(max(1, len(labels) - 1))]


def spf_records(texts: Sequence[str]) -> list[str]:
    """The SPF records among TXT records (RFC 7208 §4.5)."""
    return [text for text in texts if text.lower() == "v=spf1" or text.lower().startswith("v=spf1 ")]


def spf_allows_all(record: str) -> bool:
    """Whether it lets anybody send: `+all` or `all`."""
    return bool(re.search(r"(?:^|\s)\+?all(?:\s|$)", record.lower()))


def dmarc_records(texts: Sequence[str]) -> list[str]:
    """The DMARC records among TXT records (RFC 7489 §6.6.3)."""
    return [text for text in texts if re.match(r"v\s*=\s*DMARC1\s*(?:;|$)", text)]


def dmarc_policy(record: str) -> str:
    """Its `p=`: none, quarantine or reject; "" where it has none that counts."""
    found = re.search(r";\s*p\s*=\s*(none|quarantine|reject)\s*(?:;|$)", record.lower())
    return found[1] if found else ""


def aligned(one: str, other: str, organisation: str) -> bool:
    """Relaxed alignment (RFC 7489 §3.1.1). `organisation`: the domain of the DMARC policy, which both may be below."""
    one, other, organisation = one.lower(), other.lower(), organisation.lower()

    def within(name: str, top: str) -> bool:
        return name == top or name.endswith("." + top)

    return within(one, other) or within(other, one) or (bool(organisation) and within(one, organisation) and within(other, organisation))


def same_key(expected: str, found: str) -> bool:
    """Whether two DKIM records publish the same key, however they are written."""

    def tags(text: str) -> dict[str, str]:
        pairs = (part.partition("=") for part in text.split(";"))
        return {name.strip(): re.sub(r"\s+", "", value) for name, _, value in pairs if name.strip()}

    ours, theirs = tags(expected), tags(found)
    return theirs.get("p") == ours.get("p") and theirs.get("k", "rsa") == ours.get("k", "rsa") and theirs.get("v", "DKIM1") == "DKIM1"
