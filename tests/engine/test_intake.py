"""engine.intake: a batch is never sent by two at once, whatever order PostgreSQL does things in after it was away."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from compose.campaign import CompiledCampaign
from compose.raw import RawMessage, compiled
from config.keys import load_keyring
from config.load import load
from domain.campaign import Batch
from domain.egress import DeliveryServer
from engine import intake
from engine.egress_path import EgressPath
from engine.held import HeldBatch
from engine.intake import Intake
from engine.suppression_set import SuppressionSet
from engine.turn import Turn
from journal import inspection
from journal.ledger import Ledger
from journal.segments import Journal
from store import batch_queue, engines, feed, leases
from store.feed import Announcement
from store.postgres import Pool
from tests.peers import ACCEPT, HANG, Peer
from tests.store.campaigns import make_campaign

ME = "node.0.me"
LEASE_SECONDS = 30.0
MARGIN_SECONDS = 5.0


class Parts:
    """An engine's intake with one path and nothing that runs by itself but the ledger. The path's server is not there, or at `port`."""

    def __init__(self, pool: Pool, redis: Redis, directory: Path, server: int, port: int = 1) -> None:
        settings = load(environ={"SLUICE_NODE__STATE_DIRECTORY": str(directory)})
        self.pool = pool
        self.journal = Journal(directory / "journal" / ME, engine_id=ME)
        self.ledger = Ledger(self.journal, pool)
        self.turn = turn = Turn(
            self.journal, SuppressionSet(), MARGIN_SECONDS, lambda held: self.intake.settled(held), lambda: self.intake.overslept()
        )
        about = DeliveryServer(id=server, user_id=1, name="s", host="127.0.0.1", port=port)
        self.path = EgressPath(about, "", turn, "here.example", (0, 1))
        self.intake = Intake(
            ME, pool, redis, {server: self.path}, self.ledger, self.journal, load_keyring(settings), "http://here.example", 4,
            LEASE_SECONDS, MARGIN_SECONDS, settings.mail,
        )  # fmt: skip

    async def hold(self, announcement: Announcement, *, seconds: float) -> HeldBatch:
        """Lease a batch as the engine does it; `seconds` may be negative: it has ended."""
        async with self.pool.acquire() as conn:
            positions, recipients = await feed.recipients_of(conn, announcement)
        key = (announcement.campaign_id, announcement.batch)
        epoch, done = (await leases.grant(self.pool, ME, [key], seconds))[key]
        batch = Batch(*key, 1, self.path.server.id, time.time(), 0.0, positions, recipients)
        await self.intake._hold(batch, epoch, done, time.monotonic() + seconds)
        return self.intake.held[key]

    def sendable(self) -> int:
        """How many recipients the path would send now."""
        return sum(len(indexes) for _, indexes in self.path.take(1000, time.monotonic(), MARGIN_SECONDS))


@pytest.fixture
async def parts(pool: Pool, redis: Redis, tmp_path: Path) -> AsyncIterator[Parts]:
    campaign = await make_campaign(pool, 4)
    made = Parts(pool, redis, tmp_path, int(await pool.fetchval("select delivery_server_id from campaigns where id = $1", campaign)))
    running = asyncio.create_task(made.ledger.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await made.path.stop()
    made.journal.close()


async def announced(pool: Pool) -> Announcement:
    async with pool.acquire() as conn:
        (campaign,) = await feed.active_campaigns(conn)
        (announcement,) = await feed.announce(conn, campaign.id, 1)
    return announcement


async def waiting_for_locks(pool: Pool, count: int) -> None:
    """Return when so many statements wait for a lock of somebody else's."""
    async with asyncio.timeout(60):
        while await pool.fetchval("select count(*) from pg_stat_activity where wait_event_type = 'Lock'") < count:
            await asyncio.sleep(0.01)


async def test_a_campaign_that_nobody_can_read_costs_nobody_but_itself(pool: Pool, parts: Parts) -> None:
    await pool.execute("update campaigns set headers = '[[1]]'")  # not by way of the API
    announcement = await announced(pool)
    with pytest.raises(KeyError):  # it is not held, and the intake goes on
        await parts.hold(announcement, seconds=-1.0)
    [said] = parts.intake.uncompiled
    assert f"campaign {announcement.campaign_id}" in said
    await parts.intake.return_forgotten()
    assert await pool.fetchval("select state from batches") == "pending"
    await pool.execute("update campaigns set headers = '[]'")
    await parts.hold(await announced(pool), seconds=LEASE_SECONDS)
    assert parts.intake.uncompiled == []


async def test_a_large_template_is_not_compiled_in_the_loop_that_sends(pool: Pool, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noting(*arguments: Any) -> CompiledCampaign | RawMessage:
        threads.append(threading.current_thread())
        return compiled(*arguments)

    monkeypatch.setattr(intake, "compiled", noting)
    held = await parts.hold(await announced(pool), seconds=LEASE_SECONDS)
    assert held.campaign.refusal is not None or held.campaign.compiled is not None
    assert threads
    assert threading.main_thread() not in threads


async def test_a_batch_that_is_being_handed_back_is_not_sent_on_when_its_extension_is_confirmed_late(pool: Pool, parts: Parts) -> None:
    """What a stop of PostgreSQL longer than the leases leads to: both statements wait for the ledger's long transaction."""
    announcement = await announced(pool)
    held = await parts.hold(announcement, seconds=-1.0)
    assert parts.sendable() == 0
    assert held.lost
    async with pool.acquire() as ledger, contextlib.AsyncExitStack() as transaction:
        await transaction.enter_async_context(ledger.transaction())
        await ledger.execute("select from batches where campaign_id = $1 for update", announcement.campaign_id)
        extending = asyncio.create_task(parts.intake.extend_leases())
        await waiting_for_locks(pool, 1)
        returning = asyncio.create_task(parts.intake.hand_back())
        await waiting_for_locks(pool, 2)
        await transaction.aclose()
        await asyncio.gather(extending, returning)
    owner = await pool.fetchval("select owner from batches where batch = $1", announcement.batch)
    assert (owner, parts.sendable(), parts.intake.held) == (None, 0, {}), "free for others, so not to be sent here"


async def test_what_was_sent_while_the_ledger_was_waited_for_is_not_handed_back(
    pool: Pool, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await parts.hold(await announced(pool), seconds=-1.0)
    assert parts.sendable() == 0
    flush = parts.intake._flush

    async def slowly() -> None:
        await flush()
        held.take(2)  # extended, sent on, settled, and stopped again
        held.settle()
        held.settle()

    monkeypatch.setattr(parts.intake, "_flush", slowly)
    await parts.intake.hand_back()
    assert await pool.fetchval("select owner from batches") == ME
    assert list(parts.intake.held.values()) == [held]


async def test_a_hand_back_that_postgresql_carries_out_late_ends_no_newer_lease(pool: Pool, parts: Parts) -> None:
    announcement = await announced(pool)
    key = (announcement.campaign_id, announcement.batch)
    held = await parts.hold(announcement, seconds=30.0)
    before = [(*held.key, held.epoch)]
    await leases.hand_back(pool, ME, before)
    await announced(pool)
    granted = await leases.grant(pool, ME, [key], 30.0)
    await leases.hand_back(pool, ME, before)  # the one whose answer nobody waited for any more
    assert await pool.fetchval("select owner from batches") == ME
    await leases.hand_back(pool, ME, [(*key, granted[key][0])])
    assert await pool.fetchval("select owner from batches") is None


async def test_only_leases_that_ended_before_the_journal_was_read_are_called_back(pool: Pool, parts: Parts) -> None:
    await engines.register(pool, ME, "node", 1, str(parts.journal.directory))
    await parts.hold(await announced(pool), seconds=LEASE_SECONDS)
    as_of = await feed.database_time(pool)
    await pool.execute("update batches set lease_until = clock_timestamp()")
    assert await feed.call_back_of(pool, ME, as_of=as_of) == 0
    as_of = await feed.database_time(pool)
    assert await feed.call_back_of(pool, ME, as_of=as_of, grace_seconds=60.0) == 0
    assert await feed.call_back_of(pool, ME, as_of=as_of) == 1


async def test_the_queue_that_had_something_last_is_asked_alone_and_another_one_is_found_all_the_same(parts: Parts, redis: Redis) -> None:
    server, intake = parts.path.server.id, parts.intake

    def batch(number: int) -> Batch:
        return Batch(1, number, 1, server, 1.0, 0.0, [0], [])

    async def taken() -> list[int]:
        intake._in_hand.clear()
        await intake._take()
        return sorted(one.batch for one in intake._in_hand.values())

    assert await taken() == []
    await batch_queue.push(redis, "marketing", [batch(1), batch(2), batch(3), batch(4), batch(5), batch(6)])
    assert await taken() == [1, 2, 3, 4]
    assert intake._queue == (server, "marketing")
    assert parts.path.more
    assert await taken() == [5, 6]
    assert not parts.path.more
    await batch_queue.push(redis, "autoresponder", [batch(7)])
    assert await taken() == [7]  # the one asked first had nothing
    await batch_queue.push(redis, "transactional", [batch(8)])
    await batch_queue.push(redis, "marketing", [batch(9)])
    assert await taken() == [8, 9]
    assert intake._queue is None
    await batch_queue.push(redis, "marketing", [batch(10)])
    assert await taken() == [10]
    parts.path.held = 4  # no room behind the queue that was asked last: what is urgent is found behind it
    await batch_queue.push(redis, "marketing", [batch(11)])
    assert await taken() == []
    await batch_queue.push(redis, "transactional", [batch(12)])
    intake.wake()  # as at the feeder's word that an empty queue has something; without it every queue is looked at ten times a second
    assert await taken() == [12]
    assert parts.path.more
    parts.path.held = 3  # there is room for one more, which can wait while so many are ready
    parts.path.ready = 1000
    await batch_queue.push(redis, "marketing", [batch(13)])
    intake.wake()
    assert await taken() == []
    parts.path.ready = 0
    assert await taken() == [11]
    parts.path.held = 0


@pytest.fixture
def stands_still(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes it later by twice a lease, without anything of this process having run meanwhile."""
    monotonic, seconds = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + seconds[0])

    def pass_by() -> None:
        seconds[0] = 2 * LEASE_SECONDS

    return pass_by


@contextlib.asynccontextmanager
async def sending(pool: Pool, redis: Redis, directory: Path, peer: Peer) -> AsyncIterator[tuple[Parts, HeldBatch]]:
    """Parts that may send a batch of four to `peer`."""
    campaign = await make_campaign(pool, 4)
    await pool.execute("update campaigns set from_email = 'news@sender.example', text = 'Hello'")
    server = int(await pool.fetchval("select delivery_server_id from campaigns where id = $1", campaign))
    parts = Parts(pool, redis, directory, server, peer.port)
    parts.turn.stopping = True
    held = await parts.hold(await announced(pool), seconds=LEASE_SECONDS)
    async with asyncio.timeout(60):
        while not parts.path.sessions:
            await asyncio.sleep(0.01)
    yield parts, held
    await parts.path.stop()
    parts.journal.close()


async def test_a_process_that_stood_still_within_a_turn_sends_nothing_of_that_turn(
    pool: Pool, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stands_still: Callable[[], None]
) -> None:
    """SIGSTOP may come between composing and writing; when the process goes on, its leases have ended and others have its batches (R4)."""
    write = os.write

    def stand_still(fd: int, data: bytes) -> int:
        stands_still()
        return write(fd, data)

    async with Peer() as peer, sending(pool, redis, tmp_path, peer) as (parts, held):
        (session,) = parts.path.sessions
        monkeypatch.setattr(os, "write", stand_still)
        parts.turn.stopping = False
        parts.turn.ready(session)
        async with asyncio.timeout(60):
            while (not session.ended or held.in_flight) and not peer.commands[1:]:
                await asyncio.sleep(0.01)
        assert peer.commands == ["EHLO here.example"]
        assert (held.open, held.ready) == (4, 4), "they came back unsent, and nobody is in doubt"


async def test_what_was_on_the_wire_when_the_process_stood_still_is_named_and_not_tried_again_by_us(
    pool: Pool, redis: Redis, tmp_path: Path, stands_still: Callable[[], None]
) -> None:
    """Whoever has its batch now sends it on: a retry of ours besides would be a third copy (P3)."""
    async with Peer(script={"content": (ACCEPT, HANG)}) as peer, sending(pool, redis, tmp_path, peer) as (parts, held):
        (session,) = parts.path.sessions
        parts.turn.stopping = False
        parts.turn.ready(session)
        async with asyncio.timeout(60):
            while not peer.accepted:
                await asyncio.sleep(0.01)
        stands_still()
        parts.turn.ready(session)
        async with asyncio.timeout(60):
            while held.in_flight:
                await asyncio.sleep(0.01)
        facts = inspection.inspect(parts.journal.directory)
        assert (facts.records["u"], facts.records.get("t", 0), facts.open_intents) == (1, 0, 0)
        assert (held.open, held.ready) == (4, 4), "they are open, for whoever leases the batch next"
