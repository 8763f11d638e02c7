"""The feeder's queries against a real PostgreSQL: numbering, announcing, calling back, retrying, cancelling, ending."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from domain import states
from store import engines, feed, leases
from store.postgres import Pool
from tests.store import seed


async def state_of(pool: Pool, campaign: int) -> str:
    return str(await pool.fetchval("select state from campaigns where id = $1", campaign))


async def active(pool: Pool, campaign: int) -> feed.ActiveCampaign:
    async with pool.acquire() as conn:
        return next(c for c in await feed.active_campaigns(conn) if c.id == campaign)


@pytest.mark.parametrize(
    ("count", "most", "size"),
    [(0, 2000, 500), (7, 2000, 500), (16_000, 2000, 500), (40_000, 2000, 1250), (64_000, 2000, 2000), (10_000_000, 2000, 2000),
     (40_000, 100, 100), (7, 1, 1)],
)  # fmt: skip
def test_a_campaign_is_cut_into_shares_for_all_engines_and_batches_worth_their_cost(count: int, most: int, size: int) -> None:
    assert feed.batch_size(count, most) == size


@pytest.mark.parametrize(("recipients", "sizes"), [(0, []), (1, [1]), (500, [500]), (1001, [500, 500, 1])])
async def test_recipients_are_numbered_once_and_cut_into_batches(pool: Pool, recipients: int, sizes: list[int]) -> None:
    campaign = await seed.campaign(pool, recipients=recipients)
    async with pool.acquire() as conn:
        assert await feed.prepare(conn, campaign, 500) == recipients
        assert await feed.prepare(conn, campaign, 500) == 0
    rows = await pool.fetch("select number, email from recipients where campaign_id = $1 order by number", campaign)
    assert [row["number"] for row in rows] == list(range(1, recipients + 1))
    lengths = await pool.fetch("select length(done) as size from batches where campaign_id = $1 order by batch", campaign)
    assert [row["size"] for row in lengths] == sizes
    assert await state_of(pool, campaign) == states.RUNNING


async def test_the_opt_in_is_kept_with_each_recipient_where_the_campaign_tells_it(pool: Pool) -> None:
    rows = [("{}", "192.0.2.7"), (' {"a": "{", "b": 1}', "2001:db8::1"), ('{"subscription_ip": "mine"}', None)]
    for text, kept in (("Hello", False), ("since %Subscriber:SubscriptionDate%", True), ("{{ subscriber.subscription_ip }}", True)):
        campaign = await seed.campaign(pool, recipients=len(rows), text=text)
        for number, (data, ip) in enumerate(rows, 1):
            await pool.execute(
                "update subscribers set data = $3::text::json, subscription_ip = $4::text::inet, subscribed_at = '2024-02-29 23:30Z' "
                "from campaigns c where c.id = $1 and subscribers.list_id = c.list_id and email = $2",
                campaign, f"p{number}@people.example", data, ip,
            )  # fmt: skip
        async with pool.acquire() as conn:
            await feed.prepare(conn, campaign, 500)
        found = await pool.fetch("select data::text as data from recipients where campaign_id = $1 order by number", campaign)
        opt_in = {"subscription_ip": "", "subscription_date": "2024-02-29"} if kept else {}
        expected = [{**opt_in, **({"subscription_ip": ip} if kept and ip else {}), **json.loads(data)} for data, ip in rows]
        assert [json.loads(row["data"]) for row in found] == expected


async def test_a_campaign_paused_or_cancelled_while_it_is_prepared_stays_so(pool: Pool) -> None:
    for state in (states.PAUSED, states.CANCELLING):
        campaign = await seed.campaign(pool, recipients=10, state=state)
        async with pool.acquire() as conn:
            await feed.prepare(conn, campaign, 500)
        assert await state_of(pool, campaign) == state


async def test_two_feeders_never_lead_at_once(pool: Pool) -> None:
    async with pool.acquire() as one, pool.acquire() as other:
        assert await feed.try_to_lead(one)
        assert not await feed.try_to_lead(other)


async def test_each_batch_is_announced_once_in_order(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=1200)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        first = await feed.announce(conn, campaign, 2)
        rest = await feed.announce(conn, campaign, 10)
        assert [a.batch for a in first + rest] == [1, 2, 3]
        assert await feed.announce(conn, campaign, 10) == []
        positions, recipients = await feed.recipients_of(conn, rest[0])
    assert positions == list(range(200))
    assert recipients[0].number == 1001
    assert recipients[0].email == "p1001@people.example"
    assert recipients[0].data == b'{"first_name" : "Ada 1001"}'


async def test_an_announcement_that_got_lost_is_made_again_with_the_same_date(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        before = (await feed.announce(conn, campaign, 1))[0]
        assert await feed.call_back_announced(conn, [campaign], 60.0) == 0
        assert await feed.call_back_announced(conn, [campaign], 0.0) == 1
        after = (await feed.announce(conn, campaign, 1))[0]
    assert after.queued_at == before.queued_at


async def test_a_leased_batch_is_called_back_only_when_its_lease_has_ended(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 1)
        await leases.grant(pool, "one", [(campaign, 1)], 30.0)
        assert await feed.call_back_ended_leases(conn, [campaign], as_of=await feed.database_time(conn)) == {}
        assert await feed.call_back_announced(conn, [campaign], 0.0) == 0
        before = await feed.database_time(conn)
        await leases.extend(pool, "one", [(campaign, 1)], 0.0)
        assert await feed.call_back_ended_leases(conn, [campaign], as_of=before) == {}, "it had not ended then"
        assert await feed.call_back_ended_leases(conn, [campaign], as_of=await feed.database_time(conn)) == {campaign: 1}
        assert [a.batch for a in await feed.announce(conn, campaign, 1)] == [1]


async def test_an_ended_lease_of_a_living_engine_is_left_to_that_engine(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 1)
        await engines.register(pool, "one", "node", 1, "/nowhere")
        await leases.grant(pool, "one", [(campaign, 1)], -1.0)
        now = await feed.database_time(conn)
        assert await feed.call_back_ended_leases(conn, [campaign], as_of=now, silent_seconds=10.0) == {}
        assert await leases.grant(pool, "two", [(campaign, 1)], 30.0) == {}, "its journal may hold outcomes that no table knows"
        assert await leases.ended(pool, "one") == [(campaign, 1, 1)]
        await pool.execute("update engines set seen_at = now() - interval '11 s'")
        assert await feed.call_back_ended_leases(conn, [campaign], as_of=now, silent_seconds=10.0, spared=["one"]) == {}
        assert await feed.call_back_ended_leases(conn, [campaign], as_of=now, silent_seconds=10.0, grace_seconds=60.0) == {}
        assert await feed.call_back_ended_leases(conn, [campaign], as_of=now, silent_seconds=10.0) == {campaign: 1}


async def test_a_grant_whose_answer_was_lost_can_be_asked_for_again(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    key = (campaign, 1)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 1)
    assert (await leases.grant(pool, "one", [key], 30.0))[key][0] == 1
    assert await leases.grant(pool, "one", [key], 30.0) == {}
    assert await leases.grant(pool, "two", [key], 30.0, again=True) == {}
    assert (await leases.grant(pool, "one", [key], 30.0, again=True))[key][0] == 2


async def test_what_an_engine_has_in_hand_without_a_lease_goes_back_too(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=1500)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 3)
        await leases.grant(pool, "one", [(campaign, 1)], 30.0)
        await leases.grant(pool, "two", [(campaign, 2)], 30.0)
        await leases.give_up(pool, "one", [(campaign, n) for n in (1, 2, 3)])
        assert [a.batch for a in await feed.announce(conn, campaign, 5)] == [1, 3]
        await feed.withdraw(conn, campaign, [1, 2])
        assert [a.batch for a in await feed.announce(conn, campaign, 5)] == [1]


async def test_only_what_was_announced_before_the_head_of_a_queue_counts_as_lost(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=1500)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 1)
        await feed.announce(conn, campaign, 1)
        head = await feed.announced_at(conn, campaign, 2)
        assert await feed.call_back_announced(conn, [campaign], 0.0, before=head) == 1
        assert [a.batch for a in await feed.announce(conn, campaign, 1)] == [1]


async def test_recipients_that_have_an_outcome_are_not_announced_again(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=12)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await pool.execute("update batches set done = B'111111110100' where campaign_id = $1", campaign)
        positions, recipients = await feed.recipients_of(conn, (await feed.announce(conn, campaign, 1))[0])
    assert positions == [8, 10, 11]
    assert [r.number for r in recipients] == [9, 11, 12]


async def test_due_retries_become_one_batch_per_attempt_number(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await pool.execute(
            "insert into retries select $1, n, case when n < 4 then 2 else 3 end, "
            "now() + make_interval(secs => case n when 9 then 60 else -1 end), now() - interval '1 minute' "
            "from unnest(array[1, 3, 5, 7, 9]) n",
            campaign,
        )
        assert await feed.batch_due_retries(conn, campaign, 500) == 4
        assert await feed.batch_due_retries(conn, campaign, 500) == 0
        announced = [a for a in await feed.announce(conn, campaign, 10) if a.attempt > 1]
        assert sorted((a.attempt, a.numbers) for a in announced) == [(2, [1, 3]), (3, [5, 7])]
        assert all(a.first_attempt_at is not None for a in announced)
        positions, recipients = await feed.recipients_of(conn, next(a for a in announced if a.attempt == 3))
    assert positions == [0, 1]
    assert [r.number for r in recipients] == [5, 7]


async def test_cancelling_ends_every_recipient_without_an_outcome_once(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=1200)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 2)
        await pool.execute("update batches set done = ('11' || repeat('0', 498))::varbit where campaign_id = $1 and batch = 1", campaign)
        await pool.execute("insert into retries values ($1, 2, 2, now(), now())", campaign)
        await leases.grant(pool, "one", [(campaign, 2)], 30.0)
        await pool.execute("update campaigns set state = 'cancelling' where id = $1", campaign)
        while await feed.cancel_some(conn, campaign):
            pass
        assert not await feed.finish(conn, await active(pool, campaign))  # batch 2 is still leased
        await leases.hand_back(pool, "one", [(campaign, 2, 1)])
        while await feed.cancel_some(conn, campaign):
            pass
        assert await feed.finish(conn, await active(pool, campaign))
    rows = await pool.fetch(
        "select number, count(*) as records from accounting where campaign_id = $1 and kind = 'c' group by 1 order by 1", campaign
    )
    assert [row["number"] for row in rows] == list(range(2, 1201))  # 1 had its outcome, 2 was deferred
    assert {row["records"] for row in rows} == {1}
    assert await pool.fetchval("select sum(cancelled) from campaign_totals where campaign_id = $1", campaign) == 1199
    assert await state_of(pool, campaign) == states.CANCELLED


async def test_a_campaign_ends_when_no_batch_and_no_retry_is_left(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        assert not await feed.finish(conn, await active(pool, campaign))
        await pool.execute("update batches set state = 'settled', done = B'1111111111' where campaign_id = $1", campaign)
        await pool.execute("insert into retries values ($1, 2, 2, now(), now())", campaign)
        assert not await feed.finish(conn, await active(pool, campaign))
        await pool.execute("delete from retries where campaign_id = $1", campaign)
        assert await feed.finish(conn, await active(pool, campaign))
    assert await state_of(pool, campaign) == states.COMPLETED


async def test_neighbouring_campaigns_share_partitions_and_whoever_comes_at_once_makes_them_once(pool: Pool) -> None:
    async def make_room(campaign: int) -> None:
        async with pool.acquire() as conn, conn.transaction():
            await feed.make_room(conn, campaign)

    await asyncio.gather(*(make_room(campaign) for campaign in (1, 49, 50, 149, 50, 1, 7)))
    for table in ("recipients", "batches", "retries", "accounting"):
        found = await pool.fetch("select inhrelid::regclass::text as name from pg_inherits where inhparent = $1::text::regclass", table)
        assert sorted(row["name"] for row in found) == [f"{table}_below_{end}" for end in (100, 150, 50)]


async def test_what_engines_ask_about_leases_opens_the_partition_of_their_campaign_only(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        now = await feed.database_time(conn)
        async with conn.transaction():
            for other in range(1000, 3000, 50):
                await feed.make_room(conn, other)
        here, keys, ids = cast(Pool, conn), [(campaign, 1)], [campaign]
        questions: dict[str, Callable[[], Awaitable[object]]] = {
            "grant": lambda: leases.grant(here, "one", keys, 30.0),
            "extend": lambda: leases.extend(here, "one", keys, 30.0),
            "hand_back": lambda: leases.hand_back(here, "one", [(campaign, 1, 1)]),
            "give_up": lambda: leases.give_up(here, "one", keys),
            "ended": lambda: leases.ended(here, "one"),
            "silent": lambda: engines.silent(here, "node", "one", 10.0),
            "call_back_of": lambda: feed.call_back_of(here, "one", as_of=now),
            "call_back_ended_leases": lambda: feed.call_back_ended_leases(conn, ids, as_of=now),
            "call_back_announced": lambda: feed.call_back_announced(conn, ids, 0.0),
            "with_due_retries": lambda: feed.with_due_retries(conn, ids),
            "without_work": lambda: feed.without_work(conn, ids),
            "announce": lambda: feed.announce(conn, campaign, 1),
        }
        for name, ask in questions.items():
            for _ in range(8):  # from the sixth on PostgreSQL may use a plan for all values
                async with conn.transaction():
                    await ask()
                    opened = await conn.fetch(
                        "select distinct relation::regclass::text as name from pg_locks l join pg_class c on c.oid = l.relation "
                        "where pid = pg_backend_pid() and relkind = 'r' and relname ~ '_below_'"
                    )
            assert {row["name"] for row in opened} <= {"batches_below_50", "retries_below_50"}, name


async def test_of_many_engines_that_ask_for_a_lease_one_gets_it(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 1)
    grants = await asyncio.gather(*(leases.grant(pool, f"engine {n}", [(campaign, 1)], 30.0) for n in range(8)))
    assert sorted(map(len, grants)) == [0] * 7 + [1]


async def test_a_lease_that_ends_goes_to_one_other_engine_with_a_new_epoch(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    key = (campaign, 1)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 1)
        assert (await leases.grant(pool, "one", [key], -1.0))[key][0] == 1
        await feed.call_back_ended_leases(conn, [campaign], as_of=await feed.database_time(conn))
        await feed.announce(conn, campaign, 1)
    assert (await leases.grant(pool, "two", [key], 30.0))[key][0] == 2
    assert await leases.extend(pool, "one", [key], 30.0) == set()
    assert await leases.extend(pool, "two", [key], 30.0) == {key}
    await leases.hand_back(pool, "one", [(*key, 1)])
    assert await leases.extend(pool, "two", [key], 30.0) == {key}


async def test_no_lease_is_given_while_the_campaign_does_not_run(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=10)
    async with pool.acquire() as conn:
        await feed.prepare(conn, campaign, 500)
        await feed.announce(conn, campaign, 1)
    await pool.execute("update campaigns set state = 'paused' where id = $1", campaign)
    assert await leases.grant(pool, "one", [(campaign, 1)], 30.0) == {}
