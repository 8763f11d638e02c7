"""Rows 19 to 26 and 31 of the fault matrix: what a delivery server does to single recipients, with BDAT, DATA and lock-step.

All of it happens to one engine at the same time (`catalogue`, `verdicts`); each test looks at its part.
"""

from collections.abc import Iterable

import pytest

from tests.faults import catalogue
from tests.faults.peers import MODES, Fault, Verdict

Verdicts = dict[tuple[str, str], Verdict]


def each(faults: Iterable[Fault], *modes: str) -> pytest.MarkDecorator:
    """One test for every fault and mode."""
    pairs = [(fault.name, mode) for fault in faults for mode in fault.modes if not modes or mode in modes]
    return pytest.mark.parametrize("key", pairs, ids=[f"{name}-{mode}" for name, mode in pairs])


def named(*names: str) -> list[Fault]:
    found = [fault for fault in catalogue.FAULTS if fault.name in names]
    assert len(found) == len(names)
    return found


def records(verdict: Verdict) -> set[str]:
    """The different histories of the picked recipients."""
    return set(verdict.picked.values())


@each([*catalogue.HANGS, *catalogue.LOSSES])
def test_a_peer_that_hangs_or_drops_the_link_in_any_phase_loses_nobody(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold()


@each(named("hang-rcpt", "hang-data", "drop-rcpt", "drop-data", "reset-rcpt", "reset-data"), "data", "lock-step")
def test_nobody_is_in_doubt_before_the_content_left(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].none_uncertain()
    assert records(verdicts[key]) == {"d"}, "no attempt is used up"


@each(named("hang-dot", "hang-accepted", "drop-dot", "drop-accepted", "reset-dot", "reset-accepted"))
def test_whoever_is_in_doubt_gets_a_u_record_and_another_attempt(verdicts: Verdicts, key: tuple[str, str]) -> None:
    assert all("u" in kinds and kinds.endswith("d") for kinds in verdicts[key].picked.values())


@each(named("hang-accepted", "drop-accepted", "reset-accepted"))
def test_second_copies_are_exactly_those_that_were_announced(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdict = verdicts[key]
    assert all(verdict.copies[email] == 2 for email in verdict.picked)
    assert sum(verdict.copies.values()) <= len(verdict.kinds) + sum(kinds.count("u") for kinds in verdict.kinds.values())


@each(catalogue.CLOSING)
def test_a_421_at_whatever_stage_uses_up_nobodys_attempt(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold()
    assert set(verdicts[key].kinds.values()) == {"d"}
    assert set(verdicts[key].copies.values()) == {1}


@each(named("bye-dot"))
def test_a_250_and_a_421_in_one_segment_count_both(verdicts: Verdicts, key: tuple[str, str]) -> None:
    assert set(verdicts[key].kinds.values()) == {"d"}
    assert set(verdicts[key].copies.values()) == {1}


@each(named("refused-rcpt", "refused-data", "refused-dot", "norcpt354", "quota"))
def test_a_refused_recipient_bounces_and_nobody_else_does(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold(bounced=True)
    assert records(verdicts[key]) == {"b"}
    assert set(verdicts[key].others.values()) == {"d"}


@each([*catalogue.DESYNC, *named("wrong-data")])
def test_a_peer_that_loses_step_changes_nobodys_verdict(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdict = verdicts[key]
    verdict.must_hold()
    assert "broke the protocol" in verdict.sentences[1]
    if key[1] != "bdat":
        assert set(verdict.others.values()) == {"d"}, "one message at a time is at stake"


@each(catalogue.ODDITIES)
def test_odd_but_legal_replies_are_nothing_special(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold()
    assert set(verdicts[key].kinds.values()) == {"d"}
    assert set(verdicts[key].copies.values()) == {1}


@each(catalogue.FLOODS)
def test_a_flood_of_reply_text_ends_the_connection_and_nothing_else(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold()
    assert "64 KiB" in verdicts[key].sentences[1] or "100 lines" in verdicts[key].sentences[1]


@each(named("defer-rcpt", "defer-dot", "too-many", "too-many-552", "grey"))
def test_whoever_is_deferred_is_tried_again_and_delivered_once(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdict = verdicts[key]
    verdict.must_hold()
    verdict.none_uncertain()
    assert records(verdict) <= {"defer-rcpt": {"ttd"}, "grey": {"td", "ttd"}}.get(key[0], {"td"})
    assert set(verdict.copies.values()) == {1}


@each(named("code-299"))
def test_every_2xx_is_an_acceptance(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold()
    assert set(verdicts[key].kinds.values()) == {"d"}


@each(catalogue.SLOW)
def test_a_slow_reply_is_waited_for(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold()
    assert set(verdicts[key].kinds.values()) == {"d"}


@each(named("dot-retry", "accepted-retry"))
def test_in_doubt_again_and_again_it_expires_and_never_bounces(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold(expired=True)
    assert all(kinds.count("u") >= 1 and kinds.endswith("x") for kinds in verdicts[key].picked.values())


@each(named("dot-assume", "accepted-assume"))
def test_assume_delivered_names_everybody_in_doubt_and_sends_no_second_copy(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdict = verdicts[key]
    assert (verdict.state, verdict.clean, verdict.lost) == ("completed", True, [])
    assert records(verdict) == {"ud"}
    assert set(verdict.kinds.values()) <= {"d", "ud"}
    assert max(verdict.copies.values()) == 1
    assert {email for email in verdict.false_delivered if "u" not in verdict.kinds[email]} == set()


@each(named("dot-fail", "accepted-fail"))
def test_fail_ends_everybody_in_doubt_without_a_bounce_and_sends_no_second_copy(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdicts[key].must_hold(expired=True)
    assert records(verdicts[key]) == {"ux"}
    assert max(verdicts[key].copies.values()) == 1


@each(named("always-drops"))
def test_a_recipient_that_always_ends_the_connection_expires_and_nobody_else_does(verdicts: Verdicts, key: tuple[str, str]) -> None:
    verdict = verdicts[key]
    verdict.must_hold(expired=True)
    assert all(kinds.endswith("x") for kinds in verdict.picked.values())
    # With BDAT others of its window may be in doubt with it: once, for the second time it is alone
    assert set(verdict.others.values()) <= ({"d", "utd"} if key[1] == "bdat" else {"d"})


@each(named("drop-accepted"), "bdat")
def test_after_a_window_was_lost_the_next_messages_go_one_at_a_time(verdicts: Verdicts, key: tuple[str, str]) -> None:
    # Without this each of the ten losses would put three others in doubt too.
    assert sum("u" in kinds for kinds in verdicts[key].others.values()) < 15


def test_every_fault_was_played_to_at_least_200_recipients(verdicts: Verdicts) -> None:
    for fault in catalogue.FAULTS:
        assert sum(len(verdicts[fault.name, mode].kinds) for mode in fault.modes) >= 200
        assert set(fault.modes) <= set(MODES)
