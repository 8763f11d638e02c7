"""engine.turn where it goes wrong: a turn that fails half-way ends the process; one recipient that cannot be composed does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from compose.campaign import CompiledCampaign
from domain.campaign import Batch, Recipient
from domain.errors import Invalid
from engine import turn

ROOT = Path(__file__).resolve().parents[2]
FAILING_TURN = """
import asyncio
from engine.turn import Turn
async def main():
    turn = Turn(None, None, 1.0, print, print)
    turn.outcomes.append("no outcome")
    turn.ready(None)
    await asyncio.sleep(5)
    print("still here")
asyncio.run(main())
"""


def test_a_turn_that_fails_half_way_ends_the_process_and_says_so() -> None:
    ended = subprocess.run([sys.executable, "-c", FAILING_TURN], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == turn.BUG_EXIT_CODE
    assert "a turn failed half-way" in ended.stdout + ended.stderr
    assert "still here" not in ended.stdout


STANDING_STILL = """
import asyncio, os, signal, subprocess, sys
from engine.turn import Turn
async def main():
    turn = Turn(None, None, 0.2, print, lambda: print("stood still", flush=True))
    print("begun", flush=True)
    await asyncio.sleep(1)  # an idle second is no pause
    os.kill(os.getpid(), signal.SIGSTOP)
    await asyncio.sleep(0.5)
asyncio.run(main())
"""


def test_a_process_that_was_stopped_notices_before_anything_else_happens() -> None:
    stopped = subprocess.Popen([sys.executable, "-c", STANDING_STILL], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
    time.sleep(1.0)  # five margins
    stopped.send_signal(signal.SIGCONT)
    said, _ = stopped.communicate(timeout=30)
    assert said.split("\n")[0] == "begun"
    assert said.count("stood still") == 1


class Fragile:
    """Composes for everybody but the third."""

    def build(self, recipients: list[Recipient], *, composed_at: float, attempt: int) -> list[Any]:
        if any(recipient.number == 3 for recipient in recipients):
            raise RecursionError("nobody thought of that")
        return [recipient.email for recipient in recipients]


def test_a_recipient_nobody_foresaw_is_refused_alone() -> None:
    batch = Batch(1, 1, 1, 1, 0.0, 0.0, [0, 1, 2, 3], [Recipient(n, n, f"p{n}@x.example", b"{}") for n in (1, 2, 3, 4)])
    fragile = cast("CompiledCampaign", Fragile())
    built: list[Any] = [turn._build_alone(fragile, batch, index) for index in range(4)]
    assert [built[0], built[1], built[3]] == ["p1@x.example", "p2@x.example", "p4@x.example"]
    assert isinstance(built[2], Invalid)
    assert "RecursionError" in str(built[2])


class Kept:
    """Stands where a path does, for what a turn may compose on it."""

    def __init__(self, per_turn: int) -> None:
        self.per_turn = per_turn


async def test_a_turn_composes_so_much_and_the_other_connections_have_their_turn_next() -> None:
    made: Any = turn.Turn(cast("Any", None), cast("Any", None), 1.0, print, print)
    made._scheduled = True  # only what would be ready is looked at
    sessions = cast("Any", ["a", "b", "c", "d"])

    def postponed(per_turn: int, rooms: list[int]) -> tuple[Any, list[str], list[str]]:
        """What is begun; who is ready for the next turn; of whom nothing leaves before it."""
        later: set[str] = set()
        begun = made._postpone(cast("Any", Kept(per_turn)), sessions, rooms, later)
        ready = list(made._ready)
        made._ready.clear()
        return begun, ready, sorted(later)

    assert postponed(8, [5, 5, 5, 5]) == ((["a", "b"], [5, 3], 8), ["b", "c", "d"], ["c", "d"])
    assert postponed(1, [5, 0, 5, 5]) == ((["a"], [1], 1), ["a", "c", "d"], ["c", "d"])
    assert postponed(2, [1, 0, 1, 1]) == ((["a", "b", "c"], [1, 0, 1], 2), ["d"], ["d"])


def test_few_large_messages_are_composed_in_a_turn_and_few_signed_ones() -> None:
    def message(octets: int, signer: object) -> Any:
        compiled = SimpleNamespace(signer=signer)
        return SimpleNamespace(size=octets, ref=(SimpleNamespace(campaign=SimpleNamespace(compiled=compiled)), 0))

    assert turn._per_turn(message(100_000, None)) == 41
    assert turn._per_turn(message(10_000_000, None)) == 1
    assert turn._per_turn(message(10_000, SimpleNamespace(at_once=8))) == 8
    assert turn._per_turn(message(10_000_000, SimpleNamespace(at_once=8))) == 1
