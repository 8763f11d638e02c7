"""The operator's bounce patterns: kept in order, followed by engines and inbound through one number that every change raises."""

from datetime import datetime

import msgspec

from domain.bounce import CATEGORIES, BounceRules, shipped_rules
from domain.bounce_patterns import BouncePatterns, Pattern
from domain.errors import Conflict, Invalid, NotFound
from store.postgres import Pool, PooledConnection

_WORDS = frozenset(CATEGORIES)


class BouncePattern(msgspec.Struct, frozen=True, kw_only=True):
    """One pattern. `position` counts from 1; the first that matches wins."""

    id: int
    position: int
    pattern: str
    verdict: str
    note: str
    created_at: datetime


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What an import did."""

    added: int
    changed: int
    removed: int
    unchanged: int


_COLUMNS = "id, position, pattern, verdict, note, created_at"


async def version(pool: Pool) -> int:
    """The number that every change raises."""
    return int(await pool.fetchval("select version from bounce_pattern_version"))


async def load(pool: Pool) -> tuple[int, list[Pattern]]:
    """The version and the patterns in their order, as they stood together."""
    async with pool.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
        number = await conn.fetchval("select version from bounce_pattern_version")
        rows = await conn.fetch("select pattern, verdict, id from bounce_patterns order by position")
    return int(number), [Pattern(*row) for row in rows]


async def list_patterns(conn: PooledConnection) -> list[BouncePattern]:
    """All of them in their order; there are never more than `domain.bounce_patterns.MAX_PATTERNS`."""
    return [BouncePattern(**dict(row)) for row in await conn.fetch(f"select {_COLUMNS} from bounce_patterns order by position")]


async def add(conn: PooledConnection, wanted: Pattern, note: str = "", position: int | None = None) -> BouncePattern:
    """Put a checked pattern at `position` (None: the end). Raises Conflict (it is there already), Invalid (too many, or too costly)."""
    await _lock(conn)
    if await conn.fetchval("select exists (select from bounce_patterns where pattern = $1)", wanted.pattern):
        raise Conflict("there is a pattern with this text already; remove or move that one")
    count = await conn.fetchval("select count(*) from bounce_patterns")
    at = count + 1 if position is None else max(1, min(position, count + 1))
    await conn.execute("update bounce_patterns set position = position + 1 where position >= $1", at)
    row = await conn.fetchrow(
        f"insert into bounce_patterns (position, pattern, verdict, note) values ($1, $2, $3, $4) returning {_COLUMNS}",
        at,
        wanted.pattern,
        wanted.verdict,
        note,
    )
    await _compile(conn)
    assert row is not None
    return BouncePattern(**dict(row))


async def move(conn: PooledConnection, pattern_id: int, position: int) -> BouncePattern:
    """Put a pattern at another position; those between close up. Raises NotFound."""
    await _lock(conn)
    old = await conn.fetchval("select position from bounce_patterns where id = $1", pattern_id)
    if old is None:
        raise NotFound("bounce pattern", pattern_id)
    at = max(1, min(position, await conn.fetchval("select count(*) from bounce_patterns")))
    await conn.execute(
        "update bounce_patterns set position = case when id = $1 then $3 when $2::int < $3::int then position - 1 else position + 1 end "
        "where position between least($2::int, $3::int) and greatest($2::int, $3::int)",
        pattern_id,
        old,
        at,
    )
    row = await conn.fetchrow(f"select {_COLUMNS} from bounce_patterns where id = $1", pattern_id)
    assert row is not None
    return BouncePattern(**dict(row))


async def remove(conn: PooledConnection, pattern_id: int) -> None:
    """Take a pattern out. Raises NotFound."""
    await _lock(conn)
    position = await conn.fetchval("delete from bounce_patterns where id = $1 returning position", pattern_id)
    if position is None:
        raise NotFound("bounce pattern", pattern_id)
    await conn.execute("update bounce_patterns set position = position - 1 where position > $1", position)


async def take(conn: PooledConnection, wanted: list[Pattern], *, replace: bool) -> Imported:
    """Take checked patterns over, all or none: known ones get the verdict, new ones go to the end, in their order.

    `replace`: they are all there is then, in their order. Raises Invalid (too many, or too costly).
    """
    await _lock(conn)
    unique = {each.pattern: each.verdict for each in wanted}
    before = {row[0]: row[1] for row in await conn.fetch("select pattern, verdict from bounce_patterns order by position")}
    gone = [pattern for pattern in before if pattern not in unique] if replace else []
    order = list(unique) if replace else [*before, *(pattern for pattern in unique if pattern not in before)]
    await conn.execute("delete from bounce_patterns where pattern = any($1::text[])", gone)
    await conn.execute(
        "insert into bounce_patterns as b (position, pattern, verdict) select * from unnest($1::int[], $2::text[], $3::text[]) "
        "on conflict (pattern) do update set position = excluded.position, verdict = excluded.verdict",
        list(range(1, len(order) + 1)),
        order,
        [unique.get(pattern, before.get(pattern)) for pattern in order],
    )
    await _compile(conn)
    added = sum(pattern not in before for pattern in unique)
    changed = sum(before.get(pattern, verdict) != verdict for pattern, verdict in unique.items())
    return Imported(added=added, changed=changed, removed=len(gone), unchanged=len(unique) - added - changed)


async def _lock(conn: PooledConnection) -> None:
    """One change at a time; the number that is raised tells engines to read them again once it is committed."""
    await conn.execute("update bounce_pattern_version set version = version + 1")


async def _compile(conn: PooledConnection) -> None:
    """Refuse what an engine would not be able to take over as a whole."""
    rows = await conn.fetch("select pattern, verdict from bounce_patterns order by position")
    try:
        BouncePatterns([Pattern(row[0], row[1]) for row in rows], _WORDS)
    except Invalid as error:
        raise Invalid("pattern", error.reason) from None


async def rules(pool: Pool) -> BounceRules:
    """The shipped rules behind the patterns there are now."""
    _, patterns = await load(pool)
    return shipped_rules().with_patterns(patterns)
