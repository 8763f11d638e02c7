"""PostgreSQL to Redis: numbers the recipients of started campaigns and keeps each queue between two watermarks.

Every engine runs one; only the one that holds the advisory lock does anything, and the lock goes with its connection, so a
dead feeder is replaced within a second. Whatever it does can be repeated: an announcement is not a right to send.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import msgspec
import redis.asyncio
import structlog

from domain import states
from domain.campaign import Batch, Recipient
from ext.recipient_rows import RecipientRows
from store import batch_queue, feed, postgres
from store.batch_queue import Queue
from store.feed import ActiveCampaign, Announcement
from store.postgres import Connection
from store.trouble import is_store_trouble, sentence

log = structlog.get_logger(__name__)

_TICK_SECONDS = 0.05  # while something is announced
_QUIET_TICK_SECONDS = 0.25  # while campaigns run and nothing is to be announced
_IDLE_TICK_SECONDS = 0.5  # while none runs; also woken by a change of campaigns
_SLOW_TICK_SECONDS = 1.0  # ended leases, lost announcements, completion
_RETRY_TICK_SECONDS = 0.2
_TURN_SECONDS = 1.0  # of a tick, for campaigns with very many to cancel or to try again: the others wait to be fed
_UNLEASED_SECONDS = 3.0  # an announcement older than this that is not in the queue was lost on the way
_PACKED_AT_ONCE = 2000  # recipients
_LOCK_IDLE_SECONDS = 15.0  # a leader that stands still for so long loses the lead; longer than any wait for Redis
_LONG_ANSWER_SECONDS = 2.0  # PostgreSQL that takes longer for its clock stood still
_PREPARED_AT_ONCE = 8  # campaigns
_PREPARE_AGAIN_SECONDS = 2.0
_BUG_AGAIN_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 1.0  # while PostgreSQL is away
_SAY_AGAIN_SECONDS = 60.0


class _Unprepared(NamedTuple):
    """Why the recipients of a campaign are not numbered yet, in words, and when (monotonic) it is tried again."""

    reason: str
    again_at: float


class Feeder:
    """Feeds every campaign, over a database connection of its own, whose session holds the lock.

    `silent_seconds`: an engine not seen for so long is gone. `spared` names engines whose journals are about to be carried over
    here; their leases are left to whoever does that.
    """

    def __init__(
        self, database_url: str, client: redis.asyncio.Redis, batch_recipients: int, low: int, high: int, *,
        silent_seconds: float = 10.0, grace_seconds: float = 5.0, spared: Callable[[], Sequence[str]] = tuple,
    ) -> None:  # fmt: skip
        self.batch_recipients = batch_recipients
        self.low = low
        self.high = high
        self.leading = False
        self.ticked_at = time.monotonic()  # of the loop, leading or not
        self.announced = 0
        self._database_url = database_url
        self._redis = client
        self._silent_seconds = silent_seconds
        self._grace_seconds = grace_seconds
        self._spared = spared
        self._wake = asyncio.Event()
        self._slow_at = 0.0
        self._retries_at = 0.0
        self._steady_since = 0.0  # PostgreSQL answers without a gap since then
        self._asked_clock_at = 0.0
        self._unprepared: deque[int] = deque()  # campaigns whose recipients wait to be numbered
        self._preparing: set[int] = set()
        self._preparers: set[asyncio.Task[None]] = set()
        self._prepare_trouble: dict[int, _Unprepared] = {}
        self._fed: dict[Queue, int] = {}  # the campaign whose batches were announced last
        self._postgres_trouble = ""
        self._redis_trouble = ""
        self._said_at: dict[str, float] = {}

    @property
    def trouble(self) -> str:
        """What keeps it from feeding, in words."""
        return self._postgres_trouble or self._redis_trouble or next((each.reason for each in self._prepare_trouble.values()), "")

    def wake(self) -> None:
        """Look at the campaigns now."""
        self._wake.set()

    async def run(self) -> None:
        """Try to lead; feed while leading; begin again when a store was lost."""
        pause = 0.5
        while True:
            self.ticked_at = time.monotonic()
            try:
                conn = await self._connect()
                try:
                    pause = 0.5
                    await self._lead(conn)
                finally:
                    self.leading = False
                    for task in self._preparers:
                        task.cancel()
                    await _close(conn)
            except Exception as error:
                if not is_store_trouble(error):
                    raise
                self._postgres_trouble = f"feeder: PostgreSQL: {sentence(error)}"
                self._say("feeder lost PostgreSQL, trying again", reason=sentence(error))
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 2)

    async def _connect(self) -> Connection:
        return await postgres.connect_alone(self._database_url, command_timeout_seconds=60.0, idle_seconds=_LOCK_IDLE_SECONDS)

    async def _lead(self, conn: Connection) -> None:
        while not await feed.try_to_lead(conn):
            self._postgres_trouble = ""
            self.ticked_at = time.monotonic()
            await asyncio.sleep(1.0)
        self.leading = True
        self._steady_since = self._asked_clock_at = time.monotonic()
        log.info("this engine is the feeder")
        while True:
            self._wake.clear()
            campaigns = await feed.active_campaigns(conn)
            announced = self.announced
            await self._tick(conn, campaigns)
            self._postgres_trouble = ""
            self.ticked_at = time.monotonic()
            running = any(campaign.state in (states.RUNNING, states.CANCELLING) for campaign in campaigns)
            pause = _IDLE_TICK_SECONDS if not running or self._redis_trouble else _QUIET_TICK_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECONDS if self.announced > announced else pause):
                    await self._wake.wait()

    async def _tick(self, conn: Connection, campaigns: list[ActiveCampaign]) -> None:
        """What needs PostgreSQL alone comes first: it goes on while Redis is away."""
        now = time.monotonic()
        slow = now >= self._slow_at
        retries = now >= self._retries_at
        if slow:
            self._slow_at = now + _SLOW_TICK_SECONDS
        if retries:
            self._retries_at = now + _RETRY_TICK_SECONDS
        self._prepare([campaign.id for campaign in campaigns if not campaign.prepared], now)
        prepared = [campaign for campaign in campaigns if campaign.prepared]
        running = [campaign for campaign in prepared if campaign.state == states.RUNNING]
        if slow:
            await self._call_back_leases(conn, prepared)
        until = now + _TURN_SECONDS
        if retries and running:
            for campaign_id in sorted(await feed.with_due_retries(conn, [campaign.id for campaign in running])):
                while await feed.batch_due_retries(conn, campaign_id, self.batch_recipients) == self.batch_recipients:
                    if time.monotonic() >= until:
                        break
        cancelling = [campaign for campaign in prepared if campaign.state == states.CANCELLING]
        for campaign in cancelling:
            while await feed.cancel_some(conn, campaign.id) and time.monotonic() < until:
                pass
        if ending := running + cancelling if slow else cancelling:
            done = await feed.without_work(conn, [campaign.id for campaign in ending])
            for campaign in ending:
                if campaign.id in done and await feed.finish(conn, campaign):
                    log.info("campaign ended", campaign=campaign.id)
        try:
            if slow:
                await self._look_for_lost(conn, prepared)
            await self._announce(conn, running)
        except Exception as error:
            if not isinstance(error, batch_queue.RedisError):
                raise
            self._redis_trouble = f"feeder: Redis: {sentence(error)}"
            self._say("feeder cannot announce batches, trying again", reason=sentence(error))
        else:
            self._redis_trouble = ""

    def _say(self, what: str, **facts: object) -> None:
        """Log the same thing once a minute at most: a store may be away for hours."""
        now = time.monotonic()
        if now - self._said_at.get(what, -_SAY_AGAIN_SECONDS) >= _SAY_AGAIN_SECONDS:
            self._said_at[what] = now
            log.warning(what, **facts)

    def _prepare(self, campaigns: list[int], now: float) -> None:
        """Have the recipients of these numbered, a few campaigns at a time: a large one does not hold up a small one."""
        for campaign_id in set(self._prepare_trouble).difference(campaigns):
            del self._prepare_trouble[campaign_id]
        held_back = {campaign_id for campaign_id, trouble in self._prepare_trouble.items() if trouble.again_at > now}
        self._unprepared = deque(each for each in campaigns if each not in self._preparing and each not in held_back)
        for _ in range(min(_PREPARED_AT_ONCE - len(self._preparers), len(self._unprepared))):
            task = asyncio.create_task(self._prepare_waiting(), name="prepare campaigns")
            self._preparers.add(task)
            task.add_done_callback(self._preparers.discard)

    async def _prepare_waiting(self) -> None:
        """Number the recipients of one campaign after the other over one connection, until none waits or one cannot be prepared."""
        conn: Connection | None = None
        try:
            while self._unprepared:
                campaign_id, started = self._unprepared.popleft(), time.monotonic()
                self._preparing.add(campaign_id)
                try:
                    conn = conn or await self._connect()
                    count = await feed.prepare(conn, campaign_id, self.batch_recipients)
                except Exception as error:
                    self._note_unprepared(campaign_id, error)
                    return
                finally:
                    self._preparing.discard(campaign_id)
                self._prepare_trouble.pop(campaign_id, None)
                log.info("recipients numbered", campaign=campaign_id, recipients=count, seconds=round(time.monotonic() - started, 2))
                self.wake()
        finally:
            if conn is not None:
                await _close(conn)

    def _note_unprepared(self, campaign_id: int, error: Exception) -> None:
        what, now = f"campaign {campaign_id} could not be prepared", time.monotonic()
        if is_store_trouble(error):
            self._prepare_trouble[campaign_id] = _Unprepared(f"{what}: {sentence(error)}", now + _PREPARE_AGAIN_SECONDS)
            self._say(f"{what}, trying again", reason=sentence(error))
        else:
            self._prepare_trouble[campaign_id] = _Unprepared(f"{what}: {type(error).__name__}: {error}", now + _BUG_AGAIN_SECONDS)
            log.error("campaign could not be prepared", campaign=campaign_id, exc_info=error)

    async def _call_back_leases(self, conn: Connection, campaigns: list[ActiveCampaign]) -> None:
        """Free the leases of engines that are gone.

        Only after PostgreSQL has answered without a gap for longer than it takes a living engine to be seen: after an outage every
        engine looks silent for a moment, and what they sent meanwhile is in their journals only.
        """
        if not campaigns:
            return
        asked_at = time.monotonic()
        as_of = await feed.database_time(conn)
        answered_at = time.monotonic()
        if answered_at - asked_at > _LONG_ANSWER_SECONDS or asked_at - self._asked_clock_at > _LONG_ANSWER_SECONDS + _SLOW_TICK_SECONDS:
            self._steady_since = answered_at
        self._asked_clock_at = answered_at
        if answered_at - self._steady_since < self._silent_seconds + _LONG_ANSWER_SECONDS:
            return
        try:
            spared = list(self._spared())
        except OSError as error:
            self._say("cannot tell whose journals are here, so no leases are called back", reason=sentence(error))
            return
        called_back = await feed.call_back_ended_leases(
            conn, [campaign.id for campaign in campaigns], as_of=as_of, silent_seconds=self._silent_seconds,
            grace_seconds=self._grace_seconds, spared=spared,
        )  # fmt: skip
        for campaign_id, batches in called_back.items():
            log.warning("took back the batches of an engine that is gone", campaign=campaign_id, batches=batches)

    async def _look_for_lost(self, conn: Connection, campaigns: list[ActiveCampaign]) -> None:
        """Announce again what Redis has lost: everything, the last seconds, or what somebody took and never leased."""
        wiped = await batch_queue.was_wiped(self._redis)
        queues = _by_queue(campaigns)
        queued = await batch_queue.lengths(self._redis, queues)
        announced = await feed.count_announced(conn, [campaign.id for campaign in campaigns])
        for queue, members in queues.items():
            ids, before = [campaign.id for campaign in members], None
            if sum(announced.get(campaign_id, 0) for campaign_id in ids) <= (0 if wiped else queued[queue]):
                continue  # all of it is there; to look at the head means to fetch a whole batch
            if not wiped and queued[queue]:
                # A queue is first in, first out: what was announced before its head is not in it any more
                head = await batch_queue.head(self._redis, *queue)
                before = await feed.announced_at(conn, head.campaign_id, head.batch) if head else None
                if before is None:
                    continue
            await feed.call_back_announced(conn, ids, 0.0 if wiped else _UNLEASED_SECONDS, before=before)
        if wiped:
            log.warning("Redis has lost what was announced; announcing it again")
            await batch_queue.mark(self._redis)

    async def _announce(self, conn: Connection, running: list[ActiveCampaign]) -> None:
        queues = _by_queue(running)
        queued = await batch_queue.lengths(self._redis, queues)
        hungry = {queue: members for queue, members in queues.items() if queued[queue] < self.low}
        if not hungry:
            return
        pending = await feed.with_pending(conn, [campaign.id for members in hungry.values() for campaign in members])
        self._fed = {queue: last for queue, last in self._fed.items() if queue in queues}
        for queue, members in hungry.items():
            waiting, room = [campaign for campaign in members if campaign.id in pending], self.high - queued[queue]
            # Campaigns that share a way out share its queue evenly, and take turns where they are more than there is room for
            share = max(1, room // max(1, len(waiting)))
            last = self._fed.get(queue, 0)
            for campaign in sorted(waiting, key=lambda campaign: (campaign.id <= last, campaign.id)):
                if room <= 0:
                    break
                room -= await self._announce_some(conn, campaign, min(share, room), first=room == self.high)
                self._fed[queue] = campaign.id

    async def _announce_some(self, conn: Connection, campaign: ActiveCampaign, count: int, *, first: bool) -> int:
        """Announce up to `count` batches of a campaign; `first`: nobody looks at this queue just now. Returns how many."""
        announcements = await feed.announce(conn, campaign.id, count)
        pushed = 0
        try:
            # A few at a time: what is packed together stays small enough for memory that is used again
            at_once = max(1, _PACKED_AT_ONCE // max((len(each.done) for each in announcements), default=1))
            for start in range(0, len(announcements), at_once):
                some = announcements[start : start + at_once]
                batches = [await self._pack(conn, campaign, announcement) for announcement in some]
                await batch_queue.push(self._redis, campaign.mail_class, batches)
                pushed += len(batches)
                if first and pushed == len(batches):
                    await batch_queue.publish_change(self._redis, "queue")
        except batch_queue.RedisError:
            await feed.withdraw(conn, campaign.id, [announcement.batch for announcement in announcements[pushed:]])
            raise
        finally:
            self.announced += pushed
        return pushed

    async def _pack(self, conn: Connection, campaign: ActiveCampaign, announcement: Announcement) -> Batch:
        positions, recipients = await self._recipients(conn, announcement)
        return Batch(
            campaign.id,
            announcement.batch,
            announcement.attempt,
            campaign.delivery_server_id,
            announcement.queued_at.timestamp(),
            announcement.first_attempt_at.timestamp() if announcement.first_attempt_at else 0.0,
            positions,
            recipients,
            announcement.part,
        )

    async def _recipients(self, conn: Connection, announcement: Announcement) -> tuple[list[int], list[Recipient]]:
        if announcement.numbers is not None:
            return await feed.recipients_of(conn, announcement)
        rows = RecipientRows(announcement.done.bytes, announcement.first_number)
        await feed.copy_recipients(conn, announcement, rows.feed_copy)
        # Packed already: between here and Redis nobody looks into them
        return rows.positions, cast("list[Recipient]", msgspec.Raw(rows.packed()))


def _by_queue(campaigns: list[ActiveCampaign]) -> dict[Queue, list[ActiveCampaign]]:
    queues: dict[Queue, list[ActiveCampaign]] = {}
    for campaign in campaigns:
        queues.setdefault((campaign.delivery_server_id, campaign.mail_class), []).append(campaign)
    return queues


async def _close(conn: Connection) -> None:
    with contextlib.suppress(Exception):
        await conn.close(timeout=2)
    conn.terminate()
