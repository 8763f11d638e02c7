"""bench.pieces: what is measured alone is there, and leaves a database as it was."""

import asyncio
from pathlib import Path

from bench import pieces
from bench.measure import Row
from store.postgres import Pool


def are_figures(rows: list[Row]) -> bool:
    return all((row.cpu_us_per_message or 0) > 0 for row in rows)


async def test_the_journal_is_measured_up_to_postgresql_which_keeps_nothing_of_it(pool: Pool, fresh_database_url: str, tmp_path: Path):
    rows = await asyncio.to_thread(pieces.journal, 2000, tmp_path, fresh_database_url)
    assert len(rows) == 4
    assert are_figures(rows)
    assert all(row.messages_per_second for row in rows[2:])
    for table in ("users", "campaigns", "recipients", "batches", "accounting"):
        assert not await pool.fetchval(f"select count(*) from {table}"), table


def test_composition_and_the_client_are_measured_without_stores():
    assert are_figures(pieces.composition(160, 1))
    assert are_figures(pieces.reply_parser(400, 1))
