"""`python -m bench.bench_smtp_protocol`: what one message costs the SMTP client, in microseconds of its own CPU.

Two parts. Sans I/O: protocol alone, replies fed from memory. With sockets: sessions on uvloop against a `bench.sink` process of
its own, constant content, nothing rendered, nothing journalled, so the SMTP path is what is measured. Start-up, connecting and
TLS handshakes are outside the timed window. No timing is asserted anywhere: this prints numbers.
"""

import argparse
import asyncio
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import uvloop

from bench.bench_sink import make_content
from domain.egress import DeliveryServer, DeliveryServerLimits, Security
from engine.connect import connect
from ext.smtp_protocol import Message, Outcome, SmtpProtocol
from ext.smtp_session import SmtpSession

ENVELOPE_REPLIES: Final = b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n"
SENDER: Final = b"b-0123456789abcdef0123456789abcdef@return.example"
RECIPIENT: Final = b"somebody.here@gmail.example"


class Turn:
    """As in the engine, without the work: one run per iteration of the loop for all sessions."""

    def __init__(self, wire: bytes, messages: int) -> None:
        self.outcomes: list[Outcome] = []
        self.wire = wire
        self.left = messages
        self.expected = messages
        self.done = asyncio.Event()
        self.asked: dict[SmtpSession, None] = {}
        self.scheduled = False
        self.accepted = 0
        self.call_soon = asyncio.get_running_loop().call_soon

    def ready(self, session: SmtpSession) -> None:
        self.asked[session] = None
        if not self.scheduled:
            self.scheduled = True
            self.call_soon(self.run)

    def closed(self, session: SmtpSession, reason: str) -> None:
        if self.left or self.accepted < self.expected:
            raise RuntimeError(f"a connection ended: {reason}")

    def run(self) -> None:
        self.scheduled = False
        for outcome in self.outcomes:
            if outcome.code != 250:
                raise RuntimeError(f"not delivered: {outcome!r}")
        self.accepted += len(self.outcomes)
        self.outcomes.clear()
        sessions, self.asked = self.asked, {}
        wire = self.wire
        for session in sessions:
            room = min(session.room, self.left)
            if room:
                self.left -= room
                session.submit([Message(SENDER, RECIPIENT, wire, None) for _ in range(room)])
            session.flush()
        if self.accepted >= self.expected:
            self.done.set()

    def again(self, messages: int) -> None:
        self.left, self.expected, self.accepted = messages, messages, 0
        self.done.clear()


async def over_sockets(port: int, security: Security, connections: int, window: int, wire: bytes, messages: int) -> tuple[float, float]:
    """(CPU seconds, wall seconds) for `messages` after a warm-up."""
    limits = DeliveryServerLimits(chunking=window > 0, bdat_window=max(window, 1))
    server = DeliveryServer(id=1, user_id=1, name="sink", host="127.0.0.1", port=port, security=security, limits=limits)
    turn = Turn(wire, connections * 20)
    sessions = []
    for number in range(connections):
        connected = await connect(server, password="", ehlo_name="bench.example")
        session = SmtpSession(
            turn,
            None,
            pipelining=connected.pipelining,
            chunking=connected.chunking and window > 0,
            window=max(window, 1),
            connection_id=number,
        )
        session.start(connected.transport)
        sessions.append(session)
    await turn.done.wait()
    turn.again(messages)
    cpu, wall = time.process_time(), time.perf_counter()
    for session in sessions:
        turn.ready(session)
    await turn.done.wait()
    spent = time.process_time() - cpu, time.perf_counter() - wall
    for session in sessions:
        session.abort()
    return spent


def sans_io(window: int, wire: bytes, messages: int) -> float:
    """CPU seconds for `messages` through the protocol alone."""
    protocol = SmtpProtocol(True, window > 0, max(window, 1))
    outcomes: list[Outcome] = []
    protocol.submit(Message(SENDER, RECIPIENT, wire, None))
    protocol.output()
    protocol.feed(ENVELOPE_REPLIES + b"354 go\r\n", outcomes)
    protocol.output()
    protocol.feed(b"250 2.0.0 Ok: queued as 1\r\n", outcomes)
    one = ENVELOPE_REPLIES + b"250 2.0.0 Ok: queued as 12345678\r\n250 2.0.0 Ok\r\n"
    started = time.process_time()
    if not window:
        protocol.submit(Message(SENDER, RECIPIENT, wire, None))
        protocol.output()
        protocol.feed(ENVELOPE_REPLIES + b"354 go\r\n", outcomes)
        replies = b"250 2.0.0 Ok: queued as 12345678\r\n" + ENVELOPE_REPLIES + b"354 go\r\n"
        for _ in range(messages):
            protocol.submit(Message(SENDER, RECIPIENT, wire, None))
            protocol.output()
            protocol.feed(replies, outcomes)
            outcomes.clear()
    else:
        for _ in range(messages // window):
            for _ in range(window):
                protocol.submit(Message(SENDER, RECIPIENT, wire, None))
            protocol.output()
            protocol.feed(one * window, outcomes)
            outcomes.clear()
    if protocol.fault is not None:
        raise RuntimeError(protocol.fault)
    return time.process_time() - started


def with_sink(measure: Callable[[int], Coroutine[Any, Any, tuple[float, float]]]) -> tuple[float, float]:
    """Run `measure(port)` against a sink of its own."""
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.sink", "--port", "0", "--http-port", "0", "--json", "--no-track-duplicates"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        port = int(json.loads(child.stdout.readline())["smtp"].rsplit(":", 1)[1])
        return uvloop.run(measure(port))
    finally:
        child.terminate()
        child.wait()


def main() -> int:
    """Print one row per case; `--json` prints a list of objects."""
    parser = argparse.ArgumentParser(prog="bench_smtp_protocol", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    content = {size: b"%d".join(make_content(size)).replace(b"%d", b"1") for size in (10_000, 2_000)}
    rows: list[dict[str, Any]] = []
    for name, window, size in (("sans I/O, DATA", 0, 10_000), ("sans I/O, BDAT window 4", 4, 10_000), ("sans I/O, DATA, 2 kB", 0, 2_000)):
        spent = statistics.median(sans_io(window, content[size], chosen.messages) for _ in range(chosen.rounds))
        rows.append({"name": name, "messages": chosen.messages, "cpu_us_per_message": round(spent / chosen.messages * 1e6, 2)})
    cases: list[tuple[str, Security, int, int, int]] = [
        ("DATA, 10 kB, 20 connections", "none", 20, 0, 10_000),
        ("DATA, 2 kB, 20 connections", "none", 20, 0, 2_000),
        ("BDAT window 4, 10 kB, 10 connections", "none", 10, 4, 10_000),
        ("BDAT window 8, 10 kB, 10 connections", "none", 10, 8, 10_000),
        ("STARTTLS, DATA, 10 kB, 20 connections", "starttls", 20, 0, 10_000),
        ("STARTTLS, BDAT window 8, 10 kB", "starttls", 10, 8, 10_000),
    ]
    for name, security, connections, window, size in cases:
        run = functools.partial(
            over_sockets, security=security, connections=connections, window=window, wire=content[size], messages=chosen.messages
        )
        spent_all = [with_sink(run) for _ in range(chosen.rounds)]
        cpu, wall = (statistics.median(part) for part in zip(*spent_all, strict=True))
        rows.append(
            {
                "name": name,
                "messages": chosen.messages,
                "cpu_us_per_message": round(cpu / chosen.messages * 1e6, 2),
                "messages_per_second": round(chosen.messages / wall),
            }
        )
    if chosen.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'case':<40} {'us/message':>10} {'messages/s':>11}")
    for row in rows:
        print(f"{row['name']:<40} {row['cpu_us_per_message']:>10} {row.get('messages_per_second', ''):>11}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
