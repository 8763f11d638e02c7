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


async def test_campaigns_that_share_a_server_take_turns_in_its_queue(pool: Pool, fresh_database_url: str, redis: Redis) -> None:
    campaigns = [await make_campaign(pool, 2) for _ in range(10)]
    server = await pool.fetchval("select min(id) from delivery_servers")
    await pool.execute("update campaigns set delivery_server_id = $1", server)
    made = feeder.Feeder(fresh_database_url, redis, 4, 2, 4)
    conn = await postgres.connect(fresh_database_url)
    taken: list[int] = []
    try:
        for _ in range(3):
            await made._tick(conn, await feed.active_campaigns(conn))
            assert sum((await batch_queue.lengths(redis, [(server, "marketing")])).values()) <= 4, "its upper mark, and no more"
            taken += [batch.campaign_id for batch in (await batch_queue.take(redis, server, "marketing", 10))[0]]
    finally:
        await conn.close()
    assert taken == campaigns


async def test_what_somebody_took_and_never_leased_is_announced_again_and_what_waits_is_not(
    pool: Pool, fresh_database_url: str, redis: Redis
) -> None:
    campaign = await make_campaign(pool, 6, batch_recipients=2)
    server = await pool.fetchval("select delivery_server_id from campaigns where id = $1", campaign)
    made = feeder.Feeder(fresh_database_url, redis, 4, 8, 32)
    conn = await postgres.connect(fresh_database_url)

    async def waiting() -> int:
        made._slow_at = 0.0
        await made._tick(conn, await feed.active_campaigns(conn))
        return (await batch_queue.lengths(redis, [(server, "marketing")]))[server, "marketing"]

    try:
        await waiting()
        await conn.execute("update batches set announced_at = announced_at - interval '1 minute' * (4 - batch)")
        before = await waiting()
        assert [await waiting(), await waiting()] == [before, before]
        [lost], _ = await batch_queue.take(redis, server, "marketing", 1)
        assert await waiting() == before
        found, _ = await batch_queue.take(redis, server, "marketing", 10)
        assert sorted(batch.batch for batch in found) == list(range(1, before + 1))
        assert found[-1].batch == lost.batch
    finally:
        await conn.close()
