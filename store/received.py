"""Received mail that waits to be read, and how it was read: the queue of the inbound workers, and what people ask about it.

A group of messages is taken, read and settled in one transaction, under row locks that other workers pass by: each message counts once,
and one whose worker dies is taken by the next.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from domain.errors import NotFound
from store.postgres import PooledConnection

MOST_BYTES_AT_ONCE: Final = 8 * 1024 * 1024


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """One message for one recipient, as it was kept."""

    id: int
    received_at: datetime
    peer: str
    mail_from: str
    recipient: str
    user_id: int | None
    raw: bytes


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one. `reading` is what is kept for people, without NUL; `user_id` whose it turned out to be."""

    id: int
    kind: str
    outcome: str
    reason: str
    reading: Any
    user_id: int | None = None
    campaign_id: int | None = None
    number: int | None = None


async def take(conn: PooledConnection, limit: int, *, timeout_seconds: float) -> list[Waiting]:
    """The oldest messages nobody has read or is reading, locked; at least one where there is one, together a few MiB."""
    rows = await conn.fetch(
        "select id, octet_length(raw) as size from inbound_messages where handled_at is null order by id limit $1 for update skip locked",
        limit,
        timeout=timeout_seconds,
    )
    ids: list[int] = []
    size = 0
    for row in rows:
        size += row["size"]
        if ids and size > MOST_BYTES_AT_ONCE:
            break
        ids.append(row["id"])
    if not ids:
        return []
    rows = await conn.fetch(
        "select id, received_at, coalesce(host(peer), '') as peer, mail_from, recipient, user_id, raw from inbound_messages "
        "where id = any($1) order by id",
        ids,
        timeout=timeout_seconds,
    )
    return [Waiting(**dict(row)) for row in rows]


async def settle(conn: PooledConnection, settled: Sequence[Settled], *, timeout_seconds: float) -> None:
    """Write down how messages were read and what was done, and count them."""
    await conn.execute(
        "update inbound_messages m set kind = t.kind, outcome = t.outcome, reason = t.reason, reading = t.reading, handled_at = now(), "
        "user_id = coalesce(m.user_id, t.u), campaign_id = coalesce(m.campaign_id, t.c), number = coalesce(m.number, t.n) "
        "from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[]::jsonb[], $6::bigint[], $7::bigint[], $8::int[]) "
        "as t (id, kind, outcome, reason, reading, u, c, n) where m.id = t.id",
        [each.id for each in settled],
        [each.kind for each in settled],
        [each.outcome for each in settled],
        [each.reason for each in settled],
        [msgspec.json.encode(each.reading).decode() for each in settled],
        [each.user_id for each in settled],
        [each.campaign_id for each in settled],
        [each.number for each in settled],
        timeout=timeout_seconds,
    )
    counts = Counter((each.kind, each.outcome) for each in settled)
    for (kind, outcome), messages in sorted(counts.items()):
        await conn.execute(
            "insert into inbound_totals as t (day, kind, outcome, messages) values (current_date, $1, $2, $3) "
            "on conflict (day, kind, outcome) do update set messages = t.messages + excluded.messages",
            kind,
            outcome,
            messages,
            timeout=timeout_seconds,
        )


async def prune(conn: PooledConnection, keep_days: float, limit: int, *, timeout_seconds: float) -> int:
    """Remove messages that were handled longer ago; what is read from them stays in `feedback`. Returns how many."""
    done = await conn.execute(
        "delete from inbound_messages where id in (select id from inbound_messages where handled_at < now() - make_interval(secs => $1) "
        "order by handled_at limit $2 for update skip locked)",
        keep_days * 86400,
        limit,
        timeout=timeout_seconds,
    )
    return int(done.rpartition(" ")[2])


# --- what people ask ----------------------------------------------------------------------------------------------------------------


class ReceivedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One received message: where it came from, how it was read, what was done and why."""

    id: int
    received_at: datetime
    handled_at: datetime | None
    peer: str
    mail_from: str
    recipient: str
    user_id: int | None
    campaign_id: int | None
    number: int | None
    bytes: int
    kind: str
    outcome: str
    reason: str
    reading: dict[str, Any] | None = None


_COLUMNS: Final = (
    "id, received_at, handled_at, coalesce(host(peer), '') as peer, mail_from, recipient, user_id, campaign_id, number, "
    "octet_length(raw) as bytes, kind, outcome, reason"
)


async def page(
    conn: PooledConnection, user_id: int | None, *, before: int | None, limit: int, kind: str | None = None, outcome: str | None = None
) -> list[ReceivedMessage]:
    """The newest first. `user_id` None: everybody's, and mail that is nobody's; kind "waiting" is what nobody has read yet."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from inbound_messages where ($1::bigint is null or user_id = $1) and ($2::bigint is null or id < $2) "
        "and ($3::text is null or kind = $3) and ($4::text is null or outcome = $4) order by id desc limit $5",
        user_id,
        before,
        kind,
        outcome,
        limit,
    )
    return [ReceivedMessage(**dict(row)) for row in rows]


async def get(conn: PooledConnection, user_id: int | None, message_id: int) -> ReceivedMessage:
    """One of them, with what it was read as. Raises NotFound."""
    row = await conn.fetchrow(
        f"select {_COLUMNS}, reading::text as reading from inbound_messages where id = $1 and ($2::bigint is null or user_id = $2)",
        message_id,
        user_id,
    )
    if row is None:
        raise NotFound("received message", message_id)
    fields = dict(row)
    fields["reading"] = msgspec.json.decode(fields["reading"]) if fields["reading"] else None
    return ReceivedMessage(**fields)


async def raw(conn: PooledConnection, user_id: int | None, message_id: int) -> bytes:
    """The message as it came. Raises NotFound."""
    found = await conn.fetchval(
        "select raw from inbound_messages where id = $1 and ($2::bigint is null or user_id = $2)", message_id, user_id
    )
    if found is None:
        raise NotFound("received message", message_id)
    return bytes(found)
