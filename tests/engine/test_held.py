"""What an engine remembers of recipients whose connections ended: only those that bring it down while others are answered are suspects."""

from types import SimpleNamespace
from typing import Any

from asyncpg import BitString

from engine.held import HeldBatch


def make(count: int = 3) -> HeldBatch:
    batch: Any = SimpleNamespace(campaign_id=1, batch=1, delivery_server_id=1, positions=list(range(count)), recipients=[object()] * count)
    return HeldBatch(batch, SimpleNamespace(), 1, BitString("0" * count), 0.0)  # type: ignore[arg-type]


def test_who_is_lost_again_after_the_server_answered_others_is_a_suspect() -> None:
    held = make()
    assert held.lost_with(1, answers=10, now=100.0).since == 100.0
    assert not held.is_suspect(1)
    assert held.lost_with(1, answers=11, now=200.0).since == 100.0
    assert held.is_suspect(1)
    assert not held.is_suspect(0)


def test_a_server_that_answers_nobody_makes_nobody_a_suspect() -> None:
    held = make()
    for second in range(50):
        held.lost_with(2, answers=7, now=float(second))
    assert not held.is_suspect(2)


def test_who_was_never_taken_is_told_from_who_came_back() -> None:
    held = make()
    assert held.untried
    held.take(3)
    held.give_back(0)
    assert held.ready == 1
    assert not held.untried
