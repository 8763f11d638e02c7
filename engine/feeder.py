"""PostgreSQL to Redis: numbers the recipients of started campaigns and keeps each queue between two watermarks.

Every engine runs one; only the one that holds the advisory lock does anything, and the lock goes with its connection, so a
dead feeder is replaced within a second. Whatever it does can be repeated: an announcement is not a right to send.
"""

import asyncio
import contextlib
import time

import asyncpg
import redis.asyncio
import structlog

from domain import states
from domain.campaign import Batch
from store import batch_queue, feed
from store.feed import ActiveCampaign, Announcement
from store.postgres import Connection

log = structlog.get_logger(__name__)

_TICK_SECONDS = 0.05  # while campaigns run
_IDLE_TICK_SECONDS = 0.5  # while none does; also woken by a change of campaigns
_SLOW_TICK_SECONDS = 1.0  # ended leases, lost announcements, completion
_RETRY_TICK_SECONDS = 0.2
_UNLEASED_SECONDS = 3.0  # an announcement older than this with an empty queue was lost on the way


class Feeder:
    """Feeds every campaign. `connect` opens a database connection of its own, whose session holds the lock."""

    def __init__(self, database_url: str, client: redis.asyncio.Redis, batch_recipients: int, low: int, high: int) -> None:
        self._database_url = database_url
        self._redis = client
        self._batch_recipients = batch_recipients
        self._low = low
        self._high = high
        self._wake = asyncio.Event()
        self._slow_at = 0.0
        self._retries_at = 0.0
        self._preparing: dict[int, asyncio.Task[None]] = {}
        self.leading = False
        self.trouble = ""

    def wake(self) -> None:
        """Look at the campaigns now."""
        self._wake.set()

    async def run(self) -> None:
        """Try to lead; feed while leading; begin again when a store was lost."""
        while True:
            try:
                conn = await asyncpg.connect(self._database_url, timeout=10, command_timeout=60)
                try:
                    await self._lead(conn)
                finally:
                    self.leading = False
                    for task in self._preparing.values():
                        task.cancel()
                    await conn.close(timeout=5)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
                self.trouble = f"feeder: PostgreSQL: {type(error).__name__}: {error}"
                log.warning("feeder lost PostgreSQL, trying again", reason=str(error))
            await asyncio.sleep(1.0)

    async def _lead(self, conn: Connection) -> None:
        while not await feed.try_to_lead(conn):
            self.trouble = ""
            await asyncio.sleep(1.0)
        self.leading = True
        log.info("this engine is the feeder")
        while True:
            self._wake.clear()
            campaigns = await feed.active_campaigns(conn)
            try:
                await self._tick(conn, campaigns)
                self.trouble = ""
            except batch_queue.RedisError as error:
                self.trouble = f"feeder: Redis: {type(error).__name__}: {error}"
                await asyncio.sleep(0.5)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECONDS if campaigns else _IDLE_TICK_SECONDS):
                    await self._wake.wait()

    async def _tick(self, conn: Connection, campaigns: list[ActiveCampaign]) -> None:
        now = time.monotonic()
        slow = now >= self._slow_at
        retries = now >= self._retries_at
        if slow:
            self._slow_at = now + _SLOW_TICK_SECONDS
        if retries:
            self._retries_at = now + _RETRY_TICK_SECONDS
        for campaign in campaigns:
            if not campaign.prepared and campaign.id not in self._preparing:
                task = asyncio.create_task(self._prepare(campaign.id), name=f"prepare campaign {campaign.id}")
                self._preparing[campaign.id] = task
                task.add_done_callback(lambda _, campaign_id=campaign.id: self._preparing.pop(campaign_id, None))  # type: ignore[misc]
        prepared = [campaign for campaign in campaigns if campaign.prepared]
        running = [campaign for campaign in prepared if campaign.state == states.RUNNING]
        if slow:
            await self._look_for_lost(conn, prepared)
        if retries:
            for campaign in running:
                while await feed.batch_due_retries(conn, campaign.id, self._batch_recipients) == self._batch_recipients:
                    pass
        for campaign in prepared:
            if campaign.state == states.CANCELLING:
                while await feed.cancel_some(conn, campaign.id):
                    pass
            if (slow and campaign.state == states.RUNNING) or campaign.state == states.CANCELLING:
                if await feed.finish(conn, campaign):
                    log.info("campaign ended", campaign=campaign.id)
        await self._announce(conn, running)

    async def _prepare(self, campaign_id: int) -> None:
        started = time.monotonic()
        conn = await asyncpg.connect(self._database_url, timeout=10)
        try:
            count = await feed.prepare(conn, campaign_id, self._batch_recipients)
            log.info("recipients numbered", campaign=campaign_id, recipients=count, seconds=round(time.monotonic() - started, 2))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            self.trouble = f"campaign {campaign_id} could not be prepared: {type(error).__name__}: {error}"
            log.error("campaign could not be prepared, trying again", campaign=campaign_id, reason=str(error))
            await asyncio.sleep(2.0)  # before the next tick tries again
        finally:
            await conn.close(timeout=5)
            self.wake()

    async def _look_for_lost(self, conn: Connection, campaigns: list[ActiveCampaign]) -> None:
        wiped = await batch_queue.was_wiped(self._redis)
        lengths: dict[tuple[int, str], int] = {}
        for campaign in campaigns:
            queue = (campaign.delivery_server_id, campaign.mail_class)
            if queue not in lengths:
                lengths[queue] = await batch_queue.length(self._redis, *queue)
            await feed.call_back_ended_leases(conn, campaign.id)
            if wiped:
                await feed.call_back_announced(conn, campaign.id, 0.0)
            elif not lengths[queue]:
                await feed.call_back_announced(conn, campaign.id, _UNLEASED_SECONDS)
        if wiped:
            await batch_queue.mark(self._redis)

    async def _announce(self, conn: Connection, running: list[ActiveCampaign]) -> None:
        queues: dict[tuple[int, str], list[ActiveCampaign]] = {}
        for campaign in running:
            queues.setdefault((campaign.delivery_server_id, campaign.mail_class), []).append(campaign)
        for (server_id, mail_class), campaigns in queues.items():
            queued = await batch_queue.length(self._redis, server_id, mail_class)
            if queued >= self._low:
                continue
            # campaigns that share a way out share its queue evenly
            share = max(1, (self._high - queued) // len(campaigns))
            for campaign in campaigns:
                announcements = await feed.announce(conn, campaign.id, share)
                batches = [await self._pack(conn, campaign, announcement) for announcement in announcements]
                await batch_queue.push(self._redis, mail_class, batches)
                if batches and not queued:
                    await batch_queue.publish_change(self._redis, "queue")

    async def _pack(self, conn: Connection, campaign: ActiveCampaign, announcement: Announcement) -> Batch:
        positions, recipients = await feed.recipients_of(conn, announcement)
        return Batch(
            campaign.id,
            announcement.batch,
            announcement.attempt,
            campaign.delivery_server_id,
            announcement.queued_at.timestamp(),
            announcement.first_attempt_at.timestamp() if announcement.first_attempt_at else 0.0,
            positions,
            recipients,
        )
