"""store.accounting: the ledger's transaction, and the audit that proves the contract."""

import asyncio
import time

import pytest

from domain.errors import Conflict, NotFound
from ext import journal_record, ledger_rows
from store import accounting, feed
from store.postgres import Pool
from tests.store.campaigns import make_campaign

NOW = time.time_ns() // 1000
JOURNAL = "node.1.1"


def outcome(
    kind: str, campaign: int, number: int, *, attempt: int = 1, batch: int | None = None, position: int | None = None, due_at: int = 0
) -> bytes:
    """The record of one outcome; batches of 4."""
    return journal_record.pack_outcome(
        kind, campaign, (number - 1) // 4 + 1 if batch is None else batch, number, (number - 1) % 4 if position is None else position,
        attempt, 1, 7, 1, NOW, NOW, NOW if due_at else 0, due_at, 100, f"r{number}@example.com", "b@example.net", "2.0.0", "250 ok", "",
        "mx.example.com (192.0.2.1)", "192.0.2.2", "192.0.2.1", "PIPELINING", "example.com/v",
    )  # fmt: skip


async def put(pool: Pool, expected: tuple[int, int], new: tuple[int, int], *records: bytes, journal: str = JOURNAL) -> int | None:
    block = b"".join(records)
    batches, campaigns = ledger_rows.touched(block)

    def make_rows(progress: accounting.Progress, existing: set[int]) -> accounting.LedgerRows:
        rows, retries, totals, strays = ledger_rows.copy_rows(block, progress, existing)
        return accounting.LedgerRows([rows], retries, totals, strays)

    return await accounting.record(pool, journal, expected, new, batches, campaigns, make_rows)


async def test_outcomes_set_their_bits_and_a_full_batch_is_settled(pool: Pool):
    campaign = await make_campaign(pool, 6)
    await pool.execute("update batches set state = 'queued', owner = 'e', lease_until = now() + interval '30 s'")
    await put(pool, (0, 0), (1, 100), *(outcome("d", campaign, n) for n in (1, 2, 3)))
    rows = await pool.fetch("select state, owner, done from batches order by batch")
    assert (rows[0]["state"], rows[0]["owner"], rows[0]["done"].as_string()) == ("queued", "e", "1110")
    await put(pool, (1, 100), (1, 200), *(outcome("b", campaign, n) for n in (4, 5, 6)))
    rows = await pool.fetch("select state, owner, lease_until, done from batches order by batch")
    assert [(row["state"], row["owner"], row["lease_until"], row["done"].as_string()) for row in rows] == [
        ("settled", None, None, "1111"),
        ("settled", None, None, "11"),
    ]
    assert await accounting.cursor(pool, JOURNAL) == (1, 200)
    totals = await accounting.totals(pool, campaign)
    assert (totals.recipients, totals.delivered, totals.bounced, totals.queued) == (6, 3, 3, 0)


async def test_the_same_step_twice_is_done_once(pool: Pool):
    campaign = await make_campaign(pool, 2)
    assert await put(pool, (0, 0), (1, 100), outcome("d", campaign, 1)) == 0
    assert await put(pool, (0, 0), (1, 100), outcome("d", campaign, 1)) is None
    assert await pool.fetchval("select count(*) from accounting") == 1


async def test_a_step_from_anywhere_else_is_refused(pool: Pool):
    campaign = await make_campaign(pool, 2)
    await put(pool, (0, 0), (1, 100), outcome("d", campaign, 1))
    for expected in ((0, 0), (1, 50), (2, 0)):
        with pytest.raises(Conflict):
            await put(pool, expected, (1, 300), outcome("d", campaign, 2))
    with pytest.raises(Conflict):
        await put(pool, (1, 1), (1, 2), outcome("d", campaign, 2), journal="never seen")
    assert await pool.fetchval("select count(*) from accounting") == 1


async def test_two_ledgers_of_one_journal_at_once_write_once(pool: Pool):
    campaign = await make_campaign(pool, 4)
    results = await asyncio.gather(
        *(put(pool, (0, 0), (1, 100), outcome("d", campaign, 1), outcome("t", campaign, 2, due_at=NOW)) for _ in range(5))
    )
    assert sorted(results, key=str) == [0, None, None, None, None]
    assert await pool.fetchval("select count(*) from accounting") == 2


async def test_a_second_terminal_record_of_a_fenced_engine_becomes_uncertain(pool: Pool):
    campaign = await make_campaign(pool, 4)
    await put(pool, (0, 0), (1, 100), outcome("d", campaign, 1))
    await put(pool, (0, 0), (1, 100), outcome("b", campaign, 1), outcome("d", campaign, 2), outcome("d", campaign, 2), journal="other")
    assert [(r.kind) for r in await accounting.records_of(pool, campaign, 1)] == ["d", "u"]
    assert sorted(r.kind for r in await accounting.records_of(pool, campaign, 2)) == ["d", "u"]
    audit = await accounting.audit(pool, campaign)
    assert (audit.delivered, audit.queued, audit.possible_duplicates, audit.clean) == (2, 2, 2, True)


async def test_a_deferral_is_scheduled_once_with_its_first_attempt(pool: Pool):
    campaign = await make_campaign(pool, 4)
    due = NOW + 60_000_000
    await put(pool, (0, 0), (1, 100), outcome("t", campaign, 3, due_at=due), outcome("t", campaign, 3, due_at=due + 1))
    rows = await pool.fetch(
        "select number, attempt, (extract(epoch from due_at) * 1000000)::bigint as due, "
        "(extract(epoch from first_attempt_at) * 1000000)::bigint as first from retries"
    )
    assert [tuple(row) for row in rows] == [(3, 2, due, NOW)]
    assert (await accounting.totals(pool, campaign)).deferrals == 2
    audit = await accounting.audit(pool, campaign)
    assert (audit.input, audit.queued, audit.clean) == (4, 4, True)


async def test_records_of_campaigns_and_batches_that_are_gone_are_counted_and_left_out(pool: Pool):
    campaign = await make_campaign(pool, 4)
    records = [outcome("d", 999, 1), outcome("d", campaign, 1, batch=77), outcome("d", campaign, 1, position=4), outcome("d", campaign, 2)]
    assert await put(pool, (0, 0), (1, 100), *records) == 3
    assert await pool.fetchval("select array_agg(number) from accounting") == [2]


async def test_text_that_could_break_a_copy_arrives_as_it_was(pool: Pool):
    campaign = await make_campaign(pool, 1)
    nasty = "a\\b\tc\nd\re\\N\\. \N{SNOWMAN} =1+1 '\""
    record = journal_record.pack_outcome(
        "b", campaign, 1, 1, 0, 1, 1, 1, 1, 10**18, 0, 0, 0, 2**40, nasty, "", "5.1.1", nasty + "\0", "\\N", "\\.", "", "", "", ""
    )
    await put(pool, (0, 0), (1, 1), record)
    (row,) = await pool.fetch("select recipient, diagnostic, category, mta, size from accounting")
    assert tuple(row) == (nasty, nasty + " ", "\\N", "\\.", 2**31 - 1)


async def test_audit_names_what_is_wrong(pool: Pool):
    campaign = await make_campaign(pool, 8)
    await put(pool, (0, 0), (1, 100), *(outcome(kind, campaign, n) for n, kind in enumerate("dbxscdd", 1)))
    audit = await accounting.audit(pool, campaign)
    assert audit == accounting.Audit(
        input=8, delivered=3, bounced=1, expired=1, suppressed=1, cancelled=1, queued=1, missing=0, multiple_terminal=0, disagreeing=0,
        possible_duplicates=0,
    )  # fmt: skip
    assert audit.clean

    await pool.execute("insert into accounting select * from accounting where number = 1")
    assert (await accounting.audit(pool, campaign)).multiple_terminal == 1
    await pool.execute("delete from accounting where number in (1, 2)")
    audit = await accounting.audit(pool, campaign)
    assert (audit.missing, audit.disagreeing) == (2, 2)  # two totals differ from what the table holds
    await pool.execute("insert into retries values ($1, 3, 2, now(), now())", campaign)
    assert (await accounting.audit(pool, campaign)).disagreeing == 3
    await pool.execute("update batches set state = 'settled', done = '1111'")
    audit = await accounting.audit(pool, campaign)
    assert (audit.missing, audit.queued, audit.clean) == (3, 0, False)
    with pytest.raises(NotFound):
        await accounting.audit(pool, 12345)


async def test_audit_of_many_names_what_is_wrong_among_them(pool: Pool):
    campaign = await make_campaign(pool, 10_000, batch_recipients=500)
    await pool.execute(
        "insert into accounting select $1, n, 1, (case when n % 10 = 0 then 'b' else 'd' end)::\"char\", "
        "now(), 1, 1, 1, 1, '', '', '', '', '' "
        "from generate_series(1, 9500) n",
        campaign,
    )
    await pool.execute("update batches set state = 'settled', done = repeat('1', 500)::varbit where first_number <= 9500")
    await pool.execute("insert into campaign_totals (campaign_id, journal, delivered, bounced) values ($1, 'j', 8550, 950)", campaign)
    audit = await accounting.audit(pool, campaign)
    assert audit == accounting.Audit(
        input=10_000, delivered=8550, bounced=950, expired=0, suppressed=0, cancelled=0, queued=500, missing=0, multiple_terminal=0,
        disagreeing=0, possible_duplicates=0,
    )  # fmt: skip
    # One of each fault, far apart
    await pool.execute("insert into accounting select * from accounting where number = 1")
    await pool.execute("delete from accounting where number = 5001")
    await pool.execute("insert into retries values ($1, 9001, 2, now(), now())", campaign)
    await pool.execute(
        "insert into accounting select campaign_id, 20000, 1, kind, at, 1, 1, 1, 1, '', '', '', '', '' from accounting where number = 2"
    )
    found = await accounting.audit(pool, campaign)
    assert (found.input, found.delivered, found.bounced, found.queued) == (10_000, 8549, 950, 500)
    assert (found.missing, found.multiple_terminal, found.disagreeing) == (1, 1, 2)


async def test_audit_counts_the_open_recipients_of_a_retry_batch(pool: Pool):
    campaign = await make_campaign(pool, 4)
    await put(pool, (0, 0), (1, 100), *(outcome("t", campaign, n, due_at=NOW) for n in (1, 2, 3, 4)))
    async with pool.acquire() as conn:
        assert await feed.batch_due_retries(conn, campaign, 100) == 4
    assert (await accounting.audit(pool, campaign)).queued == 4
    await put(pool, (1, 100), (1, 200), outcome("d", campaign, 3, batch=2, position=2, attempt=2))
    audit = await accounting.audit(pool, campaign)
    assert (audit.delivered, audit.queued, audit.clean) == (1, 3, True)


async def test_report_counts_by_kind_category_and_answer(pool: Pool):
    campaign = await make_campaign(pool, 4)
    await put(pool, (0, 0), (1, 100), *(outcome(kind, campaign, n) for n, kind in enumerate("ddb", 1)))
    report = await accounting.report(pool, campaign)
    assert [(line.kind, line.status, line.records) for line in report.outcomes] == [("d", "2.0.0", 2), ("b", "2.0.0", 1)]
    assert [(d.kind, d.diagnostic, d.records) for d in report.diagnostics] == [("b", "250 ok", 1)]
    assert report.totals.delivered == 2


async def test_releasing_a_dead_owner_makes_its_batches_pending_and_nobody_elses(pool: Pool):
    await make_campaign(pool, 12)
    await pool.execute("insert into engines (id, node, pid, journal_directory) values ('dead', 'n', 1, '/'), ('alive', 'n', 2, '/')")
    await pool.execute(
        "update batches set state = 'queued', lease_until = now() + interval '30 s', owner = case batch when 3 then 'alive' else 'dead' end"
    )
    assert await accounting.release_owner(pool, "dead") == 2
    assert await accounting.release_owner(pool, "dead") == 0
    rows = await pool.fetch("select state, owner from batches order by batch")
    assert [tuple(row) for row in rows] == [("pending", None), ("pending", None), ("queued", "alive")]
    assert await pool.fetchval("select array_agg(id) from engines where stopped_at is not null") == ["dead"]
