"""A sent message once more, octet for octet: from the snapshot that was taken when its campaign was started, with its signatures checked.

Nothing is sent. What the recipient got can be shown, compared and defended years later without keeping a copy of every message.
"""

import asyncio
import base64
from datetime import UTC, datetime

import msgspec
from litestar import Controller, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from compose.campaign import CompiledCampaign
from compose.raw import compiled
from compose.signing import DkimSigner, ParsedKeys, domains_of
from compose.verifying import verdicts
from config.settings import Mail
from control.guards import Caller
from control.parameters import Id
from control.services import Services
from domain import dkim
from domain.dkim import DkimKey
from domain.errors import Invalid
from store import campaigns, sent
from store import dkim as stored
from store.postgres import PooledConnection, connection
from store.sent import SentMessage


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """One DKIM signature of the message, judged with the public key we keep; `reason` says why it is no good."""

    domain: str
    selector: str
    algorithm: str
    good: bool
    reason: str


class MadeAgain(msgspec.Struct, frozen=True, kw_only=True):
    """The message as it left. `message` is base64; `kind` and `attempt` are those of its last record: d delivered, b bounced, t deferred,
    x expired.

    Of what left, its size is recorded and no hash: `same_size` false says that something it depends on has changed since, true does
    not prove that nothing has.
    """

    campaign_id: int
    number: int
    kind: str
    attempt: int
    sent_at: datetime
    composed_at: datetime
    mail_from: str
    recipient: str
    size: int
    recorded_size: int
    same_size: bool
    signatures: list[Signature]
    message: str


class SentController(Controller):
    """Read only."""

    path = "/campaigns/{campaign_id:int}/recipients/{recipient:str}"
    tags = ("reports",)

    @get("/message", operation_id="getSentMessage", summary="The message that a recipient got, made again")
    async def message(
        self, campaign_id: Id, recipient: FromPath[str], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> MadeAgain:
        """By number in the campaign or message stream, or by address. The octets are those that were sent, down to the signatures.

        They differ when the delivery server's domains, the settings for all mail or the secret key have changed since, or a DKIM
        key was deleted. `same_size` is false then, unless what has changed is as long as what it replaces: the size is all that is
        recorded of a message.
        """
        number = int(recipient) if recipient.isascii() and recipient.isdigit() and len(recipient) < 10 else None
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
            if number is None:
                number = (await campaigns.recipient(conn, campaign_id, None, recipient)).number
            found = await sent.find(conn, caller.sees, campaign_id, number)
            chosen = await signed_with(conn, found, services.settings.mail)
        return await asyncio.to_thread(make_again, services, found, chosen)


async def signed_with(conn: PooledConnection, found: SentMessage, mail: Mail) -> list[DkimKey]:
    """The keys that signed a message when it was sent, as far as they have not been deleted since."""
    domains, operator = domains_of(found.content, found.server, mail), await stored.operator(conn)
    keys = await sent.keys_at(conn, [found.content.user_id, operator], domains.names, found.at)
    sender, feedback = domains.choose(keys, operator)
    return [*sender, *feedback]


def make_again(services: Services, found: SentMessage, chosen: list[DkimKey]) -> MadeAgain:
    """Compose, sign with the chosen keys and verify. Raises Invalid where the recipient gets no message any more."""
    settings = services.settings
    signer = _signer(services, chosen)
    limits = msgspec.structs.replace(found.server.limits, eightbitmime=True)  # whatever it says now
    server = msgspec.structs.replace(found.server, limits=limits)
    made = compiled(found.content, server, services.keyring, settings.inbound.public_url, signer, settings.mail)
    [answer] = made.build([found.recipient], composed_at=found.composed_at, attempt=found.attempt)
    if isinstance(made, CompiledCampaign) and made.has_8bit:
        # Which of its two forms left depends on what the server offered then; their sizes always differ
        [other] = made.build_8bit([found.recipient], composed_at=found.composed_at, attempt=found.attempt)
        if not isinstance(other, Invalid) and len(other.wire) == found.size:
            answer = other
    if isinstance(answer, Invalid):
        raise answer
    mail_from, rcpt, wire = answer[:3]
    said = verdicts(wire, {key.record_name: key.record for key in chosen})
    return MadeAgain(
        campaign_id=found.content.id,
        number=found.recipient.number,
        kind=found.kind,
        attempt=found.attempt,
        sent_at=found.at,
        composed_at=datetime.fromtimestamp(found.composed_at, UTC),
        mail_from=mail_from.decode(),
        recipient=rcpt.decode(),
        size=len(wire),
        recorded_size=found.size,
        same_size=len(wire) == found.size,
        signatures=[
            Signature(**{name: getattr(each, name) for name in ("domain", "selector", "algorithm", "good", "reason")}) for each in said
        ],
        message=base64.b64encode(wire).decode(),
    )


def _signer(services: Services, keys: list[DkimKey]) -> DkimSigner | None:
    parsed = ParsedKeys()
    for key in keys:
        try:
            parsed.add(key, services.keyring.open(key.private_key_sealed, dkim.seal_context(key.id)))
        except ValueError:
            raise Invalid("dkim_key", f"key {key.record_name} is damaged; the message cannot be signed as it was") from None
    return parsed.signer(keys)
