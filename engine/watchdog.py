"""Names what is stuck: an operator must never have to guess why nothing moves.

Looks once a second at counters that are there anyway, so it costs microseconds however much is being sent. What it finds is in the
heartbeat (`sluice status`) and in the metrics; it never acts on anything.
"""

import asyncio
import time
from collections.abc import Sequence

from engine.egress_path import EgressPath
from engine.feeder import Feeder
from engine.intake import Intake
from engine.turn import Turn
from journal.ledger import Ledger

STILL_SECONDS = 60.0  # a path that could send and has not settled a single recipient
LEDGER_SECONDS = 15.0
FEEDER_SECONDS = 90.0  # longer than its longest statement may take
RETURN_SECONDS = 60.0
DEADLINE_SECONDS = 5.0  # beyond which a passed deadline should have been acted on
STALL_SECONDS = 0.25  # of the event loop
_BEAT_SECONDS = 0.5
_NAMED_AT_MOST = 3
KINDS = ("path", "session", "batch", "ledger", "feeder", "event loop", "task")


class Work:
    """A piece of work that is done again and again: when it last succeeded, and why it did not since."""

    __slots__ = ("done_at", "every", "name", "said_at", "trouble")

    def __init__(self, name: str, every: float) -> None:
        self.name = name
        self.every = every
        self.done_at = time.monotonic()
        self.said_at = 0.0
        self.trouble = ""


class Watchdog:
    """`sentences` says what is stuck now, `stuck` how many things of each kind, `stall_seconds` the loop's longest since `look`."""

    def __init__(
        self, turn: Turn, intake: Intake, feeder: Feeder, ledger: Ledger, paths: dict[int, EgressPath], works: Sequence[Work]
    ) -> None:
        self.sentences: list[str] = []
        self.stuck = dict.fromkeys(KINDS, 0)
        self.stall_seconds = 0.0
        self.longest_stall_seconds = 0.0
        self._turn = turn
        self._intake = intake
        self._feeder = feeder
        self._ledger = ledger
        self._paths = paths
        self._works = works
        self._moved: dict[int, tuple[tuple[int, ...], float]] = {}  # path -> its counters, and since when they stand still
        self._lost: dict[tuple[int, int], float] = {}  # batch -> since when it waits to be handed back
        self._ledger_moved: tuple[object, float] = (None, 0.0)

    async def beat(self) -> None:
        """Measure how long the event loop keeps a timer waiting, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            wanted = loop.time() + _BEAT_SECONDS
            await asyncio.sleep(_BEAT_SECONDS)
            late = loop.time() - wanted
            if late > self.stall_seconds:
                self.stall_seconds = late
                self.longest_stall_seconds = max(late, self.longest_stall_seconds)

    async def look(self) -> None:
        """Look at everything once; about once a second."""
        now = time.monotonic()
        found: list[tuple[str, str]] = []
        self._look_at_paths(now, found)
        self._look_at_batches(now, found)
        position, since = self._ledger_moved
        if self._ledger.cursor != position or not self._ledger.lag_bytes:
            self._ledger_moved = (self._ledger.cursor, now)
        elif now - since > LEDGER_SECONDS:
            found.append(("ledger", f"the ledger is {self._ledger.lag_bytes} bytes behind and has not moved for {now - since:.0f} s"))
        if now - self._feeder.ticked_at > FEEDER_SECONDS:
            found.append(("feeder", f"the feeder has not looked at the campaigns for {now - self._feeder.ticked_at:.0f} s"))
        if self.stall_seconds > STALL_SECONDS:
            found.append(("event loop", f"the event loop stood still for {self.stall_seconds:.2f} s"))
        self.stall_seconds = 0.0
        found += [
            ("task", f"{work.name}: has not come to an end for {now - work.done_at:.0f} s")
            for work in self._works
            if not work.trouble and now - work.done_at > work.every + STILL_SECONDS
        ]
        self.stuck = {kind: sum(kind == of for of, _ in found) for kind in KINDS}
        self.sentences = []
        for kind in KINDS:
            of_kind = [sentence for of, sentence in found if of == kind]
            self.sentences += of_kind[:_NAMED_AT_MOST]
            if len(of_kind) > _NAMED_AT_MOST:
                self.sentences.append(f"… and {len(of_kind) - _NAMED_AT_MOST} more of this kind ({kind})")

    def _look_at_paths(self, now: float, found: list[tuple[str, str]]) -> None:
        clock = asyncio.get_running_loop().time()
        for server_id, path in self._paths.items():
            late = sum(1 for s in path.sessions if s.deadline and clock - s.deadline > DEADLINE_SECONDS)
            if late:
                found.append(("session", f"delivery server {path.server.name}: {late} connections wait beyond their deadline"))
            in_flight = sum(s.in_flight for s in path.sessions)
            counters = (path.delivered, path.bounced, path.deferred, path.uncertain, path.ready, in_flight)
            could_send = path.server.enabled and not path.draining and path.max_connections and not path.failures and not self._turn.trouble
            before, since = self._moved.get(server_id, (None, now))
            if counters != before or not could_send or not (path.ready or in_flight):
                self._moved[server_id] = (counters, now)
                continue
            # With a slow throttle nothing moves between two tokens, with a slow peer nothing until its time is up
            patience = STILL_SECONDS + (path.server.limits.final_dot_timeout_seconds if in_flight else 0.0)
            if rate := path.bucket.per_second:
                patience = max(patience, 3.0 / rate)
            if now - since > patience:
                found.append(
                    (
                        "path",
                        f"delivery server {path.server.name}: {path.ready} recipients wait, {in_flight} are on the wire, and nothing has "
                        f"moved for {now - since:.0f} s{self._oldest(server_id)}",
                    )
                )

    def _oldest(self, server_id: int) -> str:
        held = next((held for held in self._intake.held.values() if held.server_id == server_id and held.open), None)
        return f"; first batch: campaign {held.key[0]}, batch {held.key[1]}, {held.open} open" if held else ""

    def _look_at_batches(self, now: float, found: list[tuple[str, str]]) -> None:
        lost = {key: held for key, held in self._intake.held.items() if held.lost and not held.in_flight}
        self._lost = {key: self._lost.get(key, now) for key in lost}
        for (campaign, batch), since in self._lost.items():
            if now - since > RETURN_SECONDS:
                found.append(("batch", f"campaign {campaign}, batch {batch}: waits for {now - since:.0f} s to be handed back"))
