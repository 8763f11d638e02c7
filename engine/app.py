"""One engine process: builds the parts, starts them in order, runs until SIGTERM, drains.

Order matters at both ends. Start: stores, journal (its lock makes the identity ours), journals of dead owners, then sending.
End: nothing new is begun, what was begun is finished, the ledger catches up, batches are handed back, the journal is closed.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable

import msgspec
import redis.asyncio
import structlog

from config import load
from config.keys import Keyring, load_keyring
from config.settings import Settings
from domain.egress import DeliveryServer
from engine import metrics
from engine.egress_path import EgressPath
from engine.feeder import Feeder
from engine.intake import STORE_ERRORS, Intake
from engine.suppression_set import SuppressionSet
from engine.turn import Turn
from journal import recovery
from journal.accounting_files import AccountingFiles
from journal.ledger import Ledger
from journal.segments import Journal
from store import batch_queue, engines, postgres, redis_keys
from store.postgres import Pool

log = structlog.get_logger(__name__)

_HEARTBEAT_SECONDS = 1.0
_WATCH_SECONDS = 0.5
_STATUS_LIFETIME_SECONDS = 5


class Engine:
    """The parts of one engine and their life."""

    def __init__(self, settings: Settings, slot: int) -> None:
        self.settings = settings
        self.node = load.node_name(settings)
        # Never used twice, so a lease or a journal can always be told from its predecessor's
        self.id = f"{self.node}.{slot}.{int(time.time() * 1000):x}"
        self.slot = slot
        self.paths: dict[int, EgressPath] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._share = (0, 1)
        self._version = -1
        self._stop = asyncio.Event()
        self._pool: Pool
        self._redis: redis.asyncio.Redis
        self._keyring: Keyring

    async def run(self) -> None:
        """Live until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        settings = self.settings
        self._pool = await postgres.open_pool(settings.database.url, settings.database.pool_size, settings.database.command_timeout_seconds)
        self._redis = batch_queue.connect(settings.redis.url, settings.redis.timeout_seconds)
        self._keyring = load_keyring(settings)
        journal_root = load.journal_root(settings)
        self._journal = Journal(
            journal_root / self.id,
            engine_id=self.id,
            segment_bytes=settings.journal.segment_bytes,
            fsync_interval_seconds=settings.journal.fsync_interval_seconds,
            disk_budget_bytes=settings.journal.disk_budget_bytes,
        )
        await engines.register(self._pool, self.id, self.node, os.getpid(), str(journal_root / self.id))
        self._suppressions = SuppressionSet()
        await self._suppressions.refresh(self._pool)
        self._ledger = Ledger(self._journal, self._pool, interval_seconds=settings.journal.ledger_interval_seconds)
        accounting = AccountingFiles(
            self._journal,
            load.accounting_path(settings),
            records=settings.accounting.records,
            max_size_bytes=settings.accounting.max_size_bytes,
            flush_interval_seconds=settings.accounting.flush_interval_seconds,
        )
        self.turn = Turn(self._journal, self._suppressions, settings.engine.lease_margin_seconds, self._settled)
        self.intake = Intake(
            self.id, self._pool, self._redis, self.paths, self._ledger, self._journal, self._keyring, settings.inbound.public_url,
            settings.engine.held_batches, settings.engine.lease_seconds,
        )  # fmt: skip
        self.feeder = Feeder(
            settings.database.url, self._redis, settings.engine.batch_recipients,
            settings.engine.queue_low_batches, settings.engine.queue_high_batches,
        )  # fmt: skip
        self.status = metrics.Status(self.id, self.node, self.turn, self.intake, self.feeder, self.paths)
        if settings.engine.metrics_port:
            metrics.serve(settings.engine.metrics_port + self.slot, self.turn, self.paths)
        await self._heartbeat()
        await self._follow_egress()
        self._journal.start()
        self._start("ledger", self._ledger.run())
        self._start("accounting files", accounting.run())
        self._start("intake", self.intake.run())
        self._start("feeder", self.feeder.run())
        self._start("changes", self._listen())
        self._every("heartbeat", _HEARTBEAT_SECONDS, self._heartbeat)
        self._every("egress", _HEARTBEAT_SECONDS, self._follow_egress)
        self._every("suppressions", _HEARTBEAT_SECONDS, self._follow_suppressions)
        self._every("campaigns", _WATCH_SECONDS, self._watch)
        self._every("leases", settings.engine.lease_seconds / 3, self.intake.extend_leases)
        self._every("orphans", _HEARTBEAT_SECONDS, self._adopt)
        self._every("deadlines", _WATCH_SECONDS, self._deadlines)
        self.status.state = "running"
        print(f"engine ready id={self.id}", flush=True)
        await self._stop.wait()
        await self._drain()
        await accounting.flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._journal.stop()
        caught_up = self._ledger.cursor == self._journal.position
        self._journal.close(remove=caught_up)
        with contextlib.suppress(*STORE_ERRORS):
            await engines.stopped(self._pool, self.id)
            await self._redis.delete(redis_keys.engine_status(self.id))
        await self._redis.aclose()
        self._pool.terminate()

    def _start(self, name: str, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except Exception:
                # A part that dies would leave an engine that looks alive and does half its work; the supervisor starts a whole one.
                log.exception("a part of the engine failed; the engine stops", part=name)
                self._stop.set()

        self._tasks.append(asyncio.create_task(guarded(), name=name))

    def _every(self, name: str, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                try:
                    await work()
                except STORE_ERRORS as error:
                    self.intake.trouble = f"{name}: {type(error).__name__}: {error}"

        self._start(name, repeat())

    # --- what changes while running -----------------------------------------------------------------------------------------
    async def _listen(self) -> None:
        """Be told of changes at once; whoever misses one looks by itself within a second."""
        while True:
            try:
                async with self._redis.pubsub() as changes:
                    await changes.subscribe(redis_keys.CHANGES)
                    while True:
                        message = await changes.get_message(ignore_subscribe_messages=True, timeout=3600.0)
                        if message is not None:
                            await self._changed(message["data"].decode("utf-8", "replace"))
            except STORE_ERRORS:
                await asyncio.sleep(1.0)

    async def _changed(self, what: str) -> None:
        if what == "queue":
            self.intake.wake()
        elif what == "campaigns":
            self.feeder.wake()
            await self._watch()
            self.intake.wake()
        elif what == "egress":
            await self._follow_egress()
        elif what == "suppressions":
            await self._follow_suppressions()

    async def _follow_suppressions(self) -> None:
        await self._suppressions.refresh(self._pool)

    async def _watch(self) -> None:
        await self.intake.watch_campaigns()
        await self.intake.hand_back()

    async def _follow_egress(self) -> None:
        version = await engines.egress_version(self._pool)
        if version == self._version:
            return
        config = await engines.egress_config(self._pool)
        for server in config.servers.values():
            path = self.paths.get(server.id)
            if path is None:
                self.paths[server.id] = EgressPath(server, self._password(server), self.turn, socket.getfqdn(), self._share)
            elif path.server.version != server.version:
                path.reconfigure(server, self._password(server), self._share)
        for gone in set(self.paths) - set(config.servers):
            path = self.paths[gone]
            path.reconfigure(msgspec.structs.replace(path.server, enabled=False, version=path.server.version + 1), "", self._share)
        self._version = config.version
        self.intake.wake()

    def _password(self, server: DeliveryServer) -> str:
        if not server.password_sealed:
            return ""
        return self._keyring.open(server.password_sealed, b"delivery_servers:%d" % server.id).decode()

    async def _heartbeat(self) -> None:
        share = await engines.seen(self._pool, self.id)
        if share != self._share:
            self._share = share
            for path in self.paths.values():
                path.reconfigure(path.server, "", share)
        self.status.ledger_trouble = self._ledger.trouble
        await self._redis.set(redis_keys.engine_status(self.id), msgspec.json.encode(self.status.heartbeat()), ex=_STATUS_LIFETIME_SECONDS)

    async def _adopt(self) -> None:
        for dead in await recovery.adopt(load.journal_root(self.settings), self.id, self._pool, load.accounting_path(self.settings)):
            log.warning("took over the journal of a dead engine", engine=dead)
            self.feeder.wake()

    async def _deadlines(self) -> None:
        now = asyncio.get_running_loop().time()
        for path in self.paths.values():
            path.check_deadlines(now)

    def _settled(self, held: object) -> None:
        self.intake.settled(held)  # type: ignore[arg-type]

    # --- the end --------------------------------------------------------------------------------------------------------------
    async def _drain(self) -> None:
        """Finish what was begun (P8); at the limit the rest is cut and named as uncertain."""
        log.info("draining", held_batches=len(self.intake.held))
        self.status.state = "draining"
        limit = time.monotonic() + self.settings.engine.drain_timeout_seconds
        self.turn.stopping = True
        self.intake.stopping = True
        self.intake.wake()
        for path in self.paths.values():
            path.draining = True
            for session in list(path.sessions):
                session.quit()
            path.wake()
        while any(path.sessions for path in self.paths.values()) and time.monotonic() < limit:
            await asyncio.sleep(0.02)
        for path in self.paths.values():
            for session in list(path.sessions):
                session.abort()
        await asyncio.sleep(0)  # the turn that settles what was cut
        self.turn.run()
        try:
            async with asyncio.timeout(max(2.0, limit - time.monotonic())):
                await self.intake.hand_back(everything=True)
        except (*STORE_ERRORS, TimeoutError) as error:
            log.warning("batches could not be handed back; their leases will end by themselves", reason=str(error))
        for path in self.paths.values():
            await path.stop()
