"""One engine process: builds the parts, starts them in order, runs until SIGTERM, drains.

Order matters at both ends. Start: stores (waited for), journal (its lock makes the identity ours), then sending. End: nothing new is
begun, what was begun is finished, the ledger catches up, batches are handed back, the journal is closed.

A store that is away is nobody's end: every part goes on with what it has, says so, and tries again. A part that dies of anything
else ends the engine, because half an engine looks alive.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import redis.asyncio
import structlog

from config import load, logs, tasks
from config.keys import Keyring, load_keyring
from config.settings import Settings
from domain.bounce import shipped_rules
from domain.egress import DeliveryServer
from domain.errors import ConfigurationError, Invalid, JournalError, SluiceError
from engine import metrics, reload
from engine.connect import own_name
from engine.egress_path import EgressPath
from engine.feeder import Feeder
from engine.intake import Intake
from engine.suppression_set import SuppressionSet
from engine.turn import Turn
from engine.watchdog import Watchdog, Work
from journal import bystander, recovery
from journal.accounting_files import AccountingFiles
from journal.ledger import Ledger
from journal.segments import Journal
from store import batch_queue, bounce_patterns, engines, feed, postgres, redis_keys
from store.postgres import Pool
from store.trouble import STORE_ERRORS, is_store_trouble, sentence

log = structlog.get_logger(__name__)

_HEARTBEAT_SECONDS = 1.0
_WATCH_SECONDS = 0.5
_FORGOTTEN_SECONDS = 5.0
_STATUS_LIFETIME_SECONDS = 5
_LONGEST_PAUSE_SECONDS = 5.0  # between two tries to reach a store before the start
_LONGEST_RETRY_SECONDS = 1.0  # and after it: when it is back, everything goes on within 5 s
_SAY_AGAIN_SECONDS = 60.0
_IDLE_IN_TRANSACTION_SECONDS = 15.0
_CLOSING_SECONDS = 0.6  # of the time a drain may take beyond its limit, for each store

T = TypeVar("T")


class Engine:
    """The parts of one engine and their life."""

    def __init__(self, settings: Settings, slot: int) -> None:
        self.settings = settings
        self.node = load.node_name(settings)
        # Never used twice, so a lease or a journal can always be told from its predecessor's
        self.id = f"{self.node}.{slot}.{int(time.time() * 1000):x}"
        self.slot = slot
        self.paths: dict[int, EgressPath] = {}
        # An engine that was not seen for so long is gone; with 30 s leases it is known well before its leases end
        self.silent_seconds = max(3.0, min(10.0, settings.engine.lease_seconds / 3))
        self._grace_seconds = min(5.0, settings.engine.lease_seconds / 6)  # from the end of a lease until others get its batch
        self._journal_root = load.journal_root(settings)
        self._tasks: list[asyncio.Task[None]] = []
        self._works: list[Work] = []
        self._refused: dict[int, str] = {}  # delivery servers that cannot be used, and why
        self._silent: dict[str, float] = {}  # engines of this machine that are silent, and since when we have seen that
        self._looked_for_silent_at = 0.0
        self._share = (0, 1)
        self._share_seen = (0, 1)
        self._version = -1
        self._patterns_version = -1
        self._stop = asyncio.Event()
        self._failed = False
        self._pool: Pool
        self._redis: redis.asyncio.Redis
        self._keyring: Keyring

    async def run(self) -> bool:
        """Live until SIGTERM or SIGINT. False: a part died, and the engine with it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        starting = asyncio.create_task(self._begin())
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # told to stop while the stores are away: nothing was begun
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return True
        starting.result()
        self.status.state = "running"
        print(f"engine ready id={self.id}", flush=True)
        await stopped
        await self._end()
        return not self._failed

    # --- the start ------------------------------------------------------------------------------------------------------------
    async def _begin(self) -> None:
        settings, engine = self.settings, self.settings.engine
        logs.configure(settings.node.log_level)
        self._keyring = load_keyring(settings)
        self._redis = batch_queue.connect(settings.redis.url, settings.redis.timeout_seconds)
        self._pool = await self._patiently(
            "connecting to PostgreSQL",
            lambda: postgres.open_pool(
                settings.database.url, settings.database.pool_size, settings.database.command_timeout_seconds,
                idle_in_transaction_seconds=_IDLE_IN_TRANSACTION_SECONDS, stateless=True,
            ),
        )  # fmt: skip
        directory = self._journal_root / self.id
        # In the table before the journal exists: whoever finds the journal can tell whose it is
        await self._patiently("entering this engine", lambda: engines.register(self._pool, self.id, self.node, os.getpid(), str(directory)))
        self._suppressions = SuppressionSet()
        await self._patiently("reading the suppressions", lambda: self._suppressions.refresh(self._pool))
        self._journal = Journal(
            directory,
            engine_id=self.id,
            segment_bytes=settings.journal.segment_bytes,
            fsync_interval_seconds=settings.journal.fsync_interval_seconds,
            disk_budget_bytes=settings.journal.disk_budget_bytes,
        )
        self._ledger = Ledger(self._journal, self._pool, interval_seconds=settings.journal.ledger_interval_seconds)
        self._accounting = AccountingFiles(
            self._journal,
            load.accounting_path(settings),
            records=settings.accounting.records,
            max_size_bytes=settings.accounting.max_size_bytes,
            flush_interval_seconds=settings.accounting.flush_interval_seconds,
        )
        self.turn = Turn(self._journal, self._suppressions, engine.lease_margin_seconds, self._settled, lambda: self.intake.overslept())
        self.intake = Intake(
            self.id, self._pool, self._redis, self.paths, self._ledger, self._journal, self._keyring, settings.inbound.public_url,
            engine.held_batches, engine.lease_seconds, engine.lease_margin_seconds, settings.mail,
        )  # fmt: skip
        self.feeder = Feeder(
            settings.database.url, self._redis, engine.batch_recipients, engine.queue_low_batches, engine.queue_high_batches,
            silent_seconds=self.silent_seconds, grace_seconds=self._grace_seconds, spared=self._journals_here,
        )  # fmt: skip
        self.watchdog = Watchdog(self.turn, self.intake, self.feeder, self._ledger, self.paths, self._works)
        self.status = metrics.Status(self.id, self.node, self.turn, self.intake, self.feeder, self.paths, self._journal, self._trouble)
        if engine.metrics_port:
            metrics.serve(engine.metrics_port + self.slot, self.turn, self.paths, self.watchdog, self._ledger, self._journal, self._trouble)
        self._ehlo_name = await own_name()
        await self._patiently("saying that this engine lives", self._seen)
        await self._patiently("reading the delivery servers", self._follow_egress)
        await self._patiently("reading the bounce patterns", self._follow_bounce_patterns)
        self._journal.start()
        self._start("ledger", self._ledger.run())
        self._start("accounting files", self._accounting.run())
        self._leasing = self._start("intake", self.intake.run())
        self._start("feeder", self.feeder.run())
        self._start("changes", self._listen())
        self._start("event loop", self.watchdog.beat())
        self._every("seen", _HEARTBEAT_SECONDS, self._seen, 10.0)
        self._every("heartbeat", _HEARTBEAT_SECONDS, self._heartbeat, 10.0)
        self._every("egress", _HEARTBEAT_SECONDS, self._follow_egress, 30.0)
        self._every("suppressions", _HEARTBEAT_SECONDS, self._follow_suppressions, 300.0)
        self._every("bounce patterns", _HEARTBEAT_SECONDS, self._follow_bounce_patterns, 30.0)
        self._every("DKIM keys", _HEARTBEAT_SECONDS, self.intake.follow_keys, 10.0)
        self._every("campaigns", _WATCH_SECONDS, self.intake.watch_campaigns, 10.0)
        self._every("handing back", _WATCH_SECONDS, self.intake.hand_back, 60.0)
        self._every("forgotten batches", _FORGOTTEN_SECONDS, self.intake.return_forgotten, 60.0)
        self._every("fallback servers", _WATCH_SECONDS, self.intake.follow_fallbacks, 10.0)
        self._every("leases", min(1.0, engine.lease_seconds / 6), self.intake.extend_leases, engine.lease_seconds)
        self._every("journals of dead engines", _HEARTBEAT_SECONDS, self._adopt, None)
        self._every("journals of silent engines", self.silent_seconds / 5, self._stand_by, None)
        self._every("deadlines", _WATCH_SECONDS, self._deadlines, None)
        self._every("watchdog", _HEARTBEAT_SECONDS, self.watchdog.look, None)
        # Nothing is waited for since the first part was started: told to stop in between, we would end without draining it
        self._start("first heartbeat", self._quietly(self._heartbeat()))

    async def _patiently(self, what: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do what the start needs of a store, however long the store is away; say so at once and then every minute."""
        pause, said_at = 0.25, 0.0
        while True:
            try:
                return await work()
            except Exception as error:
                if not is_store_trouble(error):
                    raise
                if time.monotonic() - said_at >= _SAY_AGAIN_SECONDS or not said_at:
                    log.warning("the engine waits for a store before it starts", at=what, reason=sentence(error))
                    said_at = time.monotonic()
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except Exception:
                # A part that dies would leave an engine that looks alive and does half its work; the supervisor starts a whole one.
                log.exception("a part of the engine failed; the engine stops", part=name)
                self._failed = True
                self._stop.set()

        task = asyncio.create_task(guarded(), name=name)
        self._tasks.append(task)
        return task

    def _every(self, name: str, seconds: float, work: Callable[[], Awaitable[None]], limit: float | None) -> None:
        """Do `work` again and again, each time within `limit` seconds; a store's trouble is noted and waited for."""
        about = Work(name, seconds)
        self._works.append(about)

        async def repeat() -> None:
            pause = seconds
            while True:
                await asyncio.sleep(pause)
                try:
                    async with asyncio.timeout(limit):
                        await work()
                except Exception as error:
                    if not is_store_trouble(error):
                        raise
                    pause = max(seconds, min(_LONGEST_RETRY_SECONDS, pause * 1.5))
                    self._note(about, sentence(error))
                else:
                    pause, about.done_at = seconds, time.monotonic()
                    self._note(about, "")

        self._start(name, repeat())

    def _note(self, work: Work, trouble: str) -> None:
        now = time.monotonic()
        if trouble and (not work.trouble or now - work.said_at >= _SAY_AGAIN_SECONDS):
            work.said_at = now
            log.warning("a store does not answer; trying again", part=work.name, reason=trouble)
        elif work.trouble and not trouble:
            log.info("it answers again", part=work.name)
        work.trouble = trouble

    def _trouble(self) -> list[str]:
        """Every sentence an operator should read, the same one once."""
        said = [self.turn.trouble, self.intake.trouble, self.feeder.trouble, self._ledger.trouble, self._accounting.trouble]
        said += [self.intake.signing.trouble, self._journal.sync_trouble, *self.intake.uncompiled]
        said += [f"{work.name}: {work.trouble}" for work in self._works if work.trouble]
        said += [*self._refused.values(), *recovery.troubles(), *self.watchdog.sentences]
        return list(dict.fromkeys(filter(None, said)))

    # --- what changes while running -----------------------------------------------------------------------------------------
    def _reload(self) -> None:
        """SIGHUP: read the settings again. Refused whole if anything in them is wrong (P12)."""
        try:
            settings = load.load()
        except (ConfigurationError, OSError) as error:
            log.error("settings refused, the old ones stay", reason=str(error))
            return
        applied, later = reload.differences(self.settings, settings)
        self.settings = reload.apply(self.settings, settings)
        if "node.log_level" in applied:
            logs.configure(self.settings.node.log_level)
        engine = self.settings.engine
        if hasattr(self, "feeder"):
            self.intake.held_batches = engine.held_batches
            self._version = -1  # look for the fallback server by its name
            self.feeder.batch_recipients = engine.batch_recipients
            self.feeder.low, self.feeder.high = engine.queue_low_batches, engine.queue_high_batches
            self.intake.wake()
            self.feeder.wake()
        log.warning("settings read again", applied=", ".join(applied) or "nothing changed", after_a_restart=", ".join(later) or "nothing")

    async def _listen(self) -> None:
        """Be told of changes at once; whoever misses one looks by itself within a second."""
        pause = 0.25
        while True:
            try:
                async with self._redis.pubsub() as changes:
                    await changes.subscribe(redis_keys.CHANGES)
                    while True:
                        message = await changes.get_message(ignore_subscribe_messages=True, timeout=15.0)
                        if message is not None:
                            await self._quietly(self._changed(message["data"].decode("utf-8", "replace")))
                        else:
                            await changes.ping()  # a link that is half open shows now
                        pause = 0.25
            except Exception as error:
                if not is_store_trouble(error):
                    raise
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)

    async def _changed(self, what: str) -> None:
        if what == "queue":
            self.intake.wake()
        elif what == "campaigns":
            self.feeder.wake()
            await self.intake.watch_campaigns()
            await self.intake.hand_back()
            self.intake.wake()
        elif what == "egress":
            await self._follow_egress()
        elif what == "suppressions":
            await self._follow_suppressions()
        elif what == "bounce_patterns":
            await self._follow_bounce_patterns()
        elif what == "dkim":
            await self.intake.follow_keys()

    async def _quietly(self, work: Awaitable[None]) -> None:
        """Do now what is also done every second: its trouble is said there."""
        try:
            async with asyncio.timeout(10.0):
                await work
        except Exception as error:
            if not is_store_trouble(error):
                raise

    async def _follow_suppressions(self) -> None:
        await self._suppressions.refresh(self._pool)

    async def _follow_bounce_patterns(self) -> None:
        if await bounce_patterns.version(self._pool) == self._patterns_version:
            return
        version, patterns = await bounce_patterns.load(self._pool)
        try:
            self.turn.bounce_rules = shipped_rules().with_patterns(patterns)
        except Invalid as error:  # not by way of the API, which compiles them all: somebody wrote into the table
            log.error("bounce patterns refused, the ones before stay in force", reason=str(error))
        self._patterns_version = version

    async def _follow_egress(self) -> None:
        version = await engines.egress_version(self._pool)
        if version == self._version:
            return
        refused: dict[int, str] = {}
        config = await engines.egress_config(self._pool, refused.__setitem__)
        for server in config.servers.values():
            path = self.paths.get(server.id)
            if path is not None and path.server.version == server.version:
                continue
            try:
                password = self._password(server)
            except (SluiceError, ValueError) as error:
                refused[server.id] = f"delivery server {server.name}: its password cannot be opened with this installation's key: {error}"
                continue
            if path is None:
                self.paths[server.id] = EgressPath(server, password, self.turn, self._ehlo_name, self._share)
            else:
                path.reconfigure(server, password, self._share)
        # A server that cannot be read any more goes on as it was; one that is gone ends
        for gone in set(self.paths) - set(config.servers) - set(refused):
            path = self.paths[gone]
            if path.server.enabled:
                path.reconfigure(msgspec.structs.replace(path.server, enabled=False, version=path.server.version + 1), "", self._share)
        name = self.settings.engine.fallback_server
        fallback = config.fallback(name) if name else None
        if name and fallback is None:
            refused[0] = f"engine.fallback_server: the user admin has no delivery server {name!r}; add it, or correct the name"
        self.intake.fallback_server_id = fallback.id if fallback is not None else 0
        for server_id, reason in refused.items():
            if self._refused.get(server_id) != reason:
                log.error("delivery server refused", reason=reason)
        self._refused = refused
        self._version = config.version
        self.intake.wake()

    def _password(self, server: DeliveryServer) -> str:
        if not server.password_sealed:
            return ""
        return self._keyring.open(server.password_sealed, b"delivery_servers:%d" % server.id).decode()

    async def _seen(self) -> None:
        share = await engines.seen(self._pool, self.id)
        asked_at = time.monotonic()
        said = await feed.database_time(self._pool)
        self.turn.clock.heard(said.timestamp(), asked_at, time.monotonic())
        # Right after PostgreSQL was away every engine sees itself alone: only what is seen twice counts
        if share != self._share and (share == self._share_seen or not self.paths):
            self._share = share
            for path in self.paths.values():
                path.reconfigure(path.server, "", share)
        self._share_seen = share

    async def _heartbeat(self) -> None:
        await self._redis.set(redis_keys.engine_status(self.id), msgspec.json.encode(self.status.heartbeat()), ex=_STATUS_LIFETIME_SECONDS)

    async def _deadlines(self) -> None:
        now = asyncio.get_running_loop().time()
        for path in self.paths.values():
            path.check_deadlines(now)

    def _settled(self, held: object) -> None:
        self.intake.settled(held)  # type: ignore[arg-type]

    # --- engines that died or stand still -------------------------------------------------------------------------------------
    def _journals_here(self) -> list[str]:
        """The engines whose journals lie on this machine, this one's too: they are carried over here before their leases are free.

        Raises OSError, for example without descriptors: then nobody knows.
        """
        others = [path.name for path in self._journal_root.iterdir() if path.name != self.id and not recovery.is_refused(path)]
        return [self.id, *others]

    async def _adopt(self) -> None:
        settings = self.settings.accounting
        adopted = await recovery.adopt(
            self._journal_root, self.id, self._pool, load.accounting_path(self.settings),
            records=settings.records, max_size_bytes=settings.max_size_bytes,
        )  # fmt: skip
        for dead in adopted:
            log.warning("took over the journal of a dead engine", engine=dead)
            self.feeder.wake()

    async def _stand_by(self) -> None:
        """Free the ended leases of engines of this machine that live but stand still, once their journals are carried over.

        Only those we have seen silent for as long again: right after PostgreSQL was away everybody looks silent for a moment.
        """
        found = dict(await engines.silent(self._pool, self.node, self.id, self.silent_seconds))
        now = time.monotonic()
        if now - self._looked_for_silent_at > self.silent_seconds / 2 + _LONGEST_RETRY_SECONDS:
            self._silent.clear()
        self._looked_for_silent_at = now
        self._silent = {engine: self._silent.get(engine, now) for engine in found}
        for engine, since in self._silent.items():
            directory = Path(found[engine])
            if now - since < self.silent_seconds or directory.parent != self._journal_root or not directory.is_dir():
                continue
            try:
                as_of = await feed.database_time(self._pool)
                carried = await bystander.carry_over(directory, self._pool)
            except JournalError as error:
                log.error("the journal of a silent engine cannot be read", engine=engine, reason=str(error))
            else:
                batches = await feed.call_back_of(self._pool, engine, as_of=as_of, grace_seconds=self._grace_seconds)
                if not batches:  # none of its leases has ended for long enough
                    continue
                log.warning("an engine stands still; its batches go to others", engine=engine, batches=batches, journal_bytes=carried)
            self.feeder.wake()

    # --- the end --------------------------------------------------------------------------------------------------------------
    async def _end(self) -> None:
        await self._drain()
        accounted = True
        try:
            await self._accounting.flush()
        except (OSError, JournalError) as error:
            accounted = False
            log.warning("the accounting files lag; whoever takes over the journal finishes them", reason=str(error))
        await tasks.end(self._tasks, _CLOSING_SECONDS)
        await self._journal.stop()
        caught_up = accounted and self._ledger.cursor == self._journal.position
        try:
            self._journal.close(remove=caught_up)
        except JournalError as error:
            log.error("the last outcomes could not be written; they are in doubt", reason=str(error))
            self._failed = True
        if caught_up:  # else whoever takes over the journal says so, once it is carried over
            with contextlib.suppress(*STORE_ERRORS, RuntimeError):
                async with asyncio.timeout(_CLOSING_SECONDS):
                    await engines.stopped(self._pool, self.id)
        with contextlib.suppress(*STORE_ERRORS, RuntimeError):
            async with asyncio.timeout(_CLOSING_SECONDS):
                await self._redis.delete(redis_keys.engine_status(self.id))
                await self._redis.aclose()
        self._pool.terminate()

    async def _drain(self) -> None:
        """Finish what was begun (P8); at the limit the rest is cut and named as uncertain."""
        log.info("draining", held_batches=len(self.intake.held))
        self.status.state = "draining"
        limit = time.monotonic() + self.settings.engine.drain_timeout_seconds
        self.turn.stopping = True
        self.intake.stopping = True
        self._leasing.cancel()  # whatever it has asked for is given back below
        await asyncio.wait({self._leasing}, timeout=_CLOSING_SECONDS)
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
            async with asyncio.timeout(max(2 * _CLOSING_SECONDS, limit - time.monotonic())):
                # Also with nothing to hand back: what was done is to be known now, not when somebody replays the journal
                await self._ledger.flush_through(self._journal.position)
                await self.intake.hand_back(everything=True)
        except Exception as error:
            if not is_store_trouble(error):
                raise
            log.warning("batches could not be handed back; whoever takes over the journal releases them", reason=sentence(error))
        for path in self.paths.values():
            await path.stop()
