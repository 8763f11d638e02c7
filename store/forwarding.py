"""Forwarding of received mail: the rules, one row for the whole system, and what was sent on by them, each as a message (`messages`)."""

from datetime import datetime
from typing import Literal

import msgspec

from domain.forwarding import Routes, parse_aliases
from store import messages
from store.postgres import PooledConnection

Rule = Literal["duty", "alias", "notice"]  # why a mail is sent on; a notice is one that could not be processed

FAILED = "failed"  # besides the states of recipients: it was not queued
KEPT_DAYS = 30
MAX_PER_HOUR = 10_000  # the rest is kept and not sent on


class Forwarding(msgspec.Struct, frozen=True, kw_only=True):
    """The rules. `delivery_server_id` is the way out; null: the first one that is enabled."""

    aliases: str = ""
    forward_to: str = ""
    abuse_to: str = ""
    delivery_server_id: int | None = None
    updated_at: datetime | None = None

    def routes(self, complaints: frozenset[str] = frozenset()) -> Routes:
        """The same, ready to be asked."""
        return Routes(parse_aliases(self.aliases), self.forward_to, self.abuse_to, complaints)


class ForwardShown(msgspec.Struct, frozen=True, kw_only=True):
    """One mail that was sent on. `inbound_id` is the received message, `message_id` what it became, null where it was not queued.

    `state`, `attempts` and `reply`, the last word about it, are those of that message's recipient.
    """

    id: int
    inbound_id: int
    rule: str
    target: str
    message_id: int | None
    state: str
    attempts: int
    next_attempt_at: datetime | None
    created_at: datetime
    reply: str


async def get(conn: PooledConnection) -> Forwarding:
    """The rules as they stand."""
    row = await conn.fetchrow("select aliases, forward_to, abuse_to, delivery_server_id, updated_at from forwarding")
    return Forwarding(**dict(row)) if row else Forwarding()


async def put(conn: PooledConnection, rules: Forwarding) -> Forwarding:
    """Replace the rules, which were checked."""
    await conn.execute(
        "insert into forwarding (aliases, forward_to, abuse_to, delivery_server_id) values ($1, $2, $3, $4) "
        "on conflict (singleton) do update set aliases = excluded.aliases, forward_to = excluded.forward_to, "
        "abuse_to = excluded.abuse_to, delivery_server_id = excluded.delivery_server_id, updated_at = now()",
        rules.aliases,
        rules.forward_to,
        rules.abuse_to,
        rules.delivery_server_id,
    )
    return await get(conn)


async def add(conn: PooledConnection, inbound_id: int, rule: Rule, target: str, message_id: int | None, reason: str) -> None:
    """Note that a kept mail is sent on as a message, or why it is not."""
    await conn.execute(
        "insert into forwards (inbound_id, rule, target, message_id, reason) values ($1, $2, $3, $4, $5)",
        inbound_id,
        rule,
        target,
        message_id,
        reason,
    )


async def lately(conn: PooledConnection, target: str | None = None) -> int:
    """How many were sent on in the last hour (to `target`), counted up to `MAX_PER_HOUR`."""
    return int(
        await conn.fetchval(
            "select count(*) from (select from forwards where created_at > now() - interval '1 hour' "
            "and ($1::text is null or target = $1) limit $2) f",
            target,
            MAX_PER_HOUR,
        )
    )


async def page(conn: PooledConnection, before: int | None, limit: int) -> list[ForwardShown]:
    """What was sent on and what became of it, newest first."""
    rows = await conn.fetch(
        "select f.id, f.inbound_id, f.rule, f.target, f.message_id, f.created_at, f.reason, m.campaign_id, m.first_number "
        "from forwards f left join messages m on m.id = f.message_id where $1::bigint is null or f.id < $1 order by f.id desc limit $2",
        before,
        limit,
    )
    shown = []
    for row in rows:
        found = await messages.standing(conn, row["campaign_id"], row["first_number"]) if row["campaign_id"] else None
        fields = {name: row[name] for name in ("id", "inbound_id", "rule", "target", "message_id", "created_at")}
        if found is None:
            fields |= {"state": FAILED, "attempts": 0, "next_attempt_at": None, "reply": row["reason"]}
        else:
            fields |= {"reply": found.diagnostic, **{name: getattr(found, name) for name in ("state", "attempts", "next_attempt_at")}}
        shown.append(ForwardShown(**fields))
    return shown


async def prune(conn: PooledConnection) -> None:
    """Forget what was sent on long ago."""
    await conn.execute("delete from forwards where created_at < now() - make_interval(days => $1)", KEPT_DAYS)
