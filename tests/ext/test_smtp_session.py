"""smtp_session over real sockets: nothing leaves outside flush, every message gets one outcome, doubt only after the last octet."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from ext.smtp_session import (
    STAGE_CONTENT,
    STAGE_LOST,
    STAGE_MAIL,
    STAGE_RCPT,
    STAGE_UNSENT,
    Message,
    Outcome,
    SmtpSession,
)
from tests.peers import ACCEPT, DROP, HANG, HONEST, RESET, STALL, Peer, Step

BODY = b"Subject: hello\r\n\r\nA line.\r\n"
MODES = {"lock-step": (False, False), "pipelining": (True, False), "chunking": (True, True)}
WORDS = ("PIPELINING", "CHUNKING", "8BITMIME", "SMTPUTF8")


class Turn:
    """What the engine's turn does, without journal: settle, fill, flush, once per iteration of the loop."""

    def __init__(self, messages: list[Message], *, quit_at_end: bool = True) -> None:
        self.outcomes: list[Outcome] = []
        self.settled: list[Outcome] = []
        self.messages = messages
        self.quit_at_end = quit_at_end
        self.holding = False  # R5: no flush while the journal cannot be written
        self.asked: dict[SmtpSession, None] = {}
        self.ended: list[tuple[SmtpSession, str]] = []
        self.closing = asyncio.Event()
        self.progress = asyncio.Event()
        self.scheduled = False
        self.turns = 0

    def ready(self, session: SmtpSession) -> None:
        self.asked[session] = None
        if not self.scheduled:
            self.scheduled = True
            asyncio.get_running_loop().call_soon(self.run)

    def closed(self, session: SmtpSession, reason: str) -> None:
        self.ended.append((session, reason))
        self.closing.set()

    def run(self) -> None:
        self.scheduled = False
        self.turns += 1
        self.settled += self.outcomes
        self.outcomes = []
        if self.settled:
            self.progress.set()
        if self.holding:
            return
        sessions, self.asked = self.asked, {}
        for session in sessions:
            room = session.room
            session.submit(self.messages[:room])
            del self.messages[:room]
            session.flush()
            if self.quit_at_end and not self.messages and not session.in_flight:
                session.quit()

    @property
    def reason(self) -> str:
        return self.ended[0][1]


def messages(count: int, wire: bytes = BODY) -> list[Message]:
    return [Message(b"b%d@s.example" % n, b"r%d@d.example" % n, wire, n) for n in range(1, count + 1)]


async def opened(peer: Peer, turn: Turn, mode: str = "pipelining", **options: Any) -> SmtpSession:
    """Connect as engine/connect does, read the banner, hand the transport over."""
    loop = asyncio.get_running_loop()
    greeting: asyncio.Future[None] = loop.create_future()

    class Greeting(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            if data.endswith(b"\n") and not greeting.done():
                greeting.set_result(None)

    transport, _ = await loop.create_connection(Greeting, "127.0.0.1", peer.port)
    await greeting
    transport.pause_reading()
    pipelining, chunking = MODES[mode]
    session = SmtpSession(turn, "owner", pipelining=pipelining, chunking=chunking, **options)
    session.start(transport)
    return session


async def run(peer: Peer, count: int, mode: str = "pipelining", wire: bytes = BODY, **options: Any) -> tuple[Turn, SmtpSession]:
    turn = Turn(messages(count, wire))
    session = await opened(peer, turn, mode, **options)
    await asyncio.wait_for(turn.closing.wait(), 60)
    await asyncio.sleep(0)
    return turn, session


async def comes_true(condition: Callable[[], object]) -> None:
    """Wait for it."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def told(turn: Turn) -> list[tuple[object, int, int]]:
    return [(o.message.ref, o.stage, o.code) for o in turn.settled]


@pytest.fixture(params=sorted(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_messages_are_delivered_and_the_connection_ends_with_quit(mode: str) -> None:
    async with Peer(WORDS) as peer:
        turn, session = await run(peer, 12, mode)
    assert told(turn) == [(n, STAGE_CONTENT, 250) for n in range(1, 13)]
    assert [(m.mail_from, m.rcpt, m.content) for m in peer.accepted] == [(f"b{n}@s.example", f"r{n}@d.example", BODY) for n in range(1, 13)]
    assert peer.commands[-1] == "QUIT"
    assert peer.violations == []
    assert turn.reason == "closed"
    assert session.graceful
    assert (session.sent, session.in_flight, session.room, session.deadline) == (12, 0, 0, 0.0)


async def test_content_and_the_next_envelope_arrive_together() -> None:
    async with Peer(WORDS) as peer:
        await run(peer, 3)
    assert peer.chunks[0][1] == BODY + b".\r\nMAIL FROM:<b2@s.example>\r\nRCPT TO:<r2@d.example>\r\nDATA\r\n"
    assert len(peer.chunks[0]) == 5  # envelope, content + envelope, content + envelope, content, QUIT


async def test_a_message_costs_one_round_trip_with_pipelining_and_a_window_less() -> None:
    rounds = {}
    for mode in ("lock-step", "pipelining", "chunking"):
        async with Peer(WORDS) as peer:
            await run(peer, 21, mode, window=4)
        rounds[mode] = len(peer.chunks[0])
    assert rounds["lock-step"] == 4 * 21 + 1
    assert rounds["pipelining"] == 21 + 2
    assert rounds["chunking"] <= 14


async def test_replies_in_single_octets_change_nothing(mode: str) -> None:
    async with Peer(WORDS, piece=1) as peer:
        turn, _ = await run(peer, 3, mode)
    assert told(turn) == [(n, STAGE_CONTENT, 250) for n in (1, 2, 3)]


async def test_each_refusal_is_the_fate_of_its_own_message(mode: str) -> None:
    recipients = {
        "r2@d.example": "550 5.1.1 no such user",
        "r4@d.example": "450 4.2.1 greylisted",
        "r5@d.example": "550-5.7.1 two\r\n550 5.7.1 lines",
    }
    mails: list[Step] = [None, None, None, None, None, "553 5.1.8 bad sender"]
    async with Peer(WORDS, script={"mail": mails}, recipients=recipients) as peer:
        turn, _ = await run(peer, 8, mode)
    assert sorted(told(turn)) == [
        (1, STAGE_CONTENT, 250),
        (2, STAGE_RCPT, 550),
        (3, STAGE_CONTENT, 250),
        (4, STAGE_RCPT, 450),
        (5, STAGE_RCPT, 550),
        (6, STAGE_MAIL, 553),
        (7, STAGE_CONTENT, 250),
        (8, STAGE_CONTENT, 250),
    ]
    assert {m.rcpt: m.mail_from for m in peer.accepted} == {f"r{n}@d.example": f"b{n}@s.example" for n in (1, 3, 7, 8)}
    assert peer.violations == []


async def test_354_with_no_recipient_keeps_the_connection_by_a_lone_dot() -> None:
    async with Peer(WORDS, script={"data": [None, "354 go on then"]}, recipients={"r2@d.example": "550 no"}) as peer:
        turn, _ = await run(peer, 3)
    assert told(turn) == [(1, STAGE_CONTENT, 250), (2, STAGE_RCPT, 550), (3, STAGE_CONTENT, 250)]
    assert [m.rcpt for m in peer.accepted] == ["r1@d.example", "r3@d.example"]


@pytest.mark.parametrize("answer", ["552 5.2.2 full", "452 4.2.2 full", "554 5.7.1 spam"])
async def test_refused_content_is_told_and_the_next_is_sent(mode: str, answer: str) -> None:
    stage = "bdat" if mode == "chunking" else "content"
    async with Peer(WORDS, script={stage: [None, answer]}) as peer:
        turn, _ = await run(peer, 6, mode)
    refused = {o.message.rcpt.decode(): o for o in turn.settled if o.code != 250}
    assert [(o.stage, o.code, o.text) for o in refused.values()] == [(STAGE_CONTENT, int(answer[:3]), answer[4:].encode())]
    assert {m.rcpt for m in peer.accepted} == {f"r{n}@d.example" for n in range(1, 7)} - set(refused)


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("content", "250 2.0.0 ok\r\n250 2.0.0 ok"),
        ("content", b"250 ok\n"),
        ("content", "999 what"),
        ("content", "000"),
        ("content", "25"),
        ("content", "354 more"),
        ("content", "hello"),
        ("content", b"250 " + b"x" * 70_000),
        ("content", b"250-x\r\n" * 200),
        ("content", b"y" * 1_048_576),
        ("rcpt", "354 go"),
        ("data", "250 ok"),
        ("mail", "250 ok\r\n250 ok"),
        ("rcpt", "250 ok\r\n250 ok"),
        ("data", "354 go\r\n354 go"),
    ],
)
async def test_a_peer_that_loses_step_is_cut_off_and_nobody_is_misjudged(stage: str, step: str | bytes) -> None:
    async with Peer(WORDS, script={stage: [None, step]}) as peer:
        turn, session = await run(peer, 5)
    assert turn.reason.startswith("protocol violation: ")
    assert not session.graceful
    assert session.ended
    taken = {m.rcpt for m in peer.accepted}
    for outcome in turn.settled:
        rcpt = outcome.message.rcpt.decode()
        assert outcome.code in (0, 250)
        if outcome.code == 250:
            assert rcpt in taken
        elif rcpt in taken:
            assert outcome.in_doubt
    assert [o.message.ref for o in turn.settled] == list(range(1, len(turn.settled) + 1))


async def test_an_unsolicited_line_on_an_idle_connection_ends_it() -> None:
    turn = Turn(messages(1), quit_at_end=False)
    async with Peer(WORDS) as peer:
        session = await opened(peer, turn)
        await asyncio.wait_for(turn.progress.wait(), 60)
        assert session.idle
        assert session.deadline == 0.0
        peer.say_now(b"250 hello\r\n")
        await asyncio.wait_for(turn.closing.wait(), 60)
    assert "nobody asked for" in turn.reason


@pytest.mark.parametrize("how", [DROP, RESET])
@pytest.mark.parametrize("stage", ["mail", "rcpt", "data"])
@pytest.mark.parametrize("mode", ["lock-step", "pipelining"])  # with BDAT the content leaves with its envelope
async def test_a_link_lost_before_the_content_is_never_in_doubt(mode: str, stage: str, how: Any) -> None:
    async with Peer(WORDS, script={stage: [None, how]}) as peer:
        turn, _ = await run(peer, 3, mode)
    assert told(turn)[0] == (1, STAGE_CONTENT, 250)
    assert [(o.message.ref, o.stage, o.in_doubt, o.begun) for o in turn.settled[1:]] == [(2, STAGE_UNSENT, False, True)]


@pytest.mark.parametrize("how", [DROP, RESET])
@pytest.mark.parametrize("taken", [True, False])
async def test_a_link_lost_after_the_dot_is_in_doubt(how: Any, taken: bool) -> None:
    step = (ACCEPT, how) if taken else how
    async with Peer(WORDS, script={"content": [None, step]}) as peer:
        turn, _ = await run(peer, 4)
    assert [(o.message.ref, o.stage) for o in turn.settled] == [(1, STAGE_CONTENT), (2, STAGE_LOST), (3, STAGE_UNSENT)]
    assert len(peer.accepted) == 1 + taken
    assert b"before the reply to the end of the content" in turn.settled[1].text or b"connection lost" in turn.settled[1].text


async def test_a_window_lost_leaves_what_was_not_answered_in_doubt() -> None:
    async with Peer(WORDS, script={"bdat": [None, (ACCEPT, DROP)]}) as peer:
        turn, _ = await run(peer, 9, "chunking", window=4)
    decided = [o for o in turn.settled if o.stage == STAGE_CONTENT]
    lost = [o for o in turn.settled if o.stage == STAGE_LOST]
    assert len(lost) <= 4
    assert {m.rcpt for m in peer.accepted} <= {o.message.rcpt.decode() for o in decided + lost}


async def test_a_large_message_not_fully_written_is_not_in_doubt() -> None:
    wire = b"Subject: x\r\n\r\n" + (b"z" * 98 + b"\r\n") * 160_000
    async with Peer(WORDS, script={"body": DROP}) as peer:
        turn, _ = await run(peer, 1, wire=wire)
    assert [(o.stage, o.in_doubt, o.begun) for o in turn.settled] == [(STAGE_UNSENT, False, True)]


async def test_a_peer_that_stops_reading_is_cut_off_when_the_deadline_has_passed() -> None:
    wire = b"Subject: x\r\n\r\n" + (b"z" * 98 + b"\r\n") * 160_000
    turn = Turn(messages(2, wire))
    async with Peer(WORDS, script={"body": STALL}) as peer:
        session = await opened(peer, turn, command_timeout=1.5, final_dot_timeout=600.0)
        await comes_true(lambda: session.paused)
        assert session.room == 0
        assert 0 < session.deadline - time.monotonic() <= 1.5
        session.expire()
        assert not session.ended  # not yet
        await comes_true(lambda: time.monotonic() >= session.deadline)
        session.expire()
        assert session.ended
        await asyncio.sleep(0)
    assert turn.reason == "the server read nothing for 1.5 seconds"
    assert [(o.message.ref, o.in_doubt) for o in turn.settled] == [(1, False), (2, False)]


async def test_writing_goes_on_when_a_slow_peer_reads_again() -> None:
    wire = b"Subject: x\r\n\r\n" + (b"z" * 98 + b"\r\n") * 80_000
    async with Peer(WORDS) as peer:
        turn, _ = await run(peer, 3, wire=wire)
    assert told(turn) == [(n, STAGE_CONTENT, 250) for n in (1, 2, 3)]
    assert [len(m.content) for m in peer.accepted] == [len(wire)] * 3


@pytest.mark.parametrize(("stage", "doubt"), [("mail", False), ("data", False), ("content", True)])
async def test_a_peer_that_hangs_is_cut_off_and_named(stage: str, doubt: bool) -> None:
    turn = Turn(messages(1))
    async with Peer(WORDS, script={stage: HANG}) as peer:
        session = await opened(peer, turn, command_timeout=0.05, final_dot_timeout=0.05)
        await comes_true(lambda: any(connection.hung for connection in peer._connections))

        def cut_off() -> bool:
            session.expire()
            return session.ended

        await comes_true(cut_off)
        await asyncio.sleep(0)
    assert turn.reason.startswith("no reply to ")
    assert [(o.stage, o.in_doubt) for o in turn.settled] == [(STAGE_LOST if doubt else STAGE_UNSENT, doubt)]


async def test_dripped_octets_do_not_put_a_deadline_off() -> None:
    turn = Turn(messages(1))
    async with Peer(WORDS, script={"mail": HANG}) as peer:
        session = await opened(peer, turn, command_timeout=0.2)
        await comes_true(lambda: session.deadline)
        first = session.deadline
        peer.say_now(b"2")
        await asyncio.sleep(0.02)
        peer.say_now(b"5")
        await asyncio.sleep(0.02)
        assert session.deadline == first > 0
        session.abort()


async def test_the_deadline_after_the_dot_is_the_final_one() -> None:
    turn = Turn(messages(1))
    async with Peer(WORDS, script={"content": HANG}) as peer:
        session = await opened(peer, turn, command_timeout=5.0, final_dot_timeout=600.0)
        while len(peer.chunks[0]) < 2:
            await asyncio.sleep(0.01)
        assert 590 < session.deadline - time.monotonic() <= 600
        session.abort("stopped")
        await asyncio.sleep(0)
    assert [(o.stage, o.text) for o in turn.settled] == [(STAGE_LOST, b"stopped")]


async def test_421_in_mid_group_gives_each_its_own_reply_and_keeps_the_text() -> None:
    async with Peer(WORDS, script={"rcpt": [None, ("421 4.3.2 going down", DROP)]}) as peer:
        turn, session = await run(peer, 4)
    assert told(turn) == [(1, STAGE_CONTENT, 250), (2, STAGE_RCPT, 421)]
    assert session.closing_reply == b"4.3.2 going down"
    assert turn.reason == "the server is closing the connection: 421 4.3.2 going down"
    assert len(turn.messages) == 2


async def test_250_and_421_together_count_both() -> None:
    async with Peer(WORDS, script={"content": [(HONEST, "421 4.7.0 enough", DROP)]}) as peer:
        turn, _ = await run(peer, 3)
    assert told(turn)[0] == (1, STAGE_CONTENT, 250)
    assert not any(o.in_doubt for o in turn.settled)
    assert len(peer.accepted) == 1


async def test_a_421_without_a_close_is_closed_by_us() -> None:
    async with Peer(WORDS, script={"mail": "421 4.7.0 go away"}) as peer:
        turn = Turn(messages(1))
        session = await opened(peer, turn)
        await comes_true(lambda: turn.settled)
        if not session.ended:
            assert 0 < session.deadline - time.monotonic() <= 5
            session.abort("given up")
            await asyncio.sleep(0)
    assert told(turn) == [(1, STAGE_MAIL, 421)]


async def test_nothing_leaves_before_flush() -> None:
    turn = Turn(messages(3), quit_at_end=False)
    async with Peer(WORDS) as peer:
        turn.holding = True
        session = await opened(peer, turn)
        session.submit(turn.messages[:1])
        await asyncio.sleep(0.05)
        assert peer.chunks[0] == []
        session.flush()
        await comes_true(lambda: peer.chunks[0])
        await asyncio.sleep(0.05)
        assert len(peer.chunks[0]) == 1
        assert peer.accepted == []  # 354 has come, content waits for its turn
        await comes_true(lambda: session.protocol.sendable)
        session.flush()
        await comes_true(lambda: peer.accepted)
        assert len(peer.accepted) == 1
        session.abort()


async def test_quit_finishes_what_was_begun_and_hands_back_the_rest() -> None:
    turn = Turn(messages(5), quit_at_end=False)
    async with Peer(WORDS, reply_delay=0.02) as peer:
        session = await opened(peer, turn)
        await asyncio.sleep(0.01)
        session.submit(turn.messages[:2])
        session.quit()
        assert session.room == 0
        await asyncio.wait_for(turn.closing.wait(), 60)
        await asyncio.sleep(0)
    assert sorted(told(turn)) == [(1, STAGE_CONTENT, 250), (2, STAGE_UNSENT, 0), (3, STAGE_UNSENT, 0)]
    assert peer.commands[-1] == "QUIT"
    assert turn.reason == "closed"


async def test_an_idle_session_quits_at_once() -> None:
    turn = Turn([], quit_at_end=False)
    async with Peer(WORDS) as peer:
        session = await opened(peer, turn)
        await comes_true(lambda: session.idle)
        session.quit()
        await asyncio.wait_for(turn.closing.wait(), 60)
    assert (turn.reason, turn.settled, peer.commands) == ("closed", [], ["QUIT"])


async def test_a_quit_that_is_not_answered_ends_at_its_deadline() -> None:
    turn = Turn([], quit_at_end=False)
    async with Peer(WORDS, script={"quit": HANG}) as peer:
        session = await opened(peer, turn, command_timeout=0.05)
        session.quit()
        await asyncio.sleep(0.06)
        session.expire()
    assert turn.reason == "closed; QUIT was not answered"


async def test_messages_given_to_an_ended_session_come_back_unsent() -> None:
    turn = Turn([], quit_at_end=False)
    async with Peer(WORDS) as peer:
        session = await opened(peer, turn)
        peer.drop_now()
        await asyncio.wait_for(turn.closing.wait(), 60)
        session.submit(messages(2))
        await asyncio.sleep(0)
    assert [(o.message.ref, o.stage, o.begun) for o in turn.settled] == [(1, STAGE_UNSENT, False), (2, STAGE_UNSENT, False)]
    assert len(turn.ended) == 1


async def test_a_connection_quits_when_its_message_limit_is_reached(mode: str) -> None:
    turn = Turn(messages(9), quit_at_end=False)
    async with Peer(WORDS) as peer:
        await opened(peer, turn, mode, max_messages=4)
        await asyncio.wait_for(turn.closing.wait(), 60)
        await asyncio.sleep(0)
    assert len(peer.accepted) == len(turn.settled) == 4
    assert len(turn.messages) == 5
    assert peer.commands[-1] == "QUIT"


async def test_descriptors_are_given_back() -> None:
    async with Peer(WORDS) as peer:
        for step in (None, DROP, RESET):
            peer.script = {"content": step}
            await run(peer, 2)
        await comes_true(lambda: peer.open == 0)
