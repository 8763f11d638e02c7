"""Header fields that the operator asks for: X-Mailer, complaint addresses, Feedback-ID, CFBL, and custom headers by their rules.

Requirements 31, 45-47, 95-97 and 141; Feedback-ID as Gmail reads it (B9), CFBL-Address after RFC 9477 (B10). What would break a message
or pretend to be what only we may say is refused when it is saved.
"""

import re
from collections.abc import Sequence
from typing import Final

from compose import header_rules, liquid
from compose.tags import KINDS, Tags
from config.settings import Mail
from domain.campaign import CampaignContent
from domain.errors import Invalid
from domain.links import is_web_address
from ext import header

SENDER_DOMAIN: Final = "%sender_domain%"
MAX_NAME_CHARACTERS: Final = 60
MAX_CUSTOM: Final = 50  # of one campaign

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
# Said by us, by signers and relays, or once only (RFC 5322 §3.6)
_OURS: Final = frozenset((
    "date", "from", "sender", "to", "cc", "bcc", "reply-to", "subject", "message-id", "mime-version", "return-path", "received",
    "dkim-signature", "authentication-results", "domainkey-signature", "feedback-id", "x-fblid", "x-mailer", "x-complaints-to",
    "in-reply-to", "references", "delivered-to", "errors-to", "disposition-notification-to", "return-receipt-to",
))  # fmt: skip
_OUR_PREFIXES: Final = ("list-", "content-", "cfbl-", "arc-", "resent-", "received-")


def custom_name(name: str, field: str = "name") -> bytes:
    """The name of a custom header. Raises Invalid naming `field`."""
    if len(name) > MAX_NAME_CHARACTERS or not _NAME.fullmatch(name):
        raise Invalid(field, f"must be at most {MAX_NAME_CHARACTERS} letters, digits and hyphens, beginning with a letter", name)
    if name.lower() in _OURS or name.lower().startswith(_OUR_PREFIXES):
        raise Invalid(field, "this header is made by Sluice or on the way; choose another name, such as X-…", name)
    return name.encode("ascii")


def check_custom(name: str, value: str) -> None:
    """Raise Invalid for a custom header that no message could carry: `name` or, with line and column, `value`."""
    custom_name(name)
    constants = {kind: {"id": "", "name": ""} for kind in KINDS}
    compiled = liquid.compile_template("value", value, liquid.TEXT, {}, Tags(bytes(32), constants, "example.com").rewrite)
    for text in compiled.literals:
        try:
            header.check(text)
        except ValueError as error:
            raise Invalid("value", str(error)) from None


def check_from(field: str, address: str, forbidden: Sequence[str]) -> None:
    """Raise Invalid where a pattern (`*` stands for anything) forbids the From address (141)."""
    for pattern in forbidden:
        expression = ".*".join(map(re.escape, pattern.lower().split("*")))
        if re.fullmatch(expression, address.lower(), re.DOTALL):
            raise Invalid(field, f"this system sends nothing from {pattern}; use an address of a domain of your own", address)


def _address(field: str, text: str, sender_domain: bytes) -> bytes:
    octets, utf8 = header_rules.address_octets(field, text.replace(SENDER_DOMAIN, sender_domain.decode("ascii")))
    if utf8:
        raise Invalid(field, "must be ASCII before the @", text)
    return octets


def unsubscribe_to(mail: Mail, sender_domain: bytes) -> bytes | None:
    """The address that the mailto of List-Unsubscribe names (97); None: our own, at the MFROM domain of the delivery server.

    A URL only hears of unsubscribes: RFC 8058 wants one https address in the header, and that is ours.
    """
    if not mail.list_unsubscribe_to or is_web_address(mail.list_unsubscribe_to):
        return None
    return _address("mail.list_unsubscribe_to", mail.list_unsubscribe_to, sender_domain).replace(b"%", b"%25")


def feedback_id(sender_id: str, content: CampaignContent) -> bytes:
    """`campaign:user:class:SenderId`: each part means one thing wherever it occurs, the last one is the same for all mail (B9)."""
    return f"Feedback-ID: c{content.id}:u{content.user_id}:{content.mail_class}:{sender_id}\r\n".encode("ascii")


def system(mail: Mail, content: CampaignContent, sender_domain: bytes) -> bytes:
    """The fields that are the same in every message of a campaign."""
    lines = b""
    if mail.x_mailer:
        lines += header.unstructured(b"X-Mailer", mail.x_mailer)
    if mail.complaints_to:
        lines += header.mailbox(b"X-Complaints-To", "", _address("mail.complaints_to", mail.complaints_to, sender_domain))
    if mail.feedback_sender_id:
        lines += feedback_id(mail.feedback_sender_id, content)
    return lines


def cfbl(mail: Mail, sender_domain: bytes) -> tuple[bytes, str]:
    """The CFBL-Address field, empty for none, and the domain that must sign beside the From domain for it to be believed.

    Empty where the address is in the From domain or below it (RFC 9477 §3.1.1, §3.1.2); else its own, in lower case (§3.1.3).
    """
    if not mail.cfbl_address:
        return b"", ""
    address = _address("mail.cfbl_address", mail.cfbl_address, sender_domain)
    domain, sender = address.rpartition(b"@")[2].lower(), sender_domain.lower()
    beside = "" if domain == sender or domain.endswith(b"." + sender) else domain.decode("ascii")
    return b"CFBL-Address: " + address + b"; report=arf\r\n", beside
