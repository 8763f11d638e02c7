"""Leases batches: takes announced ones from Redis for paths that can send now, asks PostgreSQL for the lease, keeps leases
alive, and hands batches back when their campaign pauses or this engine drains.
"""

import asyncio
import contextlib
import time

import asyncpg
import redis.asyncio
import structlog
from asyncpg import BitString

from compose.campaign import CompiledCampaign
from config.keys import Keyring
from domain import states
from domain.campaign import Batch
from domain.errors import Invalid
from engine.egress_path import EgressPath
from engine.held import HeldBatch, LiveCampaign
from journal.ledger import Ledger
from journal.segments import Journal
from store import batch_queue, engines, leases
from store.batch_queue import RedisError
from store.postgres import Pool
from store.redis_keys import PRIORITY_CLASSES

log = structlog.get_logger(__name__)

STORE_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, RedisError)
_POLL_SECONDS = 0.25  # also woken by the feeder's word in Redis and by a path that runs low
_RECOMPILE_KEEP = 200  # compiled campaigns kept when nothing of theirs is held


class Intake:
    """The batches one engine holds."""

    def __init__(
        self, engine_id: str, pool: Pool, client: redis.asyncio.Redis, paths: dict[int, EgressPath], ledger: Ledger, journal: Journal,
        keyring: Keyring, public_url: str, held_batches: int, lease_seconds: float,
    ) -> None:  # fmt: skip
        self.held: dict[tuple[int, int], HeldBatch] = {}
        self.campaigns: dict[int, LiveCampaign] = {}
        self.unreadable = 0
        self.trouble = ""
        self._engine_id = engine_id
        self._pool = pool
        self._redis = client
        self._paths = paths
        self._ledger = ledger
        self._journal = journal
        self._keyring = keyring
        self._public_url = public_url
        self._held_batches = held_batches
        self._lease_seconds = lease_seconds
        self._wake = asyncio.Event()
        self.stopping = False

    def wake(self) -> None:
        """Look for batches now."""
        self._wake.set()

    def settled(self, held: HeldBatch) -> None:
        """Every recipient of `held` has its outcome in the journal; the ledger ends the lease."""
        if self.held.pop(held.key, None) is not None:
            held.campaign.held -= 1
            path = self._paths.get(held.batch.delivery_server_id)
            if path is not None:
                path.held -= 1
        self._wake.set()

    async def run(self) -> None:
        """Lease whatever the paths can send, until stopped."""
        while not self.stopping:
            self._wake.clear()
            try:
                took = await self._lease_some()
                self.trouble = ""
            except STORE_ERRORS as error:
                took = False
                self.trouble = f"cannot lease batches: {type(error).__name__}: {error}"
            if not took:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_SECONDS if not self.trouble else 1.0):
                        await self._wake.wait()

    async def _lease_some(self) -> bool:
        taken: list[Batch] = []
        for path in list(self._paths.values()):
            room = self._held_batches - path.held
            if room <= 0 or path.draining or not path.server.enabled or path.max_connections == 0 or self._journal.over_budget:
                continue
            if path.failures and path.held:
                continue  # the server does not take what we hold already; leave the rest to those it works for
            for priority_class in PRIORITY_CLASSES:
                if room > 0:
                    batches, unreadable = await batch_queue.take(self._redis, path.server.id, priority_class, room)
                    self.unreadable += unreadable
                    room -= len(batches)
                    taken.extend(batches)
        taken = [batch for batch in taken if (batch.campaign_id, batch.batch) not in self.held]
        if not taken:
            return False
        asked_at = time.monotonic()
        keys = [(batch.campaign_id, batch.batch) for batch in taken]
        granted = await leases.grant(self._pool, self._engine_id, keys, self._lease_seconds)
        for batch in taken:
            grant = granted.get((batch.campaign_id, batch.batch))
            if grant is not None:
                await self._hold(batch, *grant, asked_at + self._lease_seconds)
        return True

    async def _hold(self, batch: Batch, epoch: int, done: BitString, lease_until: float) -> None:
        path = self._paths.get(batch.delivery_server_id)
        campaign = await self._campaign(batch.campaign_id)
        campaign.state = states.RUNNING  # the grant was given because it is
        held = HeldBatch(batch, campaign, epoch, done, lease_until)
        self.held[held.key] = held
        campaign.held += 1
        if path is None or self.stopping:
            held.lost = True  # handed back by the next `maintain`
            return
        path.held += 1
        if not held.open:
            held.lost = True
            return
        path.add(held)

    async def _campaign(self, campaign_id: int) -> LiveCampaign:
        found = self.campaigns.get(campaign_id)
        if found is not None and found.compiled is not None:
            path = self._paths.get(found.compiled.content.delivery_server_id)
            if path is not None and path.server.version == found.server_version:
                return found
        loaded = await engines.campaign_content(self._pool, campaign_id)
        if loaded is None:
            raise asyncpg.InterfaceError(f"campaign {campaign_id} is gone")
        content, priority_class = loaded
        path = self._paths.get(content.delivery_server_id)
        version = path.server.version if path else 0
        campaign = LiveCampaign(campaign_id, content.user_id, content.list_id, priority_class, content.version, content.queued_at, version)
        if path is not None:
            try:
                campaign.compiled = CompiledCampaign(content, path.server, self._keyring, self._public_url)
            except Invalid as refusal:
                campaign.refusal = refusal
                log.error("campaign content refused", campaign=campaign_id, reason=str(refusal))
        self.campaigns[campaign_id] = campaign
        if len(self.campaigns) > _RECOMPILE_KEEP:
            for other in [c for c in self.campaigns.values() if not c.held and c is not campaign]:
                del self.campaigns[other.id]
        return campaign

    async def watch_campaigns(self) -> None:
        """Learn which of the campaigns we hold batches of still run; a paused one stops at its next message."""
        live = {held.campaign for held in self.held.values()}
        if not live:
            return
        versions = await engines.campaign_versions(self._pool, sorted({campaign.id for campaign in live}))
        for campaign in live:
            campaign.state = versions.get(campaign.id, (states.CANCELLED, 0))[0]

    async def extend_leases(self) -> None:
        """Extend all leases in one statement; a batch that is no longer ours is not sent any further (R4)."""
        keys = [key for key, held in self.held.items() if held.campaign.running and not held.lost]
        if not keys:
            return
        asked_at = time.monotonic()
        kept = await leases.extend(self._pool, self._engine_id, keys, self._lease_seconds)
        for key in keys:
            held = self.held.get(key)
            if held is not None:
                if key in kept:
                    held.lease_until = asked_at + self._lease_seconds
                else:
                    held.lost = True

    async def hand_back(self, everything: bool = False) -> None:
        """Hand back the batches that may not be sent on: paused or cancelled campaign, lost lease, or all of them.

        Only those with nothing in flight, and only after the ledger has every outcome of theirs.
        """
        for path in self._paths.values():
            shut = everything or not path.server.enabled or path.max_connections == 0
            for held in path.remove(lambda held, shut=shut: shut or held.lost or not held.campaign.running):  # type: ignore[misc]
                held.lost = True
        unwanted = [held for held in self.held.values() if held.lost and not held.in_flight]
        if not unwanted:
            return
        await self._ledger.flush_through(self._journal.position)
        await leases.hand_back(self._pool, self._engine_id, [held.key for held in unwanted])
        for held in unwanted:
            self.settled(held)
