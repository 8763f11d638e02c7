"""Bench of many campaigns: what one costs, and what a message costs behind all those that have ended.

    python -m bench.bench_campaigns [--ended N] [--runs N] [--json]

A campaign of 60,000 is sent in a fresh database, then N campaigns of five recipients are numbered and called ended, and it is sent again:
CPU per message of the engine and of the stores. `at once`: a hundred campaigns of fifty recipients started in one moment, until the
ledger has all their outcomes. Stores and sink are private. Two minutes for a thousand.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Final

from bench import end_to_end, measure
from bench.end_to_end import Bench, Case
from domain.errors import Unavailable
from store import batch_queue, feed, postgres
from store.embedded import Backends

LARGE: Final = Case(name="large", recipients=60_000)
SMALL: Final = Case(name="small", recipients=50)
_AT_ONCE: Final = 100  # campaigns
_ENDED_RECIPIENTS: Final = 5
_LONGEST_SECONDS: Final = 120.0
_BATCH_RECIPIENTS: Final = 500


class CampaignsBench(Bench):
    """Starts many campaigns at once, or makes them look ended."""

    async def letters(self, server: int, runs: int) -> dict[str, float]:
        """Medians of one large campaign, sent so many times."""
        samples = [await self.once(LARGE, server) for _ in range(runs)]
        return {
            "engine_us_per_message": round(statistics.median(each.cpu_seconds / each.messages * 1e6 for each in samples), 1),
            "stores_us_per_message": round(statistics.median((each.store_seconds or 0) / each.messages * 1e6 for each in samples), 1),
            "messages_per_second": round(statistics.median(each.messages / each.seconds for each in samples)),
        }

    async def at_once(self, server: int) -> dict[str, float]:
        """Start a hundred small campaigns in one moment and wait until the ledger has all of it."""
        await self._list(SMALL.recipients)
        engines, stores = self.engine_pids(), self.store_pids()
        cpu, store_cpu, began = measure.cpu_seconds(*engines), measure.cpu_seconds(*stores), time.monotonic()
        async with postgres.transaction(self.pool) as connection:
            started = [await self.insert_campaign(connection, SMALL, server, recipients=SMALL.recipients) for _ in range(_AT_ONCE)]
        await batch_queue.publish_change(self.redis, "campaigns")
        delivered = "select coalesce(sum(delivered), 0) from campaign_totals where campaign_id = any($1)"
        while await self.pool.fetchval(delivered, started) < _AT_ONCE * SMALL.recipients:
            self.check(SMALL.name)
            if time.monotonic() - began > _LONGEST_SECONDS:
                raise Unavailable(f"a hundred small campaigns were not sent within {_LONGEST_SECONDS:g} s")
            await asyncio.sleep(0.1)
        seconds = time.monotonic() - began
        await asyncio.sleep(end_to_end.FLUSH_SECONDS)
        return {
            "campaigns_per_second": round(_AT_ONCE / seconds, 1),
            "engine_ms_per_campaign": round((measure.cpu_seconds(*engines) - cpu) / _AT_ONCE * 1e3, 1),
            "stores_ms_per_campaign": round((measure.cpu_seconds(*stores) - store_cpu) / _AT_ONCE * 1e3, 1),
        }

    async def end(self, server: int, count: int) -> dict[str, float]:
        """Number the recipients of so many campaigns and call them ended; what one costs the stores."""
        await self._list(_ENDED_RECIPIENTS)
        stores = self.store_pids()
        before = measure.cpu_seconds(*stores)
        async with self.pool.acquire() as connection:
            for _ in range(count):
                made = await self.insert_campaign(connection, SMALL, server, recipients=_ENDED_RECIPIENTS)
                # before an engine sees it: this process numbers it
                await connection.execute("update campaigns set state = 'draft' where id = $1", made)
                await feed.prepare(connection, made, _BATCH_RECIPIENTS)
                await connection.execute("update campaigns set state = 'completed', finished_at = now() where id = $1", made)
        return {"stores_ms_to_number_one": round((measure.cpu_seconds(*stores) - before) / max(count, 1) * 1e3, 1)}


async def run(backends: Backends, directory: Path, ended: int, runs: int) -> dict[str, dict[str, float]]:
    """All of it, by name."""
    bench = CampaignsBench(backends, directory)
    try:
        await bench.open()
        await bench.engines(1)
        server = await bench.prepare(LARGE)
        found = {"fresh": await bench.letters(server, runs), "at once": await bench.at_once(server)}
        found["numbered"] = await bench.end(server, ended)
        found[f"behind {ended:,}"] = await bench.letters(server, runs)
        found[f"at once, behind {ended:,}"] = await bench.at_once(server)
    finally:
        await bench.close()
    return found


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ended", type=int, default=1000, help="campaigns that have ended before (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of the large campaign, each time (%(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with end_to_end.private() as (backends, directory):
        found = asyncio.run(run(backends, directory, options.ended, options.runs))
    if options.json:
        print(json.dumps(found))
    else:
        for name, figures in found.items():
            print(f"{name:<24}" + ", ".join(f"{what.replace('_', ' ')} {value:,g}" for what, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
