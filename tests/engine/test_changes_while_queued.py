"""What changes while a queue is full: suppressions, unsubscribes and bounce patterns count within a second, for what is queued, too.

Times are those of the records, by the clock of the engine and of PostgreSQL, which are one machine's here. They are printed (`-s`);
the bounds are wide, because the machine is shared.
"""

import asyncio
import sys
from datetime import datetime, timedelta

from domain.bounce import CATEGORIES
from domain.bounce_patterns import read_line
from domain.suppression_key import parse
from store import batch_queue, bounce_patterns, suppressions
from store.postgres import Pool, connection, transaction
from tests.machine import Machine, until
from tests.store import seed

PER_SECOND = 300
BOUND = timedelta(seconds=5)


async def sent(pool: Pool, campaign: int) -> int:
    return int(await pool.fetchval("select count(*) from accounting where campaign_id = $1", campaign))


async def announce(machine: Machine, what: str) -> None:
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    await batch_queue.publish_change(client, what)
    await client.aclose()


async def now(pool: Pool) -> datetime:
    found = await pool.fetchval("select clock_timestamp()")
    assert isinstance(found, datetime)
    return found


async def test_suppressions_and_unsubscribes_stop_recipients_that_are_queued(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine(SLUICE_ENGINE__BATCH_RECIPIENTS="500")
    campaign = await seed.campaign(
        pool, recipients=8000, port=machine.sink_port, limits={"max_messages_per_second": PER_SECOND}, state="draft"
    )
    # who is suppressed later is told by the local part and stands everywhere in the queue
    await pool.execute(
        "update subscribers set email = 'a' || id || '@one.example', email_key = 'a' || id || '@one.example' where id % 4 = 0"
    )
    await pool.execute(
        "update subscribers set email = 'b' || id || '@two.example', email_key = 'b' || id || '@two.example' where id % 4 = 1"
    )
    await pool.execute(
        "update subscribers set email = 'c' || id || '@three.example', email_key = 'c' || id || '@three.example' where id % 16 = 2"
    )
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)

    async def some() -> bool:
        return await sent(pool, campaign) > 300

    await until(some, "something was sent", 60, machine)
    [[user, mailing_list]] = await pool.fetch("select user_id, list_id from campaigns where id = $1", campaign)
    committed = {}
    keys = [f"a{number}@one.example" for number in range(1, 8001)]
    async with transaction(pool) as conn:
        await suppressions.add(conn, None, None, keys, "manual")
    committed["a"] = await now(pool)
    await announce(machine, "suppressions")
    async with transaction(pool) as conn:
        await suppressions.add(conn, user, None, [parse("two.example")], "manual")
    committed["b"] = await now(pool)  # nobody is told: the engine looks by itself
    left = await pool.fetch("select id, email_key from subscribers where email_key like 'c%' order by id")
    async with connection(pool) as conn, conn.transaction():
        for row in left:
            await suppressions.unsubscribe(conn, user, mailing_list, row["id"], row["email_key"])
    committed["c"] = await now(pool)
    await announce(machine, "suppressions")
    await asyncio.sleep(4)
    for letter, at in committed.items():
        [[last, late, stopped]] = await pool.fetch(
            "select max(at) filter (where kind = 'd'), count(*) filter (where kind = 'd' and at > $3), count(*) filter (where kind = 's') "
            "from accounting where campaign_id = $1 and recipient like $2",
            campaign,
            f"{letter}%",
            at + BOUND,
        )
        delay = max(0.0, (last - at).total_seconds())
        sys.stdout.write(f"{letter}: the last one left {delay:.3f} s after the commit; {stopped} stopped while queued\n")
        assert (late, stopped > 0) == (0, True)
        assert last - at < BOUND
    others = await pool.fetchval("select count(*) from accounting where campaign_id = $1 and recipient like 'p%' and kind = 'd'", campaign)
    assert others > 0


async def test_a_bounce_pattern_is_in_force_within_a_second_and_its_end_too(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(
        pool, recipients=12_000, port=machine.sink_port, limits={"max_messages_per_second": PER_SECOND}, state="draft"
    )
    await pool.execute("update subscribers set email = 'bounce+' || id || '@people.example'")
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)

    async def some() -> bool:
        return await sent(pool, campaign) > 200

    async def first_after(at: datetime, category: str) -> datetime | None:
        found: datetime | None = await pool.fetchval(
            "select min(at) from accounting where campaign_id = $1 and kind = 'b' and at > $2 and category = $3", campaign, at, category
        )
        return found

    await until(some, "something bounced", 60, machine)
    assert await pool.fetchval("select count(*) from accounting where category <> 'bad-mailbox'") == 0
    async with transaction(pool) as conn:
        made = await bounce_patterns.add(conn, read_line("550 5.1.1==>quota-issues|Soft", frozenset(CATEGORIES)))
    added = await now(pool)
    await announce(machine, "bounce_patterns")
    came = await until(lambda: first_after(added, "quota-issues"), "the pattern is in force", 30, machine)
    async with transaction(pool) as conn:
        await bounce_patterns.remove(conn, made.id)
    removed = await now(pool)  # nobody is told
    went = await until(lambda: first_after(removed + timedelta(seconds=0.05), "bad-mailbox"), "the pattern is gone", 30, machine)
    sys.stdout.write(f"in force {(came - added).total_seconds():.3f} s after the commit, ")
    sys.stdout.write(f"out of force {(went - removed).total_seconds():.3f} s after it\n")
    assert came - added < BOUND
    assert went - removed < BOUND
