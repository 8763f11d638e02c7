"""Direct sending: `POST /messages` takes one content and its recipients and answers when every one of them will get an outcome.

All or nothing: everything is checked first, down to composing each message, and whatever is refused is named by its place
(`recipients[3].data`). JSON up to 1,000 recipients; beyond that NDJSON, read as it streams in.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec
from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from compose import mime
from compose.campaign import CompiledCampaign
from compose.mail_headers import check_custom, custom_name
from control import dkim
from control.bodies import Refused, check_json
from control.campaigns import checked, compiled, prepared
from control.errors import FieldError, SeveralInvalid, field_error
from control.guards import Caller
from control.imports import bounded
from control.parameters import MAX_ID, After, Before, Id, Limit, Page, one_line
from control.services import Services
from domain import address
from domain.campaign import Attachment, CampaignContent, Recipient
from domain.egress import DeliveryServer
from domain.errors import Invalid, NotFound
from domain.import_rows import FIELD_NAME, FIELD_NAME_RULE
from store import custom_headers, egress, lists, messages
from store.custom_headers import MailClass
from store.messages import HEADERS_KEY, METADATA_KEY, Message, Part, RecipientState, Row, Target
from store.postgres import PooledConnection, connection, transaction

MAX_RECIPIENTS: Final = 1000  # of one JSON body
MAX_STREAMED: Final = 1_000_000
MAX_RECIPIENT_BYTES: Final = 64 * 1024
MAX_LINE_BYTES: Final = 256 * 1024
MAX_HEADERS: Final = 20
MAX_METADATA: Final = 50
MAX_ERRORS: Final = 100  # named in one answer
_BLOCK: Final = 1000
_AS_OF_CAMPAIGNS: Final = (
    "subject", "from_name", "from_email", "reply_to", "html", "mjml", "inline_css", "text", "preheader", "amp", "utm_source", "utm_medium",
)  # fmt: skip
_STREAM_SECONDS: Final = 3600.0


class MessageAttachment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file for every recipient; `content` is base64. One with a `content_id` stands in the HTML part as `cid:<content_id>`."""

    filename: str
    content: bytes
    content_type: str = "application/octet-stream"
    content_id: str = ""


class MessageContent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said, and how it goes out. `subject`, `from_name`, `html`, `text` and the values of `headers` are templates.

    Without `text` a text part is made from the HTML part; "" means none. `preheader`, `mjml`, `inline_css` and `amp` are what they are
    of a campaign. All `attachments` together may have `mail.max_attachment_bytes`, and the body `control.max_body_bytes`.

    `mail_class` transactional is mail to one person about his own business: it goes first, needs no list, and has no List-Unsubscribe.
    Mail of another class belongs to a list, whose members may leave it. `name` and `metadata` are yours: they are kept and given back.
    """

    delivery_server_id: int
    subject: str
    mail_class: MailClass = "transactional"
    list_id: int | None = None
    name: str = ""
    from_name: str = ""
    from_email: str = ""
    reply_to: str = ""
    html: str = ""
    text: str | None = None
    preheader: str = ""
    mjml: str = ""
    inline_css: bool = False
    amp: str = ""
    attachments: list[MessageAttachment] = []
    headers: dict[str, str] = {}
    track_links: bool = False
    track_opens: bool = False
    utm_source: str = ""
    utm_medium: str = ""
    metadata: dict[str, str] = {}


class MessageRecipient(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One address. Templates see `data` as `subscriber`; `headers` are added to his message as they are; `metadata` is given back."""

    email: str
    data: dict[str, Any] = {}
    headers: dict[str, str] = {}
    metadata: dict[str, str] = {}


class MessageCreate(MessageContent, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A content and its recipients."""

    recipients: list[MessageRecipient]


class MessageShown(msgspec.Struct, frozen=True, kw_only=True):
    """A message and how many of its recipients are in each state.

    Accounting files name its recipients by `campaign_id`, the message stream, and the numbers from `first_number` on.
    """

    id: int
    user_id: int
    name: str
    mail_class: MailClass
    list_id: int | None
    delivery_server_id: int
    campaign_id: int
    first_number: int
    recipients: int
    outcomes: dict[str, int]
    metadata: dict[str, str]
    created_at: Any


class MessageController(Controller):
    """Direct messages of one user."""

    path = "/messages"
    tags = ("messages",)

    @post("/", operation_id="sendMessage", summary="Send a message at once", status_code=202)
    async def send(
        self, data: JSONBody[MessageCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> Response[MessageShown]:
        """One content to up to 1,000 recipients. The first mail leaves within about a second.

        Once this is answered, every recipient gets an outcome, whatever process dies. Refused whole if anything in it is wrong;
        `errors[].field` then names each place, such as `recipients[3].email`.
        """
        if not 1 <= len(data.recipients) <= MAX_RECIPIENTS:
            reason = f"must hold 1 to {MAX_RECIPIENTS} recipients, not {len(data.recipients)}; POST /messages/stream takes any number"
            raise Invalid("recipients", reason)
        taker = Taker(services, caller.user_id, data)
        names = {name for each in data.recipients for name in each.headers}
        await taker.prepare(names)
        rows = await asyncio.to_thread(taker.rows, data.recipients, 0)
        taker.refuse()
        async with transaction(services.pool) as conn:
            made = await messages.add(conn, taker.target, taker.part, dict(data.metadata), rows)
        return await _taken(services, made)

    @post(
        "/stream", operation_id="streamMessage", summary="Send a message to any number of recipients", status_code=202,
        request_max_body_size=None,
    )  # fmt: skip
    async def stream(
        self, request: Request[Any, Any, Any], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> Response[MessageShown]:
        """NDJSON: the first line is the body of POST /messages without `recipients`, each further line one recipient.

        Up to a million lines, read as they come; refused whole if anything is wrong, with the first 100 mistakes. Names of recipients'
        headers must be those of the first recipient.
        """
        lines = lines_of(bounded(request.stream(), "nothing was sent"), services.settings.control.max_body_bytes)
        first = await anext(lines, None)
        if first is None:
            raise Invalid("body", "is empty; the first line is the message, the following ones are its recipients")
        taker = Taker(services, caller.user_id, _decoded(first, MessageContent, ""))
        made = await taker.take_stream(lines)
        return await _taken(services, made)

    @get("/", operation_id="listMessages", summary="List messages")
    async def page(
        self, caller: NamedDependency[Caller], services: NamedDependency[Services], before: Before = None, limit: Limit = 100
    ) -> Page[Message]:
        """Newest first, without their outcomes."""
        async with connection(services.pool) as conn:
            found = await messages.list_messages(conn, caller.sees, before, limit)
        return Page(found, found[-1].id if len(found) == limit else None)

    @get("/{message_id:int}", operation_id="getMessage", summary="One message and what became of it")
    async def one(self, message_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> MessageShown:
        """`outcomes` counts recipients by state; `queued` are those without an end."""
        async with connection(services.pool) as conn:
            found = await messages.get(conn, caller.sees, message_id)
            return shown(found, await messages.outcomes(conn, found))

    @get("/{message_id:int}/recipients", operation_id="listMessageRecipients", summary="The recipients of a message")
    async def recipients(
        self, message_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services], after: After = 0, limit: Limit = 100
    ) -> Page[RecipientState]:
        """By number, each with its state, what was said last, and its metadata."""
        async with connection(services.pool) as conn:
            message = await messages.get(conn, caller.sees, message_id)
            found = await messages.recipients(conn, message, after, limit)
        return Page(found, found[-1].number if len(found) == limit else None)


class Taker:
    """Checks one message, content first, then recipients in blocks; mistakes are gathered in `errors`."""

    def __init__(self, services: Services, user_id: int, data: MessageContent) -> None:
        self.errors: list[FieldError] = []
        self._services = services
        self._data = data
        self._user_id = user_id
        self._names: frozenset[str] = frozenset()
        self._compiled: CompiledCampaign
        self.target: Target
        self.part: Part

    async def prepare(self, recipient_headers: set[str]) -> None:
        """Check and compile the content. Raises Invalid, NotFound."""
        data = self._data
        if data.mail_class != "transactional" and data.list_id is None:
            raise Invalid("list_id", f"{data.mail_class} mail belongs to a list, which its readers can leave; name it")
        if not any((part or "").strip() for part in (data.html, data.mjml, data.text)):
            raise Invalid("text", "the message says nothing; give html, text or both")
        _check_metadata("metadata", data.metadata)
        one_line("name", data.name)
        fields = await prepared(checked({name: getattr(data, name) for name in _AS_OF_CAMPAIGNS}))
        text_derived = bool(fields.pop("text_derived", False))
        fields["attachments"] = _attachments(data.attachments, self._services.settings.mail.max_attachment_bytes)
        async with connection(self._services.pool) as conn:
            server, mailing_list = await self._references(conn)
            rules = await custom_headers.rules_for(conn, self._user_id, data.delivery_server_id, data.mail_class)
            content = self._content(fields, rules, recipient_headers, server, mailing_list)
            await dkim.check_owner(conn, self._user_id, content, server)
        settings = self._services.settings
        # Recipients are composed to see that they can be: the files were looked at, and need not be copied for each
        light = tuple(msgspec.structs.replace(each, content=b"") for each in content.attachments)
        content = msgspec.structs.replace(content, attachments=light)
        self._compiled = await compiled(
            lambda what: CompiledCampaign(what, server, self._services.keyring, settings.inbound.public_url, mail=settings.mail),
            content,
            text_derived,
        )

    def _content(
        self, fields: dict[str, Any], rules: tuple[tuple[str, str], ...], recipient_headers: set[str],
        server: DeliveryServer, mailing_list: lists.List | None,
    ) -> CampaignContent:  # fmt: skip
        """What is checked and composed, and with it where it goes and what is stored of it."""
        data = self._data
        list_id = mailing_list.id if mailing_list else None
        self.target = Target(user_id=self._user_id, delivery_server_id=server.id, mail_class=data.mail_class, list_id=list_id)
        self.part = Part(
            name=data.name or data.subject[:100],
            track_links=data.track_links,
            track_opens=data.track_opens,
            headers=self._headers(rules, recipient_headers),
            **fields,
        )
        self._names = frozenset(recipient_headers)
        return CampaignContent(
            id=1, version=1, part=1, user_id=self._user_id, list_id=list_id or 0, delivery_server_id=server.id,
            list_name=mailing_list.name if mailing_list else "", list_sender_email=mailing_list.sender_email if mailing_list else "",
            list_sender_name=mailing_list.sender_name if mailing_list else "", queued_at=0.0, mail_class=data.mail_class,
            **{name: getattr(self.part, name) for name in self.part.__struct_fields__},
        )  # fmt: skip

    async def _references(self, conn: PooledConnection) -> tuple[DeliveryServer, lists.List | None]:
        server_id, list_id = self._data.delivery_server_id, self._data.list_id
        for kind, identity in (("delivery server", server_id), ("list", list_id)):
            if identity is not None and not 1 <= identity <= MAX_ID:
                raise NotFound(kind, identity)
        server = await egress.get(conn, self._user_id, server_id)
        return server, None if list_id is None else await lists.get(conn, self._user_id, list_id)

    def _headers(self, rules: tuple[tuple[str, str], ...], recipient_headers: set[str]) -> tuple[tuple[str, str], ...]:
        """The rules of the user, what the message says instead, and a place for each name that recipients bring."""
        own = self._data.headers
        if len(own) + len(recipient_headers) > MAX_HEADERS:
            raise Invalid("headers", f"there are {len(own) + len(recipient_headers)} header names, at most {MAX_HEADERS} are allowed")
        for name, value in own.items():
            try:
                check_custom(name, value)
            except Invalid as error:
                raise Invalid(f"headers.{name}"[:100], error.reason) from None
        for name in recipient_headers:
            custom_name(name, f"recipients[].headers.{name}"[:100])
        taken = [name.lower() for name in (*own, *recipient_headers)]
        for name in (*own, *recipient_headers):
            if taken.count(name.lower()) > 1:
                raise Invalid(f"headers.{name}"[:100], "is there twice, in different case or for the message and a recipient")
        kept = tuple(rule for rule in rules if rule[0].lower() not in taken)
        places = tuple((name, f'{{{{ subscriber["{HEADERS_KEY}"]["{name}"] }}}}') for name in sorted(recipient_headers))
        return (*kept, *own.items(), *places)

    def rows(self, recipients: Sequence[MessageRecipient], first: int) -> list[Row]:
        """The recipients as they are stored, each composed once to see that it can be; what is wrong goes to `errors`."""
        rows: list[Row] = []
        places: list[int] = []
        for place, recipient in enumerate(recipients, first):
            try:
                rows.append(self._row(recipient))
                places.append(place)
            except Invalid as error:
                self._wrong(place, error.field, error.reason)
        trial = [Recipient(place + 1, -1 - place, email, data.encode()) for place, (email, data) in zip(places, rows, strict=True)]
        for place, answer in zip(places, self._compiled.build(trial, composed_at=0.0, attempt=1), strict=True):
            if isinstance(answer, Invalid):
                field = answer.field if answer.field == "email" else "headers" if answer.field == "headers" else "data"
                self._wrong(place, field, f"{answer.field}: {answer.reason}" if field != answer.field else answer.reason)
        return rows

    def _row(self, recipient: MessageRecipient) -> Row:
        email = address.parse(recipient.email).text
        for name in recipient.data:
            if not FIELD_NAME(name) or name in ("id", "email"):
                raise Invalid(f"data.{name}"[:80], f"{FIELD_NAME_RULE}; `id` and `email` are ours")
        for name, value in recipient.headers.items():
            if name not in self._names:
                raise Invalid(f"headers.{name}"[:80], "the first recipient has no such header; all must bring the same names")
            one_line(f"headers.{name}", value, maximum=900)
        _check_metadata("metadata", recipient.metadata)
        data = dict(recipient.data)
        if self._names:
            data[HEADERS_KEY] = recipient.headers
        if recipient.metadata:
            data[METADATA_KEY] = recipient.metadata
        encoded = msgspec.json.encode(data)
        if len(encoded) > MAX_RECIPIENT_BYTES:
            raise Invalid("data", f"is larger than {MAX_RECIPIENT_BYTES // 1024} KiB")
        return email, encoded.decode()

    def _wrong(self, place: int, field: str, reason: str) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(FieldError(f"recipients[{place}].{field}", reason))

    def refuse(self) -> None:
        """Raises SeveralInvalid if anything was wrong."""
        if self.errors:
            raise SeveralInvalid(self.errors)

    async def take_stream(self, lines: AsyncIterator[bytes]) -> Message:
        """Read all recipients, then take the message. Raises Invalid; then nothing is sent."""
        begun = await anext(lines, None)
        if begun is None:
            raise Invalid("recipients", "there is none; each line behind the first is a recipient")
        await self.prepare(set(_decoded(begun, MessageRecipient, "recipients[0]").headers))

        async def blocks() -> AsyncIterator[list[Row]]:
            place, held = 0, [begun]
            async for line in lines:
                if len(held) == _BLOCK:
                    yield await asyncio.to_thread(self._block, held, place)
                    place, held = place + len(held), []
                if place + len(held) >= MAX_STREAMED:
                    raise Invalid("recipients", f"there are more than {MAX_STREAMED:,}; send several messages")
                held.append(line)
            yield await asyncio.to_thread(self._block, held, place)

        async with asyncio.timeout(_STREAM_SECONDS), connection(self._services.pool) as conn:
            count = await messages.gather(conn, blocks())
            self.refuse()
            async with conn.transaction():
                return await messages.add_gathered(conn, self.target, self.part, dict(self._data.metadata), count)

    def _block(self, lines: list[bytes], first: int) -> list[Row]:
        recipients: list[MessageRecipient] = []
        rows: list[Row] = []
        for place, line in enumerate(lines, first):
            try:
                recipients.append(_decoded(line, MessageRecipient, f"recipients[{place}]"))
            except Invalid as error:
                # those before it are checked under their own places
                rows += self.rows(recipients, place - len(recipients))
                recipients = []
                if len(self.errors) < MAX_ERRORS:
                    self.errors.append(FieldError(error.field, error.reason))
        rows += self.rows(recipients, first + len(lines) - len(recipients))
        if len(self.errors) >= MAX_ERRORS:
            raise SeveralInvalid(self.errors)
        return [] if self.errors else rows


def shown(message: Message, outcomes: dict[str, int]) -> MessageShown:
    """A message as the API shows it."""
    fields = {name: getattr(message, name) for name in MessageShown.__struct_fields__ if name not in ("recipients", "outcomes")}
    return MessageShown(**fields, recipients=message.recipients, outcomes=outcomes)


async def _taken(services: Services, message: Message) -> Response[MessageShown]:
    await services.announce("campaigns")
    answer = shown(message, {"queued": message.recipients})
    return Response(answer, status_code=202, headers={"location": f"/api/v1/messages/{message.id}"})


def _attachments(given: Sequence[MessageAttachment], most: int) -> tuple[Attachment, ...]:
    """Raises Invalid naming the place, such as `attachments[1].filename`."""
    files = tuple(
        Attachment(filename=each.filename, content_type=each.content_type.lower(), content=each.content, content_id=each.content_id)
        for each in given
    )
    for place in range(len(files)):
        try:
            mime.check(files[: place + 1])
        except Invalid as error:
            raise Invalid(error.field if error.field == "attachments" else f"attachments[{place}].{error.field}", error.reason) from None
    size = sum(len(each.content) for each in files)
    if size > most:
        raise Invalid("attachments", f"have {size} bytes together, at most {most} are allowed (mail.max_attachment_bytes)")
    return files


def _check_metadata(field: str, metadata: dict[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise Invalid(field, f"has {len(metadata)} entries, at most {MAX_METADATA} are allowed")
    for name, value in metadata.items():
        one_line(field, name, minimum=1, maximum=100)
        one_line(f"{field}.{name}", value, maximum=1000)


async def lines_of(source: AsyncIterator[bytes], first_bytes: int = MAX_LINE_BYTES) -> AsyncIterator[bytes]:
    """The lines of a stream that are not blank; `first_bytes` the first may have. Raises Invalid for one that does not end."""
    rest, most = b"", first_bytes
    async for block in source:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
            most = MAX_LINE_BYTES
        if len(rest) > most:
            raise Invalid("body", f"a line is longer than {most // 1024} KiB; one recipient is one line")
    if rest.strip():
        yield rest


def _decoded(line: bytes, kind: Any, place: str) -> Any:
    try:
        check_json(line)
        return msgspec.json.decode(line, type=kind)
    except Refused as error:
        raise Invalid(place or "body", str(error)) from None
    except Invalid as error:
        raise Invalid(".".join(filter(None, (place, error.field))), error.reason) from None
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        found = field_error(at.rstrip("`").lstrip("."), message)
        raise Invalid(".".join(filter(None, (place, "" if found.field == "body" else found.field))) or "body", found.reason) from None
