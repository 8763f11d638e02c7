"""What came back and what follows: events, and in the same transaction suppressions, subscribers, soft bounces, totals and pauses.

Everything is done for a group of events at once, in the order of its keys, so that two processes never wait for each other in a circle.
The same event again changes nothing: `feedback` holds one row for each (campaign, number, kind, action).
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from domain import address, feedback, states
from domain.bounce import BounceRules, shipped_rules
from domain.errors import Invalid
from domain.suppression import Reason
from store import suppressions, unsubscribe_copies
from store.postgres import PooledConnection

MOST_CAMPAIGNS_LOOKED_AT: Final = 50  # for a delivery that resets a count of soft bounces

_MARK: Final = (
    "update subscribers s set state = $3, updated_at = now() from lists l where l.user_id = $1 and s.list_id = l.id "
    "and s.email_key = any($2::text[]) and (s.state = 'subscribed' or ($3 = 'unsubscribed' and s.state = 'bounced'))"
)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How much must come back until something follows."""

    soft_bounce_threshold: int = 3  # so many without a delivery in between count as a hard bounce; 0: never
    pause_sender_faults: int = 20  # so many messages refused for their sender pause it; 0: never ...
    pause_sender_fault_percent: float = 5.0  # ... when they are at least this share of the outcomes
    node: str = ""  # whose accounting files show the events
    unsubscribe_copy_to: str = ""  # gets a copy of each unsubscribe that came by mail; empty: nobody


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing reported about one sent message, whose token was verified. `kind` and `effect` are words of `domain.feedback`."""

    kind: str
    action: str
    user_id: int
    campaign_id: int
    number: int
    effect: str
    status: str = ""
    category: str = ""
    diagnostic: str = ""
    mta: str = ""
    format: str = ""
    details: dict[str, Any] = {}
    inbound_id: int | None = None
    named: frozenset[str] = frozenset()  # addresses the report names, lower case; empty: none

    @property
    def key(self) -> tuple[int, int, str, str]:
        """What makes two events one."""
        return self.campaign_id, self.number, self.kind, self.action


class Changes(msgspec.Struct):
    """What the engines must be told of."""

    suppressions: bool = False
    campaigns: bool = False


class _Consequence(msgspec.Struct, frozen=True):
    """An effect on one recipient."""

    user_id: int
    campaign_id: int
    email_key: str
    list_id: int | None
    subscriber_id: int
    effect: str
    remote: bool
    said: str
    number: int = 0
    email: str = ""


async def record(conn: PooledConnection, events: Sequence[Event], rules: Rules, changes: Changes) -> list[tuple[str, str]]:
    """Store events and draw the consequences; of each what became of it, as a word of `domain.feedback.OUTCOMES`, and a remark.

    A hard bounce that names other addresses only counts as soft: somebody passed the message on, and the end of that is not proof
    that the address we know is dead. The caller's transaction makes it all or nothing. Raises Unavailable.
    """
    unique = {event.key: event for event in reversed(events)}
    campaigns = await _campaigns(conn, {event.campaign_id for event in unique.values()})
    found = await _recipients(conn, (key[:2] for key in unique if key[0] in campaigns))
    known = {
        key: _named_or_soft(event, found[key[:2]]) for key, event in sorted(unique.items())
        if key[:2] in found and campaigns[event.campaign_id]["user_id"] == event.user_id
    }  # fmt: skip
    fresh = await _insert(conn, list(known.values()), found, rules.node)
    consequences = [
        _Consequence(event.user_id, event.campaign_id, found[key[:2]][2], campaigns[event.campaign_id]["list_id"], found[key[:2]][0],
                     event.effect, event.kind == feedback.REMOTE_BOUNCE, event.diagnostic, key[1], found[key[:2]][1])
        for key, event in known.items() if key in fresh
    ]  # fmt: skip
    await _follow(conn, consequences, rules, changes)
    answers = []
    for each in events:
        event = known.get(each.key)
        if event is None:
            answers.append((feedback.UNPROVEN, "its campaign or recipient is gone"))
        elif each.key in fresh:
            fresh.discard(each.key)  # the second of two in one group is a repetition
            acted = event.effect in ("hard", "complained", "unsubscribed")
            remark = "" if event.effect == each.effect else "it names other addresses than the one we wrote to: counts as soft"
            answers.append((feedback.ACTED if acted else feedback.RECORDED, remark))
        else:
            answers.append((feedback.REPEATED, "known already"))
    return answers


async def take_refusals(conn: PooledConnection, limit: int, rules: Rules, changes: Changes, classes: BounceRules | None = None) -> int:
    """Draw the consequences of what was refused while being sent; returns how many records of it there were."""
    classes = classes or shipped_rules()
    rows = await conn.fetch(
        "delete from refusals where id in (select id from refusals order by id limit $1 for update skip locked) "
        "returning campaign_id, number, kind::text as kind, category, diagnostic",
        limit,
    )
    effects = []
    for index, row in enumerate(rows):
        effect = feedback.refusal_effect(row["kind"], row["category"], classes.classify(0, row["diagnostic"]))
        if effect != "none":
            effects.append((row, effect))
        if index % 16 == 15:
            await asyncio.sleep(0)  # a hostile server's words can cost milliseconds each
    campaigns = await _campaigns(conn, {row["campaign_id"] for row, _ in effects})
    found = await _recipients(conn, ((row["campaign_id"], row["number"]) for row, _ in effects if row["campaign_id"] in campaigns))
    consequences = []
    for row, effect in effects:
        recipient = found.get((row["campaign_id"], row["number"]))
        if recipient is not None:
            campaign = campaigns[row["campaign_id"]]
            consequences.append(_Consequence(campaign["user_id"], row["campaign_id"], recipient[2], campaign["list_id"], recipient[0],
                                             effect, False, row["diagnostic"]))  # fmt: skip
    await _follow(conn, consequences, rules, changes)
    return len(rows)


def _named_or_soft(event: Event, recipient: tuple[int, str, str]) -> Event:
    ours = {recipient[1].lower(), recipient[2]}
    other = event.effect == "hard" and event.named and ours.isdisjoint(event.named)
    return msgspec.structs.replace(event, effect="soft") if other else event


# --- whom it is about -------------------------------------------------------------------------------------------------------------


async def _campaigns(conn: PooledConnection, ids: Iterable[int]) -> dict[int, Any]:
    rows = await conn.fetch(
        "select c.id, c.user_id, c.list_id from campaigns c join users u on u.id = c.user_id where c.id = any($1)", sorted(ids)
    )
    return {row["id"]: row for row in rows}


async def _recipients(conn: PooledConnection, keys: Iterable[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, str, str]]:
    """(campaign, number) -> subscriber id, address, key of the address."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for campaign_id, number in keys:
        wanted[campaign_id].add(number)
    found: dict[tuple[int, int], tuple[int, str, str]] = {}
    for campaign_id, numbers in sorted(wanted.items()):
        for number, subscriber_id, email in await conn.fetch(
            "select number, subscriber_id, email from recipients where campaign_id = $1 and number = any($2)", campaign_id, sorted(numbers)
        ):
            try:
                found[campaign_id, number] = (subscriber_id, email, address.key(email))
            except Invalid:
                continue  # it was refused when it was to be sent
    return found


async def _insert(
    conn: PooledConnection, events: list[Event], found: dict[tuple[int, int], tuple[int, str, str]], node: str
) -> set[tuple[int, int, str, str]]:
    if not events:
        return set()
    columns = ("kind", "action", "user_id", "campaign_id", "number", "effect", "status", "category", "diagnostic", "mta", "format",
               "inbound_id")  # fmt: skip
    rows = await conn.fetch(
        "insert into feedback (kind, action, user_id, campaign_id, number, effect, status, category, diagnostic, mta, format, inbound_id, "
        "recipient, details, node) select t.*, $15 from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::int[], $6::text[], "
        "$7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::bigint[], $13::text[], $14::text[]::jsonb[]) "
        "as t on conflict (campaign_id, number, kind, action) do nothing returning campaign_id, number, kind, action",
        *([getattr(event, name) for event in events] for name in columns),
        [found[event.key[:2]][1] for event in events],
        [msgspec.json.encode(event.details).decode() for event in events],
        node,
    )
    return {(row[0], row[1], row[2], row[3]) for row in rows}


# --- what follows -----------------------------------------------------------------------------------------------------------------


async def _follow(conn: PooledConnection, consequences: list[_Consequence], rules: Rules, changes: Changes) -> None:
    escalated = await _count_soft(conn, [each for each in consequences if each.effect == "soft"], rules.soft_bounce_threshold)
    groups: dict[tuple[int, str, str], set[str]] = defaultdict(set)  # user, effect, note -> keys
    for each in consequences:
        if each.effect in ("hard", "complained"):
            words = "hard bounce" if each.effect == "hard" else "complaint"
            groups[each.user_id, each.effect, f"{words}, campaign {each.campaign_id}"].add(each.email_key)
    for user_id, email_key, campaign_id in escalated:
        groups[user_id, "hard", f"{rules.soft_bounce_threshold} soft bounces, the last of campaign {campaign_id}"].add(email_key)
    for (user_id, effect, note), keys in sorted(groups.items()):
        reason: Reason = "bounced" if effect == "hard" else "complained"
        await conn.execute(_MARK, user_id, sorted(keys), "bounced" if effect == "hard" else "unsubscribed")
        await suppressions.add(conn, user_id, None, sorted(keys), reason, note)
        changes.suppressions = True
    for each in consequences:
        if each.effect == "unsubscribed":
            note = f"asked by mail, campaign {each.campaign_id}"
            if each.list_id is None:
                left = bool(await suppressions.add(conn, each.user_id, None, [each.email_key], "unsubscribed", note))
            else:
                left = await suppressions.unsubscribe(conn, each.user_id, each.list_id, each.subscriber_id, each.email_key, note)
            if left and rules.unsubscribe_copy_to:
                await unsubscribe_copies.send(conn, each.user_id, each.campaign_id, each.number, each.email, rules.unsubscribe_copy_to)
            changes.suppressions = True
    delivered = sorted({(each.user_id, each.email_key) for each in consequences if each.effect in ("delivered", "hard", "complained")})
    if delivered:
        await conn.execute(
            "delete from soft_bounces s using unnest($1::bigint[], $2::text[]) as t (u, k) where s.user_id = t.u and s.email_key = t.k",
            [user_id for user_id, _ in delivered],
            [key for _, key in delivered],
        )
    await _count(conn, consequences)
    await _pause(conn, [each for each in consequences if each.effect == "sender"], rules, changes)


async def _count_soft(conn: PooledConnection, soft: list[_Consequence], threshold: int) -> list[tuple[int, str, int]]:
    """Count soft bounces; (user, key, campaign) of those that are too many."""
    too_many = []
    for each in sorted(soft, key=lambda item: (item.user_id, item.email_key)):
        times = await conn.fetchval(
            "insert into soft_bounces as s (user_id, email_key, campaigns, bounced_at) values ($1, $2, array[$3::bigint], array[now()]) "
            "on conflict (user_id, email_key) do update set campaigns = s.campaigns || excluded.campaigns, "
            "bounced_at = s.bounced_at || excluded.bounced_at returning bounced_at",
            each.user_id,
            each.email_key,
            each.campaign_id,
        )
        if not threshold or len(times) < threshold:
            continue
        since = await _delivered_since(conn, each.user_id, each.email_key, times[0])
        left = [index for index, at in enumerate(times, 1) if since is None or at > since]
        if len(left) >= threshold:
            too_many.append((each.user_id, each.email_key, each.campaign_id))
            await conn.execute("delete from soft_bounces where user_id = $1 and email_key = $2", each.user_id, each.email_key)
        else:
            await conn.execute(
                "update soft_bounces set campaigns = campaigns[$3:], bounced_at = bounced_at[$3:] where user_id = $1 and email_key = $2",
                each.user_id,
                each.email_key,
                left[0] if left else len(times) + 1,
            )
    return too_many


async def _delivered_since(conn: PooledConnection, user_id: int, email_key: str, first: datetime) -> datetime | None:
    """When the address was delivered to last after `first`, by a message that no report has called undelivered since.

    Asked only when an address has reached the threshold: nothing on the way of sending keeps such a time per address.
    """
    subscribers = await conn.fetch(
        "select s.id, s.list_id from lists l join subscribers s on s.list_id = l.id where l.user_id = $1 and s.email_key = $2",
        user_id,
        email_key,
    )
    campaigns = await conn.fetch(
        "select id from campaigns where user_id = $1 and list_id = any($2) and started_at is not null "
        "and (finished_at is null or finished_at > $3) order by id desc limit $4",
        user_id,
        [row["list_id"] for row in subscribers],
        first,
        MOST_CAMPAIGNS_LOOKED_AT,
    )
    last: datetime | None = None
    async with conn.transaction():
        await conn.execute("set local enable_seqscan = off")  # else PostgreSQL reads whole partitions: it has no statistics of them
        for campaign in campaigns:
            at = await conn.fetchval(
                "select max(a.at) from recipients r join accounting a on a.campaign_id = $1 and a.number = r.number "
                "where r.campaign_id = $1 and r.subscriber_id = any($2) and a.kind = $3 and a.at > $4 and not exists ("
                "select from feedback f where f.campaign_id = $1 and f.number = r.number and f.kind = 'rb')",
                campaign["id"],
                [row["id"] for row in subscribers],
                states.KIND_DELIVERY.encode(),
                first,
            )
            last = max(filter(None, (last, at)), default=None)
        await conn.execute("set local enable_seqscan = on")
    return last


async def _count(conn: PooledConnection, consequences: list[_Consequence]) -> None:
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for each in consequences:
        counts[each.campaign_id][each.effect] += 1
        counts[each.campaign_id]["remote"] += each.remote
    names = ("hard", "soft", "remote", "complained", "unsubscribed", "sender")
    ids = sorted(counts)
    if ids:
        await conn.execute(
            "insert into campaign_feedback as c (campaign_id, hard, soft, remote_bounces, complaints, unsubscribes, sender_faults) "
            "select * from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[]) "
            "on conflict (campaign_id) do update set hard = c.hard + excluded.hard, soft = c.soft + excluded.soft, "
            "remote_bounces = c.remote_bounces + excluded.remote_bounces, complaints = c.complaints + excluded.complaints, "
            "unsubscribes = c.unsubscribes + excluded.unsubscribes, sender_faults = c.sender_faults + excluded.sender_faults",
            ids,
            *([counts[campaign_id][name] for campaign_id in ids] for name in names),
        )


# The domain of the From address as it is sent
FROM_DOMAIN = (
    "lower(split_part(coalesce(nullif(s.enforced_from, ''), case when s.use_list_sender_as_from then nullif(l.sender_email, '') end, "
    "c.from_email), '@', 2))"
)
_WITH_DOMAIN = (
    f"select c.id, c.user_id, c.state, c.mail_class, {FROM_DOMAIN} as domain from campaigns c "
    "join delivery_servers s on s.id = c.delivery_server_id left join lists l on l.id = c.list_id"
)


async def _pause(conn: PooledConnection, faults: list[_Consequence], rules: Rules, changes: Changes) -> None:
    """Pause what is sent from a domain that too many servers refuse. Transactional mail is never held back for it."""
    if not rules.pause_sender_faults:
        return
    said = {each.campaign_id: each.said for each in faults}
    for row in await conn.fetch(
        "select f.campaign_id, f.sender_faults - f.faults_at_pause as faults, "
        "coalesce(sum(t.delivered + t.bounced), 0)::bigint - f.outcomes_at_pause as outcomes from campaign_feedback f "
        "left join campaign_totals t on t.campaign_id = f.campaign_id where f.campaign_id = any($1) "
        "group by f.campaign_id order by f.campaign_id",
        sorted(said),
    ):
        outcomes = max(row["outcomes"], row["faults"])
        if row["faults"] < rules.pause_sender_faults or row["faults"] * 100 < rules.pause_sender_fault_percent * outcomes:
            continue
        campaign_id = row["campaign_id"]
        reason = (
            f"{row['faults']} of {outcomes} messages of campaign {campaign_id} were refused for who sends them (authentication, "
            f"reputation or rate), the last with: {said[campaign_id][:300]}. Nothing more is sent from %s until you resume it."
        )
        done = await conn.fetch(
            f"with about as ({_WITH_DOMAIN} where c.id = $1), same as ({_WITH_DOMAIN} where c.user_id = (select user_id from about) "
            "and c.state in ('preparing', 'running') and c.mail_class <> 'transactional') "
            "update campaigns c set state = 'paused', pause_reason = replace($2, '%s', same.domain) from same, about "
            "where c.id = same.id and same.domain = about.domain and c.state in ('preparing', 'running') returning c.id",
            campaign_id,
            reason,
        )
        changes.campaigns = changes.campaigns or bool(done)
        await conn.execute(
            "update campaign_feedback f set faults_at_pause = sender_faults, outcomes_at_pause = "
            "(select coalesce(sum(delivered + bounced), 0) from campaign_totals t where t.campaign_id = f.campaign_id) "
            "where campaign_id = any($1)",
            sorted({campaign_id, *(each["id"] for each in done)}),
        )


# --- the accounting files -----------------------------------------------------------------------------------------------------------


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """An event as the accounting files of a node show it."""

    id: int
    at: datetime
    kind: str
    action: str
    campaign_id: int
    recipient: str
    status: str
    category: str
    diagnostic: str
    mta: str
    format: str
    details: dict[str, Any]


async def unwritten(conn: PooledConnection, node: str, limit: int) -> list[Written]:
    """Events that are not in the accounting files of `node` yet, the oldest first."""
    rows = await conn.fetch(
        "select id, at, kind, action, campaign_id, recipient, status, category, diagnostic, mta, format, details::text as details "
        "from feedback where node = $1 and node <> '' order by id limit $2",
        node,
        limit,
    )
    return [Written(**{**dict(row), "details": msgspec.json.decode(row["details"])}) for row in rows]


async def mark_written(conn: PooledConnection, ids: Sequence[int]) -> None:
    """They are in the files, for good."""
    await conn.execute("update feedback set node = '' where id = any($1)", list(ids))
