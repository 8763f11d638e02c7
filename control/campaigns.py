"""Campaigns: drafts whose content is compiled when it is saved, and start, pause, resume, cancel, each safe to repeat."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import msgspec
from litestar import Controller, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import JSONBody, QueryParameter
from msgspec import UNSET, UnsetType

from compose import markup
from compose.campaign import check
from control import dkim, preflight
from control.guards import Caller
from control.parameters import MAX_ID, Before, Id, Limit, Page, given, one_line
from control.services import Services
from domain import address
from domain.campaign import CampaignContent
from domain.errors import Invalid, NotFound
from store import campaigns, egress, lists, tracking
from store.campaigns import Campaign
from store.postgres import PooledConnection, connection, transaction
from store.tracking import TrackingReport

T = TypeVar("T")

MAX_SUBJECT_CHARACTERS = 2000  # a template; what it renders to is checked per recipient

MailClass = Literal["transactional", "autoresponder", "marketing"]
CampaignState = Literal["draft", "preparing", "running", "paused", "cancelling", "cancelled", "completed"]


class CampaignCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new draft. `subject`, `html` and `text` are templates; without `from_email` the list's sender or the enforced From is used.

    Without `text` a text part is made from the HTML part; "" means none. `preheader` is a template hidden at the start of
    the HTML part. `mjml` becomes `html` when it is saved, and with `inline_css` style sheets become style attributes. `amp` is an
    AMP document for mail programs that show it; all others show the HTML part, which has to be there.

    `track_links` leads the links of the HTML part over the link domain, `track_opens` puts a pixel of the open domain at its end;
    `utm_source` and `utm_medium` are added to links that have none. With `track_conversions` followed links bring a click id along,
    which a tracker sends back (`/s2s`).
    """

    name: str
    list_id: int
    delivery_server_id: int
    subject: str
    mail_class: MailClass = "marketing"
    from_name: str = ""
    from_email: str = ""
    reply_to: str = ""
    html: str = ""
    mjml: str = ""
    inline_css: bool = False
    text: str | None = None
    preheader: str = ""
    amp: str = ""
    track_links: bool = False
    track_opens: bool = False
    track_conversions: bool = False
    utm_source: str = ""
    utm_medium: str = ""


class CampaignUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes of a draft."""

    name: str | UnsetType = UNSET
    list_id: int | UnsetType = UNSET
    delivery_server_id: int | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    mail_class: MailClass | UnsetType = UNSET
    from_name: str | UnsetType = UNSET
    from_email: str | UnsetType = UNSET
    reply_to: str | UnsetType = UNSET
    html: str | UnsetType = UNSET
    mjml: str | UnsetType = UNSET
    inline_css: bool | UnsetType = UNSET
    text: str | UnsetType | None = UNSET
    preheader: str | UnsetType = UNSET
    amp: str | UnsetType = UNSET
    track_links: bool | UnsetType = UNSET
    track_opens: bool | UnsetType = UNSET
    track_conversions: bool | UnsetType = UNSET
    utm_source: str | UnsetType = UNSET
    utm_medium: str | UnsetType = UNSET


class CampaignController(Controller):
    """The campaigns of one user."""

    path = "/campaigns"
    tags = ("campaigns",)

    @post("/", operation_id="createCampaign", summary="Create a campaign")
    async def create(
        self, data: JSONBody[CampaignCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> Campaign:
        """A draft. Content that could not be sent is refused, with the line and column of a mistake in a template."""
        fields = await prepared(checked({name: getattr(data, name) for name in data.__struct_fields__}))
        async with transaction(services.pool) as conn:
            await _check_references(conn, caller.user_id, fields)
            campaign = await campaigns.create(conn, caller.user_id, fields)
            await check_content(conn, services, campaign)
        return campaign

    @get("/", operation_id="listCampaigns", summary="List campaigns")
    async def page(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        before: Before = None,
        limit: Limit = 100,
        in_state: Annotated[CampaignState | None, QueryParameter(name="state", description="Only those in this state.")] = None,
    ) -> Page[Campaign]:
        """Newest first, without their bodies."""
        async with connection(services.pool) as conn:
            found = await campaigns.list_campaigns(conn, caller.sees, before, limit, in_state)
        return Page(found, found[-1].id if len(found) == limit else None)

    @get("/{campaign_id:int}", operation_id="getCampaign", summary="One campaign")
    async def one(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Campaign:
        """By id."""
        async with connection(services.pool) as conn:
            return await campaigns.get(conn, caller.sees, campaign_id)

    @patch("/{campaign_id:int}", operation_id="updateCampaign", summary="Change a draft")
    async def update(
        self, campaign_id: Id, data: JSONBody[CampaignUpdate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> Campaign:
        """Fields that are left out stay. A campaign that was started cannot be changed."""
        fields = checked(given(data))
        async with connection(services.pool) as conn:
            before = await campaigns.get(conn, caller.sees, campaign_id)
        fields = await prepared(fields, before)
        async with transaction(services.pool) as conn:
            owner = await campaigns.get(conn, caller.sees, campaign_id)
            await _check_references(conn, owner.user_id, fields)
            campaign = await campaigns.update(conn, campaign_id, fields)
            await check_content(conn, services, campaign)
        return campaign

    @delete("/{campaign_id:int}", operation_id="deleteCampaign", summary="Delete a draft")
    async def remove(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """A campaign that was started stays, with what became of it."""
        async with transaction(services.pool) as conn:
            await campaigns.delete(conn, caller.sees, campaign_id)

    @post("/{campaign_id:int}/start", operation_id="startCampaign", summary="Start a campaign", status_code=200)
    async def start(
        self,
        campaign_id: Id,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        force: Annotated[bool, QueryParameter(description="Start although pre-flight found something blocking.")] = False,
    ) -> Campaign:
        """Its recipients are those subscribed now, with their data as it stands now. Starting twice is fine.

        Held where pre-flight finds something blocking (`preflight.hold_start`), unless forced. Once this is answered, every one of
        them gets an outcome, whatever process dies.
        """
        async with connection(services.pool) as conn:
            campaign = await campaigns.get(conn, caller.sees, campaign_id)
            destinations: tuple[str, ...] = ()
            if campaign.state == "draft":
                if not (campaign.html.strip() or campaign.text.strip()):
                    raise Invalid("html", "is empty, and so is text: there is nothing to send")
                destinations = await check_content(conn, services, campaign)
        if campaign.state == "draft" and not force:
            await preflight.hold(services, campaign_id)
        campaign = await campaigns.start(services.pool, campaign_id, campaign.version, destinations)
        await services.announce("campaigns")
        return campaign

    @get("/{campaign_id:int}/tracking", operation_id="getCampaignTracking", summary="Opens and clicks of a campaign")
    async def opens_and_clicks(
        self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> TrackingReport:
        """People and machines apart; per link in the order of the HTML part. A link with merge tags has no address here."""
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
            return await tracking.report(conn, campaign_id)

    @post("/{campaign_id:int}/pause", operation_id="pauseCampaign", summary="Pause a campaign", status_code=200)
    async def pause(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Campaign:
        """Sending stops within a second; every recipient waits. Pausing twice is fine."""
        await _visible(services, caller, campaign_id)
        campaign = await campaigns.pause(services.pool, campaign_id)
        await services.announce("campaigns")
        return campaign

    @post("/{campaign_id:int}/resume", operation_id="resumeCampaign", summary="Resume a paused campaign", status_code=200)
    async def resume(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Campaign:
        """It goes on where it stopped. Resuming twice is fine."""
        await _visible(services, caller, campaign_id)
        campaign = await campaigns.resume(services.pool, campaign_id)
        await services.announce("campaigns")
        return campaign

    @post("/{campaign_id:int}/cancel", operation_id="cancelCampaign", summary="Cancel a campaign", status_code=200)
    async def cancel(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Campaign:
        """Every recipient without an outcome ends as cancelled; it cannot be undone. Cancelling twice is fine."""
        await _visible(services, caller, campaign_id)
        campaign = await campaigns.cancel(services.pool, campaign_id)
        await services.announce("campaigns")
        return campaign


async def check_content(conn: PooledConnection, services: Services, campaign: Campaign) -> tuple[str, ...]:
    """Compile what the campaign says, as an engine will; returns where its followed links lead.

    Raises Invalid naming field, line and column.
    """
    content = await campaigns.content(conn, campaign.id)
    server = await egress.get(conn, campaign.user_id, campaign.delivery_server_id)
    await dkim.check_owner(conn, campaign.user_id, content, server)
    settings = services.settings
    return await compiled(
        lambda what: check(what, server, services.keyring, settings.inbound.public_url, settings.mail), content, campaign.text_derived
    )


async def compiled(build: Callable[[CampaignContent], T], content: CampaignContent, text_derived: bool) -> T:
    """What `build` makes of the content, in a thread: a large template takes a while, and other requests need not wait for it.

    Raises Invalid. A mistake is named where somebody wrote it: with `text_derived` in the HTML part that the text was made of.
    """
    try:
        return await asyncio.to_thread(build, content)
    except Invalid as error:
        if error.field == "text" and text_derived:
            await asyncio.to_thread(build, msgspec.structs.replace(content, text=""))
        raise


_LINES = (("name", 1, 255), ("subject", 1, MAX_SUBJECT_CHARACTERS), ("from_name", 0, 255), ("utm_source", 0, 255), ("utm_medium", 0, 255))


async def _visible(services: Services, caller: Caller, campaign_id: int) -> None:
    async with connection(services.pool) as conn:
        await campaigns.get(conn, caller.sees, campaign_id)


async def _check_references(conn: PooledConnection, user_id: int, fields: dict[str, object]) -> None:
    """List and delivery server must be the campaign owner's; somebody else's does not exist (S10). Raises NotFound."""
    for name, kind in (("list_id", "list"), ("delivery_server_id", "delivery server")):
        identity = fields.get(name)
        if not isinstance(identity, int):
            continue
        if not 1 <= identity <= MAX_ID:
            raise NotFound(kind, identity)
        if name == "list_id":
            await lists.get(conn, user_id, identity)
        else:
            await egress.get(conn, user_id, identity)


def checked(fields: dict[str, object]) -> dict[str, object]:
    """The fields that are there, each checked. Raises Invalid naming the first that is refused."""
    fields = dict(fields)
    for name, minimum, maximum in _LINES:
        value = fields.get(name)
        if isinstance(value, str):
            one_line(name, value, minimum=minimum, maximum=maximum)
    for name in ("from_email", "reply_to"):
        value = fields.get(name)
        if isinstance(value, str) and value:
            fields[name] = address.parse(value, name).text
    for name in ("html", "mjml", "text", "preheader", "amp"):
        value = fields.get(name)
        if isinstance(value, str) and "\0" in value:
            raise Invalid(name, "contains a NUL character")
    return fields


async def prepared(fields: dict[str, object], before: Campaign | None = None) -> dict[str, object]:
    """The fields as they are stored: HTML made from MJML, CSS inlined, the text part made from the HTML part where nobody wrote one.

    `before` is the draft that is changed. In a thread, because a large HTML part takes a while.
    """
    return await asyncio.to_thread(_prepared, fields, before)


def _prepared(fields: dict[str, object], before: Campaign | None) -> dict[str, object]:
    fields = dict(fields)
    mjml, inline_css = fields.pop("mjml", ""), fields.pop("inline_css", False)
    if mjml:
        if fields.get("html"):
            raise Invalid("mjml", "stands beside html; give one of them")
        fields["html"] = markup.from_mjml(str(mjml))
    if inline_css:
        if not fields.get("html"):
            raise Invalid("inline_css", "changes the html or mjml of the same request, and there is none")
        fields["html"] = markup.inline_css(str(fields["html"]))
    if "text" in fields:
        fields["text_derived"] = fields["text"] is None
    elif before is not None and before.text_derived and "html" in fields:
        fields["text_derived"] = True
    if fields.get("text_derived"):
        html = fields.get("html", before.html if before is not None else "")
        fields["text"] = markup.text_of(str(html)) if html else ""
    return fields
