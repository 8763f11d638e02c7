"""engine.disposition: every row of the policy table, and what must never happen (P5)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import states
from domain.bounce import classify
from engine.disposition import REQUEUED, TABLE, decide
from ext.smtp_session import STAGE_CONTENT, STAGE_DATA, STAGE_LOST, STAGE_MAIL, STAGE_RCPT, STAGE_UNSENT

BEFORE_DOT = (STAGE_MAIL, STAGE_RCPT, STAGE_DATA)
ANSWERED = (*BEFORE_DOT, STAGE_CONTENT)

ROWS = [
    # stage, reply, recipient, kind, connection, path
    (STAGE_MAIL, "450 4.3.0 wait", states.DEFERRED, "t", "keep", "throttle"),
    (STAGE_MAIL, "550 5.1.8 Domain of sender address does not exist", states.BOUNCED, "b", "keep", "throttle"),
    (STAGE_MAIL, "421 4.3.2 closing", REQUEUED, "", "close", "connect-trouble"),
    (STAGE_MAIL, "503 5.5.1 nested MAIL", REQUEUED, "", "close", "none"),
    (STAGE_MAIL, "530 5.7.0 Must issue a STARTTLS command first", REQUEUED, "", "close", "suspend"),
    (STAGE_MAIL, "354 go on", REQUEUED, "", "close", "none"),
    (STAGE_RCPT, "450 4.2.0 mailbox busy", states.DEFERRED, "t", "keep", "none"),
    (STAGE_RCPT, "451 4.7.1 Greylisting in action", states.DEFERRED, "t", "keep", "none"),
    (STAGE_RCPT, "450 4.7.1 rate limited", states.DEFERRED, "t", "keep", "throttle"),
    (STAGE_RCPT, "452 4.5.3 too many recipients", states.DEFERRED, "t", "keep", "throttle"),
    (STAGE_RCPT, "552 too many recipients", states.DEFERRED, "t", "keep", "throttle"),
    (STAGE_RCPT, "550 5.1.1 User unknown", states.BOUNCED, "b", "keep", "none"),
    (STAGE_RCPT, "552 5.2.2 mailbox full", states.BOUNCED, "b", "keep", "none"),
    (STAGE_RCPT, "554 5.7.1 Relay access denied", states.BOUNCED, "b", "keep", "throttle"),
    (STAGE_RCPT, "421 4.7.0 too many errors", REQUEUED, "", "close", "throttle"),
    (STAGE_RCPT, "421 4.4.2 closing", REQUEUED, "", "close", "connect-trouble"),
    (STAGE_RCPT, "503 5.5.1 need MAIL", REQUEUED, "", "close", "none"),
    (STAGE_RCPT, "530 5.7.0 Authentication required", REQUEUED, "", "close", "suspend"),
    (STAGE_RCPT, "999 what", REQUEUED, "", "close", "none"),
    (STAGE_DATA, "451 4.3.0 later", states.DEFERRED, "t", "keep", "none"),
    (STAGE_DATA, "554 5.5.0 no", states.BOUNCED, "b", "keep", "none"),
    (STAGE_DATA, "421 4.3.2 closing", REQUEUED, "", "close", "connect-trouble"),
    (STAGE_DATA, "503 5.5.1 need RCPT", REQUEUED, "", "close", "none"),
    (STAGE_DATA, "530 5.7.0 Authentication required", REQUEUED, "", "close", "suspend"),
    (STAGE_DATA, "250 taken already", REQUEUED, "", "close", "none"),
    (STAGE_CONTENT, "250 2.0.0 queued", states.DELIVERED, "d", "keep", "none"),
    (STAGE_CONTENT, "299 fine", states.DELIVERED, "d", "keep", "none"),
    (STAGE_CONTENT, "451 4.3.0 later", states.DEFERRED, "t", "keep", "none"),
    (STAGE_CONTENT, "550 5.7.1 blocked by spam filter", states.BOUNCED, "b", "keep", "throttle"),
    (STAGE_CONTENT, "552 5.3.4 message too large", states.BOUNCED, "b", "keep", "none"),
    (STAGE_CONTENT, "421 4.3.2 closing", REQUEUED, "", "close", "connect-trouble"),
    (STAGE_CONTENT, "503 5.5.1 need DATA", REQUEUED, "", "close", "none"),
    (STAGE_CONTENT, "530 5.7.0 Authentication required", REQUEUED, "", "close", "suspend"),
    (STAGE_CONTENT, "354 go on", states.DEFERRED, "u", "close", "connect-trouble"),
]


@pytest.mark.parametrize(("stage", "reply", "recipient", "kind", "connection", "path"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_a_reply_has_the_consequence_the_table_says(stage: int, reply: str, recipient: str, kind: str, connection: str, path: str) -> None:
    code, _, text = reply.partition(" ")
    got = decide(stage, int(code), classify(int(code), text))
    assert (got.recipient, got.kind, got.connection, got.path, got.uncertain_first) == (recipient, kind, connection, path, False)


def test_every_answer_of_every_stage_is_in_the_rows() -> None:
    tried = {stage: sum(row[0] == stage for row in ROWS) for stage in ANSWERED}
    assert all(tried[stage] >= len(TABLE[stage]) for stage in ANSWERED)


@pytest.mark.parametrize(
    ("on_uncertain", "recipient", "kind", "uncertain_first"),
    [("retry", states.DEFERRED, "u", False), ("assume_delivered", states.DELIVERED, "d", True), ("fail", states.EXPIRED, "x", True)],
)
@pytest.mark.parametrize(("stage", "code"), [(STAGE_LOST, 0), (STAGE_CONTENT, 354), (STAGE_CONTENT, 199), (STAGE_CONTENT, 0)])
def test_what_is_in_doubt_is_named_and_then_treated_as_the_server_is_configured(
    stage: int, code: int, on_uncertain: str, recipient: str, kind: str, uncertain_first: bool
) -> None:
    got = decide(stage, code, None, on_uncertain=on_uncertain)  # type: ignore[arg-type]
    assert (got.recipient, got.kind, got.connection, got.uncertain_first) == (recipient, kind, "close", uncertain_first)


def test_a_message_that_was_never_begun_goes_back_without_blame() -> None:
    got = decide(STAGE_UNSENT, 0, begun=False)
    assert (got.recipient, got.kind, got.connection, got.path) == (REQUEUED, "", "close", "none")


def test_a_message_cut_off_goes_back_unsent_unless_it_is_what_ends_the_connections() -> None:
    got = decide(STAGE_UNSENT, 0)
    assert (got.recipient, got.kind, got.path) == (REQUEUED, "", "connect-trouble")
    got = decide(STAGE_UNSENT, 0, guilty=True)
    assert (got.recipient, got.kind, got.connection, got.path) == (states.DEFERRED, "t", "close", "connect-trouble")


def test_a_guilty_message_is_deferred_whatever_the_server_closes_with() -> None:
    assert decide(STAGE_RCPT, 421, classify(421, "closing"), guilty=True).kind == "t"
    assert decide(STAGE_CONTENT, 421, classify(421, "closing"), guilty=True).kind == "t"
    assert decide(STAGE_CONTENT, 503, None, guilty=True).kind == "t"


def test_a_path_that_waits_for_an_operator_never_uses_up_an_attempt() -> None:
    assert decide(STAGE_MAIL, 530, None, guilty=True).recipient == REQUEUED


def test_a_stage_that_is_not_in_the_table_is_a_bug_of_ours() -> None:
    with pytest.raises(KeyError):
        decide(4711, 250)


@given(stage=st.sampled_from(ANSWERED), code=st.integers(0, 999), text=st.sampled_from([row[1][4:] for row in ROWS]), guilty=st.booleans())
def test_no_false_verdict(stage: int, code: int, text: str, guilty: bool) -> None:
    """P5: `d` only after a 2xx to the content, `b` only after a 5xx."""
    got = decide(stage, code, classify(code, text), guilty=guilty)
    if got.kind == "d":
        assert stage == STAGE_CONTENT
        assert 200 <= code <= 299
    if got.kind == "b":
        assert 500 <= code <= 599
    assert got.kind != "x"
    if got.recipient == REQUEUED:
        assert got.kind == ""
        assert got.connection == "close"
