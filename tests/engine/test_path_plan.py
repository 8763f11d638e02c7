"""What a path opens, closes and waits for: one test a row of the decision."""

import math

import msgspec
import pytest

from engine.path_plan import OPERATOR_BACKOFF_SECONDS, Actions, PathView, backoff_seconds, next_actions

QUIET = PathView(
    now=100.0, enabled=True, draining=False, ready=0, open=0, connecting=0, idle=0, leaving=0, max_connections=10, retry_at=0.0,
    probing=False, probes=0, tokens_at=0.0, idle_since=100.0, idle_timeout=10.0,
)  # fmt: skip


def view(**changes: object) -> PathView:
    return msgspec.structs.replace(QUIET, **changes)


def test_nothing_to_do_is_nothing_done() -> None:
    assert next_actions(QUIET) == Actions()


def test_much_work_opens_all_connections_that_are_allowed() -> None:
    assert next_actions(view(ready=5000)).open == 10


def test_while_more_waits_than_is_held_only_starved_connections_count_for_what_is_ready() -> None:
    busy = view(ready=2000, open=101, max_connections=5000)
    assert next_actions(busy).open == 0
    assert next_actions(msgspec.structs.replace(busy, more=True)).open == 101
    assert next_actions(msgspec.structs.replace(busy, more=True, connecting=60)).open == 41
    assert next_actions(msgspec.structs.replace(busy, more=True, starved=101)).open == 0
    assert next_actions(msgspec.structs.replace(busy, more=True, open=4990)).open == 10


def test_little_work_opens_one_connection() -> None:
    assert next_actions(view(ready=3)).open == 1


def test_connections_that_are_being_opened_count() -> None:
    assert next_actions(view(ready=5000, open=4, connecting=5)).open == 1


@pytest.mark.parametrize("changes", [{"enabled": False}, {"draining": True}, {"max_connections": 0}])
def test_a_path_that_may_not_send_opens_nothing_and_closes_what_is_idle(changes: dict[str, object]) -> None:
    assert next_actions(view(ready=500, open=3, idle=2, **changes)) == Actions(close_idle=2)


def test_after_a_failure_nothing_is_opened_before_its_time() -> None:
    assert next_actions(view(ready=500, retry_at=130.0, probing=True)) == Actions(look_again_at=130.0)


def test_a_throttled_path_goes_on_with_its_connections_while_another_one_failed() -> None:
    assert next_actions(view(ready=500, open=3, retry_at=130.0, probing=True, tokens_at=100.5)).look_again_at == 100.5


def test_while_a_server_fails_or_is_unknown_one_connection_tries_it() -> None:
    assert next_actions(view(ready=5000, probing=True, retry_at=99.0)).open == 1
    assert next_actions(view(ready=5000, probing=True, open=6, retry_at=99.0)).open == 1
    assert next_actions(view(ready=5000, probing=True, probes=1, open=1)).open == 0
    assert next_actions(view(ready=5000, probing=True, probes=1, connecting=1)).open == 0


def test_a_throttled_path_looks_again_when_the_next_token_is_there() -> None:
    assert next_actions(view(ready=5000, open=10, tokens_at=100.5)).look_again_at == 100.5


def test_idle_connections_are_kept_for_a_while_and_then_closed() -> None:
    assert next_actions(view(open=2, idle=2, idle_since=95.0)) == Actions(look_again_at=105.0)
    assert next_actions(view(open=2, idle=2, idle_since=90.0)) == Actions(close_idle=2)


def test_connections_beyond_a_lowered_limit_are_closed_once_each_however_busy_they_are() -> None:
    assert next_actions(view(ready=500, open=10, max_connections=8)).close == 2
    assert next_actions(view(ready=500, open=10, leaving=1, max_connections=8)).close == 1
    assert next_actions(view(ready=500, open=10, leaving=2, max_connections=8)).close == 0


def test_back_off_doubles_up_to_five_minutes_and_is_spread() -> None:
    middles = [backoff_seconds(n, permanent=False, connected=False, jitter=0.5) for n in range(1, 12)]
    assert middles[:4] == [1.0, 2.0, 4.0, 8.0]
    assert max(middles) == 300.0
    assert math.isclose(backoff_seconds(3, permanent=False, connected=False, jitter=0.0), 3.2)
    assert math.isclose(backoff_seconds(3, permanent=False, connected=False, jitter=1.0), 4.8)


def test_a_server_that_greets_and_then_ends_every_connection_is_tried_again_every_five_seconds_and_later_every_half_minute() -> None:
    assert backoff_seconds(30, permanent=False, connected=True, jitter=0.5) == 5.0
    assert backoff_seconds(31, permanent=False, connected=True, jitter=0.5) == 30.0


def test_what_only_an_operator_can_mend_is_tried_at_most_once_a_minute() -> None:
    assert backoff_seconds(1, permanent=True, connected=False, jitter=0.0) == OPERATOR_BACKOFF_SECONDS
