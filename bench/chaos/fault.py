"""What a fault is, and the scene it plays in."""

import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from bench.chaos.load import Copies, Load

if TYPE_CHECKING:
    from bench.chaos.fleet import Fleet

# What second copies a fault may bring about: none; as many as the killed engines had in doubt; or any, each named by a `u` record
Duplicates = Literal["none", "window", "named"]


class Scene:
    """One run: the fleet, its load, and what the fault has to say about it. `rng` makes every choice, so a seed replays it."""

    def __init__(self, fleet: "Fleet", load: Load, copies: Copies, rng: random.Random, *, quick: bool = False) -> None:
        self.fleet = fleet
        self.load = load
        self.copies = copies
        self.rng = rng
        self.quick = quick
        self.window = 0  # messages that the engines killed so far can have had in doubt
        self.broken: list[str] = []  # promises that the fault itself saw broken
        self.notes: list[str] = []
        self.memory: dict[str, Any] = {}  # from inject to heal
        self.struck_at = 0.0  # the last harm done; `inject` may set it, else it is when inject returned

    def did_not_happen(self, why: str) -> None:
        """A fault that did no harm proves nothing: the run is broken."""
        self.broken.append(f"the fault did not happen: {why}")

    def strike(self) -> None:
        """The harm is done now; healing is counted from here where there is nothing to heal by hand."""
        self.struck_at = time.monotonic()


Step = Callable[[Scene], Awaitable[None]]


async def nothing(_: Scene) -> None:
    """The step of a fault that heals by itself."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One way to harm a fleet. `row` is its row in the fault matrix."""

    name: str
    row: int
    about: str
    inject: Step
    heal: Step = nothing
    hold: tuple[float, float] = (0.0, 0.0)  # seconds from inject to heal
    duplicates: Duplicates = "none"
    needs: frozenset[str] = frozenset()  # see `runner.PLANS` and `runner.why_not`
    process: bool = False  # a process fault: part of --quick
    mixed: bool = False  # may strike a fleet that goes on afterwards (--minutes)
    heal_limit: float = 60.0
    proof: Step = nothing  # after the verdict: did the harm really happen, and did what the fault asks for besides hold?
    recipients: int = 0  # at least: a fault that measures takes its time
    alone: bool = False  # it measures the speed of others: nothing else is played meanwhile
    may_refuse: Callable[[str], bool] | None = None  # recipients whom a sink refuses for good


class CannotRun(msgspec.Struct, frozen=True):
    """A row of the matrix that this harness, or this machine, does not play, and why."""

    row: int
    name: str
    reason: str
