"""engine.retry: the schedule is kept within its jitter, and age ends it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.egress import DeliveryServerLimits
from engine.retry import next_due

SCHEDULE = (60.0, 300.0, 900.0)
DAY = 86400.0


@pytest.mark.parametrize(("attempt", "pause"), [(1, 60.0), (2, 300.0), (3, 900.0), (4, 900.0), (50, 900.0)])
def test_the_pause_after_each_attempt_is_the_schedules_and_its_last_one_repeats(attempt: int, pause: float) -> None:
    assert next_due(SCHEDULE, attempt, 1000.0, 0.5, 1000.0, DAY) == pytest.approx(1000.0 + pause)


def test_jitter_stays_within_five_per_cent() -> None:
    assert next_due(SCHEDULE, 2, 0.0, 0.0, 0.0, DAY) == pytest.approx(285.0)
    assert next_due(SCHEDULE, 2, 0.0, 1.0, 0.0, DAY) == pytest.approx(315.0)


def test_a_message_that_would_be_too_old_is_expired() -> None:
    assert next_due(SCHEDULE, 3, 5000.0, 0.5, 4000.0, 1899.0) is None
    assert next_due(SCHEDULE, 3, 5000.0, 0.5, 4000.0, 1900.0) == pytest.approx(5900.0)


def test_age_counts_from_now_when_this_was_the_first_attempt() -> None:
    assert next_due(SCHEDULE, 1, 5000.0, 0.5, 0.0, 60.0) == pytest.approx(5060.0)
    assert next_due(SCHEDULE, 1, 5000.0, 0.5, 0.0, 59.0) is None


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule"):
        next_due((), 1, 0.0, 0.5, 0.0, DAY)
    with pytest.raises(ValueError, match="attempt 0"):
        next_due(SCHEDULE, 0, 0.0, 0.5, 0.0, DAY)


@given(attempt=st.integers(1, 1000), now=st.floats(1.7e9, 1.8e9), age=st.floats(0.0, 5e5), jitter=st.floats(0.0, 1.0))
def test_a_due_time_is_ahead_within_the_jitter_and_never_past_the_age_limit(attempt: int, now: float, age: float, jitter: float) -> None:
    limits = DeliveryServerLimits()
    first = now - age
    due = next_due(limits.retry_schedule_seconds, attempt, now, jitter, first, limits.max_age_seconds)
    pause = limits.retry_schedule_seconds[min(attempt, 7) - 1]
    if due is None:
        assert age + pause * 1.1 > limits.max_age_seconds - 1.0
    else:
        assert pause * 0.899 <= due - now <= pause * 1.101
        assert due <= first + limits.max_age_seconds
