"""What came back: received mail and what was done with it; events of bounces and complaints; rates by campaign and domain."""

from typing import Annotated, Literal

from litestar import Controller, Response, get
from litestar.di import NamedDependency
from litestar.params import QueryParameter

from control.guards import Caller
from control.parameters import MAX_ID, After, Before, Id, Limit, Page
from control.services import Services
from store import campaigns, feedback, received
from store.feedback import CampaignFeedback, DomainRates, FeedbackEvent
from store.postgres import connection
from store.received import ReceivedMessage

Kind = Literal["dsn", "arf", "unsubscribe", "autoreply", "challenge", "reply", "other", "unreadable"]
Outcome = Literal["acted", "recorded", "repeated", "unproven", "kept", "unreadable"]


class ReceivedController(Controller):
    """Mail that came in. A user sees what is proven to be about mail of its own; an administrator sees all."""

    path = "/inbound/messages"
    tags = ("inbound",)

    @get("/", operation_id="listReceived", summary="List received mail")
    async def page(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        kind: Annotated[Kind | None, QueryParameter(description="Only what was read as this.")] = None,
        outcome: Annotated[Outcome | None, QueryParameter(description="Only what this was done with.")] = None,
        before: Before = None,
        limit: Limit = 100,
    ) -> Page[ReceivedMessage]:
        """The newest first, without what was read in them. `kind` is empty while a message waits to be read."""
        async with connection(services.pool) as conn:
            found = await received.page(conn, caller.sees, before=before, limit=limit, kind=kind, outcome=outcome)
        return Page(found, found[-1].id if len(found) == limit else None)

    @get("/{message_id:int}", operation_id="getReceived", summary="One received message")
    async def one(self, message_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> ReceivedMessage:
        """How it was read, what was done and why."""
        async with connection(services.pool) as conn:
            return await received.get(conn, caller.sees, message_id)

    @get("/{message_id:int}/raw", operation_id="getReceivedRaw", summary="A received message as it came", media_type="message/rfc822")
    async def raw(self, message_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Response[bytes]:
        """Octet for octet; kept for `inbound.keep_days` after it was handled."""
        async with connection(services.pool) as conn:
            found = await received.raw(conn, caller.sees, message_id)
        headers = {"content-disposition": f'attachment; filename="{message_id}.eml"'}
        return Response(found, media_type="message/rfc822", headers=headers)


class FeedbackController(Controller):
    """Bounces, complaints and unsubscribes that came by mail, each counted once."""

    path = "/feedback"
    tags = ("inbound",)

    @get("/", operation_id="listFeedback", summary="List what came back, by event")
    async def page(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        kind: Annotated[
            Literal["rb", "rs", "f", "u"] | None,
            QueryParameter(description="rb: remote bounce; rs: delayed or delivered; f: complaint; u: unsubscribe by mail."),
        ] = None,
        campaign_id: Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)] = None,
        after: After = 0,
        limit: Limit = 100,
    ) -> Page[FeedbackEvent]:
        """The oldest first: come back with `next` for what is new."""
        async with connection(services.pool) as conn:
            if campaign_id is not None:
                await campaigns.get(conn, caller.sees, campaign_id)
            found = await feedback.events(conn, caller.sees, after=after, limit=limit, kind=kind, campaign_id=campaign_id)
        return Page(found, found[-1].id if len(found) == limit else None)

    @get("/domains", operation_id="getSenderDomainRates", summary="Bounce and complaint rates by sender domain")
    async def domains(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        days: Annotated[int, QueryParameter(ge=1, le=366, description="Of campaigns started in so many days.")] = 30,
    ) -> list[DomainRates]:
        """The domain of the From address, as it was sent; the 50 that sent most."""
        async with connection(services.pool) as conn:
            return await feedback.of_sender_domains(conn, caller.sees, days)


class CampaignFeedbackController(Controller):
    """The same for one campaign."""

    path = "/campaigns/{campaign_id:int}/feedback"
    tags = ("reports",)

    @get("/", operation_id="getCampaignFeedback", summary="Bounce and complaint rates of a campaign")
    async def show(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> CampaignFeedback:
        """With the rates of each recipient domain: a second or so per million recipients."""
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
            return await feedback.of_campaign(conn, campaign_id)
