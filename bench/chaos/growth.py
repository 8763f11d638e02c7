"""Whether the engines stay as large as they are: memory, descriptors and tasks of each process, sampled while faults go on.

Two comparisons, both after the warm-up of each process, both of medians: the first third of its life with the last, for every process
that lived long enough; and the first third of the whole run with the last, over all processes of a slot (what a killed one leaves behind
would grow there).
"""

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench.chaos.fleet import Fleet
from store import redis_keys

EVERY_SECONDS: Final = 2.0
WARM_UP_SECONDS: Final = 20.0  # of each process: imports, templates, first batches
LONG_LIFE_SECONDS: Final = 100.0  # after the warm-up: what is shorter has no trend of its own
LEAST_SAMPLES: Final = 15
# What a median may grow by and still be called flat: held batches and the journal's backlog differ from minute to minute
MOST_BYTES: Final = 16 << 20
MOST_SHARE: Final = 0.10
MOST_DESCRIPTORS: Final = 8
MOST_TASKS: Final = 8


class Sample(msgspec.Struct, frozen=True):
    """One look at one process; `tasks` -1 when it had not said (its heartbeat is in Redis, which is being harmed, too)."""

    at: float  # monotonic
    slot: str
    pid: int
    age: float
    memory: int
    descriptors: int
    tasks: int


class _Heartbeat(msgspec.Struct):
    id: str
    started_at: float
    tasks: int = -1


class Growth:
    """Takes samples from `start` to `stop`."""

    def __init__(self, fleet: Fleet) -> None:
        self.samples: list[Sample] = []
        self._fleet = fleet
        self._since: dict[int, float] = {}  # pid -> when it was first seen
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sample every two seconds."""
        self._task = asyncio.create_task(self._run(), name="growth")

    async def stop(self) -> None:
        """No more samples."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            tasks = await self._tasks()
            for engine in self._fleet.engines:
                pid, now = engine.pid, time.monotonic()
                if pid:
                    age = now - self._since.setdefault(pid, now)
                    with contextlib.suppress(OSError, IndexError):
                        self.samples.append(_sample(now, engine.name, pid, age, tasks.get(engine.name.rpartition(".")[2], -1)))
            await asyncio.sleep(EVERY_SECONDS)

    async def _tasks(self) -> dict[str, int]:
        """Tasks of each slot's newest engine, as far as heartbeats can be read."""
        newest: dict[str, _Heartbeat] = {}
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0), self._fleet.stores.redis() as client:
                keys = [key async for key in client.scan_iter(match=redis_keys.ENGINE_STATUS_PATTERN)]
                for value in await client.mget(keys) if keys else []:
                    if value:
                        beat = msgspec.json.decode(value, type=_Heartbeat)
                        slot = beat.id.split(".")[-2]
                        if slot not in newest or newest[slot].started_at < beat.started_at:
                            newest[slot] = beat
        return {slot: beat.tasks for slot, beat in newest.items()}

    def judged(self) -> tuple[list[str], list[str]]:
        """(what is not flat, one sentence each; what was measured)."""
        warm = [sample for sample in self.samples if sample.age >= WARM_UP_SECONDS]
        broken: list[str] = []
        notes: list[str] = []
        lives: dict[tuple[str, int], list[Sample]] = {}
        slots: dict[str, list[Sample]] = {}
        for sample in warm:
            lives.setdefault((sample.slot, sample.pid), []).append(sample)
            slots.setdefault(sample.slot, []).append(sample)
        long = {key: life for key, life in lives.items() if life[-1].at - life[0].at >= LONG_LIFE_SECONDS}
        for name, samples in [*((f"{slot} (process {pid})", life) for (slot, pid), life in long.items()), *slots.items()]:
            if len(samples) >= LEAST_SAMPLES:
                said, bad = compared(name, samples)
                notes.append(said)
                broken += bad
        if not notes:
            notes.append("too short to judge whether memory, descriptors and tasks are flat")
        return broken, notes


def compared(name: str, samples: Sequence[Sample]) -> tuple[str, list[str]]:
    """(one sentence of medians, first third to last; what grew by more than it may)."""
    third = max(1, len(samples) // 3)
    first, last = samples[:third], samples[-third:]
    bad = []
    one, two = (statistics.median(sample.memory for sample in part) for part in (first, last))
    said = [f"{one / (1 << 20):.1f} to {two / (1 << 20):.1f} MiB"]
    if two - one > min(MOST_BYTES, MOST_SHARE * one):
        bad.append(f"P9: memory of {name} grew from {one / (1 << 20):.1f} to {two / (1 << 20):.1f} MiB")
    for what, most in (("descriptors", MOST_DESCRIPTORS), ("tasks", MOST_TASKS)):
        known = [[getattr(sample, what) for sample in part if getattr(sample, what) >= 0] for part in (first, last)]
        if all(known):
            one, two = (statistics.median(part) for part in known)
            said.append(f"{one:g} to {two:g} {what}")
            if two - one > most:
                bad.append(f"{name} has {two:g} {what} at the end, {one:g} at first")
    return f"{name}, {samples[-1].at - samples[0].at:.0f} s: {', '.join(said)}", bad


def _sample(now: float, slot: str, pid: int, age: float, tasks: int) -> Sample:
    memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return Sample(at=now, slot=slot, pid=pid, age=age, memory=memory, descriptors=descriptors, tasks=tasks)
