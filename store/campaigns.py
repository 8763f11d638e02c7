"""Campaigns as the API sees them: drafts, transitions, progress. What engines do with them is `store.feed` and `store.leases`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from domain import states
from domain.campaign import CampaignContent
from domain.errors import Conflict, Invalid, NotFound
from domain.feedback import REMOTE_BOUNCE
from store import accounting, attachments, custom_headers, feedback, seeds, tracking
from store.postgres import Pool, PooledConnection, transaction


class Campaign(msgspec.Struct, frozen=True, kw_only=True):
    """One campaign. `recipients` is 0 until they are numbered."""

    id: int
    user_id: int
    name: str
    state: str
    mail_class: str
    list_id: int | None
    delivery_server_id: int
    subject: str
    from_name: str
    from_email: str
    reply_to: str
    html: str
    text: str
    text_derived: bool
    preheader: str
    amp: str
    track_links: bool
    track_opens: bool
    track_conversions: bool
    utm_source: str
    utm_medium: str
    recipients: int
    version: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a campaign stands, in recipients; `deferrals` and `uncertain` count attempts.

    `recipients` = delivered + bounced + expired + suppressed + cancelled + queued; `deferred` are those of the queued that wait
    for another attempt.
    """

    id: int
    state: str
    recipients: int
    delivered: int
    bounced: int
    expired: int
    suppressed: int
    cancelled: int
    queued: int
    deferred: int
    deferrals: int
    uncertain: int
    started_at: datetime | None
    finished_at: datetime | None
    messages_per_second: float | None = None


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One accounting record of a recipient. `kind` is a letter of `domain.states.KINDS`."""

    kind: str
    at: datetime
    attempt: int
    status: str
    category: str
    diagnostic: str
    mta: str
    delivery_server_id: int


class RecipientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one recipient, with every attempt. A report of failure after a delivery makes it bounced."""

    number: int
    subscriber_id: int
    email: str
    state: str
    next_attempt_at: datetime | None
    attempts: list[Attempt]
    feedback: list[feedback.FeedbackEvent]  # what came back later: bounces, complaints


# What a caller may write of a draft
FIELDS = (
    "name", "mail_class", "list_id", "delivery_server_id", "subject", "from_name", "from_email", "reply_to", "html", "text", "text_derived",
    "preheader", "amp", "track_links", "track_opens", "track_conversions", "utm_source", "utm_medium",
)  # fmt: skip
_COLUMNS = f"id, user_id, {', '.join(FIELDS)}, state, recipients, version, created_at, started_at, finished_at"
_HEADERS = custom_headers.OF_CAMPAIGN.format("c") + "::text as headers"
# lists of campaigns do not carry their bodies
_BRIEF = _COLUMNS.replace("html, text,", "'' as html, '' as text,").replace("amp,", "'' as amp,")


async def create(conn: PooledConnection, user_id: int, fields: dict[str, Any]) -> Campaign:
    """Store a draft; `fields` has every name of FIELDS. The caller has looked list and delivery server up with the user."""
    row = await conn.fetchrow(
        f"insert into campaigns (user_id, {', '.join(FIELDS)}) "
        f"values ($1, {', '.join(f'${i}' for i in range(2, len(FIELDS) + 2))}) returning {_COLUMNS}",
        user_id,
        *(fields[name] for name in FIELDS),
    )
    assert row is not None
    return Campaign(**dict(row))


async def get(conn: PooledConnection, user_id: int | None, campaign_id: int) -> Campaign:
    """One campaign; `user_id` None looks at everybody's. Raises NotFound."""
    row = await conn.fetchrow(
        f"select {_COLUMNS} from campaigns where id = $1 and ($2::bigint is null or user_id = $2)", campaign_id, user_id
    )
    if row is None:
        raise NotFound("campaign", campaign_id)
    return Campaign(**dict(row))


async def list_campaigns(conn: PooledConnection, user_id: int | None, before: int | None, limit: int, state: str | None) -> list[Campaign]:
    """Newest first, without their bodies; `user_id` None lists everybody's."""
    rows = await conn.fetch(
        f"select {_BRIEF} from campaigns where stream_month is null and ($1::bigint is null or user_id = $1) "
        "and ($2::bigint is null or id < $2) and ($3::text is null or state = $3) order by id desc limit $4",
        user_id,
        before,
        state,
        limit,
    )
    return [Campaign(**dict(row)) for row in rows]


async def update(conn: PooledConnection, campaign_id: int, fields: dict[str, Any]) -> Campaign:
    """Change a draft. The caller has looked it up with the user. Raises Conflict once it was started."""
    changes = {name: fields[name] for name in FIELDS if name in fields}
    assignments = "".join(f"{name} = ${i}, " for i, name in enumerate(changes, 2))
    row = await conn.fetchrow(
        f"update campaigns set {assignments}version = version + 1 where id = $1 and state = 'draft' returning {_COLUMNS}",
        campaign_id,
        *changes.values(),
    )
    if row is None:
        raise Conflict(f"campaign {campaign_id} was started; only a draft can be changed")
    return Campaign(**dict(row))


async def delete(conn: PooledConnection, user_id: int | None, campaign_id: int) -> None:
    """Delete a draft. Raises NotFound, Conflict once it was started."""
    await get(conn, user_id, campaign_id)
    if await conn.execute("delete from campaigns where id = $1 and state = 'draft'", campaign_id) == "DELETE 0":
        raise Conflict(f"campaign {campaign_id} was started; only a draft can be deleted")


async def content(conn: PooledConnection, campaign_id: int, part: int = 0) -> CampaignContent:
    """What a campaign says, or a part of a message stream, as `compose` wants it. Raises NotFound."""
    row = await conn.fetchrow(
        "select c.id, c.version, c.user_id, coalesce(c.list_id, 0) as list_id, c.name, c.subject, c.from_name, c.from_email, "
        "c.reply_to, c.html, c.text, c.preheader, c.amp, "
        "c.track_links, c.track_opens, c.utm_source, c.utm_medium, coalesce(c.list_name, l.name, '') as list_name, "
        "coalesce(c.list_sender_email, l.sender_email, '') as list_sender_email, "
        "coalesce(c.list_sender_name, l.sender_name, '') as list_sender_name, c.delivery_server_id, "
        f"extract(epoch from coalesce(c.started_at, c.created_at))::float8 as queued_at, c.mail_class, {_HEADERS}, "
        "coalesce(c.user_email, u.email) as user_email, coalesce(c.user_group_id, u.group_id) as user_group_id "
        "from campaigns c join users u on u.id = c.user_id left join lists l on l.id = c.list_id where c.id = $1",
        campaign_id,
    )
    if row is None:
        raise NotFound("campaign", campaign_id)
    fields = {**dict(row), "headers": custom_headers.of_campaign(row["headers"])}
    if part:
        said = await conn.fetchrow(
            "select content::text, raw, extract(epoch from created_at)::float8 as queued_at from message_parts "
            "where part = $1 and campaign_id = $2",
            part,
            campaign_id,
        )
        if said is None:
            raise NotFound("message part", part)
        content_of_part = msgspec.json.decode(said["content"])
        if "copy_of" in content_of_part:
            copied = await content(conn, content_of_part["copy_of"])
            return msgspec.structs.replace(copied, id=campaign_id, part=part, version=part)
        # A part is never changed, so it is a version of its stream's content
        fields |= {**content_of_part, "raw": said["raw"] or b"", "part": part, "version": part, "queued_at": said["queued_at"]}
    else:
        fields["attachments"] = await attachments.of_campaign(conn, campaign_id)
    return msgspec.convert(fields, CampaignContent)


async def start(pool: Pool, campaign_id: int, version: int, destinations: Sequence[str] = ()) -> Campaign:
    """Start a draft: once this returns, its recipients will be mailed whatever process dies (P2).

    `version` is the one whose content was checked, `destinations` are where its followed links lead. A campaign that was started
    already is returned as it is. Raises Conflict (paused, ended, changed meanwhile, its server or list gone), Invalid when nobody on
    its list is subscribed.
    """
    async with transaction(pool) as conn:
        campaign = await _locked(conn, campaign_id)
        if campaign.state in (states.PREPARING, states.RUNNING):
            return campaign
        if campaign.state == states.PAUSED:
            raise Conflict(f"campaign {campaign_id} is paused; resume it")
        if not states.may_follow(states.NEXT_CAMPAIGN_STATES, campaign.state, states.PREPARING):
            raise Conflict(f"campaign {campaign_id} is {campaign.state}; it cannot be started again, create a new one")
        if campaign.version != version:
            raise Conflict(f"campaign {campaign_id} was changed while it was being started; start it again")
        # Deleting the list or the server looks for unfinished campaigns under the row lock taken here
        if not await conn.fetchval("select true from lists where id = $1 and deleted_at is null for share", campaign.list_id):
            raise Conflict(f"list {campaign.list_id} was deleted; give campaign {campaign_id} another one")
        if not await conn.fetchval(
            "select true from delivery_servers where id = $1 and deleted_at is null for share", campaign.delivery_server_id
        ):
            raise Conflict(f"delivery server {campaign.delivery_server_id} was deleted; give campaign {campaign_id} another one")
        if not await conn.fetchval("select exists (select from subscribers where list_id = $1 and state = 'subscribed')", campaign.list_id):
            raise Invalid("list_id", f"nobody on list {campaign.list_id} is subscribed; import recipients first")
        await tracking.keep_links(conn, campaign_id, destinations)
        frozen = (
            f", started_at = now(), version = version + 1, headers = {custom_headers.OF_CAMPAIGN.format('campaigns')}, "
            "(user_email, user_group_id) = (select u.email, u.group_id from users u where u.id = campaigns.user_id), "
            "(list_name, list_sender_email, list_sender_name) = "
            "(select l.name, l.sender_email, l.sender_name from lists l where l.id = campaigns.list_id)"
        )
        started = await _set_state(conn, campaign_id, states.PREPARING, frozen)
        if started.mail_class == "marketing" and started.list_id is not None:
            await seeds.send_copies(conn, campaign_id, started.user_id, started.delivery_server_id, "marketing", started.list_id)
        return started


async def pause(pool: Pool, campaign_id: int) -> Campaign:
    """Engines stop within a second; every recipient waits. Raises Conflict for a draft and for one that has ended."""
    async with transaction(pool) as conn:
        campaign = await _locked(conn, campaign_id)
        if campaign.state == states.PAUSED:
            return campaign
        _require(campaign, states.PAUSED, "paused")
        return await _set_state(conn, campaign_id, states.PAUSED)


async def resume(pool: Pool, campaign_id: int) -> Campaign:
    """Go on where it was paused. Raises Conflict for a draft and for one that has ended."""
    async with transaction(pool) as conn:
        campaign = await _locked(conn, campaign_id)
        if campaign.state in (states.PREPARING, states.RUNNING):
            return campaign
        prepared = await conn.fetchval("select prepared_at is not null from campaigns where id = $1", campaign_id)
        following = states.RUNNING if prepared else states.PREPARING
        if campaign.state != states.PAUSED:
            raise Conflict(f"campaign {campaign_id} is {campaign.state}; only a paused one can be resumed")
        return await _set_state(conn, campaign_id, following, ", pause_reason = ''")


async def cancel(pool: Pool, campaign_id: int) -> Campaign:
    """End every recipient that has no outcome yet as cancelled. Raises Conflict for one that is completed."""
    async with transaction(pool) as conn:
        campaign = await _locked(conn, campaign_id)
        if campaign.state in (states.CANCELLING, states.CANCELLED):
            return campaign
        if campaign.state == states.DRAFT:
            return await _set_state(conn, campaign_id, states.CANCELLED, ", finished_at = now()")
        _require(campaign, states.CANCELLING, "cancelled")
        return await _set_state(conn, campaign_id, states.CANCELLING)


async def _locked(conn: PooledConnection, campaign_id: int) -> Campaign:
    row = await conn.fetchrow(f"select {_COLUMNS} from campaigns where id = $1 for update", campaign_id)
    if row is None:
        raise NotFound("campaign", campaign_id)
    return Campaign(**dict(row))


def _require(campaign: Campaign, following: str, word: str) -> None:
    if not states.may_follow(states.NEXT_CAMPAIGN_STATES, campaign.state, following):
        raise Conflict(f"campaign {campaign.id} is {campaign.state}; it cannot be {word}")


async def _set_state(conn: PooledConnection, campaign_id: int, state: str, more: str = "") -> Campaign:
    row = await conn.fetchrow(f"update campaigns set state = $2{more} where id = $1 returning {_COLUMNS}", campaign_id, state)
    assert row is not None
    return Campaign(**dict(row))


async def progress(conn: PooledConnection, user_id: int | None, campaign_id: int) -> Progress:
    """Where a campaign stands. Raises NotFound."""
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        campaign = await get(conn, user_id, campaign_id)
        sums = await accounting.totals_on(conn, campaign_id)
        deferred = await conn.fetchval("select count(*) from retries where campaign_id = $1", campaign_id)
    return Progress(
        id=campaign.id,
        state=campaign.state,
        recipients=sums.recipients,
        delivered=sums.delivered,
        bounced=sums.bounced,
        expired=sums.expired,
        suppressed=sums.suppressed,
        cancelled=sums.cancelled,
        queued=sums.queued,
        deferred=deferred,
        deferrals=sums.deferrals,
        uncertain=sums.uncertain,
        started_at=campaign.started_at,
        finished_at=campaign.finished_at,
    )


async def recipient(conn: PooledConnection, campaign_id: int, number: int | None, email: str = "") -> RecipientStatus:
    """One recipient by number, or by address (without case) where the number is None. Raises NotFound.

    By address it reads the whole partition: about 0.2 s for a million recipients.
    """
    if number is not None:
        row = await conn.fetchrow(
            "select number, subscriber_id, email from recipients where campaign_id = $1 and number = $2", campaign_id, number
        )
    else:
        row = await conn.fetchrow(
            "select number, subscriber_id, email from recipients where campaign_id = $1 and lower(email) = lower($2) limit 1",
            campaign_id,
            email,
        )
    if row is None:
        raise NotFound("recipient", email if number is None else number)
    records = await accounting.records_on(conn, campaign_id, row["number"])
    attempts = [Attempt(**{name: getattr(record, name) for name in Attempt.__struct_fields__}) for record in records]
    due_at = await conn.fetchval("select due_at from retries where campaign_id = $1 and number = $2", campaign_id, row["number"])
    terminal = [states.TERMINAL_KINDS[attempt.kind] for attempt in attempts if attempt.kind in states.TERMINAL_KINDS]
    if terminal:
        state = terminal[-1]
    elif due_at is not None:
        state = states.DEFERRED
    else:
        state = _batch_state(
            await conn.fetchrow(
                "select state, owner from batches where campaign_id = $1 and (numbers is null and $2 between first_number and last_number "
                "or $2 = any(numbers)) order by batch desc limit 1",
                campaign_id,
                row["number"],
            )
        )
    came_back = await feedback.events_of(conn, campaign_id, row["number"])
    if state == states.DELIVERED and any(event.kind == REMOTE_BOUNCE for event in came_back):
        state = states.BOUNCED  # its one terminal record stays what it is (P1): the report is an event of its own
    return RecipientStatus(**dict(row), state=state, next_attempt_at=due_at, attempts=attempts, feedback=came_back)


def _batch_state(row: asyncpg.Record | None) -> str:
    if row is None or row["state"] == "pending":
        return states.PENDING
    return states.LEASED if row["owner"] is not None else states.QUEUED
