"""CompiledCampaign: a campaign's content compiled once, then whole messages in octets for groups of recipients.

What it builds depends on the content, the delivery server, the keys, the recipient and the time of composition alone, so
the same input gives the same octets, on every node and in every attempt.
"""

import datetime as dt
from email.utils import formatdate
from html import escape
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from compose import header_rules, link_rewriting, liquid, mail_headers, markup, mime
from compose.link_nodes import Splicer
from compose.signing import DkimSigner
from compose.tags import Tags
from config.keys import Keyring
from config.settings import Mail
from domain import links, return_path
from domain.campaign import CampaignContent, Recipient
from domain.egress import DeliveryServer
from domain.errors import Invalid
from ext import header
from ext.body import Unsendable
from ext.message import Layout, Part
from ext.recipient import Names
from ext.template import Program
from ext.token import Signer

Message = tuple[bytes, bytes, bytes, bool]  # MAIL FROM, RCPT, header and body, needs SMTPUTF8


class Envelope(NamedTuple):
    """One recipient's message that may be of any octets: `dotted` is `wire` as DATA carries it, None where that is the same;
    `eight_bit`: it needs 8BITMIME."""

    mail_from: bytes
    rcpt: bytes
    wire: bytes
    smtputf8: bool
    dotted: bytes | None
    eight_bit: bool


def enveloped(mail_from: bytes, rcpt: bytes, wire: bytes, smtputf8: bool) -> Envelope:
    """A message whose lines may begin with dots and whose octets may have eight bits."""
    return Envelope(mail_from, rcpt, wire, smtputf8, dot_stuffed(wire), not wire.isascii())


def dot_stuffed(wire: bytes) -> bytes | None:
    """A message as DATA carries it (RFC 5321 §4.5.2); None where that is the same."""
    return wire.replace(b"\r\n.", b"\r\n..") if b"\r\n." in wire else None


MESSAGE_ID_MAC_BYTES: Final = 16
MAX_BASE_URL: Final = 500  # so that no line of List-Unsubscribe comes near 998 octets

_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_decode_value = msgspec.json.Decoder().decode


def _decode(data: bytes) -> dict[str, Any]:
    return _decode_object(data) if data else {}


def _reason(error: Exception) -> str:
    return "it holds half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else str(error)


class CompiledCampaign:
    """One campaign behind one delivery server, ready to be built for any of its recipients.

    Raises Invalid at construction for content that can never be sent, naming the field (`html`, `subject`, `from_email` ...)
    and in templates line and column. `signer` may be replaced at any time, when the keys of the domain change.
    """

    def __init__(
        self,
        content: CampaignContent,
        server: DeliveryServer,
        keyring: Keyring,
        public_url: str,
        signer: DkimSigner | None = None,
        mail: Mail = Mail(),  # noqa: B008  frozen
    ) -> None:
        self.content = content
        self.server = server
        field, sender = header_rules.from_address(content, server)
        if field != "enforced_from":
            mail_headers.check_from(field, sender, mail.forbidden_from)
        sender_octets, sender_utf8 = header_rules.address_octets(field, sender)
        domain = sender_octets.rpartition(b"@")[2]
        constants: dict[str, Any] = {
            "campaign": {"id": content.id, "name": content.name},
            "list": {"id": content.list_id, "name": content.list_name},
            "user": {"id": content.user_id, "email": content.user_email},
            "user_group": {"id": content.user_group_id or ""},
        }
        self._tags = Tags(keyring.derive("hashed-id"), constants, domain.decode("ascii"))
        layout = self._layout = Layout()
        self._by_field: dict[str, liquid.Compiled] = {}
        layout.refuse = self._refuse
        layout.address = lambda text: header_rules.address_octets("email", text)
        layout.decode = _decode
        layout.decode_value = _decode_value
        self._names = layout.names = Names()
        layout.constants = constants
        layout.user = content.user_id
        layout.campaign = content.id
        layout.base_url = self._base_url("link_domain", server.link_domain, public_url)
        self._tracking = self._tracked(keyring, public_url)
        self.destinations: tuple[str, ...] = ()  # of the followed links 1, 2, ...; "" where a link carries its own

        kind, address = header_rules.mail_from(content, server, mail.sender_domain, mail.catch_all_domain)
        if kind == "domain":
            layout.mail_from_domain = header_rules.domain_octets("mfrom", address)
            layout.mail_from = b""
        else:
            layout.mail_from, return_utf8 = header_rules.address_octets("mfrom", address)
            sender_utf8 = sender_utf8 or return_utf8
        layout.message_domain = layout.mail_from_domain or domain

        layout.message_signer = Signer(keyring.derive("message-id"), MESSAGE_ID_MAC_BYTES, base32=True)
        layout.return_signer = Signer(keyring.derive("return-path"), return_path.MAC_BYTES, base32=True)
        layout.unsubscribe_signer = Signer(keyring.derive("unsubscribe"), links.MAC_BYTES)
        layout.unsubscribe_mail_signer = Signer(keyring.derive("unsubscribe"), return_path.MAC_BYTES, base32=True)
        layout.web_view_signer = Signer(keyring.derive("web-view"), links.MAC_BYTES)

        if content.track_links:
            layout.click_signer = Signer(keyring.derive("click"), links.MAC_BYTES)
        if content.track_opens:
            layout.open_signer = Signer(keyring.derive("open"), links.MAC_BYTES)

        layout.always_utf8 = sender_utf8
        self._compiled: list[liquid.Compiled] = []
        self._headers(layout, constants, sender_octets)
        layout.unsubscribe_to = mail_headers.unsubscribe_to(mail, domain)
        before = (layout.list_headers or b"") + mail_headers.system(mail, content, domain)
        self._lines = (before, *mail_headers.cfbl(mail, domain), self._custom(layout, constants))
        self.signer = signer
        self._parts(layout, constants, markup.with_preheader(content.html, content.preheader, mail.preheader_template))
        layout.needs_data = self._tags.used or any(each.asks_for("subscriber") for each in self._compiled)
        self._dates: tuple[float, bytes, dict[str, Any]] | None = None

    @property
    def signer(self) -> DkimSigner | None:
        """What signs the messages; with one for the domain of the complaint address they carry CFBL-Address, else they do not."""
        return self._signer

    @signer.setter
    def signer(self, signer: DkimSigner | None) -> None:
        before, cfbl, beside, behind = self._lines
        covered = bool(cfbl) and (not beside or (signer is not None and beside in signer.domains))
        self._layout.cfbl = covered
        self._layout.list_headers = before + (cfbl if covered else b"") + behind
        self._signer = signer

    def build(self, recipients: list[Recipient], *, composed_at: float, attempt: int) -> list[Message | Invalid]:
        """One answer for each recipient, in order: a message, or why its merge data or address is refused.

        `composed_at` (POSIX seconds) is the Date of the message and the time its templates see; `attempt` changes nothing
        in it: every attempt sends the same octets, so that a receiver can tell a copy by its Message-ID (R7). With a signer
        they are signed, at `composed_at`.
        """
        del attempt
        date_line, clock = self._at(composed_at)
        answers = self._layout.build(recipients, date_line, int(composed_at // 86400), clock)
        return answers if self._signer is None else _signed(self._signer, answers, int(composed_at))

    def build_8bit(self, recipients: list[Recipient], *, composed_at: float, attempt: int) -> list[Envelope | Invalid]:
        """As `build`, for a server with 8BITMIME: parts beyond ASCII as 8bit. Only with `has_8bit`, which the delivery server allows.

        One whose merge data makes a line of more than 998 octets, or holds a boundary, is as `build` makes it.
        """
        del attempt
        date_line, clock = self._at(composed_at)
        answers = self._layout.build(recipients, date_line, int(composed_at // 86400), clock, True)
        if self.signer is not None:
            answers = _signed(self.signer, answers, int(composed_at))
        return [enveloped(*answer) if isinstance(answer, tuple) else answer for answer in answers]

    def page(self, recipient: Recipient, *, composed_at: float) -> str | None:
        """The text of the HTML part of a message, the text part where there is no HTML, None where there is neither.

        Raises Invalid for a recipient who gets no message.
        """
        answer = self.build([recipient], composed_at=composed_at, attempt=1)[0]
        if isinstance(answer, Invalid):
            raise answer
        scope = self.scope(recipient, composed_at=composed_at)
        for part in reversed(self._layout.parts or ()):  # HTML is the last of them
            text = part.program.render(scope)
            return text if part.field == "html" else f"<pre>{escape(text)}</pre>"
        return None

    def _refuse(self, field: str, error: Exception) -> Invalid:
        """Why one recipient gets no message (bad inputs 47, 48)."""
        if isinstance(error, Invalid):
            return error
        if not isinstance(error, (UnicodeEncodeError, Unsendable, msgspec.MsgspecError)):
            place = self._by_field[field].place() if field in self._by_field else ""
            return Invalid(field, f"{place}cannot be rendered: {Exception.__str__(error) or type(error).__name__}")
        return Invalid("merge data" if field in ("text", "amp", "html") else field, f"bad merge data: {_reason(error)}")

    def empty_values(self) -> dict[str, int]:
        """How often a value came out empty in the messages built so far, by what the templates call it; only those that did."""
        found: dict[str, int] = {}
        for output in (output for each in self._compiled for output in each.outputs if output.empty):
            found[output.name] = found.get(output.name, 0) + output.empty
        return found

    def scope(self, recipient: Recipient, *, composed_at: float) -> dict[str, Any]:
        """The variables that the templates see for `recipient`."""
        return self._layout.scope(recipient, self._at(composed_at)[1])

    def _at(self, composed_at: float) -> tuple[bytes, dict[str, Any]]:
        if self._dates is None or self._dates[0] != composed_at:
            now = dt.datetime.fromtimestamp(composed_at)
            line = f"Date: {formatdate(int(composed_at))}\r\n".replace("-0000", "+0000").encode("ascii")
            self._dates = (composed_at, line, {"now": now, "today": now.date()})
        return self._dates[1], self._dates[2]

    def _tracked(self, keyring: Keyring, public_url: str) -> link_rewriting.Tracking:
        content = self.content
        part_key = keyring.derive("click-link")
        return link_rewriting.Tracking(
            links=content.track_links,
            opens=content.track_opens,
            utm_source=content.utm_source,
            utm_medium=content.utm_medium,
            click_url=(self._base_url("link_domain", self.server.link_domain, public_url)).decode("ascii") + links.PATHS["click"],
            open_url=(
                self._base_url("open_domain", self.server.open_domain or self.server.link_domain, public_url).decode("ascii")
                + links.PATHS["open"]
            ),
            link_part=lambda number: links.link_part(part_key, content.user_id, content.id, number),
            destination_key=keyring.derive("click-destination"),
            carried=bool(content.part),
        )

    def _base_url(self, field: str, domain: str, public_url: str) -> bytes:
        if domain:
            return b"https://" + header_rules.domain_octets(field, domain)
        url = public_url.rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or len(url) > MAX_BASE_URL:
            raise Invalid("public_url", "must be an http or https URL", public_url)
        if not url.isascii() or any(character <= " " or character in '<>"\x7f' for character in url):
            raise Invalid("public_url", "holds a character that may not stand in a URL", public_url)
        return url.encode("ascii")

    def _template(self, field: str, source: str, constants: dict[str, Any], *, html: bool) -> liquid.Compiled:
        env = liquid.HTML if html else liquid.TEXT
        return liquid.compile_template(field, source, env, constants, self._tags.rewrite, names=self._names)

    def _parts(self, layout: Layout, constants: dict[str, Any], html: str) -> None:
        """Compile the body parts there are, from the plainest to the richest (RFC 2046 §5.1.4), and the frame around them."""
        content, programs = self.content, []
        bodies: list[mime.Body] = []
        bodies_8bit: list[mime.Body] = []
        markup.check_amp(content.amp, html)
        for field, kind, source in (("text", "plain", content.text), ("amp", "x-amp-html", content.amp), ("html", "html", html)):
            if not source:
                continue
            compiled = self._template(field, source, constants, html=kind != "plain")
            text = "".join(compiled.literals)
            bodies.append(mime.Body(kind, mime.coding(text)))
            bodies_8bit.append(mime.Body(kind, mime.coding_8bit(text)))
            if field == "html":  # only now: a mistake is named at its place in what was written
                compiled = self._with_links(compiled, source, constants)
            self._compiled.append(compiled)
            self._by_field[field] = compiled
            programs.append((field, compiled.program))
        mark = mime.boundary(content.id, content.version)

        def framed(bodies: list[mime.Body]) -> tuple[bytes, list[Part]]:
            head, behind = mime.frame(bodies, mark, content.attachments)
            each = zip(programs, bodies, behind, strict=True)
            return head, [Part(*program, body.coding, octets, mark.decode("ascii")) for program, body, octets in each]

        layout.content_headers, layout.parts = framed(bodies)
        self.has_8bit = self.server.limits.eightbitmime and bodies_8bit != bodies
        if self.has_8bit:
            layout.content_headers_8bit, layout.parts_8bit = framed(bodies_8bit)

    def _with_links(self, compiled: liquid.Compiled, source: str, constants: dict[str, Any]) -> liquid.Compiled:
        if self._tracking.wanted:
            marked, self.destinations = link_rewriting.rewrite("html", source, self._tracking)
        else:
            marked = link_rewriting.mark_addresses(source)
        if marked == source:
            return compiled
        return liquid.compile_template("html", marked, liquid.HTML, constants, self._tags.rewrite, Splicer(self._tracking), self._names)

    def _line(self, field: str, source: str, constants: dict[str, Any]) -> tuple[str, Program | None]:
        """A header value: its text when it is the same for everybody, else its program."""
        compiled = self._template(field, source, constants, html=False)
        for text in compiled.literals:
            try:
                header.check(text)
            except ValueError as error:
                raise Invalid(field, _reason(error)) from None
        if compiled.constant is not None:
            return compiled.constant, None
        self._compiled.append(compiled)
        self._by_field[field] = compiled
        return "", compiled.program

    def _custom(self, layout: Layout, constants: dict[str, Any]) -> bytes:
        """Custom headers: the lines that are the same for everybody; the others go to the layout (45-47)."""
        lines = b""
        layout.custom = []
        if len(self.content.headers) > mail_headers.MAX_CUSTOM:
            raise Invalid("headers", f"there are {len(self.content.headers)} custom headers, at most {mail_headers.MAX_CUSTOM} are allowed")
        seen: set[bytes] = set()
        for name, value in self.content.headers:
            octets = mail_headers.custom_name(name, "headers")
            if octets.lower() in seen:
                raise Invalid("headers", "two custom headers have the same name", name)
            seen.add(octets.lower())
            text, program = self._line(f"header {name}", value, constants)
            if program is not None:
                layout.custom.append((octets, program))
            elif text.strip():
                lines += _field(f"header {name}", header.unstructured, octets, text)
        return lines

    def _headers(self, layout: Layout, constants: dict[str, Any], sender: bytes) -> None:
        content = self.content
        layout.sender_address = sender
        name, layout.from_name = self._line("from_name", header_rules.from_name(content, self.server), constants)
        if layout.from_name is None:
            layout.sender = _field("from_name", header.mailbox, b"From", name, sender)
        subject, layout.subject = self._line("subject", content.subject, constants)
        if layout.subject is None:
            layout.subject_line = _field("subject", header.unstructured, b"Subject", subject)
        layout.reply_to = b""
        if content.reply_to:
            reply_to, utf8 = header_rules.address_octets("reply_to", content.reply_to)
            layout.reply_to = header.mailbox(b"Reply-To", "", reply_to)
            layout.always_utf8 = layout.always_utf8 or utf8
        layout.list_headers = b""
        layout.listless = not content.list_id
        if layout.listless:
            return
        identity = header_rules.list_id(content, layout.message_domain or b"")
        name_and_id = _field("list.name", header.mailbox, b"List-ID", content.list_name, identity[1:-1])
        if not content.list_name:
            name_and_id = b"List-ID: " + identity + b"\r\n"
        layout.list_headers = b"List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n" + name_and_id


def _signed(signer: DkimSigner, answers: list[Message | Invalid], at: int) -> list[Message | Invalid]:
    signed = iter(signer.sign([answer[2] for answer in answers if isinstance(answer, tuple)], at))
    for index, answer in enumerate(answers):
        if isinstance(answer, tuple):
            wire = next(signed)
            answers[index] = wire if isinstance(wire, Invalid) else (answer[0], answer[1], wire, answer[3])
    return answers


def _field(field: str, make: Any, *arguments: Any) -> bytes:
    try:
        line: bytes = make(*arguments)
    except ValueError as error:
        raise Invalid(field, _reason(error)) from None
    return line


def check(
    content: CampaignContent,
    server: DeliveryServer,
    keyring: Keyring,
    public_url: str,
    mail: Mail = Mail(),  # noqa: B008
) -> tuple[str, ...]:
    """Raise Invalid when the campaign could not be sent as it stands; what the API asks when it is saved.

    Returns where its followed links lead, as `CompiledCampaign.destinations`.
    """
    return CompiledCampaign(content, server, keyring, public_url, mail=mail).destinations
