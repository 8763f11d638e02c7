"""Acceptances: the ledger compared with what receivers say they accepted, recipient by recipient.

Receivers are read as a stream; what is kept of it is one byte per recipient, how often its message was accepted. With that byte
string as an argument PostgreSQL compares in plain scans of the accounting table, so ten million lines need ten megabytes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import msgspec

from domain import states
from domain.errors import NotFound
from store.postgres import Pool, PooledConnection, transaction

MOST_COPIES: Final = 255  # of one message; more are counted as that many
MOST_EXAMPLES: Final = 10

# Numbers and, in the same order, the addresses they were accepted for; empty: there is no more
Accepted: TypeAlias = tuple[list[int], list[str]]


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign's ledger against its receivers. Exact once the campaign is finished and every receiver's log was given."""

    accepted: int  # copies of this campaign's messages
    recipients: int  # whom at least one copy was accepted for
    other_mail: int  # accepted lines that are not this campaign's, by their Message-ID
    misaddressed: int  # copies accepted for an address that is not the recipient's
    lost: int  # the ledger has a `d` that rests on a reply, and nobody accepted it
    assumed_delivered: int  # the ledger has a `d` that rests on on_uncertain = assume_delivered, and nobody accepted it
    false_bounced: int  # the ledger has b, x, s or c without any `u`, and somebody accepted it
    unrecorded: int  # accepted, and the ledger has no end for it yet
    duplicates_announced: int  # copies beyond the first that a `u` record announced
    duplicates_unexplained: int  # copies beyond the first that no `u` record announced
    examples: dict[str, list[str]]  # kind of fault -> up to ten addresses

    @property
    def clean(self) -> bool:
        """Whether everything accepted is explained by the ledger, and the ledger by what was accepted."""
        return not (self.misaddressed or self.lost or self.false_bounced or self.duplicates_unexplained)


_TERMINAL: Final = [kind.encode() for kind in states.TERMINAL_KINDS]

# The address on the wire has its domain in A-labels; of an international one only the part before the @ is compared
_MISADDRESSED = """
    select a.address from unnest($2::int[], $3::text[]) as a(number, address)
    left join recipients r on r.campaign_id = $1 and r.number = a.number
    where r.email is null or (r.email <> a.address and lower(r.email) <> lower(a.address) and (
        octet_length(r.email) = length(r.email) or lower(split_part(r.email, '@', 1)) <> lower(split_part(a.address, '@', 1))))
"""
_COPIES = "case when {0} < octet_length($2::bytea) then get_byte($2::bytea, {0}) else 0 end"
_LOST = f"a.kind = 'd' and {_COPIES.format('a.number')} = 0 and a.diagnostic like '2%'"
_ENDED = f"""
    select count(*) filter (where {_COPIES.format("a.number")} > 0) as accepted,
        count(*) filter (where {_LOST}) as lost,
        count(*) filter (where a.kind = 'd' and {_COPIES.format("a.number")} = 0 and a.diagnostic not like '2%') as assumed,
        count(*) filter (where a.kind <> 'd' and {_COPIES.format("a.number")} > 0) as refused
    from accounting a where a.campaign_id = $1 and a.kind = any($3::"char"[])
"""
_ANNOUNCED = f"""
    select coalesce(sum(least(u.records, {_COPIES.format("u.number")} - 1)), 0)::bigint
    from (select number, count(*) as records from accounting where campaign_id = $1 and kind = 'u' group by number) as u
    where {_COPIES.format("u.number")} > 1
"""
_FALSE_BOUNCED = f"""
    from accounting a where a.campaign_id = $1 and a.kind = any('{{b,x,s,c}}'::"char"[]) and {_COPIES.format("a.number")} > 0
    and not exists (select from accounting u where u.campaign_id = $1 and u.kind = 'u' and u.number = a.number)
"""
_DOUBLED = f"""
    from (select r.number, r.email as recipient from recipients r
        left join (select number, count(*) as records from accounting where campaign_id = $1 and kind = 'u' group by number) as u
        on u.number = r.number
        where r.campaign_id = $1 and {_COPIES.format("r.number")} > 1 + coalesce(u.records, 0)) as a
"""
_EXAMPLES = {
    "lost": f"from accounting a where a.campaign_id = $1 and {_LOST}",
    "false_bounced": _FALSE_BOUNCED,
    "duplicates_unexplained": _DOUBLED,
}


async def owner(pool: Pool, campaign_id: int) -> int:
    """The user a campaign belongs to: a part of its Message-IDs. Raises NotFound."""
    user_id = await pool.fetchval("select user_id from campaigns where id = $1", campaign_id)
    if user_id is None:
        raise NotFound("campaign", campaign_id)
    return int(user_id)


async def compare(
    pool: Pool, campaign_id: int, read: Callable[[], Awaitable[Accepted]], other_mail: Callable[[], int], *, timeout_seconds: float = 600.0
) -> Against:
    """Compare one campaign with what `read` gives, part by part. `other_mail`, asked at the end: lines `read` left out.

    One snapshot, taken before the first `read`: what is accepted later shows as `unrecorded`. Raises NotFound.
    """
    async with transaction(pool, isolation="repeatable_read", readonly=True) as conn:
        row = await conn.fetchrow("select recipients from campaigns where id = $1", campaign_id)
        if row is None:
            raise NotFound("campaign", campaign_id)
        # A plan made for the byte string itself would carry a copy of it to every worker, written out as text
        await conn.execute("set local plan_cache_mode = force_generic_plan")
        counted, misaddressed, astray = await _take_in(conn, campaign_id, row["recipients"], read, timeout_seconds)
        accepted, recipients = sum(counted), len(counted) - counted.count(0)
        ended = await conn.fetchrow(_ENDED, campaign_id, counted, _TERMINAL, timeout=timeout_seconds)
        assert ended is not None  # an aggregate always has a row
        announced = await conn.fetchval(_ANNOUNCED, campaign_id, counted, timeout=timeout_seconds) if accepted > recipients else 0
        faults = {"lost": ended["lost"], "false_bounced": 0, "duplicates_unexplained": accepted - recipients - announced}
        if ended["refused"]:
            faults["false_bounced"] = await conn.fetchval(
                f"select count(*) {_FALSE_BOUNCED}", campaign_id, counted, timeout=timeout_seconds
            )
        examples = {"misaddressed": astray} if astray else {}
        for name in (name for name, count in faults.items() if count):
            statement = f"select a.recipient {_EXAMPLES[name]} order by a.number limit {MOST_EXAMPLES}"
            examples[name] = [found[0] for found in await conn.fetch(statement, campaign_id, counted, timeout=timeout_seconds)]
    return Against(
        accepted=accepted, recipients=recipients, other_mail=other_mail(), misaddressed=misaddressed, assumed_delivered=ended["assumed"],
        unrecorded=recipients - ended["accepted"], duplicates_announced=announced, examples=examples, **faults,
    )  # fmt: skip


async def _take_in(
    conn: PooledConnection, campaign_id: int, highest: int, read: Callable[[], Awaitable[Accepted]], timeout_seconds: float
) -> tuple[bytes, int, list[str]]:
    """Read to the end. Returns how often each number was accepted, and of those for a foreign address how many and which."""
    copies = bytearray(highest + 1)
    misaddressed = 0
    astray: list[str] = []
    numbers, addresses = await read()
    while numbers:
        # PostgreSQL looks at this part while the next one is read
        found, (next_numbers, next_addresses) = await asyncio.gather(
            conn.fetch(_MISADDRESSED, campaign_id, numbers, addresses, timeout=timeout_seconds), read()
        )
        misaddressed += len(found)
        astray += [row["address"] for row in found[: MOST_EXAMPLES - len(astray)]]
        for number in numbers:
            if number <= highest and copies[number] < MOST_COPIES:
                copies[number] += 1
        numbers, addresses = next_numbers, next_addresses
    return bytes(copies), misaddressed, astray
