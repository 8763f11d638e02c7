"""One egress path: the connections to one delivery server, its throttle, and the leased batches waiting for it.

A task per path does what `path_plan` says; the messages themselves are handed to connections by `turn`, which asks `take`.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from domain.egress import DeliveryServer
from domain.errors import ConnectFailed
from engine import path_plan
from engine.connect import Connected, connect
from engine.held import HeldBatch
from engine.throttle import TokenBucket
from ext.smtp_session import SmtpSession
from store.redis_keys import PRIORITY_CLASSES

if TYPE_CHECKING:
    from engine.turn import Turn

IDLE_TIMEOUT_SECONDS = 10.0
_connection_ids = itertools.count(1)

# Of seven turns four go to transactional mail, two to autoresponders, one to marketing; a class with nothing waiting passes its turn on.
_TURNS = (0, 1, 0, 2, 0, 1, 0)


class Facts:
    """What the accounting records of one connection's messages have in common."""

    __slots__ = ("destination_ip", "esmtp", "mta", "queue_suffix", "smtputf8", "source_ip")

    def __init__(self, server: DeliveryServer, connected: Connected) -> None:
        self.mta = f"{server.host} ({connected.peer_ip})" if connected.peer_ip else server.host
        self.source_ip = connected.source_ip
        self.destination_ip = connected.peer_ip
        self.esmtp = ",".join(connected.capabilities)
        self.queue_suffix = "/" + server.name
        self.smtputf8 = connected.smtputf8


class EgressPath:
    """The way out through one delivery server, for one engine."""

    def __init__(self, server: DeliveryServer, password: str, turn: "Turn", ehlo_name: str, share: tuple[int, int]) -> None:
        self.server = server
        self._password = password
        self._turn = turn
        self._ehlo_name = ehlo_name
        self._share = share
        self.bucket = TokenBucket(self._rate_share(), time.monotonic())
        self.sessions: set[SmtpSession] = set()
        self._waiting: set[SmtpSession] = set()  # have room and found nothing to send
        self._connecting: set[asyncio.Task[None]] = set()
        self._batches: tuple[deque[HeldBatch], ...] = tuple(deque() for _ in PRIORITY_CLASSES)
        self._turn_index = 0
        self.held = 0  # batches leased for this path and not settled; kept by intake
        self.ready = 0
        self.draining = False
        self.failures = 0
        self._permanent = False
        self._retry_at = 0.0
        self._idle_since = time.monotonic()
        self.state = "idle"
        self.sentence = "nothing to send yet"
        self.since = time.time()
        self.delivered = self.bounced = self.deferred = self.uncertain = 0
        self.connections_opened = 0
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"egress path {server.name}")

    # --- limits -------------------------------------------------------------------------------------------------------
    @property
    def max_connections(self) -> int:
        """This engine's share of the server's connections."""
        rank, engines = self._share
        whole, rest = divmod(self.server.limits.max_connections, engines)
        return whole + (1 if rank < rest else 0)

    def _rate_share(self) -> float:
        return self.server.limits.max_messages_per_second / self._share[1]

    def reconfigure(self, server: DeliveryServer, password: str, share: tuple[int, int]) -> None:
        """Apply a new version of the server or a new share of its limits; open connections that are still allowed stay."""
        if server.version != self.server.version:
            moved = (server.host, server.port, server.security, server.username) != (
                self.server.host, self.server.port, self.server.security, self.server.username,
            ) or password != self._password  # fmt: skip
            self.server, self._password = server, password
            self._retry_at, self.failures, self._permanent = 0.0, 0, False
            if moved or not server.enabled:
                for session in list(self.sessions):
                    session.quit()
        self._share = share
        self.bucket.set_rate(self._rate_share())
        self.wake()

    # --- batches ------------------------------------------------------------------------------------------------------
    def add(self, held: HeldBatch) -> None:
        """Put a leased batch in line."""
        self._batches[PRIORITY_CLASSES.index(held.campaign.priority_class)].append(held)
        self.ready += held.ready
        self.wake()

    def returned(self, held: HeldBatch, index: int) -> None:
        """A recipient came back unsent; its batch goes to the front again if it had left the line."""
        held.give_back(index)
        if held.lost or not held.campaign.running:
            return  # intake hands it back
        line = self._batches[PRIORITY_CLASSES.index(held.campaign.priority_class)]
        if held not in line:
            line.appendleft(held)
        self.ready += 1

    def remove(self, unwanted: Callable[[HeldBatch], bool]) -> list[HeldBatch]:
        """Take every batch out of line for which `unwanted` is true and return them; what is in flight of them goes on."""
        gone: list[HeldBatch] = []
        for line in self._batches:
            keep = [held for held in line if not unwanted(held)]
            gone.extend(held for held in line if unwanted(held))
            if len(keep) != len(line):
                line.clear()
                line.extend(keep)
        self.ready -= sum(held.ready for held in gone)
        return gone

    def take(self, count: int, now: float, lease_margin: float) -> list[tuple[HeldBatch, list[int]]]:
        """Take up to `count` recipients in order of priority class turns, never from a batch whose lease may have ended (R4)."""
        slices: list[tuple[HeldBatch, list[int]]] = []
        while count > 0 and any(self._batches):
            line = self._batches[_TURNS[self._turn_index % len(_TURNS)]]
            self._turn_index += 1
            if not line:
                continue
            held = line[0]
            if held.lost or now >= held.lease_until - lease_margin or not held.campaign.running:
                held.lost = True  # for good: intake hands it back, whoever leases it next sends it on
                line.popleft()
                self.ready -= held.ready
                continue
            indexes = held.take(count)
            self.ready -= len(indexes)
            if not held.ready:
                line.popleft()
            count -= len(indexes)
            slices.append((held, indexes))
        return slices

    # --- connections --------------------------------------------------------------------------------------------------
    def wake(self) -> None:
        """Decide again now."""
        self._wake.set()

    def wait_for_work(self, session: SmtpSession) -> None:
        """Remember a connection that had room and found nothing to take."""
        self._waiting.add(session)

    def opened(self, session: SmtpSession) -> None:
        """A connection is ready for its first message."""
        self.sessions.add(session)
        self._turn.ready(session)

    def closed(self, session: SmtpSession, reason: str, *, trouble: bool) -> None:
        """A connection has ended; `trouble` when the server ended it and it had not carried a single message."""
        self.sessions.discard(session)
        self._waiting.discard(session)
        if trouble and not session.sent:
            self._failed(reason, permanent=False)
        self.wake()

    def suspend(self, sentence: str) -> None:
        """Stop until an operator acts or a minute has passed: the server asks for something our configuration does not give."""
        self._failed(sentence, permanent=True)

    def _failed(self, sentence: str, *, permanent: bool) -> None:
        self.failures += 1
        self._permanent = permanent
        pause = path_plan.backoff_seconds(self.failures, permanent=permanent, jitter=random.random())
        self._retry_at = time.monotonic() + pause
        self._say("suspended" if permanent else "failing", f"{sentence}; next try in {pause:.0f} s, recipients wait")

    def _say(self, state: str, sentence: str) -> None:
        if state != self.state:
            self.since = time.time()
        self.state, self.sentence = state, sentence

    def describe(self) -> None:
        """Bring `state` and `sentence` up to date: what an operator reads in `sluice status`."""
        if not self.server.enabled:
            self._say("disabled", "switched off")
        elif self.server.limits.max_connections == 0:
            self._say("disabled", "max_connections is 0, so nothing is sent")
        elif self.failures:
            return  # what failed has already been said
        elif self.sessions:
            self._say("sending" if self.ready or any(s.in_flight for s in self.sessions) else "idle", "connected")
        elif self._connecting:
            self._say("connecting", f"connecting to {self.server.host}:{self.server.port}")
        elif self.max_connections == 0:
            self._say("idle", "other engines hold all of max_connections")
        else:
            self._say("idle", "nothing to send")

    def check_deadlines(self, now: float) -> None:
        """Cut every connection whose peer has not answered in time (the one timer for all of them)."""
        for session in list(self.sessions):
            if session.deadline and now >= session.deadline:
                session.expire()

    async def _run(self) -> None:
        while True:
            now = time.monotonic()
            idle = [s for s in self.sessions if s.idle]
            if self.ready or len(idle) < len(self.sessions):
                self._idle_since = now
            plan = path_plan.next_actions(
                path_plan.PathView(
                    now=now,
                    enabled=self.server.enabled,
                    draining=self.draining,
                    ready=self.ready,
                    open=len(self.sessions),
                    connecting=len(self._connecting),
                    idle=len(idle),
                    max_connections=self.max_connections,
                    retry_at=self._retry_at,
                    failures=self.failures,
                    tokens_at=self.bucket.ready_at(now),
                    idle_since=self._idle_since,
                    idle_timeout=IDLE_TIMEOUT_SECONDS,
                )
            )
            for session in idle[: plan.close_idle]:
                self._waiting.discard(session)
                session.quit()
            for _ in range(plan.open):
                task = asyncio.create_task(self._connect())
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)
            if self.ready and self.bucket.ready_at(now) <= now:
                for session in self._waiting:
                    self._turn.ready(session)
                self._waiting.clear()
            self._wake.clear()
            # not wait_for: on Python 3.11 it loses a cancellation that comes together with the event
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.002, min(plan.look_again_at - now, 3600.0))):
                    await self._wake.wait()

    async def _connect(self) -> None:
        server = self.server
        try:
            connected = await connect(server, password=self._password, ehlo_name=self._ehlo_name, source_address=None)
        except ConnectFailed as failure:
            self._failed(str(failure), permanent=failure.permanent)
            self.wake()
            return
        except asyncio.CancelledError:
            raise
        except Exception as bug:
            # a path must outlive what we did not foresee; it is said where the operator looks
            self._failed(f"connecting failed unexpectedly: {type(bug).__name__}: {bug}", permanent=False)
            self.wake()
            return
        self.failures, self._permanent = 0, False
        self.connections_opened += 1
        limits = server.limits
        session = SmtpSession(
            self._turn,
            self,
            pipelining=limits.pipelining and connected.pipelining,
            chunking=limits.chunking and connected.chunking,
            window=limits.bdat_window,
            max_messages=limits.max_messages_per_connection,
            command_timeout=limits.command_timeout_seconds,
            final_dot_timeout=limits.final_dot_timeout_seconds,
            connection_id=next(_connection_ids),
            facts=Facts(server, connected),
        )
        if self.draining or server is not self.server:
            connected.transport.abort()
            return
        session.start(connected.transport)
        self.opened(session)
        self.wake()

    async def stop(self) -> None:
        """End the path's task and every connection attempt; call after the connections have been drained or cut."""
        tasks = [self._task, *self._connecting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
