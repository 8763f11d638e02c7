"""The steps every message takes, held against what the engine's careful path would have written."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.reply import SmtpReply, one_line
from ext import turn_steps
from ext.journal_record import Records, scan
from ext.smtp_session import STAGE_CONTENT, STAGE_LOST, Message, Outcome, SmtpSession

NOW = 1_700_000_000_000_000


class Transport:
    """Where a session writes; nothing else is asked of it here."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 0

    def is_reading(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return False

    def set_protocol(self, protocol: object) -> None:
        pass

    def set_write_buffer_limits(self, high: int) -> None:
        pass


def opened(owner: object = None, facts: object = None, **options: Any) -> SmtpSession:
    """A session over a transport that only remembers; with `chunking` it takes one message, like the others, until it has learned."""
    turn: Any = SimpleNamespace(outcomes=[], ready=lambda session: None, closed=lambda session, reason: None)
    session = SmtpSession(turn, owner, pipelining=True, chunking=False, facts=facts, **options)
    transport: Any = Transport()
    session.start(transport)
    return session


def read(records: Records) -> list[tuple[Any, ...]]:
    """The records, taken out and unpacked."""
    return list(scan(records.take())[0])


def make(count: int = 3, failures: int = 0, first_attempt_at: float = 0.0) -> tuple[Any, Any, Any]:
    path = SimpleNamespace(delivered=0, answers=0, server=SimpleNamespace(id=9), health=SimpleNamespace(failures=failures))
    facts = turn_steps.Peer("mx (192.0.2.1)", "192.0.2.7", "192.0.2.1", "PIPELINING", "/relay", True, True)
    session = opened(path, facts, connection_id=17)
    recipients = [SimpleNamespace(number=100 + i, email=f"p{i}@people.example") for i in range(count)]
    batch = SimpleNamespace(
        campaign_id=5, batch=2, attempt=1, first_attempt_at=first_attempt_at, positions=list(range(10, 10 + count)), recipients=recipients
    )
    held = SimpleNamespace(batch=batch, epoch=4, campaign=SimpleNamespace(queued_at_us=11), in_flight=count, open=count)
    return path, session, held


def outcome(session: Any, held: Any, index: int, code: int, text: bytes, stage: int = STAGE_CONTENT) -> Outcome:
    message = Message(b"b-x@bounces.example", b"p@people.example", b"Subject: x\r\n\r\nx\r\n", (held, index))
    return Outcome(session, message, code, text, stage)


def test_a_delivery_is_recorded_with_everything_the_accounting_needs():
    path, session, held = make()
    records = Records()
    outcomes = [outcome(session, held, i, 250, b"2.0.0 Ok: queued as 7") for i in range(3)]
    others, count, settled = turn_steps.record_deliveries(outcomes, records, NOW)
    assert (others, count, settled) == ([], 3, [held])
    assert (path.delivered, path.answers, held.in_flight, held.open) == (3, 3, 0, 0)
    assert read(records)[1] == (
        "d", 5, 2, 101, 11, 1, 4, 17, 9, NOW, 11, NOW, 0, 17, "p1@people.example", "b-x@bounces.example", "2.0.0",
        "250 2.0.0 Ok: queued as 7", "", "mx (192.0.2.1)", "192.0.2.7", "192.0.2.1", "PIPELINING", "people.example/relay",
    )  # fmt: skip


def test_a_later_attempt_keeps_the_time_of_the_first():
    _, session, held = make(first_attempt_at=1.6e9)
    records = Records()
    turn_steps.record_deliveries([outcome(session, held, 0, 250, b"2.0.0 Ok")], records, NOW)
    assert read(records)[0][11] == 1_600_000_000_000_000


@pytest.mark.parametrize(
    ("code", "text", "stage"),
    [
        (451, b"4.3.0 later", STAGE_CONTENT),
        (550, b"5.1.1 no", STAGE_CONTENT),
        (354, b"go", STAGE_CONTENT),
        (0, b"connection lost", STAGE_LOST),
    ],
)
def test_what_is_no_delivery_is_handed_back_untouched(code: int, text: bytes, stage: int):
    path, session, held = make()
    odd = outcome(session, held, 1, code, text, stage)
    plain = outcome(session, held, 0, 250, b"2.0.0 Ok")
    records = Records()
    others, count, settled = turn_steps.record_deliveries([plain, odd], records, NOW)
    assert (others, count, settled, len(read(records))) == ([odd], 1, [], 1)
    assert (path.delivered, held.open) == (1, 2)


def test_on_a_path_that_was_failing_nothing_is_decided_here():
    path, session, held = make(failures=1)
    outcomes = [outcome(session, held, 0, 250, b"2.0.0 Ok")]
    records = Records()
    assert turn_steps.record_deliveries(outcomes, records, NOW) == (outcomes, 0, [])
    assert (path.delivered, len(records)) == (0, 0)


@given(
    code=st.integers(200, 299),
    text=st.one_of(
        st.binary(max_size=150),
        st.from_regex(rb"\A[0-9]{1,2}\.[0-9]{0,4}\.[0-9]{0,4}[ x]?[!-~ ]{0,20}\Z"),
        st.text("abc .012", max_size=140).map(str.encode),
    ),
)
def test_whatever_a_server_writes_reads_as_on_the_careful_path(code: int, text: bytes):
    _, session, held = make()
    records = Records()
    turn_steps.record_deliveries([outcome(session, held, 0, code, text)], records, NOW)
    for found in read(records):
        line = one_line(text)
        assert (found[16], found[17]) == (str(SmtpReply(code, line).enhanced), f"{code} {line}")


def test_messages_are_made_of_what_was_composed_and_the_rest_is_named():
    _, _, held = make()
    refusal = ValueError("bad merge data")
    into: list[Message] = []
    built = [(b"a@b.example", b"p0@people.example", b"x\r\n", False), refusal, (b"", b"p2@people.example", b"y\r\n", True)]
    assert turn_steps.make_messages(built, held, [4, 5, 6], into) == [(5, refusal)]
    assert [(m.mail_from, m.rcpt, m.wire, m.ref, m.smtputf8) for m in into] == [
        (b"a@b.example", b"p0@people.example", b"x\r\n", (held, 4), False), (b"", b"p2@people.example", b"y\r\n", (held, 6), True)
    ]  # fmt: skip


def test_an_intent_is_recorded_for_every_message_and_the_session_has_them():
    _, session, held = make()
    messages = [Message(b"", b"p@people.example", b"x\r\n", (held, i)) for i in (2, 0)]
    records = Records()
    turn_steps.begin(session, messages, records, 9, NOW)
    assert session.protocol.held == 2
    assert read(records) == [
        ("i", 5, 2, 102, 12, 1, 4, 17, 9, NOW),
        ("i", 5, 2, 100, 10, 1, 4, 17, 9, NOW),
    ]


def test_rooms_and_flushes_go_to_every_session():
    _, _, held = make()
    sessions = [opened(connection_id=i) for i in range(3)]
    sessions[1].submit([Message(b"", b"p@people.example", b"x\r\n", (held, 0))])
    assert turn_steps.rooms_of(sessions) == ([1, 0, 1], 2)
    turn_steps.flush_all(sessions)
    written: list[Any] = [session.transport for session in sessions]
    assert [each.written for each in written] == [[], [b"MAIL FROM:<>\r\nRCPT TO:<p@people.example>\r\nDATA\r\n"], []]


def test_sessions_are_sorted_by_their_owner():
    one, two = object(), object()
    sessions = [opened(owner) for owner in (one, two, two, one)]
    assert turn_steps.by_owner(dict.fromkeys(sessions)) == {one: [sessions[0], sessions[3]], two: sessions[1:3]}


def test_messages_are_handed_out_by_room_and_those_left_with_room_are_named():
    _, _, held = make(count=6)
    sessions = [opened(facts=turn_steps.Peer("", "", "", "", "", i != 3, True), connection_id=i) for i in range(6)]
    messages = [Message(b"", b"p@people.example", b"x\r\n", (held, i), i == 4) for i in range(6)]
    records = Records()
    odd, starved = turn_steps.hand_out(sessions, [2, 0, 1, 2, 2, 1], messages, records, 9, NOW)
    assert [session.protocol.held for session in sessions] == [2, 0, 1, 0, 1, 0]
    assert odd == [(sessions[3], messages[3:5])]
    assert starved == [sessions[4], sessions[5]]
    assert [(record[3], record[7]) for record in read(records)] == [(100, 0), (101, 0), (102, 2), (105, 4)]


def test_an_address_beyond_ascii_stands_in_the_record_as_it_is():
    _, session, held = make()
    message = Message("b\u00fc@b\u00fccher.example".encode(), b"p@people.example", b"x\r\n", (held, 0), True)
    records = Records()
    turn_steps.record_deliveries([Outcome(session, message, 250, b"2.0.0 Ok", STAGE_CONTENT)], records, NOW)
    assert read(records)[0][15] == "b\u00fc@b\u00fccher.example"
