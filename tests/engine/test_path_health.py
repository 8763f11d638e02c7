"""engine.path_health: what counts as a failure, when it is over, and what an operator reads of it."""

from engine.path_health import ALL, CAUTION_SECONDS, DEMOTION_SECONDS, LOCK_STEP, NO_CHUNKING, PathHealth


def fail(health: PathHealth, connection: int, newest: int, now: float = 100.0, *, permanent: bool = False, engines: int = 1) -> bool:
    return health.failed("it broke", connection, newest, now, permanent=permanent, connected=False, engines=engines, dice=0.5)


def test_connections_that_fail_together_count_once() -> None:
    health = PathHealth(0.0)
    assert [fail(health, n, 10 + n) for n in range(1, 11)] == [True] + [False] * 9
    assert health.failures == 1
    assert health.retry_at == 101.0


def test_a_connection_begun_after_the_failure_fails_again_or_ends_it() -> None:
    health = PathHealth(0.0)
    fail(health, 1, 2)
    fail(health, 3, 4)
    assert health.failures == 2
    assert not health.answered(2), "it was open before"
    assert health.answered(5)
    assert (health.failures, health.retry_at) == (0, 0.0)


def test_what_failed_beside_the_last_connection_is_over_with_it_unless_an_operator_has_to_act() -> None:
    health = PathHealth(0.0)
    fail(health, 2, 3)
    assert not health.answered(1), "the server lets no more of them in"
    assert health.answered(1, last=True)
    assert health.failures == 0
    fail(health, 4, 5, permanent=True)
    assert not health.answered(1, last=True)
    assert health.permanent


def test_a_wrong_password_outweighs_a_failure_that_was_counted_and_is_tried_once_a_minute_by_all_engines_together() -> None:
    health = PathHealth(0.0)
    fail(health, 2, 3)
    assert fail(health, 1, 4, permanent=True, engines=3)
    assert health.permanent
    assert health.retry_at >= 100.0 + 3 * 60.0


def test_a_peer_that_loses_step_is_spoken_to_with_less_and_less_for_a_while() -> None:
    health = PathHealth(0.0)
    health.lost_step("protocol violation: reply code 354 to RCPT", ALL, 10.0)
    assert health.level == NO_CHUNKING
    health.lost_step("protocol violation: a reply nobody asked for", ALL, 11.0)
    assert health.level == NO_CHUNKING, "a connection of the same kind says nothing new"
    health.lost_step("protocol violation: a reply nobody asked for", NO_CHUNKING, 12.0)
    health.lost_step("protocol violation: a reply nobody asked for", LOCK_STEP, 13.0)
    assert health.level == LOCK_STEP
    assert health.notes(13.0) == ["one command at a time for 5 min, because the server broke the protocol: a reply nobody asked for"]
    assert not health.trust_again(13.0 + DEMOTION_SECONDS - 1)
    assert health.trust_again(13.0 + DEMOTION_SECONDS)
    assert (health.level, health.notes(400.0)) == (ALL, [])


def test_a_connection_too_many_is_noted_while_others_work() -> None:
    health = PathHealth(0.0)
    fail(health, 9, 9)
    assert health.notes(100.2) == ["another connection failed: it broke; next try in 1 s"]
    assert health.notes(107.0) == ["another connection failed: it broke; trying again now"]


def test_a_server_that_is_moved_has_to_prove_itself_again() -> None:
    health = PathHealth(0.0)
    health.proven = True
    fail(health, 1, 1)
    health.forget_failures(moved=False)
    assert (health.failures, health.proven) == (0, True)
    health.forget_failures(moved=True)
    assert not health.proven


def test_after_a_window_was_lost_only_one_message_at_a_time_is_at_stake_for_a_minute() -> None:
    health = PathHealth(0.0)
    health.lost_window(4, 10.0)
    assert health.level == NO_CHUNKING
    assert health.notes(10.0) == ["DATA instead of BDAT for 1 min, because a connection was lost with 4 messages in doubt"]
    assert health.trust_again(10.0 + CAUTION_SECONDS)
