"""What people ask about what came back: events, and the rates of bounces and complaints by campaign, recipient's and sender's domain."""

from datetime import datetime
from typing import Any, Final

import msgspec

from store.bounces import FROM_DOMAIN
from store.postgres import PooledConnection

MOST_DOMAINS: Final = 50

_COLUMNS: Final = (
    "id, at, kind, action, user_id, campaign_id, number, recipient, effect, status, category, diagnostic, mta, format, inbound_id, "
    "details::text as details"
)


class FeedbackEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event. `kind`: rb remote bounce, rs remote status (delayed, delivered), f complaint, u unsubscribe by mail.

    `effect`: hard, soft, sender, content, complained, unsubscribed, delivered, none.
    """

    id: int
    at: datetime
    kind: str
    action: str
    user_id: int
    campaign_id: int
    number: int
    recipient: str
    effect: str
    status: str
    category: str
    diagnostic: str
    mta: str
    format: str
    inbound_id: int | None
    details: dict[str, Any] = {}


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Counts in recipients. Rates are parts of 1, null where nothing was sent.

    `bounce_rate`: refused, or reported undeliverable later, of those that got an answer; `complaint_rate`: of those delivered.
    """

    delivered: int
    bounced: int
    remote_bounces: int
    complaints: int
    bounce_rate: float | None
    complaint_rate: float | None


class DomainRates(Rates, frozen=True, kw_only=True):
    """The same for one domain."""

    domain: str


class CampaignFeedback(Rates, frozen=True, kw_only=True):
    """What came back for one campaign. `sender_faults`: refused for who sends; `pause_reason`: why Sluice paused it by itself."""

    campaign_id: int
    hard: int
    soft: int
    unsubscribes: int
    sender_faults: int
    pause_reason: str
    domains: list[DomainRates]  # of recipients, the largest first


async def events(
    conn: PooledConnection, user_id: int | None, *, after: int, limit: int, kind: str | None = None, campaign_id: int | None = None
) -> list[FeedbackEvent]:
    """By id, so that a reader who comes back with the last one misses none (an id may appear a moment after a higher one)."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from feedback where ($1::bigint is null or user_id = $1) and id > $2 and ($3::text is null or kind = $3) "
        "and ($4::bigint is null or campaign_id = $4) order by id limit $5",
        user_id,
        after,
        kind,
        campaign_id,
        limit,
    )
    return [_event(row) for row in rows]


async def events_of(conn: PooledConnection, campaign_id: int, number: int) -> list[FeedbackEvent]:
    """Everything that came back for one recipient of a campaign, the oldest first."""
    rows = await conn.fetch(f"select {_COLUMNS} from feedback where campaign_id = $1 and number = $2 order by id", campaign_id, number)
    return [_event(row) for row in rows]


def _event(row: Any) -> FeedbackEvent:
    return FeedbackEvent(**{**dict(row), "details": msgspec.json.decode(row["details"])})


async def of_campaign(conn: PooledConnection, campaign_id: int, *, timeout_seconds: float = 120.0) -> CampaignFeedback:
    """Counts and rates of a campaign the caller may see; the domains count its accounting: a second or so per million."""
    row = await conn.fetchrow(
        "select c.pause_reason, c.state, coalesce(f.hard, 0) as hard, coalesce(f.soft, 0) as soft, "
        "coalesce(f.remote_bounces, 0) as remote_bounces, coalesce(f.complaints, 0) as complaints, "
        "coalesce(f.unsubscribes, 0) as unsubscribes, coalesce(f.sender_faults, 0) as sender_faults, "
        "(select coalesce(sum(t.delivered), 0)::bigint from campaign_totals t where t.campaign_id = c.id) as delivered, "
        "(select coalesce(sum(t.bounced), 0)::bigint from campaign_totals t where t.campaign_id = c.id) as bounced "
        "from campaigns c left join campaign_feedback f on f.campaign_id = c.id where c.id = $1",
        campaign_id,
    )
    assert row is not None
    domains = await conn.fetch(
        "select coalesce(a.domain, f.domain) as domain, coalesce(a.delivered, 0) as delivered, coalesce(a.bounced, 0) as bounced, "
        "coalesce(f.remote_bounces, 0) as remote_bounces, coalesce(f.complaints, 0) as complaints from "
        "(select lower(split_part(recipient, '@', 2)) as domain, count(*) filter (where kind = 'd') as delivered, "
        "count(*) filter (where kind = 'b') as bounced from accounting where campaign_id = $1 and kind in ('d', 'b') group by 1) a "
        "full join (select lower(split_part(recipient, '@', 2)) as domain, count(*) filter (where kind = 'rb') as remote_bounces, "
        "count(*) filter (where effect = 'complained') as complaints from feedback where campaign_id = $1 group by 1) f "
        "on a.domain = f.domain order by coalesce(a.delivered, 0) + coalesce(a.bounced, 0) desc, 1 limit $2",
        campaign_id,
        MOST_DOMAINS,
        timeout=timeout_seconds,
    )
    return CampaignFeedback(
        campaign_id=campaign_id,
        hard=row["hard"],
        soft=row["soft"],
        unsubscribes=row["unsubscribes"],
        sender_faults=row["sender_faults"],
        pause_reason=row["pause_reason"] if row["state"] == "paused" else "",
        domains=[DomainRates(domain=each["domain"], **_rates(each)) for each in domains],
        **_rates(row),
    )


async def of_sender_domains(conn: PooledConnection, user_id: int | None, days: int) -> list[DomainRates]:
    """Rates of each domain that campaigns of the last `days` were sent from, the largest first."""
    rows = await conn.fetch(
        f"select {FROM_DOMAIN} as domain, coalesce(sum(t.delivered), 0)::bigint as delivered, "
        "coalesce(sum(t.bounced), 0)::bigint as bounced, coalesce(sum(f.remote_bounces), 0)::bigint as remote_bounces, "
        "coalesce(sum(f.complaints), 0)::bigint as complaints from campaigns c join delivery_servers s on s.id = c.delivery_server_id "
        "left join lists l on l.id = c.list_id left join campaign_feedback f on f.campaign_id = c.id "
        "left join lateral (select sum(delivered) as delivered, sum(bounced) as bounced from campaign_totals where campaign_id = c.id) t "
        "on true where ($1::bigint is null or c.user_id = $1) and c.started_at > now() - make_interval(days => $2) "
        "group by 1 order by 2 desc, 1 limit $3",
        user_id,
        days,
        MOST_DOMAINS,
    )
    return [DomainRates(domain=each["domain"], **_rates(each)) for each in rows]


def _rates(row: Any) -> dict[str, Any]:
    delivered, bounced, remote, complaints = row["delivered"], row["bounced"], row["remote_bounces"], row["complaints"]
    answered = delivered + bounced
    return {
        "delivered": delivered,
        "bounced": bounced,
        "remote_bounces": remote,
        "complaints": complaints,
        "bounce_rate": round(min(1.0, (bounced + remote) / answered), 6) if answered else None,
        "complaint_rate": round(min(1.0, complaints / delivered), 6) if delivered else None,
    }
