"""The copy of each unsubscribe (requirement 97): a direct message to the address that the operator names, or a POST to a URL of his.

A POST is a row, written in the transaction of the unsubscribe itself, until the receiver has answered 2xx (`inbound.unsubscribe_copies`).
"""

import time
import uuid
from datetime import UTC, datetime

import msgspec

from domain.links import is_web_address
from store import messages
from store.messages import Part, Target
from store.postgres import PooledConnection

SENDER_DOMAIN = "%sender_domain%"
KEPT_DAYS = 30  # of those that were given up
_SUBJECT = "Unsubscribed: {{ subscriber.address }}"
_TEXT = "{{ subscriber.address }} has left {{ subscriber.list }} (campaign {{ subscriber.campaign }}).\n"


class Copy(msgspec.Struct, frozen=True):
    """One POST that is due. `attempts` counts the one to be made; `age_seconds` since the unsubscribe."""

    id: uuid.UUID
    body: str
    attempts: int
    age_seconds: float


class Failure(msgspec.Struct, frozen=True):
    """A POST that failed. `again_seconds`: when it is due next; None: never."""

    id: uuid.UUID
    reason: str
    again_seconds: float | None


class CopiesReport(msgspec.Struct, frozen=True, kw_only=True):
    """How many POSTs wait and how many were given up; why the last one of each failed."""

    waiting: int
    given_up: int
    oldest_waiting_at: datetime | None
    waiting_because: str
    given_up_because: str


async def send(
    conn: PooledConnection, user_id: int, campaign_id: int, number: int, email: str, copy_to: str, at: float | None = None
) -> None:
    """Tell `copy_to` that `email`, recipient `number` of a campaign, has left; in the caller's transaction. `at`: POSIX seconds; None: now.

    A message goes by the campaign's own way; `%sender_domain%` in an address is the domain that the campaign is from.
    """
    row = await conn.fetchrow(
        "select c.name, c.delivery_server_id, c.list_id, coalesce(l.name, '') as list, coalesce(nullif(s.enforced_from, ''), "
        "(select nullif(p.content->>'from_email', '') from messages m join message_parts p using (part) where m.campaign_id = $1 "
        "and m.first_number <= $2 order by m.first_number desc limit 1), nullif(c.from_email, ''), l.sender_email, '') as sender "
        "from campaigns c join delivery_servers s on s.id = c.delivery_server_id left join lists l on l.id = c.list_id where c.id = $1",
        campaign_id,
        number,
    )
    assert row is not None
    if is_web_address(copy_to):
        said = {
            "type": "unsubscribed",
            "timestamp": datetime.fromtimestamp(time.time() if at is None else at, UTC),
            "data": {
                "email": email, "user_id": user_id, "campaign_id": campaign_id, "campaign": row["name"], "number": number,
                "list_id": row["list_id"], "list": row["list"],
            },
        }  # fmt: skip
        await conn.execute("insert into unsubscribe_copies (body) values ($1)", msgspec.json.encode(said).decode())
        return
    copy_to = copy_to.replace(SENDER_DOMAIN, row["sender"].rpartition("@")[2])
    target = Target(user_id=user_id, delivery_server_id=row["delivery_server_id"], mail_class="transactional", list_id=None)
    part = Part(name="copies of unsubscribes", subject=_SUBJECT, text=_TEXT, from_email=row["sender"] or copy_to)
    left = f"the list {row['list']}" if row["list"] else "all mail of its sender"
    data = {"address": email, "list": left, "campaign": f"{campaign_id} {row['name']}".strip()}
    await messages.add(conn, target, part, {"campaign": str(campaign_id)}, [(copy_to, msgspec.json.encode(data).decode())])


async def take(conn: PooledConnection, most: int, hold_seconds: float) -> list[Copy]:
    """Those that are due, the oldest first; nobody else gets them for `hold_seconds`, after which they are due again."""
    rows = await conn.fetch(
        "update unsubscribe_copies set attempts = attempts + 1, due_at = now() + $2 * interval '1 s' where id in ("
        "select id from unsubscribe_copies where given_up_at is null and due_at <= now() order by due_at limit $1 for update skip locked) "
        "returning id, body, attempts, extract(epoch from now() - created_at)::float8 as age_seconds",
        most,
        hold_seconds,
    )
    return [Copy(**dict(row)) for row in rows]


async def settle(conn: PooledConnection, done: list[uuid.UUID], failed: list[Failure]) -> None:
    """What became of them."""
    await conn.execute("delete from unsubscribe_copies where id = any($1)", done)
    await conn.executemany(
        "update unsubscribe_copies set reason = $2, due_at = now() + coalesce($3::float8, 0) * interval '1 s', "
        "given_up_at = case when $3::float8 is null then now() end where id = $1",
        [(each.id, each.reason, each.again_seconds) for each in failed],
    )


async def retry(conn: PooledConnection) -> int:
    """Make those that were given up due again, as if they were new; how many there are."""
    done = await conn.execute(
        "update unsubscribe_copies set given_up_at = null, due_at = now(), created_at = now(), attempts = 0 where given_up_at is not null"
    )
    return int(done.rpartition(" ")[2])


async def prune(conn: PooledConnection) -> None:
    """Forget what was given up long ago."""
    await conn.execute(f"delete from unsubscribe_copies where given_up_at < now() - interval '{KEPT_DAYS} days'")


async def report(conn: PooledConnection) -> CopiesReport:
    """How it stands."""
    row = await conn.fetchrow(
        "select count(*) filter (where given_up_at is null) as waiting, count(given_up_at) as given_up, "
        "min(created_at) filter (where given_up_at is null) as oldest_waiting_at, "
        "coalesce((select reason from unsubscribe_copies where given_up_at is null and reason <> '' order by due_at desc limit 1), '') "
        "as waiting_because, "
        "coalesce((select reason from unsubscribe_copies where given_up_at is not null order by given_up_at desc limit 1), '') "
        "as given_up_because from unsubscribe_copies"
    )
    assert row is not None
    return CopiesReport(**dict(row))
