"""What the parts cost alone: composition, Liquid, the reply parser, the journal, PostgreSQL and Redis per recipient.

Each case runs in this process; `cpu_us_per_message` is its own CPU. No timing is asserted anywhere.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from asyncpg import BitString

from bench import bench_journal, measure, newsletter
from bench.bench_smtp_protocol import sans_io
from bench.measure import Row
from domain.campaign import Batch
from domain.errors import Invalid
from ext.recipient_rows import RecipientRows
from store import batch_queue, feed, postgres

GROUP: Final = 16
BATCH: Final = 500


def _row(name: str, messages: int, runs: int, work: Callable[[], object], *, note: str = "") -> Row:
    """Median CPU of `runs` runs."""
    watch, spent = measure.Watch(), []
    wall = time.perf_counter()
    for _ in range(runs):
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    rate = runs * messages / (time.perf_counter() - wall)
    _, foreign = watch.stop()
    return Row(
        name=name, messages=messages, messages_per_second=round(rate),
        cpu_us_per_message=round(statistics.median(spent) / messages * 1e6, 2),
        foreign_cpu=foreign, runs=runs, note=note,
    )  # fmt: skip


def composition(messages: int, runs: int) -> list[Row]:
    """Whole messages in groups; Liquid alone is one line of ten values and a condition, without header and encoding of a letter."""
    recipients = newsletter.recipients(messages)
    letter = newsletter.compiled()
    liquid = newsletter.compiled(newsletter.content(html="", text=_LIQUID, subject="Letter"))
    plain = newsletter.compiled(newsletter.content(html="", text="Letter", subject="Letter"))

    def build(what: object) -> Callable[[], object]:
        def work() -> None:
            for at in range(0, messages, GROUP):
                for answer in what.build(recipients[at : at + GROUP], composed_at=1.7e9, attempt=1):  # type: ignore[attr-defined]
                    if isinstance(answer, Invalid):
                        raise answer

        return work

    rows = [
        _row("composition alone, the newsletter", messages, runs, build(letter), note=f"groups of {GROUP}"),
        _row("composition alone, six words, nothing merged", messages, runs, build(plain), note="headers and tokens"),
        _row("the same with a Liquid line: 10 values, 1 condition, 1 loop", messages, runs, build(liquid)),
    ]
    cost = (rows[2].cpu_us_per_message or 0.0) - (rows[1].cpu_us_per_message or 0.0)
    rows.append(Row(name="Liquid alone (the difference)", messages=messages, cpu_us_per_message=round(cost, 2), runs=runs))
    return rows


_LIQUID: Final = (
    "{% for n in (1..3) %}{{ n }}: {{ subscriber.first_name | upcase }} {{ subscriber.last_name }} {{ subscriber.city }}\n{% endfor %}"
    "{% if subscriber.plan == 'pilot' %}{{ subscriber.country | default: '?' }}{% endif %}\n"
)


def reply_parser(messages: int, runs: int) -> list[Row]:
    """The SMTP client without sockets: build what is sent, read what is answered."""
    wire = newsletter.wire()[2]
    return [
        _row("SMTP client without sockets, DATA", messages, runs, lambda: sans_io(0, wire, messages)),
        _row("SMTP client without sockets, BDAT window 5", messages, runs, lambda: sans_io(5, wire, messages)),
    ]


def journal(messages: int, directory: Path, database_url: str) -> list[Row]:
    """From an outcome to the ledger and the accounting files; one run each, they are long enough."""
    found = bench_journal.bench_records(messages, directory / "bench-journal", null=False)
    ledger = asyncio.run(bench_journal.bench_ledger(messages, directory / "bench-ledger", database_url))
    names = {
        "journal: pack intent and outcome": found["pack intent"] + found["pack outcome"],
        "journal: append and write": next(value for name, value in found.items() if name.startswith("append and write")),
        "journal: accounting files": found["accounting files, all in all"],
        "journal: ledger into PostgreSQL (client)": ledger["ledger, CPU of this process"],
    }
    rows = [Row(name=name, messages=messages, cpu_us_per_message=round(value, 2), runs=1) for name, value in names.items()]
    rows[2].messages_per_second = round(1e6 / found["accounting files, all in all"])
    rows[3].messages_per_second = round(1e6 / ledger["ledger, wall"])
    return rows


def stores(messages: int, redis_url: str, database_url: str, runs: int) -> list[Row]:
    """Batches through Redis, and recipients read from PostgreSQL, per recipient, client side."""
    batches = [
        Batch(1, number, 1, 999_999, 1.7e9, 0.0, list(range(BATCH)), newsletter.recipients(BATCH)) for number in range(messages // BATCH)
    ]

    async def queue() -> None:
        client = batch_queue.connect(redis_url, 5.0)
        for batch in batches:
            await batch_queue.push(client, "marketing", [batch])
        taken = 0
        while taken < len(batches):
            found, _ = await batch_queue.take(client, 999_999, "marketing", 4)
            taken += len(found)
        await client.aclose()

    async def any_campaign() -> int | None:
        pool = await postgres.open_pool(database_url, 2, 60.0)
        found: int | None = await pool.fetchval("select id from campaigns where recipients >= $1 limit 1", BATCH)
        await pool.close()
        return found

    async def read(campaign: int) -> None:
        pool = await postgres.open_pool(database_url, 2, 60.0)
        async with pool.acquire() as connection:
            announcement = feed.Announcement(campaign, 1, 1, 1, BATCH, None, datetime.now(UTC), None, BitString.from_int(0, BATCH))
            for _ in range(len(batches)):
                rows = RecipientRows(announcement.done.bytes, 1)
                await feed.copy_recipients(connection, announcement, rows.feed_copy)
                rows.packed()
        await pool.close()

    name = "PostgreSQL: read recipients for a batch"
    campaign = asyncio.run(any_campaign())
    from_postgres = (
        measure.skipped(name, "this run has sent no campaign")
        if campaign is None
        else _row(name, messages, runs, lambda: asyncio.run(read(campaign)))
    )
    return [_row("Redis: announce and take, batches of 500", messages, runs, lambda: asyncio.run(queue())), from_postgres]
