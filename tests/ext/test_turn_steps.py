"""The steps every message takes, held against what the engine's careful path would have written."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.reply import SmtpReply, one_line
from ext import turn_steps
from ext.journal_record import unpack
from ext.smtp_session import STAGE_CONTENT, STAGE_LOST, Message, Outcome

NOW = 1_700_000_000_000_000


def make(count: int = 3, failures: int = 0, first_attempt_at: float = 0.0) -> tuple[Any, Any, Any]:
    path = SimpleNamespace(delivered=0, answers=0, server=SimpleNamespace(id=9), health=SimpleNamespace(failures=failures))
    ips = {"source_ip": "192.0.2.7", "destination_ip": "192.0.2.1"}
    facts = SimpleNamespace(mta="mx (192.0.2.1)", esmtp="PIPELINING", queue_suffix="/relay", **ips)
    session = SimpleNamespace(owner=path, facts=facts, connection_id=17)
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
    records: list[bytes] = []
    outcomes = [outcome(session, held, i, 250, b"2.0.0 Ok: queued as 7") for i in range(3)]
    others, count, settled = turn_steps.record_deliveries(outcomes, records.append, NOW)
    assert (others, count, settled) == ([], 3, [held])
    assert (path.delivered, path.answers, held.in_flight, held.open) == (3, 3, 0, 0)
    assert unpack(records[1][8:]) == (
        "d", 5, 2, 101, 11, 1, 4, 17, 9, NOW, 11, NOW, 0, 17, "p1@people.example", "b-x@bounces.example", "2.0.0",
        "250 2.0.0 Ok: queued as 7", "", "mx (192.0.2.1)", "192.0.2.7", "192.0.2.1", "PIPELINING", "people.example/relay",
    )  # fmt: skip


def test_a_later_attempt_keeps_the_time_of_the_first():
    _, session, held = make(first_attempt_at=1.6e9)
    records: list[bytes] = []
    turn_steps.record_deliveries([outcome(session, held, 0, 250, b"2.0.0 Ok")], records.append, NOW)
    assert unpack(records[0][8:])[11] == 1_600_000_000_000_000


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
    records: list[bytes] = []
    others, count, settled = turn_steps.record_deliveries([plain, odd], records.append, NOW)
    assert (others, count, settled, len(records)) == ([odd], 1, [], 1)
    assert (path.delivered, held.open) == (1, 2)


def test_on_a_path_that_was_failing_nothing_is_decided_here():
    path, session, held = make(failures=1)
    outcomes = [outcome(session, held, 0, 250, b"2.0.0 Ok")]
    records: list[bytes] = []
    assert turn_steps.record_deliveries(outcomes, records.append, NOW) == (outcomes, 0, [])
    assert (path.delivered, records) == (0, [])


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
    records: list[bytes] = []
    turn_steps.record_deliveries([outcome(session, held, 0, code, text)], records.append, NOW)
    if records:
        found = unpack(records[0][8:])
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


def test_an_intent_is_recorded_before_the_session_gets_the_message():
    _, session, held = make()
    seen: list[Any] = []
    session.submit = lambda messages: seen.append(list(messages))
    messages = [Message(b"", b"p@people.example", b"x\r\n", (held, i)) for i in (2, 0)]
    turn_steps.begin(session, messages, seen.append, 9, NOW)
    assert seen[2] == messages
    assert [unpack(record[8:]) for record in seen[:2]] == [
        ("i", 5, 2, 102, 12, 1, 4, 17, 9, NOW),
        ("i", 5, 2, 100, 10, 1, 4, 17, 9, NOW),
    ]


def test_rooms_and_flushes_go_to_every_session():
    flushed: list[int] = []
    sessions = [SimpleNamespace(room=room, flush=lambda room=room: flushed.append(room)) for room in (1, 0, 4)]
    assert turn_steps.rooms_of(sessions) == ([1, 0, 4], 5)  # type: ignore[arg-type]
    turn_steps.flush_all(sessions)  # type: ignore[arg-type]
    assert flushed == [1, 0, 4]


def test_messages_are_handed_out_by_room_and_those_left_with_room_are_named():
    _, _, held = make(count=6)
    got: dict[int, list[Message]] = {}
    sessions = [
        SimpleNamespace(connection_id=i, facts=SimpleNamespace(smtputf8=i != 3), submit=lambda messages, i=i: got.setdefault(i, messages))
        for i in range(6)
    ]
    messages = [Message(b"", b"p@people.example", b"x\r\n", (held, i), i == 4) for i in range(6)]
    records: list[bytes] = []
    odd, starved = turn_steps.hand_out(sessions, [2, 0, 1, 2, 2, 1], messages, records.append, 9, NOW)  # type: ignore[arg-type]
    assert got == {0: messages[0:2], 2: messages[2:3], 4: messages[5:6]}
    assert odd == [(sessions[3], messages[3:5])]  # type: ignore[comparison-overlap]
    assert starved == [sessions[4], sessions[5]]
    assert [unpack(record[8:])[7] for record in records] == [0, 0, 2, 4]
