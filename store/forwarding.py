"""Forwarding of received mail: the rules, one row for the whole system, and the queue of what is still to go out."""

from datetime import datetime
from typing import Literal

import msgspec

from domain.forwarding import Routes, parse_aliases
from store.postgres import PooledConnection

State = Literal["waiting", "sent", "failed"]

KEPT_DAYS = 30  # of what was settled
MAX_WAITING = 10_000  # mails in the queue; the rest is kept and not forwarded


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
    """One mail of the queue, as it is shown. `inbound_id` is the received message; `reply` the last word about it."""

    id: int
    inbound_id: int
    target: str
    state: State
    attempts: int
    due_at: datetime
    created_at: datetime
    finished_at: datetime | None
    reply: str


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """One mail to send on. `attempts` counts this one, too."""

    id: int
    inbound_id: int
    target: str
    attempts: int
    created_at: datetime
    mail_from: str
    recipient: str
    received_at: datetime
    raw: bytes


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


async def enqueue(conn: PooledConnection, inbound_id: int, target: str, *, timeout_seconds: float) -> bool:
    """Queue a kept mail for `target`, in the transaction that keeps it. False: the queue is full."""
    done = await conn.execute(
        "insert into forwards (inbound_id, target) select $1, $2 "
        f"where (select count(*) from (select from forwards where state = 'waiting' limit {MAX_WAITING}) w) < {MAX_WAITING}",
        inbound_id,
        target,
        timeout=timeout_seconds,
    )
    return done != "INSERT 0 0"


async def page(conn: PooledConnection, before: int | None, limit: int) -> list[ForwardShown]:
    """The queue and what became of it, newest first."""
    rows = await conn.fetch(
        "select id, inbound_id, target, state, attempts, due_at, created_at, finished_at, reply from forwards "
        "where $1::bigint is null or id < $1 order by id desc limit $2",
        before,
        limit,
    )
    return [ForwardShown(**dict(row)) for row in rows]


async def claim(conn: PooledConnection, limit: int, lease_seconds: float) -> list[Forward]:
    """Take due mails for this process; who does not settle one within `lease_seconds` leaves it to the next."""
    await conn.execute(
        "update forwards f set state = 'failed', finished_at = now(), reply = 'the message is no longer kept' "
        "where f.state = 'waiting' and f.due_at <= now() and not exists (select from inbound_messages m where m.id = f.inbound_id)"
    )
    rows = await conn.fetch(
        "with taken as (update forwards set attempts = attempts + 1, due_at = now() + make_interval(secs => $2) where id in ("
        "select id from forwards where state = 'waiting' and due_at <= now() order by due_at limit $1 for update skip locked) "
        "returning id, inbound_id, target, attempts, created_at) "
        "select t.*, m.mail_from, m.recipient, m.received_at, m.raw from taken t join inbound_messages m on m.id = t.inbound_id "
        "order by t.id",
        limit,
        lease_seconds,
    )
    return [Forward(**dict(row)) for row in rows]


async def settle(conn: PooledConnection, forward_id: int, reply: str, *, sent: bool, again_in_seconds: float | None) -> None:
    """Write what became of one: sent, to be tried again, or (`again_in_seconds` None and not sent) failed for good."""
    await conn.execute(
        "update forwards set reply = $2, state = case when $3 then 'sent' when $4::float8 is null then 'failed' else 'waiting' end, "
        "due_at = now() + make_interval(secs => coalesce($4, 0)), "
        "finished_at = case when $3 or $4 is null then now() end where id = $1",
        forward_id,
        reply,
        sent,
        again_in_seconds,
    )


async def prune(conn: PooledConnection) -> None:
    """Forget what was settled long ago."""
    await conn.execute("delete from forwards where state <> 'waiting' and finished_at < now() - make_interval(days => $1)", KEPT_DAYS)
