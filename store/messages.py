"""Direct messages: mail that is sent at once, to recipients the caller names, without a list or a campaign of its own.

They go into a message stream: a row of `campaigns` that never ends, one per user, delivery server, mail class, list and month, with
partitions of its own. So a message costs some rows and no table, and feeder, leases, journal and accounting treat it like any other mail.
A stream rests as `completed` while it has nothing to do. What a message says is a part of its stream; equal contents share one.
"""

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import date, datetime
from typing import Any

import msgspec

from domain import states
from domain.campaign import Attachment
from domain.errors import NotFound
from domain.feedback import REMOTE_BOUNCE
from store import feed
from store.custom_headers import MailClass
from store.postgres import PooledConnection

BATCH_RECIPIENTS = 500
_COPY_TIMEOUT_SECONDS = 120.0
_TERMINAL = tuple(states.TERMINAL_KINDS)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What the recipients of a message get; fields as in `domain.campaign.CampaignContent`."""

    name: str
    subject: str
    from_name: str = ""
    from_email: str = ""
    reply_to: str = ""
    html: str = ""
    text: str = ""
    track_links: bool = False
    track_opens: bool = False
    utm_source: str = ""
    utm_medium: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    preheader: str = ""
    amp: str = ""
    attachments: tuple[Attachment, ...] = ()
    mail_from: str | None = None
    sign: bool = True


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """The same content as a campaign that was started, and so cannot be changed any more."""

    name: str
    copy_of: int


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The way a message takes. `list_id` None: it is mail to nobody's list."""

    user_id: int
    delivery_server_id: int
    mail_class: MailClass
    list_id: int | None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was taken. `campaign_id` and the numbers are what its recipients are called in journals and accounting."""

    id: int
    user_id: int
    campaign_id: int
    part: int
    first_number: int
    last_number: int
    name: str
    mail_class: MailClass
    list_id: int | None
    delivery_server_id: int
    metadata: dict[str, str]
    created_at: datetime

    @property
    def recipients(self) -> int:
        """How many."""
        return self.last_number - self.first_number + 1


class RecipientState(msgspec.Struct, frozen=True, kw_only=True):
    """Where one recipient stands: `diagnostic` is what was said last, `attempts` how often it was tried."""

    number: int
    email: str
    state: str
    status: str
    category: str
    diagnostic: str
    attempts: int
    at: datetime | None
    next_attempt_at: datetime | None
    metadata: dict[str, Any]


METADATA_KEY = "recipient metadata"  # in the merge data; no template can name it, because it is no identifier
HEADERS_KEY = "recipient headers"

_COLUMNS = (
    "m.id, m.user_id, m.campaign_id, m.part, m.first_number, m.last_number, m.name, c.mail_class, c.list_id, c.delivery_server_id, "
    "m.metadata::text as metadata, m.created_at"
)
_metadata = msgspec.json.Decoder(dict[str, str]).decode
_any_metadata = msgspec.json.Decoder(dict[str, Any]).decode

Row = tuple[str, str]  # address, merge data as a JSON object


_FIND = (
    "select id from campaigns where user_id = $1 and delivery_server_id = $2 and mail_class = $3 "
    "and coalesce(list_id, 0) = coalesce($4::bigint, 0) and stream_month = date_trunc('month', now() at time zone 'UTC')::date "
    "and state not in ('cancelling', 'cancelled')"
)
# One statement, because the row of the stream stays locked from here to the end of the transaction and others wait for it
_TAKE = (
    "with stream as (update campaigns set recipients = recipients + $2, batches = batches + ($2 - 1) / $3 + 1, finished_at = null, "
    "state = case when state = 'completed' then 'running' else state end "
    "where id = $1 and state not in ('cancelling', 'cancelled') "
    "returning id, recipients - $2 + 1 as first, recipients as last, batches - ($2 - 1) / $3 as batch), "
    "people as (insert into recipients (campaign_id, number, subscriber_id, email, data) "
    "select s.id, s.first + p.place - 1, -(s.first + p.place - 1), p.email, p.data from stream s, {people} p), "
    "cut as (insert into batches (campaign_id, batch, part, first_number, last_number, done) "
    "select s.id, s.batch + n, $4, s.first + n * $3, least(s.first + (n + 1) * $3 - 1, s.last), "
    "repeat('0', least($3, $2 - n * $3)::int)::varbit from stream s, generate_series(0, ($2::int - 1) / $3::int) n) "
    "insert into messages (user_id, campaign_id, part, name, first_number, last_number, metadata) "
    "select $5, s.id, $4, $6, s.first, s.last, $7 from stream s returning id, created_at, first_number, last_number"
)
_GIVEN = _TAKE.format(people="(select place, email, data from unnest($8::text[], $9::json[]) with ordinality t (email, data, place))")
_GATHERED = _TAKE.format(people="(select row_number() over (order by row) as place, email, data from message_rows)")


async def add(
    conn: PooledConnection, target: Target, part: Part | Copy, metadata: dict[str, str], rows: Sequence[Row], raw: bytes | None = None
) -> Message:
    """Take a message for `rows`, in the caller's transaction: once that is committed, every recipient gets an outcome (P2).

    `raw`: a whole message (`compose.raw.take`), sent as it is; of `part` the From address counts then.
    """
    return await _take(conn, target, part, metadata, len(rows), _GIVEN, [row[0] for row in rows], [row[1] for row in rows], raw=raw)


async def gather(conn: PooledConnection, blocks: AsyncIterator[list[Row]]) -> int:
    """Put recipients that arrive in blocks aside; returns how many. `add_gathered` takes them, on the same connection.

    Outside of any transaction: a slow client must not keep a stream locked.
    """
    await conn.execute(
        "drop table if exists pg_temp.message_rows; "
        "create temporary table message_rows (row int generated always as identity, email text not null, data json not null)"
    )
    count = 0
    async for rows in blocks:
        await conn.copy_records_to_table("message_rows", records=rows, columns=("email", "data"), timeout=_COPY_TIMEOUT_SECONDS)
        count += len(rows)
    return count


async def add_gathered(conn: PooledConnection, target: Target, part: Part | Copy, metadata: dict[str, str], count: int) -> Message:
    """`add` for what `gather` has put aside."""
    made = await _take(conn, target, part, metadata, count, _GATHERED)
    await conn.execute("drop table message_rows")
    return made


async def _take(
    conn: PooledConnection, target: Target, part: Part | Copy, metadata: dict[str, str], count: int, statement: str, *rows: list[str],
    raw: bytes | None = None,
) -> Message:  # fmt: skip
    content = msgspec.json.encode(part)
    for _ in range(3):
        campaign_id = await conn.fetchval(_FIND, *_way(target))
        if campaign_id is None:
            await _open(conn, target)
            continue
        number = await _part(conn, campaign_id, content, raw)
        row = await conn.fetchrow(
            statement,
            campaign_id,
            count,
            BATCH_RECIPIENTS,
            number,
            target.user_id,
            part.name,
            msgspec.json.encode(metadata).decode(),
            *rows,
            timeout=_COPY_TIMEOUT_SECONDS,
        )
        if row is not None:
            way = {name: getattr(target, name) for name in target.__struct_fields__}
            return Message(**dict(row), **way, campaign_id=campaign_id, part=number, name=part.name, metadata=metadata)
        # it was cancelled meanwhile
    raise NotFound("message stream", target.mail_class)


def _way(target: Target) -> tuple[int, int, MailClass, int | None]:
    return target.user_id, target.delivery_server_id, target.mail_class, target.list_id


async def _part(conn: PooledConnection, campaign_id: int, content: bytes, raw: bytes | None) -> int:
    """The number of a content of this stream, stored if it is new."""
    digest = hashlib.sha256(content + (raw or b"")).digest()
    for _ in range(3):
        number = await conn.fetchval(
            "with found as (select part from message_parts where campaign_id = $1 and digest = $2), made as ("
            "insert into message_parts (campaign_id, digest, content, raw) select $1, $2, $3, $4 where not exists (select from found) "
            "on conflict do nothing returning part) select part from found union all select part from made",
            campaign_id,
            digest,
            content.decode(),
            raw,
        )
        if number is not None:
            return int(number)
        # somebody stores the same at this moment: then it is found
    raise NotFound("message part", digest.hex())


async def _open(conn: PooledConnection, target: Target) -> None:
    """Make this month's stream, unless somebody else does so just now."""
    month: date = await conn.fetchval("select date_trunc('month', now() at time zone 'UTC')::date")
    campaign_id = await conn.fetchval(
        "insert into campaigns (user_id, name, state, mail_class, list_id, delivery_server_id, subject, stream_month, started_at, "
        "prepared_at, user_email, user_group_id) select $1, $2, 'running', $3, $4, $5, '', $6, now(), now(), email, group_id "
        "from users where id = $1 on conflict do nothing returning id",
        target.user_id,
        f"{target.mail_class} messages of {month:%Y-%m}",
        target.mail_class,
        target.list_id,
        target.delivery_server_id,
        month,
    )
    if campaign_id is not None:
        await feed.make_room(conn, campaign_id)


async def get(conn: PooledConnection, user_id: int | None, message_id: int) -> Message:
    """One message; `user_id` None looks at everybody's. Raises NotFound."""
    row = await conn.fetchrow(
        f"select {_COLUMNS} from messages m join campaigns c on c.id = m.campaign_id "
        "where m.id = $1 and ($2::bigint is null or m.user_id = $2)",
        message_id,
        user_id,
    )
    if row is None:
        raise NotFound("message", message_id)
    return Message(**{**dict(row), "metadata": _metadata(row["metadata"])})


async def list_messages(conn: PooledConnection, user_id: int | None, before: int | None, limit: int) -> list[Message]:
    """Newest first; `user_id` None lists everybody's."""
    rows = await conn.fetch(
        f"select {_COLUMNS} from messages m join campaigns c on c.id = m.campaign_id "
        "where ($1::bigint is null or m.user_id = $1) and ($2::bigint is null or m.id < $2) order by m.id desc limit $3",
        user_id,
        before,
        limit,
    )
    return [Message(**{**dict(row), "metadata": _metadata(row["metadata"])}) for row in rows]


async def outcomes(conn: PooledConnection, message: Message) -> dict[str, int]:
    """State -> how many of the message's recipients are in it; `queued` are those without an end.

    Who was delivered to and reported as undeliverable later is bounced, as in `campaigns.recipient`.
    """
    async with conn.transaction(readonly=True):
        # As in `accounting.records_on`: the BRIN index, also where there are no statistics yet
        await conn.execute("set local enable_seqscan = off")
        rows = await conn.fetch(
            "select kind, count(*) from (select distinct on (number) kind from accounting where campaign_id = $1 "
            "and number between $2 and $3 and kind::text = any($4) order by number, at desc, attempt desc) ended group by kind",
            message.campaign_id,
            message.first_number,
            message.last_number,
            list(_TERMINAL),
        )
        reported = await conn.fetchval(
            "select count(*) from feedback f where campaign_id = $1 and number between $2 and $3 and kind = $4 "
            "and exists (select from accounting a where a.campaign_id = $1 and a.number = f.number and a.kind = 'd')",
            message.campaign_id,
            message.first_number,
            message.last_number,
            REMOTE_BOUNCE,
        )
    found = Counter({states.TERMINAL_KINDS[row["kind"].decode()]: row["count"] for row in rows})
    found[states.QUEUED] = message.recipients - found.total()
    found[states.DELIVERED] -= reported
    found[states.BOUNCED] += reported
    return dict(+found)


async def recipients(conn: PooledConnection, message: Message, after: int, limit: int) -> list[RecipientState]:
    """Its recipients by number, behind number `after` of the stream."""
    return await _standing(conn, message.campaign_id, max(message.first_number, after + 1), message.last_number, limit)


async def standing(conn: PooledConnection, campaign_id: int, number: int) -> RecipientState | None:
    """Where one recipient of a stream stands."""
    found = await _standing(conn, campaign_id, number, number, 1)
    return found[0] if found else None


async def _standing(conn: PooledConnection, campaign_id: int, first: int, last: int, limit: int) -> list[RecipientState]:
    async with conn.transaction(readonly=True):
        await conn.execute("set local enable_seqscan = off")
        rows = await conn.fetch(
            "select r.number, r.email, t.due_at, (r.data -> $4::text)::text as metadata, "
            "coalesce(f.state, l.kind) as kind, coalesce(f.status, l.status) as status, coalesce(f.category, l.category) as category, "
            "coalesce(f.diagnostic, l.diagnostic) as diagnostic, coalesce(f.at, l.at) as at, l.attempts "
            "from recipients r left join retries t on t.campaign_id = $1 and t.number = r.number "
            "left join lateral (select (array_agg(a.kind::text order by a.kind::text = any($5) desc, a.at desc))[1] as kind, "
            "(array_agg(a.status order by a.kind::text = any($5) desc, a.at desc))[1] as status, "
            "(array_agg(a.category order by a.kind::text = any($5) desc, a.at desc))[1] as category, "
            "(array_agg(a.diagnostic order by a.kind::text = any($5) desc, a.at desc))[1] as diagnostic, "
            "max(a.at) as at, coalesce(max(a.attempt), 0) as attempts from accounting a "
            "where a.campaign_id = $1 and a.number = r.number) l on true "
            "left join lateral (select 'b' as state, status, category, diagnostic, at from feedback "
            "where campaign_id = $1 and number = r.number and kind = $7 limit 1) f on l.kind = 'd' "
            "where r.campaign_id = $1 and r.number between $2::int and $3::int order by r.number limit $6",
            campaign_id,
            first,
            last,
            METADATA_KEY,
            list(_TERMINAL),
            limit,
            REMOTE_BOUNCE,
        )
    return [
        RecipientState(
            number=row["number"],
            email=row["email"],
            state=states.TERMINAL_KINDS.get(row["kind"] or "") or (states.DEFERRED if row["due_at"] else states.QUEUED),
            status=row["status"] or "",
            category=row["category"] or "",
            diagnostic=row["diagnostic"] or "",
            attempts=row["attempts"],
            at=row["at"],
            next_attempt_at=row["due_at"],
            metadata=_any_metadata(row["metadata"]) if row["metadata"] else {},
        )
        for row in rows
    ]


async def part_of(conn: PooledConnection, campaign_id: int, number: int) -> int:
    """Which part of its stream a recipient gets; 0 where the campaign is no stream."""
    found = await conn.fetchval(
        "select part from messages where campaign_id = $1 and first_number <= $2 order by first_number desc limit 1", campaign_id, number
    )
    return int(found or 0)
