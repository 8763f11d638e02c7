"""Whether cost grows with work: the same letters sent with 100,000 and with 10 million recipients in the queue.

The recipients are numbered rows in PostgreSQL, cut into batches, as the feeder leaves them; here one statement makes them, because ten
million subscribers would only cost disk and time. The engine sends from the front, and CPU and the sink's count are read together at two
moments of full flow, so neither the start nor the end of a campaign is in the figure. The deep queue is left unfinished.
"""

import asyncio
import time
from typing import Final

from bench import end_to_end, measure, newsletter
from bench.end_to_end import Bench, Case
from bench.measure import Sample
from config.settings import Settings
from domain.errors import Unavailable
from store import batch_queue, feed
from store.postgres import transaction

SHALLOW: Final = 100_000
DEEP: Final = 10_000_000
_BEGIN: Final = 10_000  # messages before the first window
_WINDOW: Final = 80_000
_FILL_SECONDS: Final = 3600.0
_PATIENCE_SECONDS: Final = 120.0

_RECIPIENTS: Final = """
insert into recipients select $1, n, n, 'letter.' || n || '@shore' || n % 40 || '.example', json_build_object(
    'first_name', ($3::text[])[n % cardinality($3::text[]) + 1], 'last_name', 'O’Brien-' || n % 5000,
    'city', ($4::text[])[n % cardinality($4::text[]) + 1], 'country', 'NO', 'plan', ($5::text[])[n % cardinality($5::text[]) + 1],
    'joined', '20' || 10 + n % 16 || '-03-' || 10 + n % 19, 'balance', round(n % 500000 / 100.0, 2) || ' €', 'favourite', 'fish & <chips>')
from generate_series(1, $2::int) n
"""
_BATCHES: Final = """
insert into batches (campaign_id, batch, first_number, last_number, done)
select $1, n + 1, n * $2 + 1, least((n + 1) * $2, $3), repeat('0', (least((n + 1) * $2, $3) - n * $2)::int)::varbit
from generate_series(0, ($3::int - 1) / $2::int) n
"""


class DeepQueue:
    """Campaigns that are queued whole before the first message leaves."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self._bench = bench
        self._case = case

    async def samples(self, recipients: int, runs: int) -> list[Sample]:
        """Engine CPU in `runs` windows of one campaign, or of as many campaigns as that takes. Afterwards nothing of it is queued."""
        server = await self._bench.prepare(self._case)
        found: list[Sample] = []
        while len(found) < runs:
            campaign = await self._queue(server, recipients)
            most = min(runs - len(found), max(1, (recipients - _BEGIN) // (_WINDOW + _BEGIN)))
            found += await self._windows(most)
            await self._forget(campaign)
        return found

    async def _queue(self, server: int, recipients: int) -> int:
        """Make a campaign with all its recipients and batches and let it run."""
        batch = feed.batch_size(recipients, Settings().engine.batch_recipients)
        async with transaction(self._bench.pool) as connection:
            campaign = await self._bench.insert_campaign(connection, self._case, server)
            await feed.make_room(connection, campaign)
            await connection.execute(
                _RECIPIENTS, campaign, recipients, list(newsletter.NAMES), list(newsletter.CITIES),
                list(newsletter.PLANS), timeout=_FILL_SECONDS,
            )  # fmt: skip
            await connection.execute(_BATCHES, campaign, batch, recipients, timeout=_FILL_SECONDS)
            await connection.execute(
                "update campaigns set recipients = $2, batches = $3, prepared_at = now(), state = 'running' where id = $1",
                campaign, recipients, -(-recipients // batch),
            )  # fmt: skip
            await feed.analyze_much(connection, campaign, recipients)  # before anybody sends: the first window counts from its start
        return campaign

    async def _windows(self, count: int) -> list[Sample]:
        _, http, sink = await self._bench.sink(self._case.delay_ms)
        self._bench.pin()
        before = await self._count(http)
        await batch_queue.publish_change(self._bench.redis, "campaigns")
        found, engines = [], self._bench.engine_pids()
        for number in range(count):
            await self._until(http, before + _BEGIN + number * (_BEGIN + _WINDOW))
            watch, cpu, sink_cpu, first = measure.Watch(), measure.cpu_seconds(*engines), measure.cpu_seconds(sink), await self._count(http)
            await self._until(http, first + _WINDOW)
            last, cpu, sink_cpu = await self._count(http), measure.cpu_seconds(*engines) - cpu, measure.cpu_seconds(sink) - sink_cpu
            seconds, foreign = watch.stop()
            most = max(measure.memory(pid)[1] for pid in engines)
            found.append(
                Sample(messages=last - first, seconds=seconds, cpu_seconds=cpu, sink_seconds=sink_cpu, foreign=foreign, memory=most)
            )
        return found

    async def _count(self, http: str) -> int:
        return int((await asyncio.to_thread(end_to_end._counters, http))["messages"])

    async def _until(self, http: str, wanted: int) -> None:
        end = time.monotonic() + _PATIENCE_SECONDS
        while (seen := await self._count(http)) < wanted:
            self._bench.check(self._case.name)
            if time.monotonic() > end:
                raise Unavailable(f"{self._case.name}: {wanted - seen} messages were still missing after {_PATIENCE_SECONDS:g} s")
            await asyncio.sleep(0.02)

    async def _forget(self, campaign: int) -> None:
        """Leave nothing of it in the queue. To cancel it would write an outcome for each of its recipients."""
        await self._bench.engines(0)
        await self._bench.pool.execute("update campaigns set state = 'cancelled', finished_at = now() where id = $1", campaign)
        await self._bench.redis.flushdb()
        await self._bench.engines(1)
        await self._bench.prepare(self._case)
