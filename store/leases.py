"""Leases: the right of one engine to send one batch, granted by PostgreSQL (owner, epoch, until).

Redis only announces batches and may hand one out twice; the row here is granted once per epoch, so nobody is mailed twice.
Times of this file are PostgreSQL's own clock; a holder counts on its monotonic clock from before it asked (R4).

A lease that has ended is not free yet: its holder's journal may hold outcomes that no table knows. It becomes free when the holder
gives it back after its ledger has caught up, when its journal was carried over by somebody else, or when the holder is known to be
gone (`feed.call_back_ended_leases`). Only then is the batch granted again.
"""

from asyncpg import BitString

from store.postgres import Pool, PooledConnection

Key = tuple[int, int]  # (campaign_id, batch)
Grant = tuple[int, int, int]  # (campaign_id, batch, epoch): one lease, never given twice


_BATCHES = "unnest($2::bigint[], $3::int[]) as k(campaign_id, batch)"
_GRANTS = "unnest($2::bigint[], $3::int[], $4::int[]) as k(campaign_id, batch, epoch)"
_FREE = "state = 'pending', owner = null, lease_until = null"
# Rows are locked in key order, as the ledger locks them, so that the two never wait for each other in a circle.
# The campaigns are named once more as a plain list, from which PostgreSQL sees which partitions it need not even open.
_LOCKED = (
    "with mine as (select b.campaign_id, b.batch from {keys} "
    "join batches b on b.campaign_id = k.campaign_id and b.batch = k.batch {join} "
    "where b.campaign_id = any($2) and b.state = 'queued' and {which} order by b.campaign_id, b.batch for update of b) "
    "update batches b set {change} from mine where b.campaign_id = any($2) and b.campaign_id = mine.campaign_id and b.batch = mine.batch "
)
_GRANT = (
    _LOCKED.format(
        keys=_BATCHES,
        join="join campaigns c on c.id = k.campaign_id",
        which="c.state = 'running' and (b.owner is null or ($5 and b.owner = $1))",
        change="owner = $1, epoch = b.epoch + 1, lease_until = now() + make_interval(secs => $4)",
    )
    + "returning b.campaign_id, b.batch, b.epoch, b.done"
)
_EXTEND = (
    _LOCKED.format(keys=_BATCHES, join="", which="b.owner = $1", change="lease_until = now() + make_interval(secs => $4)")
    + "returning b.campaign_id, b.batch"
)
_HAND_BACK = _LOCKED.format(keys=_GRANTS, join="", which="b.owner = $1 and b.epoch = k.epoch", change=_FREE)
_GIVE_UP = _LOCKED.format(keys=_BATCHES, join="", which="(b.owner = $1 or b.owner is null)", change=_FREE)
_ENDED = (
    "select campaign_id, batch, epoch from batches where owner = $1 and state = 'queued' and lease_until < now() and campaign_id = any($2)"
)


def _columns(keys: list[Key]) -> tuple[list[int], list[int]]:
    return [key[0] for key in keys], [key[1] for key in keys]


async def campaigns(conn: Pool | PooledConnection) -> list[int]:
    """Those of which batches can be leased at all. A statement that names them opens their partitions only."""
    return [row[0] for row in await conn.fetch("select id from campaigns where state in ('preparing', 'running', 'paused', 'cancelling')")]


async def grant(pool: Pool, owner: str, keys: list[Key], seconds: float, *, again: bool = False) -> dict[Key, tuple[int, BitString]]:
    """Ask for leases on `keys`. Returns (epoch, progress bitmap) of those granted.

    Not granted: leased to somebody, already settled, or the campaign is not running. `again`: the answer to the same question was
    lost, so what `owner` was granted then is granted once more; only right when the ledger holds every outcome of `owner`'s.
    """
    rows = await pool.fetch(_GRANT, owner, *_columns(keys), seconds, again)
    return {(row[0], row[1]): (row[2], row[3]) for row in rows}


async def extend(pool: Pool, owner: str, keys: list[Key], seconds: float, *, timeout_seconds: float | None = None) -> set[Key]:
    """Extend every lease `owner` holds among `keys`, in one statement. Returns those still held; the others are lost.

    A lease that has ended in the meantime is extended too, as long as nobody has called it back.
    """
    return {(row[0], row[1]) for row in await pool.fetch(_EXTEND, owner, *_columns(keys), seconds, timeout=timeout_seconds)}


async def hand_back(pool: Pool, owner: str, grants: list[Grant]) -> None:
    """Give up leases: the batches become pending again. Call only when the ledger holds every outcome of theirs.

    PostgreSQL may carry this out long after we gave up waiting for it (a server that stood still reads what is in its sockets).
    The epoch keeps it from ending a lease on the same batch that was granted since.
    """
    await pool.execute(_HAND_BACK, owner, *(list(column) for column in zip(*grants, strict=True)))


async def give_up(pool: Pool, owner: str, keys: list[Key]) -> None:
    """Like `hand_back`, also for batches that were taken from Redis and never leased: they are announced again."""
    await pool.execute(_GIVE_UP, owner, *_columns(keys))


async def ended(pool: Pool, owner: str) -> list[Grant]:
    """The leases `owner` still has in the table although they have ended."""
    return [(row[0], row[1], row[2]) for row in await pool.fetch(_ENDED, owner, await campaigns(pool))]
