"""Bench of the journal: what one message costs from the moment its outcome is known, in microseconds of CPU per message.

    python -m bench.bench_journal [--messages N] [--directory DIR] [--database URL] [--json]

A message is one intent and one outcome. The ledger is measured against PostgreSQL only when `--database` names one (any
migrated database; one campaign is made there and removed again), as CPU of this process and as wall time.
"""

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ext import accounting_lines, journal_record, ledger_rows
from journal.accounting_files import AccountingFiles
from journal.ledger import Ledger
from journal.segment_files import Reader
from journal.segments import Journal
from store import feed, postgres

MESSAGES_PER_TURN = 40
BATCH_RECIPIENTS = 500


def intent(campaign: int, number: int, at: int) -> bytes:
    """The intent of recipient `number`."""
    return journal_record.pack_intent(
        campaign, (number - 1) // BATCH_RECIPIENTS + 1, number, (number - 1) % BATCH_RECIPIENTS, 1, 1, 17, 1, at
    )


def outcome(campaign: int, number: int, at: int) -> bytes:
    """A delivery, as long as they are in life (about 300 bytes)."""
    return journal_record.pack_outcome(
        "d", campaign, (number - 1) // BATCH_RECIPIENTS + 1, number, (number - 1) % BATCH_RECIPIENTS, 1, 1, 17, 1, at, at, 0, 0, 10240,
        "recipient@mailbox-provider.example", "b+c1r2d3.0123456789abcdef@bounces.sender.example", "2.0.0",
        "250 2.0.0 Ok: queued as 4ZkQ2x0Y3Jz9vQ", "", "mx1.mailbox-provider.example (192.0.2.1)", "192.0.2.77", "192.0.2.1",
        "PIPELINING,SIZE,8BITMIME,SMTPUTF8,CHUNKING,ENHANCEDSTATUSCODES", "mailbox-provider.example/vmta1",
    )  # fmt: skip


def measure(messages: int, work: Callable[[], object]) -> float:
    """Microseconds of CPU (user and system) per message of one run of `work`."""
    started = time.process_time()
    work()
    return (time.process_time() - started) / messages * 1e6


def bench_records(messages: int, directory: Path, *, null: bool) -> dict[str, float]:
    """Pack, write (`null`: to /dev/null instead of segments), read and convert `messages` messages."""
    at = time.time_ns() // 1000
    found: dict[str, float] = {}

    def pack_intents() -> None:
        for number in range(1, messages + 1):
            intent(1, number, at)

    def pack_outcomes() -> None:
        for number in range(1, messages + 1):
            outcome(1, number, at)

    found["pack intent"] = measure(messages, pack_intents)
    found["pack outcome"] = measure(messages, pack_outcomes)
    records = [(intent(1, number, at), outcome(1, number, at)) for number in range(1, messages + 1)]
    journal = Journal(directory, engine_id="bench")
    sink = os.open(os.devnull, os.O_WRONLY) if null else -1

    def write() -> None:
        pending: list[bytes] = []
        append = pending.append if null else journal.append
        for count, (first, second) in enumerate(records):
            append(first)
            append(second)
            if count % MESSAGES_PER_TURN == 0:
                if null:
                    os.write(sink, b"".join(pending))
                    pending.clear()
                else:
                    journal.write()
        journal.write()

    found[f"append and write, {MESSAGES_PER_TURN} messages a turn" + (", null file" if null else "")] = measure(messages, write)
    if null:
        os.close(sink)
        journal.close(remove=True)
        return found
    found["fsync of all of it"] = measure(messages, journal.sync)
    blocks: list[bytes] = []

    def read() -> None:
        with Reader(directory) as reader:
            while block := reader.read(until=journal.position):
                blocks.append(block)
                reader.advance()

    found["read and check"] = measure(messages, read)
    batches = messages // BATCH_RECIPIENTS + 1
    progress = {(1, batch): (bytearray(-(-BATCH_RECIPIENTS // 8)), BATCH_RECIPIENTS) for batch in range(1, batches + 1)}
    intents = journal_record.OpenIntents()

    def feed_intents() -> None:
        for block in blocks:
            intents.feed(block, 1)

    found["rows for COPY and progress"] = measure(messages, lambda: [ledger_rows.copy_rows(block, progress, {1}) for block in blocks])
    found["batches touched"] = measure(messages, lambda: [ledger_rows.touched(block) for block in blocks])
    found["open intents"] = measure(messages, feed_intents)
    found["CSV lines"] = measure(messages, lambda: [accounting_lines.csv_lines(block, "dbt") for block in blocks])

    async def files() -> None:
        writer = AccountingFiles(journal, directory / "out" / "acct.csv")
        await writer.flush()
        writer.close()

    found["accounting files, all in all"] = measure(messages, lambda: asyncio.run(files()))
    shutil.rmtree(directory / "out")
    journal.close(remove=True)
    return found


async def bench_ledger(messages: int, directory: Path, url: str) -> dict[str, float]:
    """The whole way into PostgreSQL."""
    pool = await postgres.open_pool(url, 2)
    async with pool.acquire() as conn:
        user = await conn.fetchval("insert into users (name) values ('bench ' || gen_random_uuid()) returning id")
        server = await conn.fetchval(
            "insert into delivery_servers (user_id, name, host, port, security) values ($1, 'bench', '127.0.0.1', 25, 'none') returning id",
            user,
        )
        mailing_list = await conn.fetchval("insert into lists (user_id, name) values ($1, 'bench') returning id", user)
        campaign = await conn.fetchval(
            "insert into campaigns (user_id, name, state, list_id, delivery_server_id, subject) "
            "values ($1, 'bench', 'preparing', $2, $3, '') returning id",
            user,
            mailing_list,
            server,
        )
        await conn.execute(
            "insert into subscribers (user_id, list_id, email, email_key) select $1, $2, e, e "
            "from generate_series(1, $3::int) n, lateral (select n || '@bench.example') x(e)",
            user,
            mailing_list,
            messages,
            timeout=600,
        )
        await feed.prepare(conn, campaign, BATCH_RECIPIENTS)
    at = time.time_ns() // 1000
    journal = Journal(directory, engine_id=f"bench.{at}", readers=("ledger",))
    for number in range(1, messages + 1):
        journal.append(intent(campaign, number, at))
        journal.append(outcome(campaign, number, at))
        if number % MESSAGES_PER_TURN == 0:
            journal.write()
    journal.write()
    ledger = Ledger(journal, pool)
    cpu, wall = time.process_time(), time.perf_counter()
    await ledger.catch_up()
    found = {
        "ledger, CPU of this process": (time.process_time() - cpu) / messages * 1e6,
        "ledger, wall": (time.perf_counter() - wall) / messages * 1e6,
    }
    ledger.close()
    journal.close(remove=True)
    async with pool.acquire() as conn:
        for name in ("recipients", "batches", "retries", "accounting"):
            await conn.execute(f"delete from {name} where campaign_id = $1", campaign, timeout=600)
        for table in ("campaigns", "subscribers", "lists", "delivery_servers"):
            await conn.execute(f"delete from {table} where user_id = $1", user, timeout=600)
        await conn.execute("delete from users where id = $1", user)
    await pool.close()
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--directory", type=Path, default=None, help="where the journal is written; default: a temporary directory")
    parser.add_argument("--database", default="", help="URL of a migrated PostgreSQL database")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="sluice-bench-", dir=options.directory))
    try:
        found = bench_records(options.messages, root / "journal", null=False)
        found |= {name: value for name, value in bench_records(options.messages, root / "null", null=True).items() if "null" in name}
        if options.database:
            found |= asyncio.run(bench_ledger(options.messages, root / "ledger", options.database))
    finally:
        shutil.rmtree(root)
    if options.json:
        print(json.dumps({"messages": options.messages, "us_per_message": {name: round(value, 3) for name, value in found.items()}}))
    else:
        for name, value in found.items():
            print(f"{name:<48} {value:8.3f} us")


if __name__ == "__main__":
    main()
