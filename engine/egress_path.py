"""One egress path: the connections to one delivery server, its throttle, and the leased batches waiting for it.

A task per path does what `path_plan` says; the messages themselves are handed to connections by `turn`, which asks `take`.
"""

import asyncio
import contextlib
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from config import tasks
from domain.egress import DeliveryServer
from domain.errors import ConnectFailed
from engine import path_plan
from engine.connect import Connected, connect
from engine.held import HeldBatch
from engine.path_health import ALL, LOCK_STEP, PathHealth
from engine.throttle import TokenBucket
from ext.smtp_session import SmtpSession
from ext.turn_steps import Peer
from store.redis_keys import PRIORITY_CLASSES

if TYPE_CHECKING:
    from engine.turn import Turn

IDLE_TIMEOUT_SECONDS = 10.0
STOPPING_SECONDS = 1.0
QUIET_SECONDS = 10.0  # no reply on any connection for so long is worth a word in the status
LIVELY_SECONDS = 300.0  # a server that has answered somebody since then is alive: what it ends a connection for is the message
_connection_ids = itertools.count(1)

# Of seven turns four go to transactional mail, two to autoresponders, one to marketing; a class with nothing waiting passes its turn on.
_TURNS = (0, 1, 0, 2, 0, 1, 0)


class Facts(Peer):
    """What the accounting records of one connection's messages have in common, and what became of them without an answer."""

    __slots__ = ("in_doubt", "level", "unanswered")

    def __init__(self, server: DeliveryServer, connected: Connected, level: int) -> None:
        super().__init__(
            f"{server.host} ({connected.peer_ip})" if connected.peer_ip else server.host,
            connected.source_ip, connected.peer_ip, ",".join(connected.capabilities), "/" + server.name,
            connected.smtputf8, connected.eightbitmime,
        )  # fmt: skip
        self.level = level
        self.unanswered = 0  # messages begun that came back
        self.in_doubt = 0  # of those, such as may have arrived


class EgressPath:
    """The way out through one delivery server, for one engine."""

    def __init__(self, server: DeliveryServer, password: str, turn: "Turn", ehlo_name: str, share: tuple[int, int]) -> None:
        self.server = server
        self._password = password
        self._turn = turn
        self._ehlo_name = ehlo_name
        self._share = share
        self.health = PathHealth(time.monotonic())
        self._looked_at = (0, 0)
        self._answered_at = float("-inf")
        self.per_turn = sys.maxsize  # messages that one turn composes for it; known when the first was made
        self.eight_bit = False  # the connection that was opened last offers 8BITMIME
        self.windows = False  # several messages are in doubt when one of its connections is lost
        self.bucket = TokenBucket(self._rate_share(), time.monotonic())
        self.sessions: set[SmtpSession] = set()
        self._waiting: set[SmtpSession] = set()  # have room and found nothing to send
        self._connecting: set[asyncio.Task[None]] = set()
        self._batches: tuple[deque[HeldBatch], ...] = tuple(deque() for _ in PRIORITY_CLASSES)
        self._turn_index = 0
        self.held = 0  # batches leased for this path and not settled; kept by intake
        self.ready = 0
        self.more = False  # more is announced for it than there was room for when intake last looked
        self.away = ""  # name of the fallback that sends what belongs here
        self.away_recipients = 0  # given to it, ever
        self.missed = False  # something went to it since the last try to connect
        self.draining = False
        self._idle_since = time.monotonic()
        self.state = "idle"
        self.sentence = "nothing to send yet"
        self.since = time.time()
        self.delivered = self.bounced = self.deferred = self.uncertain = 0
        self.answers = 0  # recipients the server has decided, well or badly
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
        """Messages per second: this engine's share of the limit, or less where the server asks for it; 0 = no limit."""
        share = self.server.limits.max_messages_per_second / self._share[1]
        pace = self.health.pace.per_second
        return min(share, pace) if share and pace else share or pace

    @property
    def failures(self) -> int:
        """Failed connections in a row; 0 while another one works."""
        return 0 if self._works() else self.health.failures

    def _works(self) -> bool:
        return any(session.sent > session.facts.unanswered + session.in_flight for session in self.sessions)

    @property
    def batches_for_connections(self) -> int:
        """Batches to hold, besides the ordinary few, for what is in flight on many connections: one for every hundred messages."""
        return len(self.sessions) * (self.server.limits.bdat_window if self.windows else 1) // 100

    def needs_fallback(self, now: float) -> bool:
        """Whether no connection could be used for longer than an operator wants to wait for that."""
        unusable = self.failures and not self.sessions
        return bool(unusable) and now - self.health.failing_since >= self.server.limits.fallback_after_seconds

    @property
    def takes_over(self) -> bool:
        """Whether it can send for another server now."""
        return self.server.enabled and self.max_connections > 0 and not self.draining and not self.failures

    def reconfigure(self, server: DeliveryServer, password: str, share: tuple[int, int]) -> None:
        """Apply a new version of the server or a new share of its limits; open connections that are still allowed stay."""
        if server.version != self.server.version:
            moved = (server.host, server.port, server.security, server.username) != (
                self.server.host, self.server.port, self.server.security, self.server.username,
            ) or password != self._password  # fmt: skip
            self.server, self._password = server, password
            self.health.forget_failures(moved=moved)
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
        """A recipient came back unsent; its batch goes to the end of the line if it had left it.

        The end, because it may be what the server ends its connections for: then the others show that the server works.
        """
        held.give_back(index)
        if held.lost or not held.campaign.running:
            return  # intake hands it back
        line = self._batches[PRIORITY_CLASSES.index(held.campaign.priority_class)]
        if held not in line:
            line.append(held)
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
        """A connection has ended; `trouble` unless it was we who ended it with everything answered."""
        self.sessions.discard(session)
        self._waiting.discard(session)
        if session.violated:
            self.health.lost_step(reason, session.facts.level, time.monotonic())
            self._use_less()
        elif session.facts.in_doubt > 1:
            self.health.lost_window(session.facts.in_doubt, time.monotonic())
            self._use_less()
        answered = session.sent > session.facts.unanswered
        if answered or not trouble:
            self.health.answered(session.connection_id, last=answered and not self.sessions)
        else:
            # It answered nobody: opening the next one at once would be a loop
            self._failed(reason, session.connection_id, connected=True)
        self.wake()

    def suspend(self, sentence: str, session: SmtpSession) -> None:
        """Stop until an operator acts or a minute has passed: the server asks for something our configuration does not give."""
        session.facts.unanswered += 1
        self._failed(sentence, session.connection_id, permanent=True)

    def _failed(self, sentence: str, connection: int, *, permanent: bool = False, connected: bool = False) -> None:
        self.health.failed(
            sentence, connection, next(_connection_ids), time.monotonic(),
            permanent=permanent, connected=connected, engines=self._share[1], dice=random.random(),
        )  # fmt: skip

    def answered(self, session: SmtpSession) -> None:
        """A recipient was decided on `session`: if the server was failing, it works again."""
        if self.health.answered(session.connection_id):
            self.wake()

    def came_back(self, session: SmtpSession, *, in_doubt: bool) -> None:
        """A message begun on `session` has no answer."""
        session.facts.unanswered += 1
        session.facts.in_doubt += in_doubt

    @property
    def lively(self) -> bool:
        """Whether the server has answered somebody not long ago."""
        return time.monotonic() - self._answered_at < LIVELY_SECONDS

    @property
    def untried(self) -> bool:
        """Whether recipients wait that were never taken: others than those that may be what the server ends its connections for."""
        return any(held.untried for line in self._batches for held in line)

    def slow_down(self, sentence: str) -> None:
        """A reply asked us to."""
        self.health.throttled += 1
        self.health.throttle_said = sentence

    def _use_less(self) -> None:
        for session in list(self.sessions):
            if session.facts.level < self.health.level:
                session.quit()

    def _say(self, state: str, sentence: str) -> None:
        if state != self.state:
            self.since = time.time()
        self.state, self.sentence = state, sentence

    def describe(self) -> None:
        """Bring `state` and `sentence` up to date: what an operator reads in `sluice status`."""
        now, health = time.monotonic(), self.health
        where = f"{self.server.host}:{self.server.port}"
        if not self.server.enabled:
            self._say("disabled", "switched off")
        elif self.server.limits.max_connections == 0:
            self._say("disabled", "max_connections is 0, so nothing is sent")
        elif self.failures:
            state = "suspended" if health.permanent else "failing"
            waiting = f"recipients go out through {self.away} ({self.away_recipients} so far)" if self.away else "recipients wait"
            self._say(state, f"{health.failure}; {health.next_try(now)}, {waiting}")
        elif self.sessions:
            busy = [session for session in self.sessions if session.in_flight]
            notes = health.notes(now)
            if busy and (quiet := now - max(session.last_activity for session in busy)) >= QUIET_SECONDS:
                notes.insert(0, f"no reply on any of {len(busy)} connections for {quiet:.0f} s")
            self._say("sending" if self.ready or busy else "idle", "; ".join([f"connected to {where}", *notes]))
        elif self._connecting:
            self._say("connecting", f"connecting to {where}")
        elif self.max_connections == 0:
            self._say("idle", "other engines hold all of max_connections")
        else:
            self._say("idle", "; ".join(["nothing to send", *health.notes(now)]))

    def check_deadlines(self, now: float) -> None:
        """The one timer of all connections, about twice a second: cut those whose peer has not answered in time; adapt the pace."""
        for session in list(self.sessions):
            if session.deadline:
                if now >= session.deadline:
                    session.expire()
            elif session.in_flight and not self._turn.trouble and now - session.last_activity > session.command_timeout:
                session.abort("nothing is awaited and nothing can be sent")
        answered, throttled = self._looked_at
        self._looked_at = self.answers, self.health.throttled
        if self.answers != answered:
            self._answered_at = now
        self.health.pace.look(now, self.answers - answered, self.health.throttled - throttled)
        if (rate := self._rate_share()) != self.bucket.per_second:
            self.bucket.set_rate(rate)
            self.wake()
        if self.health.trust_again(now):
            for session in list(self.sessions):
                if session.facts.level != ALL:
                    session.quit()

    async def _run(self) -> None:
        while True:
            now = time.monotonic()
            idle = [s for s in self.sessions if s.idle]
            if self.ready or len(idle) < len(self.sessions):
                self._idle_since = now
            probing = self.health.failures > 0 or not self.health.proven
            plan = path_plan.next_actions(
                path_plan.PathView(
                    now=now,
                    enabled=self.server.enabled,
                    draining=self.draining,
                    ready=self.ready or int(self.missed and probing),  # what a fallback sends is worth a try
                    open=len(self.sessions),
                    connecting=len(self._connecting),
                    idle=len(idle),
                    leaving=sum(s.protocol.quitting for s in self.sessions) if len(self.sessions) > self.max_connections else 0,
                    max_connections=self.max_connections,
                    retry_at=self.health.retry_at,
                    probing=probing,
                    probes=len(self._connecting) + sum(self.health.since_failure(s.connection_id) for s in self.sessions) if probing else 0,
                    tokens_at=self.bucket.ready_at(now),
                    idle_since=self._idle_since,
                    idle_timeout=IDLE_TIMEOUT_SECONDS,
                    more=self.more,
                    starved=len(self._waiting),
                )
            )
            surplus = [*idle, *(s for s in self.sessions if not s.idle and not s.protocol.quitting)] if plan.close else []
            for session in idle[: plan.close_idle] + surplus[: plan.close]:
                self._waiting.discard(session)
                session.quit()
            for _ in range(plan.open):
                task = asyncio.create_task(self._connect())
                self._connecting.add(task)
                task.add_done_callback(self._tried)
            if self.ready and self.bucket.ready_at(now) <= now:
                for session in self._waiting:
                    self._turn.ready(session)
                self._waiting.clear()
            self._wake.clear()
            # not wait_for: on Python 3.11 it loses a cancellation that comes together with the event
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.002, min(plan.look_again_at - now, 3600.0))):
                    await self._wake.wait()

    def _tried(self, task: "asyncio.Task[None]") -> None:
        self._connecting.discard(task)
        self.wake()  # only now is its place free for another one

    async def _connect(self) -> None:
        server, number, self.missed = self.server, next(_connection_ids), False
        try:
            connected = await connect(server, password=self._password, ehlo_name=self._ehlo_name, source_address=None)
        except ConnectFailed as failure:
            self._failed(str(failure), number, permanent=failure.permanent)
            self.wake()
            return
        except asyncio.CancelledError:
            raise
        except Exception as bug:
            # a path must outlive what we did not foresee; it is said where the operator looks
            self._failed(f"connecting failed unexpectedly: {type(bug).__name__}: {bug}", number)
            self.wake()
            return
        if self.draining or server is not self.server:
            connected.transport.abort()
            return
        self.health.proven = True
        self.connections_opened += 1
        self.eight_bit = connected.eightbitmime
        limits, level = server.limits, self.health.level
        self.windows = limits.chunking and connected.chunking and level == ALL and limits.bdat_window > 1
        session = SmtpSession(
            self._turn,
            self,
            pipelining=limits.pipelining and connected.pipelining and level != LOCK_STEP,
            chunking=limits.chunking and connected.chunking and level == ALL,
            window=limits.bdat_window,
            max_messages=limits.max_messages_per_connection,
            command_timeout=limits.command_timeout_seconds,
            final_dot_timeout=limits.final_dot_timeout_seconds,
            connection_id=number,
            facts=Facts(server, connected, level),
        )
        session.start(connected.transport)
        self.opened(session)
        self.wake()

    async def stop(self) -> None:
        """End the path's task and every connection attempt; call after the connections have been drained or cut."""
        await tasks.end([self._task, *self._connecting], STOPPING_SECONDS)
