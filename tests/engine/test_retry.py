"""engine.retry: the schedule is kept within its jitter, and age ends it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.egress import DeliveryServerLimits
from engine.retry import next_due

DAY = 86400.0
LIST = DeliveryServerLimits(retry_schedule_seconds=(60.0, 300.0, 900.0), max_age_seconds=DAY)
DOUBLING = DeliveryServerLimits(retry_schedule_seconds=(60.0,), retry_growth=2.0, retry_longest_seconds=3600.0, max_age_seconds=30 * DAY)


@pytest.mark.parametrize(("attempt", "pause"), [(1, 60.0), (2, 300.0), (3, 900.0), (4, 900.0), (50, 900.0)])
def test_the_pause_after_each_attempt_is_the_schedules_and_its_last_one_repeats(attempt: int, pause: float) -> None:
    assert next_due(LIST, attempt, 1000.0, 0.5, 1000.0) == pytest.approx(1000.0 + pause)


@pytest.mark.parametrize(("attempt", "pause"), [(1, 60.0), (2, 120.0), (3, 240.0), (6, 1920.0), (7, 3600.0), (5000, 3600.0)])
def test_an_exponential_schedule_grows_up_to_its_longest_pause(attempt: int, pause: float) -> None:
    assert next_due(DOUBLING, attempt, 1000.0, 0.5, 1000.0) == pytest.approx(1000.0 + pause)


def test_a_list_is_kept_as_written_before_it_grows() -> None:
    limits = DeliveryServerLimits(retry_schedule_seconds=(10.0, 7200.0, 60.0), retry_growth=3.0, retry_longest_seconds=30.0)
    pauses = [next_due(limits, attempt, 0.0, 0.5, 0.0) for attempt in (1, 2, 3, 4, 5)]
    assert pauses == pytest.approx([10.0, 7200.0, 60.0, 60.0, 60.0])


def test_jitter_stays_within_five_per_cent() -> None:
    assert next_due(LIST, 2, 0.0, 0.0, 0.0) == pytest.approx(285.0)
    assert next_due(LIST, 2, 0.0, 1.0, 0.0) == pytest.approx(315.0)


def test_a_message_that_would_be_too_old_is_expired() -> None:
    for max_age, due in ((1899.0, None), (1900.0, pytest.approx(5900.0))):
        limits = DeliveryServerLimits(retry_schedule_seconds=(900.0,), max_age_seconds=max_age)
        assert next_due(limits, 3, 5000.0, 0.5, 4000.0) == due


def test_age_counts_from_now_when_this_was_the_first_attempt() -> None:
    for max_age, due in ((59.0, None), (60.0, pytest.approx(5060.0))):
        limits = DeliveryServerLimits(retry_schedule_seconds=(60.0,), max_age_seconds=max_age)
        assert next_due(limits, 1, 5000.0, 0.5, 0.0) == due


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule"):
        next_due(DeliveryServerLimits(retry_schedule_seconds=()), 1, 0.0, 0.5, 0.0)
    with pytest.raises(ValueError, match="attempt 0"):
        next_due(LIST, 0, 0.0, 0.5, 0.0)


@given(
    attempt=st.integers(1, 10_000),
    now=st.floats(1.6e9, 2e9),
    age=st.floats(0, 30 * DAY),
    jitter=st.floats(0, 1),
    growth=st.floats(1, 100),
)
def test_every_retry_is_within_its_tolerance_and_before_the_end(attempt: int, now: float, age: float, jitter: float, growth: float) -> None:
    limits = DeliveryServerLimits(retry_growth=growth)
    due = next_due(limits, attempt, now, jitter, now - age)
    if due is None:
        return
    assert due <= now - age + limits.max_age_seconds
    longest = max(max(limits.retry_schedule_seconds), limits.retry_longest_seconds)
    assert 0.95 * min(limits.retry_schedule_seconds) - 0.01 <= due - now <= 1.05 * longest + 0.01
