"""engine.feeder against a real PostgreSQL and a real Valkey: what one campaign needs keeps no other from being fed."""

import pytest
from redis.asyncio import Redis

from engine import feeder
from store import batch_queue, feed, postgres
from store.postgres import Pool
from tests.store.campaigns import make_campaign


async def test_cancelling_a_large_campaign_lets_the_others_be_fed(
    pool: Pool, fresh_database_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder, "_TURN_SECONDS", 0.0)
    large = await make_campaign(pool, 60, batch_recipients=1)
    other = await make_campaign(pool, 4)
    await pool.execute("update campaigns set state = 'cancelling' where id = $1", large)
    made = feeder.Feeder(fresh_database_url, redis, 4, 8, 32)
    left = "select count(*) from batches where campaign_id = $1 and state <> 'settled'"
    conn = await postgres.connect(fresh_database_url)
    try:
        await made._tick(conn, await feed.active_campaigns(conn))
        server = await conn.fetchval("select delivery_server_id from campaigns where id = $1", other)
        assert await batch_queue.count_waiting(redis, [server]) == 1
        assert 0 < await conn.fetchval(left, large) < 60
        for _ in range(2):
            await made._tick(conn, await feed.active_campaigns(conn))
        assert await conn.fetchval("select state from campaigns where id = $1", large) == "cancelled"
    finally:
        await conn.close()
