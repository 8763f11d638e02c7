"""Raw messages: somebody else's header and body (RFC 5322), which go out as they are.

`take` checks one when it is handed in and removes what is meant for us alone; `RawMessage` is to it what `CompiledCampaign` is to a
campaign: only the envelope differs from recipient to recipient, with a signed return path each, and a DKIM signature is put in front.
A message that others wrote and we send on (`mail_from`, `sign`) has one envelope sender for all and no signature of ours.
"""

import re
import uuid
from email.utils import formatdate
from typing import Final, NamedTuple

from compose import header_rules, mail_headers
from compose.campaign import CompiledCampaign, Envelope, dot_stuffed
from compose.signing import DkimSigner
from config.keys import Keyring
from config.settings import Mail
from domain import return_path
from domain.campaign import CampaignContent, Recipient
from domain.egress import DeliveryServer
from domain.errors import Invalid
from domain.forwarding import unsendable
from ext.token import Signer

CONTROLS: Final = frozenset(("x-job", "x-virtual-mta", "x-mail-class"))  # instructions to us, as PowerMTA knows them, and their kin
MAX_FIELDS: Final = 200
MAX_HEADER_OCTETS: Final = 256 * 1024

_REMOVED: Final = CONTROLS | {"bcc", "resent-bcc", "return-path", "x-envid", "x-dkim-options"}
_ONCE: Final = frozenset((
    "from", "sender", "reply-to", "to", "cc", "message-id", "in-reply-to", "references", "subject", "date", "mime-version",
    "content-type", "content-transfer-encoding",
))  # fmt: skip
_FIELD: Final = re.compile(rb"([A-Za-z0-9][!-9;-~]{0,76})[ \t]*:(.*)", re.DOTALL)
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xff]")
_MAILBOX: Final = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^"<>(),:;@])*<([^<>\s]+)>|([^<>\s,:;()"]+)')


class Taken(NamedTuple):
    """A message that was taken: what goes out, who it says it is from, and what its control fields (in lower case) said."""

    raw: bytes
    from_email: str
    subject: str
    controls: dict[str, str]


def take(content: bytes, now: float) -> Taken:
    """Check a message in CRLF lines and make it ready to be kept; `now` (POSIX seconds) is its Date where it has none.

    Bcc, Return-Path and control fields go, a missing Date or Message-ID comes; everything else stays octet for octet. Raises Invalid
    naming the header field, `header` or `body` (RFC 5321 §2.3.8, §4.5.3.1.6; RFC 5322 §3.6; bad inputs S1, S2).
    """
    if why := unsendable(content):
        raise Invalid("message", f"{why}; write CRLF lines, encoded as quoted-printable or base64")
    header, gap, body = content.partition(b"\r\n\r\n")
    if not gap:
        header = content.removesuffix(b"\r\n")
    if len(header) > MAX_HEADER_OCTETS or header.count(b"\r\n") >= 4 * MAX_FIELDS:
        raise Invalid("header", f"is larger than {MAX_HEADER_OCTETS // 1024} KiB or {4 * MAX_FIELDS} lines")
    if _CONTROL.search(header):
        raise Invalid("header", "holds control characters or octets beyond ASCII; encode them (RFC 2047)")
    kept: list[bytes] = []
    found: dict[str, str] = {}
    for field in re.split(rb"\r\n(?![ \t])", header):
        match = _FIELD.fullmatch(field)
        if match is None:
            raise Invalid("header", "has a line that is no field `Name: value`", field[:60].decode("latin-1"))
        name = match[1].decode("ascii").lower()
        value = match[2].replace(b"\r\n", b"").decode("ascii").strip()
        if name == "x-schedule":
            raise Invalid("X-Schedule", "is not supported: a message leaves at once")
        if name in found and (name in _ONCE or name in CONTROLS):
            raise Invalid(match[1].decode("ascii"), "is there twice")
        found[name] = value
        if name not in _REMOVED:
            kept.append(field)
    if len(kept) > MAX_FIELDS:
        raise Invalid("header", f"has more than {MAX_FIELDS} fields")
    sender = _sender(found.get("from", ""))
    domain = header_rules.address_octets("From", sender)[0].rpartition(b"@")[2]
    if "message-id" not in found:
        kept.insert(0, b"Message-ID: <%s@%s>" % (uuid.uuid4().hex.encode(), domain))
    if "date" not in found:
        kept.insert(0, b"Date: " + formatdate(int(now)).replace("-0000", "+0000").encode())
    if body and not body.endswith(b"\r\n"):
        body += b"\r\n"
    raw = b"\r\n".join(kept) + b"\r\n\r\n" + body
    return Taken(raw, sender, found.get("subject", ""), {name: found[name] for name in CONTROLS if name in found})


def _sender(value: str) -> str:
    """The one address of a From field. Stricter than RFC 5322: what programs could read differently is refused."""
    match = _MAILBOX.fullmatch(value)
    if match is None:
        raise Invalid("From", "is needed, with one address, such as `Shop <shop@example.com>`", value or None)
    return match[1] or match[2]


class RawMessage:
    """One raw message behind one delivery server, ready for any of its recipients.

    Raises Invalid where it may not go out from its From address. `signer` may be replaced at any time, as that of a campaign.
    """

    def __init__(
        self,
        content: CampaignContent,
        server: DeliveryServer,
        keyring: Keyring,
        signer: DkimSigner | None = None,
        mail: Mail = Mail(),  # noqa: B008  frozen
    ) -> None:
        self.content = content
        self.server = server
        self.signer = signer
        self._return_signer = Signer(keyring.derive("return-path"), return_path.MAC_BYTES, base32=True)
        self._eight_bit = not content.raw.isascii()
        self._signed: tuple[DkimSigner | None, bytes | Invalid, bytes | None] | None = None
        self._domain: bytes | None = None
        self._mail_from, self._utf8 = b"", False
        if content.mail_from is not None:  # mail that others wrote: whose it is was said by them
            if content.mail_from:
                self._mail_from, self._utf8 = header_rules.address_octets("mail_from", content.mail_from)
            return
        mail_headers.check_from("From", content.from_email, mail.forbidden_from)
        if server.enforced_from and server.enforced_from.lower() != content.from_email.lower():
            raise Invalid("From", f"must be {server.enforced_from}: the delivery server sends from no other address", content.from_email)
        kind, address = header_rules.mail_from(content, server, mail.sender_domain, mail.catch_all_domain)
        if kind == "domain":
            self._domain = header_rules.domain_octets("mfrom", address)
        else:
            self._mail_from, self._utf8 = header_rules.address_octets("mfrom", address)

    def build(self, recipients: list[Recipient], *, composed_at: float, attempt: int) -> list[Envelope | Invalid]:
        """One answer for each recipient, in order. With a signer it is signed once, as of the time it was handed in.

        So every attempt sends the same octets; `composed_at` (POSIX seconds) is the day in the return path alone.
        """
        del attempt
        wire, dotted = self._wire()
        if isinstance(wire, Invalid):
            return [wire] * len(recipients)
        day = int(composed_at // 86400)
        answers: list[Envelope | Invalid] = []
        for recipient in recipients:
            try:
                rcpt, utf8 = header_rules.address_octets("email", recipient.email)
            except Invalid as refusal:
                answers.append(refusal)
                continue
            mail_from = self._mail_from
            if self._domain is not None:
                token = self._return_signer.sign(self.content.user_id, self.content.id, recipient.number, day)
                mail_from = b"%s%s@%s" % (return_path.BOUNCE.encode(), token.encode(), self._domain)
            answers.append(Envelope(mail_from, rcpt, wire, utf8 or self._utf8, dotted, self._eight_bit))
        return answers

    def _wire(self) -> tuple[bytes | Invalid, bytes | None]:
        kept = self._signed
        if kept is None or kept[0] is not self.signer:
            raw = self.content.raw
            wire = raw if self.signer is None else self.signer.sign([raw], int(self.content.queued_at))[0]
            kept = self._signed = (self.signer, wire, dot_stuffed(wire) if isinstance(wire, bytes) else None)
        return kept[1], kept[2]


def compiled(
    content: CampaignContent, server: DeliveryServer, keyring: Keyring, public_url: str, signer: DkimSigner | None, mail: Mail
) -> CompiledCampaign | RawMessage:
    """What builds the messages of `content`, whichever kind it is. Raises Invalid."""
    if content.raw:
        return RawMessage(content, server, keyring, signer, mail)
    return CompiledCampaign(content, server, keyring, public_url, signer, mail)
