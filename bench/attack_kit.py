"""An attack kit for SMTP listeners: hostile clients, round after round, as many at once as are asked for.

    python -m bench.attack_kit HOST:PORT [--seconds N] [--clients N] [--recipient ADDRESS]

Floods, false ends of data, early and mixed protocols, endless lines, broken handshakes, slow and dead clients. It only counts: whether a
listener answers right is for tests/inbound to say. One JSON object at the end: connections, octets sent, rounds of each case.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

CASE_SECONDS: Final = 8.0  # the slow ones end here
_BODY: Final = b"From: a@b.example\r\nSubject: x\r\n\r\n"
_FALSE_ENDS: Final = (b"\n.\n", b"\r\n.\n", b"\n.\r\n", b"\r.\r", b"\r\n.\r", b"\r\n\0.\r\n", b"\r\n.\r\r\n")


class Peer:
    """One hostile connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, recipient: bytes) -> None:
        self.reader = reader
        self.writer = writer
        self.recipient = recipient
        self.sent = 0

    async def send(self, data: bytes) -> None:
        """Octets, as fast as they are taken."""
        self.sent += len(data)
        self.writer.write(data)
        await self.writer.drain()

    async def line(self) -> bytes:
        """One line of an answer."""
        return await self.reader.readline()

    async def drained(self) -> None:
        """Everything that is said until the end."""
        while await self.reader.read(65536):
            pass

    async def hello(self) -> None:
        """Greeting and EHLO."""
        await self.line()
        await self.send(b"EHLO attack.example\r\n")
        while (await self.line())[3:4] == b"-":
            pass

    async def content(self) -> None:
        """Up to the content."""
        await self.hello()
        await self.send(b"MAIL FROM:<>\r\nRCPT TO:<" + self.recipient + b">\r\nDATA\r\n")
        for _ in range(3):
            await self.line()


async def _flood(peer: Peer, line: bytes, times: int) -> None:
    await peer.hello()
    await peer.send(line * times)
    await peer.drained()


async def noops(peer: Peer) -> None:
    await _flood(peer, b"NOOP\r\n", 5000)


async def recipients(peer: Peer) -> None:
    await _flood(peer, b"MAIL FROM:<>\r\nRCPT TO:<" + peer.recipient + b">\r\nRSET\r\n", 1000)


async def strangers(peer: Peer) -> None:
    await _flood(peer, b"RCPT TO:<ada@reader.example>\r\n", 5000)


async def unknown(peer: Peer) -> None:
    await _flood(peer, b"XYZZY\r\n", 5000)


async def passwords(peer: Peer) -> None:
    await _flood(peer, b"AUTH PLAIN AGEAYg==\r\n", 2000)


async def smuggling(peer: Peer) -> None:
    await peer.content()
    await peer.send(_BODY + random.choice(_FALSE_ENDS) + b"MAIL FROM:<>\r\n" * 20 + b"\r\n.\r\n")
    await peer.line()


async def endless_line(peer: Peer) -> None:
    await peer.content()
    await peer.send(b"x" * (8 * 1024 * 1024) + b"\r\n.\r\n")
    await peer.line()


async def endless_command(peer: Peer) -> None:
    await peer.hello()
    await peer.send(b"NOOP " + b"x" * (4 * 1024 * 1024) + b"\r\n")
    await peer.drained()


async def empty_lines(peer: Peer) -> None:
    await peer.content()
    await peer.send(b"\r\n" * 1_000_000 + b".\r\n")
    await peer.line()


async def too_large(peer: Peer) -> None:
    await peer.content()
    for _ in range(200):
        await peer.send((b"y" * 70 + b"\r\n") * 1024)
    await peer.drained()


async def deep(peer: Peer) -> None:
    await peer.content()
    parts = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(2000))
    await peer.send(b"Subject: x\r\n" + parts + b"\r\n.\r\n")
    await peer.line()


async def headers(peer: Peer) -> None:
    await peer.content()
    await peer.send(b"X-Header: value of some length\r\n" * 50_000 + b"\r\nx\r\n.\r\n")
    await peer.line()


async def early(peer: Peer) -> None:
    await peer.send(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<" + peer.recipient + b">\r\nDATA\r\n" + _BODY + b".\r\nQUIT\r\n")
    await peer.drained()


async def web(peer: Peer) -> None:
    await peer.line()
    await peer.send(b"POST / HTTP/1.1\r\nHost: x\r\n\r\nMAIL FROM:<>\r\n")
    await peer.drained()


async def handshake(peer: Peer) -> None:
    await peer.hello()
    await peer.send(b"STARTTLS\r\n")
    await peer.line()
    await peer.send(b"\x16\x03\x01\x02\x00" + random.randbytes(512))
    await peer.drained()


async def silent(peer: Peer) -> None:
    await peer.drained()


async def drip(peer: Peer) -> None:
    await peer.content()
    while True:
        await peer.send(b"x")
        await asyncio.sleep(0.2)


async def deaf(peer: Peer) -> None:
    await peer.hello()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    while True:
        await peer.send(b"VRFY x\r\n" * 100)
        await asyncio.sleep(0.1)


async def vanish(peer: Peer) -> None:
    await peer.content()
    await peer.send(_BODY * 20)
    peer.writer.transport.abort()


Case = Callable[[Peer], Awaitable[None]]
FAST: Final[tuple[Case, ...]] = (
    noops, recipients, strangers, unknown, passwords, smuggling, endless_line, endless_command, empty_lines, too_large, deep, headers,
    early, web, handshake, vanish,
)  # fmt: skip
SLOW: Final[tuple[Case, ...]] = (silent, drip, deaf)


class Kit:
    """All cases against one listener."""

    def __init__(self, host: str, port: int, recipient: str) -> None:
        self._place = (host, port)
        self._recipient = recipient.encode()
        self.rounds: Counter[str] = Counter()
        self.refused = 0
        self.octets = 0

    async def run(self, clients: int, seconds: float) -> None:
        """`clients` at once for so long; a quarter of them are slow ones."""
        end = time.monotonic() + seconds
        slow = max(1, clients // 4)
        await asyncio.gather(*(self._loop(SLOW if number < slow else FAST, number, end) for number in range(clients)))

    async def _loop(self, cases: tuple[Case, ...], number: int, end: float) -> None:
        while (left := end - time.monotonic()) > 0:
            case = cases[number % len(cases)]
            number += 1
            try:
                async with asyncio.timeout(min(CASE_SECONDS, left)):
                    await self._once(case)
            except (OSError, EOFError, TimeoutError, RuntimeError):  # uvloop says of a transport that is gone by RuntimeError
                pass
            self.rounds[case.__name__] += 1

    async def _once(self, case: Case) -> None:
        try:
            reader, writer = await asyncio.open_connection(*self._place)
        except (OSError, RuntimeError):
            self.refused += 1
            await asyncio.sleep(0.05)
            return
        peer = Peer(reader, writer, self._recipient)
        try:
            await case(peer)
        finally:
            self.octets += peer.sent
            writer.transport.abort()


def main() -> int:
    """Run it and say what was done."""
    parser = argparse.ArgumentParser(prog="python -m bench.attack_kit", description="Hostile SMTP clients, round after round.")
    parser.add_argument("place", metavar="HOST:PORT")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--recipient", default="postmaster@example.com", help="an address the listener takes mail for")
    options = parser.parse_args()
    host, _, port = options.place.rpartition(":")
    kit = Kit(host, int(port), options.recipient)
    asyncio.run(kit.run(options.clients, options.seconds))
    rounds = dict(sorted(kit.rounds.items()))
    done = {"connections": sum(rounds.values()), "refused": kit.refused, "octets": kit.octets, "rounds": rounds}
    sys.stdout.write(json.dumps(done) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
