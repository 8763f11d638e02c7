"""Campaigns for tests that begin where the feeder has done its work."""

from store import feed
from store.postgres import Pool


async def make_campaign(pool: Pool, recipients: int, *, batch_recipients: int = 4) -> int:
    """A running campaign with `recipients` numbered recipients, as the feeder prepares it."""
    async with pool.acquire() as conn:
        user = await conn.fetchval("insert into users (name) values ('u' || gen_random_uuid()) returning id")
        server = await conn.fetchval(
            "insert into delivery_servers (user_id, name, host, port, security) values ($1, 's', '127.0.0.1', 25, 'none') returning id",
            user,
        )
        mailing_list = await conn.fetchval("insert into lists (user_id, name) values ($1, 'l') returning id", user)
        await conn.execute(
            "insert into subscribers (user_id, list_id, email, email_key) select $1, $2, e, e "
            "from generate_series(1, $3::int) n, lateral (select 'r' || n || '@example.com') x(e)",
            user,
            mailing_list,
            recipients,
        )
        campaign = await conn.fetchval(
            "insert into campaigns (user_id, name, state, list_id, delivery_server_id, subject, started_at) "
            "values ($1, 'c', 'preparing', $2, $3, 's', now()) returning id",
            user,
            mailing_list,
            server,
        )
        await feed.prepare(conn, campaign, batch_recipients)
    return int(campaign)
