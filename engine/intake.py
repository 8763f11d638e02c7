"""Leases batches: takes announced ones from Redis for paths that can send now, asks PostgreSQL for the lease, keeps leases
alive, and hands batches back when their campaign pauses or this engine drains.
"""

import asyncio
import contextlib
import time
from typing import TypeAlias

import redis.asyncio
import structlog
from asyncpg import BitString

from compose.raw import RawMessage, compiled
from config.keys import Keyring
from config.settings import Mail
from domain import states
from domain.campaign import Batch
from domain.errors import Invalid, Unavailable
from engine.egress_path import EgressPath
from engine.held import HeldBatch, LiveCampaign
from engine.signing_keys import SigningKeys
from journal.ledger import Ledger
from journal.segments import Journal
from store import batch_queue, engines, leases
from store.postgres import Pool
from store.redis_keys import PRIORITY_CLASSES
from store.trouble import is_store_trouble, sentence

log = structlog.get_logger(__name__)

Key: TypeAlias = tuple[int, int]  # (campaign_id, batch)

_POLL_SECONDS = 0.25  # while batches are held; also woken by the feeder's word in Redis and by a path that runs low
_IDLE_POLL_SECONDS = 1.0  # while none is
_RECOMPILE_KEEP = 200  # compiled campaigns kept when nothing of theirs is held
_LOOK_SECONDS = 0.1  # so often every queue is looked at while one is being emptied; sooner when somebody says so
_PLENTY = 1000  # recipients: with so many ready a path waits until there is room for several batches, which cost no more than one
_URGENT = PRIORITY_CLASSES[0]
_URGENT_BATCHES = 8  # times held_batches: urgent mail does not wait for room, and its batches are often of one recipient
_LONGEST_PAUSE_SECONDS = 1.0  # while a store is away
_FLUSH_SECONDS = 20.0


class Intake:
    """The batches one engine holds."""

    def __init__(
        self, engine_id: str, pool: Pool, client: redis.asyncio.Redis, paths: dict[int, EgressPath], ledger: Ledger, journal: Journal,
        keyring: Keyring, public_url: str, held_batches: int, lease_seconds: float, lease_margin: float, mail: Mail,
    ) -> None:  # fmt: skip
        self.held: dict[Key, HeldBatch] = {}
        self.campaigns: dict[tuple[int, int, int], LiveCampaign] = {}  # (campaign, part, delivery server)
        self.unreadable = 0
        self._uncompiled: dict[int, tuple[float, str]] = {}  # campaign -> when it was tried last, and why it cannot be compiled
        self.trouble = ""
        self.held_batches = held_batches
        self.lease_seconds = lease_seconds
        self.lease_margin = lease_margin
        self._engine_id = engine_id
        self._pool = pool
        self._redis = client
        self._paths = paths
        self._ledger = ledger
        self._journal = journal
        self._keyring = keyring
        self.signing = SigningKeys(pool, keyring, mail)
        self._public_url = public_url
        self._mail = mail
        self._in_hand: dict[Key, Batch] = {}  # taken from Redis, not leased yet
        self._queue: tuple[int, str] | None = None  # the only one that had something when we last looked at each
        self._looked_at = 0.0
        self._asked = False  # a lease for those was asked for and the answer was lost
        self._handing_back = asyncio.Lock()
        self._wake = asyncio.Event()
        self.fallback_server_id = 0  # of those that have none of their own
        self.stopping = False

    @property
    def uncompiled(self) -> list[str]:
        """Why campaigns wait that cannot be compiled, in words. Each is tried again when the lease of its batch has ended."""
        since = time.monotonic() - 2 * self.lease_seconds
        return [said for at, said in self._uncompiled.values() if at > since]

    def wake(self) -> None:
        """Look for batches now, in every queue."""
        self._looked_at = 0.0
        self._wake.set()

    def settled(self, held: HeldBatch) -> None:
        """Every recipient of `held` has its outcome in the journal; the ledger ends the lease."""
        if self.held.get(held.key) is held:
            del self.held[held.key]
            held.campaign.held -= 1
            path = self._paths.get(held.server_id)
            if path is not None:
                path.held -= 1
        self._wake.set()

    def overslept(self) -> None:
        """This process stood still: connections with messages of a batch whose lease has ended are dropped before a content leaves (R4).

        What arrived meanwhile has been read: an answer that is there is no doubt.
        """
        now = time.monotonic()
        for server_id in {held.server_id for held in self.held.values() if held.in_flight and held.lease_until <= now}:
            path = self._paths.get(server_id)
            for session in list(path.sessions) if path is not None else ():
                session.abort("this engine stood still for longer than its lease")

    async def run(self) -> None:
        """Lease whatever the paths can send, until stopped."""
        pause = 0.0
        while not self.stopping:
            self._wake.clear()
            took = False
            try:
                took = await self._lease_some()
                pause, self.trouble = 0.0, ""
            except Exception as error:
                if not is_store_trouble(error):
                    raise
                pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause or 0.25)
                self.trouble = f"cannot lease batches: {sentence(error)}; what is held is sent on"
            if pause:
                await asyncio.sleep(pause)  # not woken: batches that end meanwhile must not make us ask at once
            elif not took:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_SECONDS if self.held else _IDLE_POLL_SECONDS):
                        await self._wake.wait()

    async def _lease_some(self) -> bool:
        if self._asked:
            # What the lost answer said is asked for once more, and only with the ledger caught up may it be granted to us again.
            await self._flush()
        else:
            await self._take()
        if not self._in_hand:
            return False
        asked_at = time.monotonic()
        again, self._asked = self._asked, True
        granted = await leases.grant(self._pool, self._engine_id, list(self._in_hand), self.lease_seconds, again=again)
        self._asked = False
        for key in [key for key in self._in_hand if key not in granted]:
            del self._in_hand[key]
        self._asked = True  # until every one of them is held
        for key, grant in granted.items():
            await self._hold(self._in_hand[key], *grant, asked_at + self.lease_seconds)
            del self._in_hand[key]
        self._asked = False
        return True

    async def _take(self) -> None:
        """Take announced batches from Redis into `_in_hand`, as many as the paths have room for."""
        if self._journal.over_budget:
            return
        # Mostly one campaign is sent, and another command for each empty queue would cost as much as twenty messages
        now, count = time.monotonic(), 1  # `_queue` alone had something when it was asked last
        if self._queue is None or now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            count = await batch_queue.count_waiting(self._redis, self._paths)
        if count == 1 and self._queue is not None and await self._take_from({self._queue}):
            return
        queues = await batch_queue.which_waiting(self._redis, self._paths) if count else set()
        self._queue = next(iter(queues)) if len(queues) == 1 else None
        await self._take_from(queues)

    async def _take_from(self, queues: set[tuple[int, str]]) -> bool:
        """Take what there is room for from these queues. False: there was room, and nothing in them."""
        found, full = False, set()
        for home in list(self._paths.values()):
            server, path = home.server.id, self._way(home)
            classes = [mail_class for mail_class in PRIORITY_CLASSES if (server, mail_class) in queues]
            if not classes:
                continue
            in_hand = sum(b.delivery_server_id == server for b in self._in_hand.values())
            if path.draining or not path.server.enabled or path.max_connections == 0:
                continue
            if path.failures and path.untried:
                continue  # the server does not take what we hold already; leave the rest to those it works for
            urgent = sum(h.campaign.priority_class == _URGENT and h.server_id == path.server.id for h in self.held.values())
            taken = 0
            if _URGENT in classes:
                taken = await self._take_class(server, _URGENT, _URGENT_BATCHES * self.held_batches - urgent - in_hand)
            room = before = self.held_batches + path.batches_for_connections - (path.held - urgent) - in_hand - taken
            if 2 * room < self.held_batches and path.ready >= _PLENTY:
                room = before = 0
            for priority_class in classes:
                if priority_class != _URGENT:
                    room -= await self._take_class(server, priority_class, room)
            if room <= 0:
                full.add(path)
            found = found or taken > 0 or room < before
        for path in self._paths.values():
            path.more = path in full
        return found or bool(full)

    async def _take_class(self, server_id: int, priority_class: str, room: int) -> int:
        if room <= 0:
            return 0
        batches, unreadable = await batch_queue.take(self._redis, server_id, priority_class, room)
        self.unreadable += unreadable
        # Redis may hand out twice what we hold already
        self._in_hand.update((key, b) for b in batches if (key := (b.campaign_id, b.batch)) not in self.held)
        return len(batches)

    async def _hold(self, batch: Batch, epoch: int, done: BitString, lease_until: float) -> None:
        home = self._paths.get(batch.delivery_server_id)
        path = self._way(home) if home is not None else None
        campaign = await self._campaign(batch, path)
        if campaign is None:
            log.error("a batch is not sent: its campaign is gone or cannot be compiled", campaign=batch.campaign_id, batch=batch.batch)
            return
        campaign.state = states.RUNNING  # the grant was given because it is
        held = HeldBatch(batch, campaign, epoch, done, lease_until)
        self.held[held.key] = held
        campaign.held += 1
        if path is None or self.stopping:
            held.lost = True  # handed back by the next `hand_back`
            return
        if home is not path and home is not None:
            held.server_id = path.server.id
            home.away_recipients += held.open
            home.missed = True
        path.held += 1
        if not held.open:
            held.lost = True
            return
        path.add(held)

    async def _campaign(self, batch: Batch, path: EgressPath | None) -> LiveCampaign | None:
        """The campaign of a batch, compiled for the server it goes out through."""
        try:
            campaign = await self._compiled(batch.campaign_id, batch.part, path)
        except Exception as bug:
            if is_store_trouble(bug):
                raise
            # One campaign that nobody foresaw must not end engine after engine: it waits, and the others are sent
            log.exception("a campaign cannot be compiled", campaign=batch.campaign_id)
            said = f"campaign {batch.campaign_id} cannot be compiled and waits: {type(bug).__name__}: {bug}"
            self._uncompiled[batch.campaign_id] = time.monotonic(), said
            return None
        self._uncompiled.pop(batch.campaign_id, None)
        if campaign is not None and batch.part:
            return campaign.queued(batch.first_attempt_at or batch.composed_at)
        return campaign

    async def _compiled(self, campaign_id: int, part: int, path: EgressPath | None) -> LiveCampaign | None:
        key = (campaign_id, part, path.server.id if path else 0)
        found = self.campaigns.get(key)
        if found is not None and found.compiled is not None and path is not None and path.server.version == found.server_version:
            return found
        loaded = await engines.campaign_content(self._pool, campaign_id, part)
        if loaded is None:
            return None
        content, priority_class = loaded
        server = path.server if path is not None else None
        version = server.version if server is not None else 0
        campaign = LiveCampaign(campaign_id, content.user_id, content.list_id, priority_class, content.queued_at, version)
        if server is not None:
            try:
                # In a thread: a large template takes seconds, and nobody else's connections are to stand still for it
                made = await asyncio.to_thread(compiled, content, server, self._keyring, self._public_url, None, self._mail)
                # Nothing is awaited between this answer and `self.campaigns`, where a change of keys finds it
                made.signer = await self.signing.signer(content, server)
                campaign.compiled = made
            except Invalid as refusal:
                campaign.refusal = refusal
                log.error("campaign content refused", campaign=campaign_id, reason=str(refusal))
        self.campaigns[key] = campaign
        full = len(self.campaigns) > _RECOMPILE_KEEP
        if full or isinstance(campaign.compiled, RawMessage):  # those are large, and mostly sent once
            for key, kept in list(self.campaigns.items()):
                if not kept.held and kept is not campaign and (full or isinstance(kept.compiled, RawMessage)):
                    del self.campaigns[key]
        return campaign

    # --- fallback servers ---------------------------------------------------------------------------------------------------
    def _way(self, home: EgressPath) -> EgressPath:
        """The path that sends what belongs to `home` now. A fallback's own fallback is never asked: no chains, no circles."""
        if home.needs_fallback(time.monotonic()):
            fallback = self._paths.get(home.server.fallback_server_id or self.fallback_server_id)
            if fallback is not None and fallback.takes_over:
                return fallback
        return home

    async def follow_fallbacks(self) -> None:
        """Send what waits for a server that cannot be used out through its fallback; what still waits there goes home when it can.

        A batch moves as a whole and only while nothing of it is in flight, so a connection's answers always find it where they left it.
        """
        for held in list(self.held.values()):
            home = self._paths.get(held.batch.delivery_server_id)
            if home is None:
                continue
            way = self._way(home)
            if way.server.id != held.server_id and self._movable(held):
                await self._move(held, home, way)
            if held.server_id != home.server.id:
                home.missed = True
        for path in list(self._paths.values()):
            way = self._way(path)
            name = way.server.name if way is not path else ""
            if name != path.away:
                log.warning("fallback", server=path.server.name, through=name or path.server.name, reason=path.health.failure)
            path.away = name
            if path.missed:
                path.wake()

    def _movable(self, held: HeldBatch) -> bool:
        unmoved = self.held.get(held.key) is held and not held.in_flight and held.open > 0
        return unmoved and not held.lost and not held.returning and not self.stopping

    async def _move(self, held: HeldBatch, home: EgressPath, way: EgressPath) -> None:
        campaign = await self._campaign(held.batch, way)
        before = self._paths.get(held.server_id)
        if campaign is None or before is None or not self._movable(held):
            return
        before.remove(lambda other: other is held)
        before.held -= 1
        held.campaign.held -= 1
        campaign.state = held.campaign.state
        campaign.held += 1
        held.campaign, held.server_id = campaign, way.server.id
        held.losses.clear()
        home.away_recipients += held.ready if way is not home else -held.ready
        way.held += 1
        way.add(held)

    async def watch_campaigns(self) -> None:
        """Learn which of the campaigns we hold batches of still run; a paused one stops at its next message."""
        live = {held.campaign for held in self.held.values()}
        if not live:
            return
        found = await engines.campaign_states(self._pool, sorted({campaign.id for campaign in live}))
        for campaign in live:
            campaign.state = found.get(campaign.id, states.CANCELLED)

    async def follow_keys(self) -> None:
        """Sign with other keys when they have changed, also what is left of batches that are held."""
        live = {*self.campaigns.values(), *(held.campaign for held in self.held.values())}
        await self.signing.follow([campaign.compiled for campaign in live if campaign.compiled is not None])

    async def extend_leases(self) -> None:
        """Extend all leases in one statement when the first of them has used up a third of its time.

        A batch that somebody called back is not sent any further (R4). One whose lease ended while PostgreSQL was away, and that
        nobody called back, goes on where it stopped.
        """
        now = time.monotonic()
        mine = [held for held in self.held.values() if held.campaign.running and self._can_send(held)]
        if not mine or min(held.lease_until for held in mine) - now > self.lease_seconds * 2 / 3:
            return
        # As long as a lease may take to be asked for again twice before it ends
        limit = max(1.0, self.lease_seconds / 3)
        kept = await leases.extend(self._pool, self._engine_id, [held.key for held in mine], self.lease_seconds, timeout_seconds=limit)
        for held in mine:
            if held.key not in kept:
                held.lost = True
            elif self.held.get(held.key) is held and not held.returning:
                # One that is being handed back must not go on: while we waited for this answer, PostgreSQL may have been told to free it
                held.lease_until = now + self.lease_seconds
                if held.lost and not self.stopping:
                    held.lost = False
                    if held.ready:
                        self._paths[held.server_id].add(held)

    def _can_send(self, held: HeldBatch) -> bool:
        """Whether `held` may be sent, but for its lease."""
        path = self._paths.get(held.server_id)
        if path is None or not path.server.enabled or path.max_connections == 0 or not held.open or held.returning:
            return False
        # Lost before its time: by a drain, a server switched off, or because it was called back
        return not held.lost or held.lease_until <= time.monotonic() + self.lease_margin

    async def hand_back(self, everything: bool = False) -> None:
        """Hand back the batches that may not be sent on: paused or cancelled campaign, lost lease, or all of them.

        Only those with nothing in flight, and only after the ledger has every outcome of theirs.
        """
        for path in self._paths.values():
            shut = everything or not path.server.enabled or path.max_connections == 0
            for held in path.remove(lambda held, shut=shut: shut or held.lost or not held.campaign.running):  # type: ignore[misc]
                held.lost = True
        async with self._handing_back:
            unwanted = {held: held.progress for held in self.held.values() if held.lost and not held.in_flight}
            in_hand = list(self._in_hand) if everything else []
            if not unwanted and not in_hand:
                return
            await self._flush()
            # Extended and sent on meanwhile: what it says has not all been in the ledger yet
            still = [h for h, before in unwanted.items() if h.lost and h.progress == before and self.held.get(h.key) is h]
            for held in still:
                held.returning = True  # from here on it must not go on, whatever PostgreSQL answers
            if still:
                await leases.hand_back(self._pool, self._engine_id, [(*held.key, held.epoch) for held in still])
            for held in still:
                self.settled(held)
            if in_hand:
                await leases.give_up(self._pool, self._engine_id, in_hand)
                self._in_hand.clear()

    async def return_forgotten(self) -> None:
        """Hand back what PostgreSQL says we lease and we do not hold: an answer was lost on the way, or the ledger came late."""
        ended = [grant for grant in await leases.ended(self._pool, self._engine_id) if not self._has(grant)]
        if not ended:
            return
        await self._flush()
        if ended := [grant for grant in ended if not self._has(grant)]:
            await leases.hand_back(self._pool, self._engine_id, ended)

    def _has(self, grant: leases.Grant) -> bool:
        key = (grant[0], grant[1])
        return key in self.held or key in self._in_hand

    async def _flush(self) -> None:
        """Return when every outcome so far is in PostgreSQL. Raises Unavailable: it does not answer, or the journal holds some back."""
        if self._journal.failure:
            raise Unavailable(self._journal.failure)
        await self._ledger.flush_through(self._journal.position, timeout_seconds=_FLUSH_SECONDS)
