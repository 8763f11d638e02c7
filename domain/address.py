"""Address: what we take for an email address, and when two spellings are one. Pure; the same rules for imports and the API.

Stricter than RFC 5321 §4.1.2 on purpose: quoted local parts, address literals, comments and domains without a dot are
legal on paper and mistakes in every real list. Taken: letters beyond ASCII in the local part (SMTPUTF8, RFC 6531) and
international domains (UTS 46, non-transitional). Lengths are octets (RFC 5321 §4.5.3.1), the domain counted as A-labels.
"""

import functools
import re
import unicodedata

import idna
import msgspec

from domain.errors import Invalid

MAX_LOCAL_OCTETS = 64
MAX_DOMAIN_OCTETS = 253
MAX_OCTETS = 254

_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~-"
_ascii_local = re.compile(rf"[{_ATEXT}]+(?:\.[{_ATEXT}]+)*").fullmatch
_ascii_atom = re.compile(rf"[{_ATEXT}]*").fullmatch
_label = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?").fullmatch


class Address(msgspec.Struct, frozen=True, gc=False):
    """One address. `domain` is in lower case and may hold U-labels, `ascii_domain` is the same as A-labels."""

    local: str
    domain: str
    ascii_domain: str

    @property
    def text(self) -> str:
        """As people write it: the local part as given."""
        return f"{self.local}@{self.domain}"

    @property
    def wire(self) -> str:
        """As it goes into MAIL, RCPT and header fields: the domain as A-labels."""
        return f"{self.local}@{self.ascii_domain}"

    @property
    def smtputf8(self) -> bool:
        """Whether the server must offer SMTPUTF8 (RFC 6531) to take it."""
        return not self.local.isascii()

    @property
    def key(self) -> str:
        """What makes two spellings one address: no case, one Unicode form, A-labels."""
        local = self.local
        return f"{local.lower() if local.isascii() else unicodedata.normalize('NFC', local).lower()}@{self.ascii_domain}"


def parse(text: str, field: str = "email") -> Address:
    """Read one address. Raises Invalid(field, reason)."""
    local, at, domain = text.rpartition("@")
    if not at or len(local) > MAX_LOCAL_OCTETS or not _ascii_local(local):
        _check_local(text, local, at, field)
    try:
        lower, ascii_domain = _domain(domain)
    except ValueError as error:
        raise Invalid(field, str(error), text) from None
    if len(local) + len(ascii_domain) >= MAX_OCTETS or (not local.isascii() and _octets(local) + len(ascii_domain) >= MAX_OCTETS):
        raise Invalid(field, f"is longer than {MAX_OCTETS} octets", text)
    return Address(local, lower, ascii_domain)


def key(text: str, field: str = "email") -> str:
    """The key of an address given as text. Raises Invalid(field, reason)."""
    return parse(text, field).key


def parse_domain(text: str, field: str) -> str:
    """Read a domain with at least one dot and return it as A-labels in lower case. Raises Invalid(field, reason)."""
    if not text:
        raise Invalid(field, "is empty; write a domain such as example.com")
    if set(text) & set("@:/"):
        raise Invalid(field, "must be a domain alone, such as example.com, without @, scheme, port or path", text)
    try:
        return _domain(text)[1]
    except ValueError as error:
        raise Invalid(field, str(error), text) from None


def _octets(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _check_local(text: str, local: str, at: str, field: str) -> None:
    """Raises Invalid with the reason people understand; returns for a good local part with letters beyond ASCII."""
    if not text:
        raise Invalid(field, "is empty")
    if "\0" in text:
        raise Invalid(field, "contains a NUL character", text)
    if any(character.isspace() for character in text):
        raise Invalid(field, "contains a space or line break", text)
    if not at:
        raise Invalid(field, "has no @", text)
    if not local:
        raise Invalid(field, "has nothing before the @", text)
    if local.startswith('"'):
        raise Invalid(field, "has a quoted part before the @, which is not supported", text)
    if "@" in local:
        raise Invalid(field, "has more than one @", text)
    if "," in text or ";" in text:
        raise Invalid(field, "holds more than one address or a stray separator", text)
    if _octets(local) > MAX_LOCAL_OCTETS:
        raise Invalid(field, f"has more than {MAX_LOCAL_OCTETS} octets before the @", text)
    if ".." in local:
        raise Invalid(field, "has two dots in a row", text)
    if local.startswith(".") or local.endswith("."):
        raise Invalid(field, "has a dot at an end of the part before the @", text)
    for character in local:
        # C*: control, format (bidi and zero-width), surrogate, private use, unassigned; Z*: separators
        if not character.isascii() and unicodedata.category(character)[0] in "CZ":
            raise Invalid(field, f"contains the invisible character U+{ord(character):04X}", text)
        if character.isascii() and character != "." and not _ascii_atom(character):
            raise Invalid(field, f"contains {character!r} before the @", text)


@functools.lru_cache(maxsize=65536)
def _domain(domain: str) -> tuple[str, str]:
    """A domain as (lower case, A-labels). Raises ValueError with the reason. Cached: a list repeats its domains."""
    if not domain:
        raise ValueError("has no domain after the @")
    if any(character.isspace() for character in domain):
        raise ValueError("contains a space or line break")
    if domain.startswith("[") or domain.endswith("]"):
        raise ValueError("has an address literal instead of a domain")
    # before IDNA: its algorithms are not meant for megabytes
    if len(domain) > MAX_DOMAIN_OCTETS:
        raise ValueError(f"has a domain of more than {MAX_DOMAIN_OCTETS} characters")
    if domain.endswith("."):
        raise ValueError("ends in a dot")
    if ".." in domain:
        raise ValueError("has two dots in a row")
    if domain.isascii():
        lower = ascii_domain = domain.lower()
    else:
        try:
            lower = idna.uts46_remap(domain, std3_rules=True, transitional=False)
            ascii_domain = idna.encode(domain, uts46=True, std3_rules=True, transitional=False).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise ValueError("has a domain that is not a valid international domain name") from None
    labels = ascii_domain.split(".")
    if len(labels) < 2:
        raise ValueError("has a domain without a dot")
    if len(ascii_domain) > MAX_DOMAIN_OCTETS:
        raise ValueError(f"has a domain of more than {MAX_DOMAIN_OCTETS} octets")
    for label in labels:
        if not _label(label):
            raise ValueError(f"has {label[:64]!r} in its domain, which is not a domain label")
        if domain.isascii() and label.startswith("xn--"):
            try:
                idna.ulabel(label)
            except (idna.IDNAError, UnicodeError):
                raise ValueError(f"has {label!r} in its domain, which is not a valid international domain label") from None
    if labels[-1].isdigit():
        raise ValueError("has a domain that ends in a number")
    return lower, ascii_domain
