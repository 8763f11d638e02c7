"""smtp_protocol: replies are read whatever their cut, paired in order, and never decide another message (P5, R6)."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext.smtp_protocol import (
    MODE_CHUNKING,
    MODE_LOCK_STEP,
    MODE_PIPELINING,
    PHASE_ENVELOPE,
    PHASE_FINAL,
    STAGE_CONTENT,
    STAGE_DATA,
    STAGE_LOST,
    STAGE_MAIL,
    STAGE_RCPT,
    STAGE_UNSENT,
    Message,
    Outcome,
    SmtpProtocol,
)
from tests.reference.smtp_replies import Broken, Reply, read_replies

BODY = b"Subject: hello\r\n\r\nA line.\r\n"
RESET = b"250 2.0.0 reset\r\n"
GOOD = b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n250 2.0.0 queued\r\n" + RESET  # to one message of a window
MODES = {"lock-step": (False, False), "pipelining": (True, False), "chunking": (True, True)}


def message(number: int = 1, wire: bytes = BODY, *, smtputf8: bool = False) -> Message:
    return Message(b"bounce-%d@s.example" % number, b"r%d@d.example" % number, wire, number, smtputf8)


def pipelined(**options: int) -> SmtpProtocol:
    return SmtpProtocol(True, False, **options)


def learned_window(window: int = 4) -> SmtpProtocol:
    """A chunking protocol whose window is open: one message has gone through."""
    protocol = SmtpProtocol(True, True, window)
    learn(protocol)
    assert protocol.open_window == window
    return protocol


def learn(protocol: SmtpProtocol) -> None:
    protocol.submit(message(0))
    protocol.output()
    protocol.feed(b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n354 go\r\n", [])
    protocol.output()
    protocol.feed(b"250 2.0.0 queued\r\n", [])


def fed(protocol: SmtpProtocol, data: bytes) -> list[Outcome]:
    outcomes: list[Outcome] = []
    protocol.feed(data, outcomes)
    return outcomes


def seen(outcomes: list[Outcome]) -> list[tuple[object, int, int, bytes, bool]]:
    return [(o.message.ref, o.stage, o.code, o.text, o.in_doubt) for o in outcomes]


# --- alone ------------------------------------------------------------------------------------------------------------


def alone(number: int) -> Message:
    one = message(number)
    one.alone = True
    return one


@pytest.mark.parametrize("mode", MODES)
def test_dots_are_stuffed_for_data_and_never_for_bdat(mode: str) -> None:
    wire, dotted = BODY + b".\r\n", BODY + b"..\r\n"
    protocol = learned_window() if mode == "chunking" else SmtpProtocol(*MODES[mode])
    protocol.submit(Message(b"s@s.example", b"r@d.example", wire, 1, False, dotted, True))
    out = b""
    for reply in (b"250 2.1.0 Ok\r\n", b"250 2.1.5 Ok\r\n", b"354 go\r\n"):
        out += protocol.output() or b""
        if mode != "chunking":
            protocol.feed(reply, [])
    out += protocol.output() or b""
    assert b"MAIL FROM:<s@s.example> BODY=8BITMIME\r\n" in out
    assert (b"BDAT %d LAST\r\n" % len(wire) + wire in out) if mode == "chunking" else out.endswith(dotted + b".\r\n")


def test_with_chunking_nothing_shares_the_window_with_a_message_that_is_to_be_alone() -> None:
    protocol = learned_window()
    for one in (message(1), alone(2), message(3), alone(4)):
        protocol.submit(one)
    assert protocol.room == 0
    sent = [protocol.output() or b""]
    assert not protocol.sendable
    for _ in range(3):
        assert fed(protocol, GOOD)
        sent.append(protocol.output() or b"")
    assert [part.count(b"MAIL FROM") for part in sent] == [1, 1, 1, 1]
    assert [b"r%d@" % number in part for number, part in enumerate(sent, 1)] == [True] * 4
    assert len(fed(protocol, GOOD)) == 1
    assert protocol.room == 4


def test_with_data_the_envelope_of_the_next_waits_for_a_message_that_is_to_be_alone() -> None:
    protocol = pipelined()
    protocol.submit(alone(1))
    protocol.output()
    assert protocol.room == 0
    fed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    assert protocol.room == 0
    protocol.submit(message(2))
    assert protocol.output() == BODY + b".\r\n"
    fed(protocol, b"250 ok\r\n")
    assert b"r2@" in (protocol.output() or b"")


def test_when_the_link_goes_with_a_message_that_is_alone_nobody_else_was_begun() -> None:
    protocol = learned_window()
    for one in (alone(1), message(2), message(3)):
        protocol.submit(one)
    protocol.output()
    outcomes: list[Outcome] = []
    protocol.lose("gone", False, outcomes)
    assert [(o.message.ref, o.stage, o.begun) for o in outcomes] == [
        (1, STAGE_LOST, True),
        (2, STAGE_UNSENT, False),
        (3, STAGE_UNSENT, False),
    ]


# --- what is written --------------------------------------------------------------------------------------------------


def test_lock_step_sends_one_command_at_a_time() -> None:
    protocol = SmtpProtocol(False, True)
    assert protocol.mode == MODE_LOCK_STEP
    assert protocol.room == 1
    protocol.submit(message())
    assert protocol.room == 0
    steps = [
        (b"MAIL FROM:<bounce-1@s.example>\r\n", b"250 ok\r\n"),
        (b"RCPT TO:<r1@d.example>\r\n", b"250 ok\r\n"),
        (b"DATA\r\n", b"354 go\r\n"),
        (BODY + b".\r\n", b"250 taken\r\n"),
    ]
    outcomes: list[Outcome] = []
    for command, reply in steps:
        assert protocol.output() == command
        assert protocol.output() is None
        protocol.feed(reply, outcomes)
    assert seen(outcomes) == [(1, STAGE_CONTENT, 250, b"taken", False)]
    assert protocol.room == 1


def test_content_and_the_next_envelope_leave_in_one_write() -> None:
    protocol = pipelined()
    assert protocol.mode == MODE_PIPELINING
    protocol.submit(message(1))
    assert protocol.output() == b"MAIL FROM:<bounce-1@s.example>\r\nRCPT TO:<r1@d.example>\r\nDATA\r\n"
    assert protocol.room == 0
    assert fed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n") == []
    assert protocol.room == 1
    protocol.submit(message(2))
    expected = BODY + b".\r\nMAIL FROM:<bounce-2@s.example>\r\nRCPT TO:<r2@d.example>\r\nDATA\r\n"
    assert protocol.output() == expected
    assert (protocol.in_flight, protocol.expecting, protocol.room) == (2, 4, 0)
    outcomes = fed(protocol, b"250 taken\r\n250 ok\r\n250 ok\r\n354 go\r\n")
    assert seen(outcomes) == [(1, STAGE_CONTENT, 250, b"taken", False)]
    assert protocol.room == 1


@pytest.mark.parametrize("window", [0, 4])
def test_a_message_lets_go_of_its_content_when_that_leaves_and_cannot_be_sent_twice(window: int) -> None:
    protocol = learned_window(window) if window else pipelined()
    one = message()
    protocol.submit(one)
    held: list[bytes | None] = [one.wire]
    out = protocol.output() or b""
    if not window:
        held.append(one.wire)
        fed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
        out = protocol.output() or b""
    assert set(held) == {BODY}
    assert BODY in out
    held.append(one.wire)
    assert (held[-1], one.size) == (None, len(BODY))
    with pytest.raises(ValueError, match="has left before"):
        protocol.submit(one)


def test_content_is_not_held_back_when_there_is_no_next_message() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    fed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    assert protocol.output() == BODY + b".\r\n"
    assert protocol.room == 1
    protocol.submit(message(2))
    assert protocol.output() == b"MAIL FROM:<bounce-2@s.example>\r\nRCPT TO:<r2@d.example>\r\nDATA\r\n"
    assert len(fed(protocol, b"250 taken\r\n")) == 1


def test_at_most_one_message_is_in_doubt_with_data() -> None:
    protocol = pipelined()
    for number in range(5):
        protocol.submit(message(number))
    protocol.output()
    fed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.output()
    lost: list[Outcome] = []
    protocol.lose("cable cut", False, lost)
    assert [(o.message.ref, o.stage, o.in_doubt, o.begun) for o in lost] == [
        (0, STAGE_LOST, True, True),
        (1, STAGE_UNSENT, False, True),
        (2, STAGE_UNSENT, False, False),
        (3, STAGE_UNSENT, False, False),
        (4, STAGE_UNSENT, False, False),
    ]
    assert {o.text for o in lost} == {b"cable cut"}


def test_a_connection_begins_with_data_and_turns_to_bdat_when_replies_can_be_told_apart() -> None:
    protocol = SmtpProtocol(True, True, 4)
    assert protocol.mode == MODE_CHUNKING
    assert protocol.room == 1
    protocol.submit(message(1))
    assert protocol.output() == b"MAIL FROM:<bounce-1@s.example>\r\nRCPT TO:<r1@d.example>\r\nDATA\r\n"
    assert protocol.room == 0
    fed(protocol, b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n354 go\r\n")
    assert protocol.output() == BODY + b".\r\n"
    fed(protocol, b"250 2.0.0 queued\r\n")
    assert (protocol.open_window, protocol.room) == (4, 4)
    for number in (2, 3, 4, 5):
        protocol.submit(message(number))
    sent = protocol.output()
    assert sent is not None
    groups = [
        b"MAIL FROM:<bounce-%d@s.example>\r\nRCPT TO:<r%d@d.example>\r\nBDAT %d LAST\r\n" % (n, n, len(BODY)) + BODY for n in (2, 3, 4, 5)
    ]
    assert sent == b"".join(group + b"RSET\r\n" for group in groups)
    assert protocol.room == 0
    assert len(fed(protocol, GOOD)) == 1
    assert protocol.room == 0  # refilled at half a window, not one by one
    assert len(fed(protocol, GOOD)) == 1
    assert protocol.room == 2


def test_it_stays_with_data_where_all_replies_look_alike() -> None:
    protocol = SmtpProtocol(True, True, 8)
    for number in range(3):
        protocol.submit(message(number))
        protocol.output()
        fed(protocol, b"250 OK\r\n250 OK\r\n354 OK\r\n")
        assert protocol.output() == BODY + b".\r\n"
        fed(protocol, b"250 OK\r\n")
        assert (protocol.open_window, protocol.room) == (1, 1)


def test_a_window_follows_the_last_content_sent_with_data_in_one_write() -> None:
    protocol = SmtpProtocol(True, True, 4)
    protocol.submit(message(1))
    protocol.output()
    fed(protocol, b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n354 go\r\n")
    protocol.submit(message(2))
    protocol.output()
    fed(protocol, b"250 2.0.0 queued\r\n")
    assert (protocol.open_window, protocol.room) == (4, 0)
    fed(protocol, b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n354 go\r\n")
    assert protocol.room == 3
    protocol.submit(message(3))
    envelope = b"MAIL FROM:<bounce-3@s.example>\r\nRCPT TO:<r3@d.example>\r\nBDAT %d LAST\r\n" % len(BODY)
    assert protocol.output() == BODY + b".\r\n" + envelope + BODY + b"RSET\r\n"
    assert [(o.message.ref, o.code) for o in fed(protocol, b"250 2.0.0 queued\r\n" + GOOD)] == [(2, 250), (3, 250)]


def test_a_window_holds_no_more_than_64_kb_but_always_one_message() -> None:
    protocol = learned_window(8)
    big = b"X: y\r\n\r\n" + b"z" * 29_000 + b"\r\n"
    protocol.submit(message(1, big))
    assert protocol.open_window == 2
    protocol.submit(message(2, b"X: y\r\n\r\n" + b"z" * 100_000 + b"\r\n"))
    assert protocol.open_window == 1


def test_a_null_sender_and_smtputf8_are_written() -> None:
    protocol = pipelined()
    protocol.submit(Message(b"", "ü@d.example".encode(), BODY, 1, True))
    assert protocol.output() == "MAIL FROM:<> BODY=8BITMIME SMTPUTF8\r\nRCPT TO:<ü@d.example>\r\nDATA\r\n".encode()


def test_the_message_limit_of_a_connection_is_kept() -> None:
    protocol = SmtpProtocol(True, True, 4, 3)
    learn(protocol)
    assert protocol.room == 2


@pytest.mark.parametrize("bad", [b"a\r\nDATA", b"a b@c", b"a>b@c", b"a<b@c", b"a\0b@c", b"a\x7f@c", "ü@c".encode(), b"x" * 1001])
def test_an_address_that_would_break_a_command_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="rcpt"):
        Message(b"s@s.example", bad, BODY, None)
    with pytest.raises(ValueError, match="mail_from"):
        Message(bad, b"r@d.example", BODY, None)


@pytest.mark.parametrize("bad", [b"", b"a", b"a\n", b"a\r", b".\r\n", b"\r"])
def test_content_that_does_not_end_with_crlf_or_begins_with_a_dot_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="wire"):
        Message(b"", b"r@d.example", bad, None)


def test_an_empty_recipient_is_refused_and_a_quoted_one_with_a_blank_is_not() -> None:
    with pytest.raises(ValueError, match="rcpt"):
        Message(b"", b"", BODY, None)
    assert Message(b"", b'"a b"@d.example', BODY, None).rcpt == b'"a b"@d.example'


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refused_recipient_and_a_354_all_the_same_cost_a_lone_dot() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    outcomes = fed(protocol, b"250 ok\r\n550 5.1.1 no such user\r\n354 go\r\n")
    assert seen(outcomes) == [(1, STAGE_RCPT, 550, b"5.1.1 no such user", False)]
    protocol.submit(message(2))
    assert protocol.output() == b".\r\nMAIL FROM:<bounce-2@s.example>\r\nRCPT TO:<r2@d.example>\r\nDATA\r\n"
    assert fed(protocol, b"554 no valid recipients\r\n250 ok\r\n250 ok\r\n354 go\r\n") == []
    assert protocol.output() == BODY + b".\r\n"
    assert seen(fed(protocol, b"250 taken\r\n")) == [(2, STAGE_CONTENT, 250, b"taken", False)]


@pytest.mark.parametrize("answer", [b"503 no recipients", b"554 no valid recipients", b"451 later"])
def test_a_refused_recipient_and_a_refused_data_cost_a_reset(answer: bytes) -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    assert fed(protocol, b"250 ok\r\n450 4.2.1 later\r\n" + answer + b"\r\n") == []
    protocol.submit(message(2))
    assert protocol.output() == b"RSET\r\nMAIL FROM:<bounce-2@s.example>\r\nRCPT TO:<r2@d.example>\r\nDATA\r\n"
    outcomes = fed(protocol, b"250 flushed\r\n250 ok\r\n250 ok\r\n354 go\r\n")
    assert seen(outcomes) == [(1, STAGE_RCPT, 450, b"4.2.1 later", False)]
    assert protocol.output() == BODY + b".\r\n"


def test_a_refused_sender_is_confirmed_by_a_reset_even_when_nothing_else_is_to_be_sent() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    assert fed(protocol, b"550 5.7.1 not you\r\n503 MAIL first\r\n503 MAIL first\r\n") == []
    assert protocol.output() == b"RSET\r\n"
    assert protocol.output() is None
    assert seen(fed(protocol, b"250 flushed\r\n")) == [(1, STAGE_MAIL, 550, b"5.7.1 not you", False)]
    protocol.submit(message(2))
    assert (protocol.output() or b"").startswith(b"MAIL FROM")


def test_a_refusal_shifted_by_a_doubled_reply_is_found_out_by_the_reset() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    fed(protocol, b"250 ok\r\n550 5.1.1 nobody\r\n354 go\r\n")
    protocol.submit(message(2))
    protocol.output()
    outcomes = fed(protocol, b"554 none\r\n554 none\r\n451 not now\r\n503 MAIL first\r\n")
    protocol.output()
    fed(protocol, b"503 MAIL first\r\n250 flushed\r\n")
    assert protocol.fault is not None
    protocol.lose(protocol.fault, True, outcomes)
    assert [(o.message.ref, o.stage) for o in outcomes] == [(2, STAGE_UNSENT)]


def test_data_refused_is_the_verdict_of_its_message() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    fed(protocol, b"250 ok\r\n250 ok\r\n452 4.3.1 no space\r\n")
    assert protocol.output() == b"RSET\r\n"
    assert seen(fed(protocol, b"250 flushed\r\n")) == [(1, STAGE_DATA, 452, b"4.3.1 no space", False)]


@pytest.mark.parametrize("code", [452, 552, 554, 450])
def test_content_refused_is_the_verdict_of_its_message_and_the_next_goes_on(code: int) -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    fed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.submit(message(2))
    protocol.output()
    outcomes = fed(protocol, b"%d refused\r\n250 ok\r\n250 ok\r\n354 go\r\n" % code)
    assert seen(outcomes) == [(1, STAGE_CONTENT, code, b"refused", False)]
    assert protocol.output() == BODY + b".\r\n"


def test_lock_step_refusals_reset_before_the_next_message() -> None:
    protocol = SmtpProtocol(False, False)
    protocol.submit(message(1))
    protocol.output()
    fed(protocol, b"250 ok\r\n")
    protocol.output()
    assert seen(fed(protocol, b"550 no\r\n")) == [(1, STAGE_RCPT, 550, b"no", False)]
    protocol.submit(message(2))
    assert protocol.output() == b"RSET\r\n"
    fed(protocol, b"250 ok\r\n")
    assert (protocol.output() or b"").startswith(b"MAIL")
    assert seen(fed(protocol, b"451 wait\r\n")) == [(2, STAGE_MAIL, 451, b"wait", False)]


def test_a_refused_recipient_in_a_window_is_paired_with_its_own_bdat() -> None:
    protocol = learned_window(4)
    for number in (1, 2, 3):
        protocol.submit(message(number))
    protocol.output()
    outcomes = fed(protocol, GOOD + b"250 2.1.0 Ok\r\n550 5.1.1 unknown\r\n554 5.5.1 no recipients\r\n" + RESET + GOOD)
    assert [(o.message.ref, o.stage, o.code) for o in outcomes] == [(1, STAGE_CONTENT, 250), (2, STAGE_RCPT, 550), (3, STAGE_CONTENT, 250)]
    assert protocol.fault is None


def test_several_lines_of_a_reply_are_one_text() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    outcomes = fed(protocol, b"250-2.1.0 one\r\n250 two\r\n550-5.7.1 Your\r\n550-5.7.1 mail\r\n550 5.7.1 smells\r\n354\r\n")
    assert seen(outcomes) == [(1, STAGE_RCPT, 550, b"5.7.1 Your\n5.7.1 mail\n5.7.1 smells", False)]


def test_reply_text_is_kept_to_two_kib_as_it_came() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    text = b"=1+1;\x1b[31m\0\rX\xff" + b"y" * 5000
    assert seen(fed(protocol, b"550 " + text + b"\r\n503\r\n354\r\n")) == [(1, STAGE_MAIL, 550, text[:2048], False)]


# --- 421 --------------------------------------------------------------------------------------------------------------


def test_a_421_decides_its_own_message_and_nothing_more_is_sent() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    fed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    protocol.submit(message(2))
    protocol.output()
    outcomes = fed(protocol, b"250 taken\r\n421 4.3.2 shutting down\r\n")
    assert seen(outcomes) == [(1, STAGE_CONTENT, 250, b"taken", False)]
    assert protocol.closing
    assert (protocol.closing_reply, protocol.room, protocol.output()) == (b"4.3.2 shutting down", 0, None)
    lost: list[Outcome] = []
    protocol.lose("closed", False, lost)
    assert seen(lost) == [(2, STAGE_MAIL, 421, b"4.3.2 shutting down", False)]


def test_a_421_in_a_window_leaves_nobody_behind_it_in_doubt() -> None:
    protocol = learned_window(4)
    for number in (1, 2, 3):
        protocol.submit(message(number))
    protocol.output()
    outcomes = fed(protocol, b"250 2.1.0 Ok\r\n421 4.7.0 too many\r\n")
    protocol.lose("closed", False, outcomes)
    assert [(o.message.ref, o.stage, o.code, o.in_doubt) for o in outcomes] == [
        (1, STAGE_RCPT, 421, False),
        (2, STAGE_UNSENT, 0, False),
        (3, STAGE_UNSENT, 0, False),
    ]


def test_a_server_that_goes_on_answering_after_a_421_is_listened_to() -> None:
    protocol = learned_window(4)
    for number in (1, 2):
        protocol.submit(message(number))
    protocol.output()
    outcomes = fed(protocol, b"250 2.1.0 Ok\r\n421 4.7.0 not him\r\n503 5.5.1 no recipients\r\n" + RESET + GOOD)
    assert [(o.message.ref, o.stage, o.code) for o in outcomes] == [(1, STAGE_RCPT, 421), (2, STAGE_CONTENT, 250)]
    assert protocol.expecting == 0


def test_an_idle_421_is_no_violation() -> None:
    protocol = pipelined()
    assert fed(protocol, b"421 4.4.2 idle too long\r\n") == []
    assert protocol.fault is None
    assert protocol.closing


# --- violations (R6) --------------------------------------------------------------------------------------------------


def awaiting_content(mode: str = "pipelining") -> SmtpProtocol:
    protocol = SmtpProtocol(*MODES[mode])
    protocol.submit(message(1))
    protocol.output()
    for reply in (b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
        fed(protocol, reply)
        if mode == "lock-step":
            protocol.output()
    protocol.output()
    return protocol


@pytest.mark.parametrize("mode", ["lock-step", "pipelining"])
@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\r\n",
        b"25\r\n",
        b"\r\n",
        b"\n",
        b"250 ok\n",
        b"000 zero\r\n",
        b"199 low\r\n",
        b"600 high\r\n",
        b"999 high\r\n",
        b"2500 ok\r\n",
        b"250\tok\r\n",
        b"25x ok\r\n",
        b"-50 ok\r\n",
        b"354 go\r\n",
        b"300 what\r\n",
        b"399 what\r\n",
        b"250-one\r\n251 two\r\n",
        b"250-x\r\n" * 101,
        b"250 " + b"x" * 65536,
        b"x" * 65536,
        b"250-" + b"x" * 40000 + b"\r\n250-" + b"y" * 40000,
    ],
)
def test_a_reply_that_breaks_the_rules_ends_the_connection_in_doubt(mode: str, garbage: bytes) -> None:
    protocol = awaiting_content(mode)
    assert fed(protocol, garbage) == []
    assert isinstance(protocol.fault, str)
    assert (protocol.room, protocol.output()) == (0, None)
    lost: list[Outcome] = []
    assert fed(protocol, b"250 too late\r\n") == []
    protocol.lose(protocol.fault, True, lost)
    assert [(o.stage, o.in_doubt) for o in lost] == [(STAGE_LOST, True)]


@pytest.mark.parametrize("code", [200, 250, 251, 299])
def test_every_2xx_to_the_content_is_success(code: int) -> None:
    assert [o.code for o in fed(awaiting_content(), b"%d\r\n" % code)] == [code]


@pytest.mark.parametrize("unasked", [b"250 ok\r\n", b"550 no\r\n", b"354 go\r\n", b"220 hello\r\n"])
def test_a_reply_nobody_asked_for_ends_the_connection(unasked: bytes) -> None:
    protocol = awaiting_content()
    assert len(fed(protocol, b"250 taken\r\n")) == 1
    assert fed(protocol, unasked) == []
    assert protocol.fault is not None


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize(("before", "wrong"), [(b"", b"354 go\r\n"), (b"250 ok\r\n", b"354 go\r\n"), (b"250 ok\r\n", b"334 what\r\n")])
def test_a_354_to_mail_or_rcpt_ends_the_connection(mode: str, before: bytes, wrong: bytes) -> None:
    protocol = SmtpProtocol(*MODES[mode])
    protocol.submit(message(1))
    protocol.output()
    fed(protocol, before)
    protocol.output()
    assert fed(protocol, wrong) == []
    assert protocol.fault is not None


@pytest.mark.parametrize("mode", ["lock-step", "pipelining"])
def test_a_250_to_data_ends_the_connection_without_doubt(mode: str) -> None:
    protocol = SmtpProtocol(*MODES[mode])
    protocol.submit(message(1))
    outcomes: list[Outcome] = []
    for _ in range(3):
        protocol.output()
        protocol.feed(b"250 ok\r\n", outcomes)
    assert protocol.fault is not None
    protocol.lose(protocol.fault, True, outcomes)
    assert [(o.stage, o.begun) for o in outcomes] == [(STAGE_UNSENT, True)]


def test_a_doubled_refusal_of_content_cannot_bounce_the_next_message() -> None:
    protocol = awaiting_content()
    protocol.submit(message(2))
    protocol.output()
    outcomes = fed(protocol, b"550 spam\r\n550 spam\r\n250 sender ok\r\n250 recipient ok\r\n354 go\r\n")
    assert protocol.fault is not None
    protocol.lose(protocol.fault, True, outcomes)
    assert [(o.message.ref, o.stage, o.code) for o in outcomes] == [(1, STAGE_CONTENT, 550), (2, STAGE_UNSENT, 0)]


def test_a_doubled_acceptance_in_a_window_is_found_out_before_the_next_verdict() -> None:
    protocol = learned_window(4)
    for number in (1, 2, 3):
        protocol.submit(message(number))
    protocol.output()
    outcomes = fed(protocol, b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n250 2.0.0 queued\r\n" + b"250 2.0.0 queued\r\n" + RESET + GOOD)
    assert protocol.fault is not None
    assert [(o.message.ref, o.code) for o in outcomes] == [(1, 250)]
    protocol.lose(protocol.fault, True, outcomes)
    assert [(o.message.ref, o.stage) for o in outcomes[1:]] == [(2, STAGE_LOST), (3, STAGE_LOST)]


def test_a_lone_250_before_a_refusal_in_a_window_delivers_nothing() -> None:
    protocol = learned_window(4)
    for number in (1, 2):
        protocol.submit(message(number))
    protocol.output()
    outcomes = fed(protocol, b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n250 2.0.0 hello\r\n554 5.7.1 spam\r\n" + RESET + GOOD)
    assert outcomes == []
    assert protocol.fault is not None
    protocol.lose(protocol.fault, True, outcomes)
    assert [(o.message.ref, o.stage) for o in outcomes] == [(1, STAGE_LOST), (2, STAGE_LOST)]


@pytest.mark.parametrize(("broken", "reason"), [(b"", "cable cut"), (b"garbage\r\n", ""), (b"421 4.3.2 bye\r\n", "closed")])
def test_an_acceptance_in_a_window_stands_when_the_connection_breaks_behind_it(broken: bytes, reason: str) -> None:
    protocol = learned_window(4)
    for number in (1, 2):
        protocol.submit(message(number))
    protocol.output()
    outcomes = fed(protocol, b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n250 2.0.0 queued\r\n" + broken)
    protocol.lose(reason or "violation", protocol.fault is not None, outcomes)
    assert (outcomes[0].message.ref, outcomes[0].stage, outcomes[0].code) == (1, STAGE_CONTENT, 250)


def test_a_250_to_bdat_after_a_refused_recipient_is_a_loss_of_step() -> None:
    protocol = learned_window(4)
    protocol.submit(message(1))
    protocol.output()
    outcomes = fed(protocol, b"250 2.1.0 Ok\r\n550 5.1.1 unknown\r\n250 2.0.0 queued\r\n")
    assert outcomes == []
    assert protocol.fault is not None


def test_a_refusal_that_was_read_stands_when_the_connection_is_lost() -> None:
    protocol = pipelined()
    protocol.submit(message(1))
    protocol.output()
    outcomes = fed(protocol, b"250 ok\r\n550 5.1.1 unknown\r\n")
    assert outcomes == []
    protocol.lose("reset by peer", False, outcomes)
    assert seen(outcomes) == [(1, STAGE_RCPT, 550, b"5.1.1 unknown", False)]


def test_quit_leaves_when_what_was_begun_is_decided() -> None:
    protocol = awaiting_content()
    protocol.quit()
    assert (protocol.room, protocol.output()) == (0, None)
    assert len(fed(protocol, b"250 taken\r\n")) == 1
    assert protocol.output() == b"QUIT\r\n"
    fed(protocol, b"221 bye\r\n")
    assert protocol.quit_answered


def test_phases_follow_what_has_left() -> None:
    protocol = pipelined()
    m = message(1)
    protocol.submit(m)
    protocol.output()
    assert m.phase == PHASE_ENVELOPE
    fed(protocol, b"250 ok\r\n250 ok\r\n354 go\r\n")
    assert m.phase == PHASE_ENVELOPE
    protocol.output()
    assert m.phase == PHASE_FINAL


# --- cuts, and the slow twin ------------------------------------------------------------------------------------------

_STREAMS: dict[str, tuple[Callable[[], SmtpProtocol], bytes]] = {
    "refusal": (pipelined, b"250-2.1.0 one\r\n250 two\r\n550-5.7.1 Your\r\n550 5.7.1 smell\r\n354\r\n"),
    "acceptance": (awaiting_content, b"250-2.0.0 taken\r\n250 as 1\r\n"),
    "garbage": (awaiting_content, b"250-2.0.0 taken\r\nhello\r\n250 x\r\n"),
    "double": (awaiting_content, b"250 taken\r\n250 taken\r\n"),
    "bare LF": (awaiting_content, b"250-taken\r\n250 taken\n"),
    "goodbye": (awaiting_content, b"250 taken\r\n421 bye\r\n"),
}


@pytest.mark.parametrize("name", sorted(_STREAMS))
def test_outcomes_do_not_depend_on_where_the_input_is_cut(name: str) -> None:
    make, data = _STREAMS[name]

    def run(*pieces: bytes) -> tuple[object, ...]:
        protocol = make()
        if protocol.held == 0:
            protocol.submit(message(1))
            protocol.output()
        outcomes: list[Outcome] = []
        for piece in pieces:
            protocol.feed(piece, outcomes)
        return seen(outcomes), protocol.fault, protocol.closing, protocol.sendable

    whole = run(data)
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            assert run(data[:first], data[first:second], data[second:]) == whole
    assert run(*(data[i : i + 1] for i in range(len(data)))) == whole


_line = st.one_of(
    st.tuples(st.sampled_from(["250", "421", "450", "550", "354", "250-", "550-", "199", "25", "abc", ""]), st.binary(max_size=12)).map(
        lambda pair: pair[0].encode() + (b" " if not pair[0].endswith("-") and pair[1] else b"") + pair[1].replace(b"\n", b"")
    ),
    st.binary(max_size=10).map(lambda b: b.replace(b"\n", b"")),
)
_reply_streams = st.lists(st.tuples(_line, st.sampled_from([b"\r\n"] * 9 + [b"\n"])), max_size=8).map(
    lambda parts: b"".join(line + end for line, end in parts)
)


@settings(max_examples=400, deadline=None)
@given(_reply_streams, st.randoms(use_true_random=False))
def test_the_parser_agrees_with_its_slow_twin_on_any_stream_and_cut(data: bytes, chance: random.Random) -> None:
    protocol = awaiting_content()
    outcomes: list[Outcome] = []
    at = 0
    while at < len(data):
        step = chance.randint(1, 9)
        protocol.feed(data[at : at + step], outcomes)
        at += step
    expected = read_replies(data)
    first = expected[0] if expected else None
    if first is None:
        assert (outcomes, protocol.fault) == ([], None)
    elif isinstance(first, Broken) or 300 <= first.code < 400:
        assert outcomes == []
        assert protocol.fault is not None
    else:
        assert isinstance(first, Reply)
        assert [(o.code, o.text, o.stage) for o in outcomes] == [(first.code, first.text, STAGE_CONTENT)]
        rest = next((r for r in expected[1:] if isinstance(r, Broken) or r.code != 421), None)
        assert (protocol.fault is not None) == (rest is not None)


# --- a model server that stumbles -------------------------------------------------------------------------------------


class Stumbling:
    """An honest SMTP server, sans I/O, that keeps its own books; now and then it says a reply twice."""

    def __init__(self, chance: random.Random, refusals: float, doubles: float) -> None:
        self.chance, self.refusals, self.doubles = chance, refusals, doubles
        self.buffer = b""
        self.sender: bytes | None = None
        self.rcpt: bytes | None = None
        self.in_data = False
        self.accepted: list[tuple[bytes, bytes]] = []
        self.refused: set[bytes] = set()
        self.stumbled = False
        self.bdat = False

    def says(self, text: bytes) -> bytes:
        if self.chance.random() < self.doubles:
            self.stumbled = True
            return text + b"\r\n" + text + b"\r\n"
        return text + b"\r\n"

    def no(self) -> bool:
        return self.chance.random() < self.refusals

    def take(self, data: bytes) -> bytes:
        self.buffer += data
        out = b""
        while True:
            if self.in_data:
                body, dot, rest = (
                    self.buffer.partition(b"\r\n.\r\n") if not self.buffer.startswith(b".\r\n") else (b"", b".", self.buffer[3:])
                )
                if not dot:
                    return out
                self.buffer, self.in_data = rest, False
                out += self.finish(body == b"")
                continue
            line, lf, rest = self.buffer.partition(b"\r\n")
            if not lf:
                return out
            verb = line[:4]
            if verb == b"BDAT":
                size, self.bdat = int(line.split()[1]), True
                if len(rest) < size:
                    return out
                self.buffer = rest[size:]
                if self.rcpt is None:
                    out += self.says(b"503 5.5.1 no recipients")
                else:
                    out += self.finish(False)
                continue
            self.buffer = rest
            if verb == b"MAIL":
                if self.sender is not None:
                    out += self.says(b"503 5.5.1 nested")
                elif self.no():
                    out += self.says(b"451 4.7.1 not now")
                else:
                    self.sender = line[11:-1]
                    out += self.says(b"250 2.1.0 sender fine")
            elif verb == b"RCPT":
                if self.sender is None:
                    out += self.says(b"503 5.5.1 MAIL first")
                elif self.no():
                    self.refused.add(line[9:-1])
                    out += self.says(b"550 5.1.1 nobody")
                else:
                    self.rcpt = line[9:-1]
                    out += self.says(b"250 2.1.5 recipient fine")
            elif verb == b"DATA":
                if self.rcpt is None and self.chance.random() < 0.5:
                    out += self.says(b"503 5.5.1 RCPT first")
                else:
                    self.in_data = True
                    out += self.says(b"354 go")
            else:
                self.sender = self.rcpt = None
                out += self.says(b"250 2.0.0 flushed")

    def finish(self, empty: bool) -> bytes:
        sender, rcpt, self.sender, self.rcpt = self.sender, self.rcpt, None, None
        if rcpt is None or empty:
            return self.says(b"554 5.5.1 no recipients")
        lone = b""
        if self.bdat and self.chance.random() < self.doubles / 4:
            self.stumbled = True
            lone = b"250 2.0.0 nobody asked\r\n"
        if self.no():
            self.refused.add(rcpt)
            return lone + self.says(b"552 5.2.2 full")
        assert sender is not None
        self.accepted.append((sender, rcpt))
        return lone + self.says(b"250 2.0.0 queued")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(MODES)),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.sampled_from([0.0, 0.02, 0.2]),
    st.integers(1, 8),
    st.integers(0, 2**32),
)
def test_no_verdict_is_ever_false_whatever_the_server_refuses_or_says_twice(
    mode: str, refusals: float, doubles: float, window: int, seed: int
) -> None:
    chance = random.Random(seed)
    protocol = SmtpProtocol(*MODES[mode], window)
    server = Stumbling(chance, refusals, doubles)
    outcomes: list[Outcome] = []
    number = 0
    while number < 40 and protocol.fault is None:
        for _ in range(min(protocol.room, chance.randint(1, 4))):
            number += 1
            protocol.submit(message(number))
        said = b""
        while (data := protocol.output()) is not None:
            said += server.take(data)
        assert said, "stuck"
        at = 0
        while at < len(said):
            step = chance.randint(1, 60)
            protocol.feed(said[at : at + step], outcomes)
            at += step
    violation = protocol.fault is not None
    protocol.lose(protocol.fault or "over", violation, outcomes)
    assert violation <= server.stumbled
    assert sorted(o.message.ref for o in outcomes) == list(range(1, number + 1))
    accepted = {rcpt: sender for sender, rcpt in server.accepted}
    assert len(accepted) == len(server.accepted)
    delivered = {o.message.rcpt for o in outcomes if o.stage == STAGE_CONTENT and o.code == 250}
    assert delivered <= set(accepted)
    assert all(accepted[o.message.rcpt] == o.message.mail_from for o in outcomes if o.message.rcpt in accepted)
    for o in outcomes:
        if o.code >= 500:
            assert o.message.rcpt in server.refused
        if o.message.rcpt in accepted and o.message.rcpt not in delivered:
            assert o.in_doubt  # a second copy would be announced (P4)
