"""Leases: the right of one engine to send one batch, granted by PostgreSQL (owner, epoch, until).

Redis only announces batches and may hand one out twice; the row here is granted once per epoch, so nobody is mailed twice.
Times of this file are PostgreSQL's own clock; a holder counts on its monotonic clock from before it asked (R4).
"""

from asyncpg import BitString

from store.postgres import Pool

Key = tuple[int, int]  # (campaign_id, batch)


async def grant(pool: Pool, owner: str, keys: list[Key], seconds: float) -> dict[Key, tuple[int, BitString]]:
    """Ask for leases on `keys`. Returns (epoch, progress bitmap) of those granted.

    Not granted: leased to somebody, already settled, or the campaign is not running.
    """
    rows = await pool.fetch(
        "update batches b set owner = $1, epoch = epoch + 1, lease_until = now() + make_interval(secs => $4) "
        "from unnest($2::bigint[], $3::int[]) as k(campaign_id, batch), campaigns c "
        "where b.campaign_id = k.campaign_id and b.batch = k.batch and c.id = k.campaign_id and c.state = 'running' "
        "and b.state = 'queued' and (b.owner is null or b.lease_until < now()) "
        "returning b.campaign_id, b.batch, b.epoch, b.done",
        owner,
        [key[0] for key in keys],
        [key[1] for key in keys],
        seconds,
    )
    return {(row[0], row[1]): (row[2], row[3]) for row in rows}


async def extend(pool: Pool, owner: str, keys: list[Key], seconds: float) -> set[Key]:
    """Extend every lease `owner` holds among `keys`, in one statement. Returns those still held; the others are lost."""
    rows = await pool.fetch(
        "update batches b set lease_until = now() + make_interval(secs => $4) "
        "from unnest($2::bigint[], $3::int[]) as k(campaign_id, batch) "
        "where b.campaign_id = k.campaign_id and b.batch = k.batch and b.owner = $1 and b.state = 'queued' "
        "returning b.campaign_id, b.batch",
        owner,
        [key[0] for key in keys],
        [key[1] for key in keys],
        seconds,
    )
    return {(row[0], row[1]) for row in rows}


async def hand_back(pool: Pool, owner: str, keys: list[Key]) -> None:
    """Give up leases: the batches become pending again. Call only when the ledger holds every outcome of theirs."""
    await pool.execute(
        "update batches b set state = 'pending', owner = null, lease_until = null "
        "from unnest($2::bigint[], $3::int[]) as k(campaign_id, batch) "
        "where b.campaign_id = k.campaign_id and b.batch = k.batch and b.owner = $1 and b.state = 'queued'",
        owner,
        [key[0] for key in keys],
        [key[1] for key in keys],
    )
