"""An engine's time of day: PostgreSQL's, whatever the machine's own clock does."""

import time

import pytest

from engine.clock import SteadyClock


def test_a_jump_of_the_machines_clock_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteadyClock()
    before = clock.now_us()
    assert abs(before / 1e6 - time.time()) < 5.0
    monkeypatch.setattr(time, "time", lambda: 9e9)
    assert 0 <= clock.now_us() - before < 5_000_000


def test_what_postgresql_said_holds_and_a_slow_answer_is_not_believed() -> None:
    clock, now = SteadyClock(), time.monotonic()
    clock.heard(2_000_000_000.0, now - 0.1, now)
    assert abs(clock.now_us() / 1e6 - 2_000_000_000.0) < 5.0
    clock.heard(1_000_000_000.0, now - 5.0, now)
    assert abs(clock.now_us() / 1e6 - 2_000_000_000.0) < 5.0
