"""Who a message says it is from, and whom it goes to: MAIL FROM, From, Reply-To, List-ID, and addresses as octets.

The rules of requirements 17-22 for the return path and the From header, RFC 5321 §4.1.2 and RFC 6531 for addresses,
RFC 5890 for their domains, RFC 2919 for List-ID.
"""

import re
from typing import Final

import idna

from domain.campaign import CampaignContent
from domain.egress import DeliveryServer
from domain.errors import Invalid

MAX_LOCAL_PART_OCTETS: Final = 64  # RFC 5321 §4.5.3.1.1
MAX_ADDRESS_OCTETS: Final = 254  # RFC 5321 §4.5.3.1.3, without the angle brackets
ATOMS: Final = re.compile(r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~\u0080-\U0010ffff]+(?:\.[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~\u0080-\U0010ffff]+)*")
QUOTED: Final = re.compile(r'"(?:[ !#-\[\]-~\u0080-\U0010ffff]|\\[ -~])*"')
BAD: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
LABELS: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?)*")

_domains: dict[str, bytes] = {}


def domain_octets(field: str, domain: str) -> bytes:
    """The domain as it travels: ASCII, internationalised labels as A-labels (UTS 46). Raises Invalid naming `field`."""
    known = _domains.get(domain)
    if known is not None:
        return known
    if len(domain) > 253:
        raise Invalid(field, "the domain is longer than 253 characters")
    try:
        if domain.isascii() and "xn--" not in domain.lower():
            octets = domain.encode("ascii")
        else:
            octets = idna.encode(domain, uts46=True)
    except (idna.IDNAError, UnicodeError, ValueError) as error:
        raise Invalid(field, f"the domain is no valid internationalised name: {error}", domain) from None
    if not LABELS.fullmatch(octets.decode("ascii")) or len(octets) > 253:
        raise Invalid(field, "the part behind the @ is no domain name", domain)
    if len(_domains) >= 65536:
        _domains.clear()
    _domains[domain] = octets
    return octets


def address_octets(field: str, address: str) -> tuple[bytes, bool]:
    """An address as it travels in MAIL, RCPT and header, and whether it needs SMTPUTF8 (a local part beyond ASCII).

    Raises Invalid naming `field`. Case is kept; a quoted local part stays quoted.
    """
    local, at, domain = address.rpartition("@")
    if not at or not local or not domain:
        raise Invalid(field, "it is no address of the form name@domain", address)
    if BAD.search(local) or not (ATOMS.fullmatch(local) or QUOTED.fullmatch(local)):
        raise Invalid(field, "the part before the @ holds a character that is not allowed there", address)
    try:
        octets = local.encode("utf-8")
    except UnicodeEncodeError:
        raise Invalid(field, "it holds half of a surrogate pair", address) from None
    if len(octets) > MAX_LOCAL_PART_OCTETS:
        raise Invalid(field, f"the part before the @ is longer than {MAX_LOCAL_PART_OCTETS} octets", address)
    whole = octets + b"@" + domain_octets(field, domain)
    if len(whole) > MAX_ADDRESS_OCTETS:
        raise Invalid(field, f"it is longer than {MAX_ADDRESS_OCTETS} octets", address)
    return whole, not local.isascii()


def from_address(content: CampaignContent, server: DeliveryServer) -> tuple[str, str]:
    """The field the From address comes from, and the address (requirements 20, 22). The list's also where the campaign names none."""
    if server.enforced_from:
        return "enforced_from", server.enforced_from
    if content.list_sender_email and (server.use_list_sender_as_from or not content.from_email):
        return "list.sender_email", content.list_sender_email
    return "from_email", content.from_email


def from_name(content: CampaignContent, server: DeliveryServer) -> str:
    """The display name beside it: the list sender's own where his address is used and he has one."""
    from_list = from_address(content, server)[0] == "list.sender_email"
    if from_list and content.list_sender_name and (server.use_list_sender_as_from or not content.from_name):
        return content.list_sender_name
    return content.from_name


def mail_from(content: CampaignContent, server: DeliveryServer, *fallbacks: str) -> tuple[str, str]:
    """The return path: ("domain", MFROM domain) for signed addresses below it, else ("address", address) (18, 19, 21, 32, 67).

    The order: the list sender where the server asks for it, the server's MFROM address, its MFROM domain, the first of the `fallbacks`
    (domains of the whole system) that is not empty, the From address.
    """
    if server.use_list_sender_as_mfrom and content.list_sender_email:
        return "address", content.list_sender_email
    if "@" in server.mfrom:
        return "address", server.mfrom
    if server.mfrom:
        return "domain", server.mfrom
    for domain in fallbacks:
        if domain:
            return "domain", domain
    return "address", from_address(content, server)[1]


def list_id(content: CampaignContent, domain: bytes) -> bytes:
    """The List-ID value in angle brackets: the list's own name below `domain`, the same as long as the list lives."""
    return b"<list-%d.user-%d.%b>" % (content.list_id, content.user_id, domain)
