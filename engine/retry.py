"""When a deferred recipient is due again, and when it has expired. Pure: the clock and the dice are passed in."""

from domain.egress import DeliveryServerLimits

# Each step is stretched or shortened by up to this share, so that what was deferred together does not come back together. Half of the
# tolerance a schedule has (10 %): the other half is for finding due recipients and for waiting in line.
JITTER = 0.05


def next_due(limits: DeliveryServerLimits, attempt: int, now: float, jitter: float, first_attempt_at: float) -> float | None:
    """Tell when the next attempt is due, or None when waiting for it would make the message too old: it is expired now.

    `attempt` is the number of the one that was just deferred, 1 for the first. `now` and `first_attempt_at` are POSIX seconds on one
    clock; a `first_attempt_at` of 0 says that this was the first. `jitter` is in 0..1 (0.5 = exactly the schedule). The age counts
    from the first attempt, so no number of attempts and no pause of a campaign outlives it (RFC 5321 §4.5.4.1).
    Raises ValueError on an empty schedule or an attempt below 1.
    """
    schedule = limits.retry_schedule_seconds
    if not schedule or attempt < 1:
        raise ValueError(f"a retry needs a schedule and an attempt of at least 1 (got {len(schedule)} steps, attempt {attempt})")
    due = now + _wait(limits, attempt) * (1.0 - JITTER + 2.0 * JITTER * min(max(jitter, 0.0), 1.0))
    return due if due <= (first_attempt_at or now) + limits.max_age_seconds else None


def _wait(limits: DeliveryServerLimits, attempt: int) -> float:
    schedule = limits.retry_schedule_seconds
    beyond = attempt - len(schedule)
    if beyond <= 0:
        return schedule[attempt - 1]
    if limits.retry_growth == 1.0:
        return schedule[-1]
    # The exponent is bounded because a float is
    return max(schedule[-1], min(limits.retry_longest_seconds, schedule[-1] * limits.retry_growth ** min(beyond, 100)))
