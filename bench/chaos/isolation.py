"""P10: one dead, slow or lying delivery server costs the others less than a tenth of their rate.

All four servers are paced at the same rate, well below what the machine can do. What the other three sinks' logs gain in each second is
compared before and while one is sick: the median of the seconds of each span.
"""

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from typing import Final

from bench.chaos.fault import Fault, Scene
from bench.chaos.fleet import WAYS
from bench.chaos.peer_faults import heal_links
from bench.chaos.proxy import Weather

_SECONDS: Final = 8
_SETTLE_SECONDS: Final = 2.0
_KEPT: Final = 0.9
RECIPIENTS: Final = 36_000  # enough for both spans at the usual rate


async def _dead(scene: Scene, sick: int) -> None:
    await scene.fleet.smtp_links[sick].set(Weather(refuse=True))
    scene.fleet.smtp_links[sick].reset()


async def _tarpit(scene: Scene, sick: int) -> None:
    await scene.fleet.smtp_links[sick].set(Weather(delay_seconds=2.5))  # each way: 5 s a reply


async def _lying(scene: Scene, sick: int) -> None:
    rules: list[dict[str, object]] = [
        {"stage": "dot", "action": action, "percent": 50, "recipient": f"l*.{sick}.*@*"} for action in ("garbage", "double")
    ]
    await scene.fleet.script(rules, (WAYS[sick].sink,))


def _isolated(name: str, about: str, harm: Callable[[Scene, int], Awaitable[None]]) -> Fault:
    async def inject(scene: Scene) -> None:
        sick = scene.rng.randrange(len(WAYS))
        before = await _others(scene, sick)
        await harm(scene, sick)
        await asyncio.sleep(_SETTLE_SECONDS)
        during = await _others(scene, sick)
        scene.notes.append(f"{WAYS[sick].name} sick; the other three: {before:,.0f} messages/s before, {during:,.0f} during")
        left = [scene.load.recipients / len(WAYS) - count for way, count in enumerate(_taken(scene)) if way != sick]
        if min(left) <= 0:
            scene.did_not_happen("the others had no mail left while it was measured; more --recipients or a lower --rate")
        elif during < _KEPT * before:
            scene.broken.append(f"P10: one sick delivery server slows the others from {before:,.0f} to {during:,.0f} messages/s")

    return Fault(
        name=name, row=27, about=about, inject=inject, heal=heal_links, duplicates="named", needs=frozenset({"own-sink", "proxied"}),
        recipients=RECIPIENTS, alone=True, heal_limit=90.0,
    )  # fmt: skip


async def _others(scene: Scene, sick: int) -> float:
    """Messages a second of the others together: the median second."""
    gained, before = [], _taken(scene)
    for _ in range(_SECONDS):
        await asyncio.sleep(1.0)
        now = _taken(scene)
        gained.append(sum(new - old for way, (new, old) in enumerate(zip(now, before, strict=True)) if way != sick))
        before = now
    return statistics.median(gained)


def _taken(scene: Scene) -> list[int]:
    """Accepted copies of this load, by delivery server."""
    scene.copies.read()
    counts = [0] * len(WAYS)
    for address in scene.copies.of(scene.load.number):
        counts[int(address.split(".", 2)[1])] += 1
    return counts


FAULTS: Final = (
    _isolated("isolation-dead", "one delivery server refuses: the others' rate", _dead),
    _isolated("isolation-tarpit", "one delivery server takes 5 s a reply: the others' rate", _tarpit),
    _isolated("isolation-lying", "one delivery server answers nonsense: the others' rate", _lying),
)
