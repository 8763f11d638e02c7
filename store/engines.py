"""What an engine process asks PostgreSQL besides leases: who is alive, what changed, what a campaign says."""

from collections.abc import Callable

import msgspec

from domain.campaign import CampaignContent
from domain.egress import DeliveryServer, DeliveryServerLimits, EgressConfig
from domain.errors import NotFound
from store import campaigns, dkim, leases
from store.postgres import Pool

_ALIVE_SECONDS = 10  # an engine not seen for longer has no share of the limits


async def register(pool: Pool, engine_id: str, node: str, pid: int, journal_directory: str) -> None:
    """Enter this engine in the table of engines."""
    await pool.execute(
        "insert into engines (id, node, pid, journal_directory) values ($1, $2, $3, $4)", engine_id, node, pid, journal_directory
    )


async def seen(pool: Pool, engine_id: str) -> tuple[int, int]:
    """Say that this engine lives. Returns (its rank, how many engines live), which is how limits are shared."""
    rows = await pool.fetch(
        "with me as (update engines set seen_at = now() where id = $1) "
        "select id from engines where stopped_at is null and (id = $1 or seen_at > now() - make_interval(secs => $2)) order by id",
        engine_id,
        _ALIVE_SECONDS,
    )
    ids = [row["id"] for row in rows]
    return (ids.index(engine_id), len(ids)) if engine_id in ids else (0, max(1, len(ids)))


async def stopped(pool: Pool, engine_id: str) -> None:
    """Say that this engine has ended in order."""
    await pool.execute("update engines set stopped_at = now() where id = $1", engine_id)


async def egress_version(pool: Pool) -> int:
    """The number that every change of a delivery server raises."""
    return int(await pool.fetchval("select version from egress_version"))


async def silent(pool: Pool, node: str, own_id: str, seconds: float) -> list[tuple[str, str]]:
    """(id, journal directory) of the other engines of `node` that hold ended leases and were not seen for `seconds`."""
    rows = await pool.fetch(
        "select e.id, e.journal_directory from engines e where e.node = $1 and e.id <> $2 and e.stopped_at is null "
        "and e.seen_at < now() - make_interval(secs => $3) and exists (select from batches b where b.owner = e.id "
        "and b.state = 'queued' and b.lease_until < now() and b.campaign_id = any($4))",
        node,
        own_id,
        seconds,
        await leases.campaigns(pool),
    )
    return [(row[0], row[1]) for row in rows]


async def egress_config(pool: Pool, refused: Callable[[int, str], None] | None = None) -> EgressConfig:
    """Every delivery server, and the version they stand at.

    A row that cannot be read goes to `refused` (id, reason) and is left out; without `refused` it raises.
    """
    async with pool.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
        version = await conn.fetchval("select version from egress_version")
        operator = await dkim.operator(conn)
        rows = await conn.fetch(
            "select id, user_id, name, host, port, security, connect_timeout_seconds, username, password_sealed, link_domain, "
            "open_domain, mfrom, enforced_from, use_list_sender_as_mfrom, use_list_sender_as_from, "
            "fallback_server_id, limits::text as limits, enabled, version from delivery_servers where deleted_at is null"
        )
    servers = {}
    for row in rows:
        fields = dict(row)
        try:
            fields["limits"] = msgspec.json.decode(fields["limits"], type=DeliveryServerLimits)
        except msgspec.MsgspecError as error:
            if refused is None:
                raise
            refused(row["id"], f"delivery server {row['name']}: its limits cannot be read: {error}")
            continue
        servers[row["id"]] = DeliveryServer(**fields)
    return EgressConfig(version, servers, operator)


async def campaign_states(pool: Pool, campaign_ids: list[int]) -> dict[int, str]:
    """The state of each campaign that there is."""
    rows = await pool.fetch("select id, state from campaigns where id = any($1)", campaign_ids)
    return {row["id"]: row["state"] for row in rows}


async def campaign_content(pool: Pool, campaign_id: int, part: int = 0) -> tuple[CampaignContent, str] | None:
    """What a campaign says, and its priority class; None if there is no such campaign."""
    async with pool.acquire() as conn:
        try:
            content = await campaigns.content(conn, campaign_id, part)
        except NotFound:
            return None
    return content, content.mail_class
