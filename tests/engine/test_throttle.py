"""The token bucket: no more than the rate, and never later than it must be."""

from engine.throttle import TokenBucket


def test_a_rate_of_zero_is_no_limit() -> None:
    bucket = TokenBucket(0.0, now=100.0)
    assert bucket.take(10_000, 100.0) == 10_000
    assert bucket.ready_at(100.0) == 100.0


def test_in_any_ten_seconds_at_most_the_rate_and_one_burst_leave() -> None:
    bucket = TokenBucket(50.0, now=0.0)
    taken = sum(bucket.take(100, step / 100) for step in range(1000))
    assert 490 <= taken <= 10 * 50 + 5


def test_a_slow_rate_lets_one_message_go_when_its_time_has_come() -> None:
    bucket = TokenBucket(0.5, now=0.0)
    assert bucket.take(5, 0.0) == 1
    assert bucket.ready_at(0.0) == 2.0
    assert bucket.take(5, 1.99) == 0
    assert bucket.take(5, 2.0) == 1


def test_tokens_given_back_can_be_taken_again() -> None:
    bucket = TokenBucket(10.0, now=0.0)
    assert bucket.take(1, 0.0) == 1
    bucket.give_back(1)
    assert bucket.take(1, 0.0) == 1


def test_a_new_rate_holds_from_then_on() -> None:
    bucket = TokenBucket(1000.0, now=0.0)
    bucket.set_rate(10.0)
    assert bucket.take(1000, 0.0) == 1
    assert bucket.take(1000, 1.0) == 1  # the burst, a tenth of a second's worth
    assert bucket.ready_at(1.0) == 1.1


def test_a_clock_that_stands_still_or_goes_back_makes_no_tokens() -> None:
    bucket = TokenBucket(10.0, now=5.0)
    assert bucket.take(1, 5.0) == 1
    assert bucket.take(1, 4.0) == 0
    assert bucket.take(1, 5.0) == 0
