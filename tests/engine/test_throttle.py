"""The token bucket: no more than the rate, and never later than it must be."""

from engine.throttle import Pace, TokenBucket


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


def test_a_server_that_takes_fifty_a_second_is_found_out_and_kept_to() -> None:
    pace, now, refused_at_the_end = Pace(0.0), 0.0, 0
    for look in range(1, 61):
        now = look * 0.5
        offered = int((pace.per_second or 1000.0) * 0.5)
        taken = min(offered, 25)
        pace.look(now, offered, offered - taken)
        if look > 20:
            refused_at_the_end += offered - taken
    assert 40.0 <= pace.per_second <= 60.0
    assert refused_at_the_end < 0.1 * 40 * 25


def test_a_few_recipients_that_are_told_to_slow_down_do_not_slow_the_others() -> None:
    pace = Pace(0.0)
    pace.look(0.5, 1000, 90)
    pace.look(1.0, 2, 2)
    assert pace.per_second == 0.0


def test_a_server_that_stops_asking_gets_its_old_rate_back() -> None:
    pace = Pace(0.0)
    pace.look(0.5, 500, 400)
    assert pace.per_second == 180.0
    for look in range(2, 200):
        pace.look(look * 0.5, 100, 0)
    assert pace.per_second == 0.0


def test_the_longer_a_server_is_quiet_the_sooner_it_gets_its_rate_back() -> None:
    pace = Pace(0.0)
    pace.look(0.5, 100, 0)
    pace.look(1.0, 100, 90)
    looks = 0
    while pace.per_second:
        looks += 1
        pace.look(1.0 + looks * 0.5, 100, 0)
    assert looks < 60  # from 18 a second to 200: half a minute


def test_the_pace_never_falls_to_nothing() -> None:
    pace = Pace(0.0)
    for look in range(1, 40):
        pace.look(look * 0.5, 100, 100)
    assert pace.per_second == 1.0
