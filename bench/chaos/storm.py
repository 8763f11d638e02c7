"""Many faults on one fleet under a load that never ends: kill storms, drain storms, and mixed chaos by the clock.

Loads follow each other so closely that there is always mail to send; each is reconciled for itself once it has ended.
"""

import asyncio
import contextlib
import math
import random
import signal
import time
from collections.abc import Sequence
from typing import Final

from bench.chaos import world
from bench.chaos.fault import Fault, Scene
from bench.chaos.fleet import Fleet
from bench.chaos.growth import Growth
from bench.chaos.load import Load
from bench.chaos.process_faults import DRAIN_SECONDS
from bench.chaos.reconcile import Verdict
from bench.chaos.runner import STORE_AWAY, Run, Runner, Say, verdict_sentences
from domain.errors import Unavailable

FAULT_EVERY_SECONDS: Final = 20.0
_MIXED_RATE: Final = 500.0  # messages a second on average that mixed chaos must still send
_LOADS_AT_ONCE: Final = 4  # a storm's load is that many times as large as a run's: fewer, larger campaigns
_UNDER_WAY: Final = 500  # messages sent before the first harm
_BEGIN_SECONDS: Final = 60.0
_BACK: Final = 0.5  # of the pace before: a storm's fault is healed


class Supply:
    """Keeps the fleet in mail."""

    def __init__(self, runner: Runner, fleet: Fleet, recipients: int) -> None:
        self._runner = runner
        self._fleet = fleet
        self._recipients = recipients
        self.loads: list[Load] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Two loads at once, then always a fresh one before the last is out."""
        await self._one_more()
        self._task = asyncio.create_task(self._keep(), name="supply")

    async def _one_more(self) -> None:
        load = self._runner.new_load(self._recipients)
        await load.seed(self._fleet)
        self.loads.append(load)

    async def _keep(self) -> None:
        while True:
            accepted = sum(len(self._runner.copies.of(load.number)) for load in self.loads)
            if sum(load.recipients for load in self.loads) - accepted < self._recipients:
                with contextlib.suppress(*STORE_AWAY):
                    await self._one_more()
            await asyncio.sleep(0.2)

    async def stop(self) -> None:
        """No more loads."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


async def signals(runner: Runner, count: int, number: signal.Signals, seed: int, say: Say) -> Run:
    """`count` signals to random engines under full load: SIGKILL, or SIGTERM with the time to end measured."""
    name = "kill-storm" if number is signal.SIGKILL else "drain-storm"
    scene, supply, began = await _begin(runner, f"{seed} {name}")
    slowest, ends = 0.0, []
    for done in range(count):
        await asyncio.sleep(scene.rng.uniform(0.5, 1.5))
        engine = scene.rng.choice(scene.fleet.engines)
        await engine.ready()
        if number is signal.SIGKILL:
            scene.window += scene.fleet.window_of_one()
        engine.send(number)
        scene.strike()
        ends.append(await engine.gone(60.0))
        if done % 10 == 9:
            say(f"{name}: {done + 1} of {count}")
        slowest = max(slowest, await _pace_again(scene, 0.0))
    scene.notes.append(f"{sum(end < math.inf for end in ends)} of {count} signals ended an engine that was sending")
    if math.inf in ends:
        scene.did_not_happen("an engine lived on for a minute after its signal")
    if number is signal.SIGTERM:
        ends.sort()
        p99 = ends[math.ceil(len(ends) * 0.99) - 1]
        scene.notes.append(f"exit p99 {p99:.2f} s, longest {ends[-1]:.2f} s")
        if p99 > DRAIN_SECONDS:
            scene.broken.append(f"P8: 99 of 100 drains took up to {p99:.1f} s, more than {DRAIN_SECONDS:g} s")
    return await _end(runner, scene, supply, name, seed, began, "window" if number is signal.SIGKILL else "none", slowest)


async def mixed(runner: Runner, faults: Sequence[Fault], minutes: float, seed: int, say: Say) -> Run:
    """A random fault every 20 s. Each must be healed 60 s after its harm ended at the latest."""
    scene, supply, began = await _begin(runner, f"{seed} mixed")
    slowest, played = 0.0, 0
    # processes, stores and peers take turns by chance: there are more scripts for peers than all the rest
    rows = [[one for one in faults if one.row in row] for row in ({*range(1, 7), 35, 36}, {*range(7, 18)}, {*range(18, 34)})]
    kinds = [kind for kind in rows if kind]
    growth = Growth(scene.fleet)
    growth.start()
    while time.monotonic() - began < minutes * 60:
        fault = scene.rng.choice(scene.rng.choice(kinds))
        started = time.monotonic()
        pace = runner.copies.rate(started - 2.0, started)
        one = Scene(scene.fleet, supply.loads[-1], runner.copies, random.Random(scene.rng.random()))
        try:
            await fault.inject(one)
            if not one.struck_at:
                one.strike()
            if fault.hold[1]:
                await asyncio.sleep(one.rng.uniform(*fault.hold))
        except (*STORE_AWAY, RuntimeError) as error:
            scene.broken.append(f"{fault.name} could not be played: {type(error).__name__}: {error}")
        finally:
            await fault.heal(one)
        if fault.hold[1]:
            one.strike()
        healed = await _pace_again(one, pace)
        with contextlib.suppress(*STORE_AWAY):
            await fault.proof(one)
        slowest, played = max(slowest, healed), played + 1
        scene.window += one.window
        scene.broken += [f"{fault.name}: {sentence}" for sentence in one.broken]
        say(f"mixed: {fault.name}: healed after {healed:.1f} s; {runner.copies.total:,} messages so far")
        if healed > fault.heal_limit:
            scene.broken.append(f"{fault.name}: not healed after {fault.heal_limit:g} s")
        await asyncio.sleep(max(0.0, FAULT_EVERY_SECONDS - (time.monotonic() - started)))
    mean = runner.copies.total / (time.monotonic() - began)
    scene.notes.append(f"{played} faults, {mean:,.0f} messages/s on average")
    await growth.stop()
    grown, measured = growth.judged()
    scene.broken += grown
    scene.notes += measured
    if (not runner.options.rate or runner.options.rate >= _MIXED_RATE) and mean < _MIXED_RATE:
        scene.broken.append(f"only {mean:,.0f} messages/s on average, {_MIXED_RATE:g} are promised")
    return await _end(runner, scene, supply, "mixed", seed, began, "named", slowest)


async def _begin(runner: Runner, choices: str) -> tuple[Scene, Supply, float]:
    fleet = await runner.fleet_for(_mixed_needs() if choices.endswith("mixed") else frozenset())
    supply = Supply(runner, fleet, _LOADS_AT_ONCE * runner.options.recipients)
    began = time.monotonic()
    await supply.start()
    scene = Scene(fleet, supply.loads[0], runner.copies, random.Random(choices))
    while runner.copies.total < _UNDER_WAY:
        if time.monotonic() - began > _BEGIN_SECONDS:
            raise Unavailable(f"only {runner.copies.total} messages were sent in {_BEGIN_SECONDS:g} s; see {fleet.directory}/log")
        await asyncio.sleep(0.05)
    return scene, supply, began


def _mixed_needs() -> frozenset[str]:
    """What mixed chaos needs of its fleet: links, and clocks where they can be had."""
    return frozenset({"proxied"}) if world.why_not("faketime") else frozenset({"proxied", "faketime"})


async def _pace_again(scene: Scene, pace: float) -> float:
    """Seconds from the strike until mail goes out again, at half the pace of before."""
    deadline = scene.struck_at + 100.0
    while time.monotonic() < deadline:
        scene.copies.read()
        now = time.monotonic()
        back = scene.copies.back_at(scene.struck_at, now, _BACK * pace) if pace else scene.copies.next_after(scene.struck_at)
        if back is not None:
            return round(max(0.0, back - scene.struck_at), 2)
        await asyncio.sleep(0.1)
    return float("inf")


async def _end(runner: Runner, scene: Scene, supply: Supply, name: str, seed: int, began: float, duplicates: str, slowest: float) -> Run:
    await supply.stop()
    fleet = scene.fleet
    finished, late = await runner.wait_for(supply.loads, 300.0)
    if not finished:
        scene.broken.append(f"not finished 300 s after the last fault: {late}")
    total = Verdict(examples=[])
    for load in supply.loads:
        verdict = await runner.reconcile(load, fleet, scene)
        for field in Verdict.__struct_fields__:
            setattr(total, field, getattr(total, field) + getattr(verdict, field))
    scene.broken += verdict_sentences(total, duplicates, scene.window, runner.options.on_uncertain)
    if total.assumed:
        scene.notes.append(f"{total.assumed} recipients are not proven delivered, each named by a `u` record")
    scene.notes.append(f"{total.duplicates_announced} second copies, {total.uncertain} `u` records")
    scene.notes.append(f"killed engines had at most {scene.window} messages in doubt")
    scene.notes += fleet.surprises()
    seconds = time.monotonic() - began
    return Run(
        fault=name, seed=seed, verdict=total, heal_seconds=slowest, broken=scene.broken, notes=scene.notes,
        rate=total.recipients / seconds, seconds=seconds,
    )  # fmt: skip
