"""The tables of states: every pair, from the table itself."""

import itertools

import pytest

from domain import states


@pytest.mark.parametrize("table", [states.NEXT_STATES, states.NEXT_CAMPAIGN_STATES], ids=["recipients", "campaigns"])
def test_every_state_that_can_be_reached_is_itself_in_the_table(table: dict[str, frozenset[str]]) -> None:
    assert set().union(*table.values()) <= set(table)


@pytest.mark.parametrize("table", [states.NEXT_STATES, states.NEXT_CAMPAIGN_STATES], ids=["recipients", "campaigns"])
def test_a_pair_that_is_not_in_the_table_does_not_happen(table: dict[str, frozenset[str]]) -> None:
    for state, following in itertools.product([*table, "no such state"], repeat=2):
        assert states.may_follow(table, state, following) == (following in table.get(state, ()))


def test_terminal_recipient_states_lead_nowhere_but_for_a_dsn_after_a_delivery() -> None:
    for state in states.TERMINAL_KINDS.values():
        assert states.NEXT_STATES[state] == ({states.BOUNCED} if state == states.DELIVERED else frozenset())


def test_every_state_of_a_started_campaign_reaches_an_end() -> None:
    def ends(state: str, seen: frozenset[str] = frozenset()) -> bool:
        following = states.NEXT_CAMPAIGN_STATES[state] - seen
        return not states.NEXT_CAMPAIGN_STATES[state] or any(ends(s, seen | {state}) for s in following)

    assert all(ends(state) for state in states.CAMPAIGN_STATES)
