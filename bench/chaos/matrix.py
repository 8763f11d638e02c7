"""Plays a list of faults: one after the other within a time, or on several fleets at a time."""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from bench.chaos import report
from bench.chaos.fault import CannotRun, Fault
from bench.chaos.runner import Run, Runner
from domain.errors import SluiceError

QUICK_SECONDS: Final = 170.0
_QUICK_SHARE: Final = 11.0  # seconds a fault of --quick takes; where fewer are left for each, it gets fewer recipients

Play = tuple[Fault, int]  # a fault and its seed


async def quick(runner: Runner, plays: Sequence[Play], began: float, cannot: list[CannotRun]) -> list[Run]:
    """All of them within three minutes of `began`; what had no time left goes to `cannot`."""
    runs: list[Run] = []
    runner.deadline = began + QUICK_SECONDS
    for number, (fault, seed) in enumerate(plays):
        left = runner.deadline - time.monotonic() - 5.0
        if left < _QUICK_SHARE / 2:
            cannot.append(CannotRun(fault.row, fault.name, "the three minutes of --quick were over"))
            continue
        fewer = left / (len(plays) - number) < _QUICK_SHARE
        runs.append(await runner.run(fault, seed, runner.options.recipients // 2 if fewer else 0))
        report.line(runs[-1], number + 1, len(plays))
    return runs


async def play(runner: Runner, plays: Sequence[Play], jobs: int) -> list[Run]:
    """All of them on `jobs` fleets at a time; what measures speed comes last and alone. Runs are returned in the order of `plays`."""
    runs: dict[int, Run] = {}
    together = [number for number, (fault, _) in enumerate(plays) if not fault.alone]
    alone = [number for number, (fault, _) in enumerate(plays) if fault.alone]

    async def work(one: Runner, waiting: list[int]) -> None:
        while waiting:
            number = next((at for at in waiting if one.fits(plays[at][0].needs)), waiting[0])
            waiting.remove(number)
            runs[number] = await one.run(*plays[number])
            report.line(runs[number], len(runs), len(plays))

    async def own(job: int) -> None:
        options = msgspec.structs.replace(runner.options, directory=runner.options.directory / f"job-{job}")
        async with Runner(options, report.say) as one:
            await work(one, together)

    try:
        async with asyncio.TaskGroup() as group:
            for job in range(1, jobs):
                group.create_task(own(job))
            group.create_task(work(runner, together))
    except* SluiceError as several:
        raise several.exceptions[0] from None
    await work(runner, alone)
    return [runs[number] for number in sorted(runs)]
