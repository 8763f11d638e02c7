"""`python -m bench.bench_sink`: what one message costs the sink, in microseconds of its own CPU.

The sender is a plain epoll loop over blocking-free sockets that sends constant content with its own Message-ID per message,
pipelined (content of message n with the envelope of n+1 in one send) or as BDAT windows, so the sink is what is measured.
Start-up and connecting are outside the timed window. No timing is asserted anywhere: this prints numbers.
"""

import argparse
import json
import select
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from typing import Any, Final

ENVELOPE: Final = b"MAIL FROM:<bench-%d@return.example>\r\nRCPT TO:<user%d@gmail.example>\r\n"


def make_content(size: int) -> tuple[bytes, bytes]:
    """Header before and everything behind the Message-ID number; about `size` octets together, no line starts with a dot."""
    head = (
        b"Date: Fri, 21 Nov 2025 12:00:00 +0000\r\nFrom: Sluice <news@brand.example>\r\nTo: Ann <ann@gmail.example>\r\n"
        b"Subject: News of the week\r\nMessage-ID: <"
    )
    tail = (
        b".bench@brand.example>\r\nMIME-Version: 1.0\r\nContent-Type: text/html; charset=utf-8\r\n"
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\n"
    )
    line = b'<p style=3D"margin:0">A paragraph of the newsletter, see <a href=3D"https://a=\r\n'
    return head, tail + line * max(1, (size - len(head) - len(tail) - 12) // len(line))


def read_line_count(link: socket.socket, wanted: int) -> None:
    """Read until `wanted` reply lines came."""
    seen = 0
    while seen < wanted:
        data = link.recv(65536)
        if not data:
            raise ConnectionError("the sink closed the connection")
        seen += data.count(b"\n")


def open_links(port: int, count: int) -> list[socket.socket]:
    """Connections past EHLO."""
    links = []
    for _ in range(count):
        link = socket.create_connection(("127.0.0.1", port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_line_count(link, 1)
        link.sendall(b"EHLO bench.example\r\n")
        data = b""
        while b"\r\n250 " not in data:
            data += link.recv(65536)
        links.append(link)
    return links


def run_data(port: int, connections: int, messages: int, content: tuple[bytes, bytes]) -> None:
    """Pipelined DATA: one send and one reply segment per message and connection."""
    links = {link.fileno(): link for link in open_links(port, connections)}
    poll = select.epoll()
    owed: dict[int, int] = {}
    head, tail = content
    sent = done = 0
    for number, link in links.items():
        link.sendall(ENVELOPE % (number, number) + b"DATA\r\n")
        owed[number] = 3
        poll.register(number, select.EPOLLIN)
    while done < messages:
        for number, _ in poll.poll():
            link = links[number]
            owed[number] -= link.recv(65536).count(b"\n")
            if owed[number] > 0:
                continue
            if sent >= messages + connections:
                continue
            # The first answer is the 354 alone; every later one also ends a message.
            link.sendall(b"%s%d%s.\r\n" % (head, sent, tail) + ENVELOPE % (sent, sent) + b"DATA\r\n")
            sent += 1
            done = sent - connections
            owed[number] = 4
    for link in links.values():
        link.close()


def run_bdat(port: int, connections: int, messages: int, content: tuple[bytes, bytes], window: int) -> None:
    """BDAT LAST, `window` messages per send."""
    links = {link.fileno(): link for link in open_links(port, connections)}
    poll = select.epoll()
    owed = dict.fromkeys(links, 0)
    head, tail = content
    sent = done = 0
    ready = list(links)
    for number in ready:
        poll.register(number, select.EPOLLIN)
    while done < messages:
        for number in ready:
            if owed[number] > 0:
                continue
            parts = []
            for _ in range(window):
                body = b"%s%d%s" % (head, sent, tail)
                parts.append(ENVELOPE % (sent, sent) + b"BDAT %d LAST\r\n" % len(body) + body)
                sent += 1
            links[number].sendall(b"".join(parts))
            owed[number] = 3 * window
        ready = []
        for number, _ in poll.poll():
            owed[number] -= links[number].recv(65536).count(b"\n")
            if owed[number] == 0:
                done += window
                ready.append(number)
    for link in links.values():
        link.close()


def counters(http: str) -> dict[str, Any]:
    """The sink's counters."""
    with urllib.request.urlopen(f"http://{http}/api/v1/counters") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def measure(name: str, arguments: list[str], connections: int, messages: int, size: int, window: int, rounds: int) -> dict[str, Any]:
    """Median over `rounds` of one case, each on a fresh sink."""
    costs, rates, reads = [], [], []
    content = make_content(size)
    for _ in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.sink", "--port", "0", "--http-port", "0", "--json", *arguments], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        port = int(ready["smtp"].rsplit(":", 1)[1])
        run_data(port, connections, 2000, content)
        before, start = counters(ready["http"]), time.perf_counter()
        if window:
            run_bdat(port, connections, messages, content, window)
        else:
            run_data(port, connections, messages, content)
        seconds = time.perf_counter() - start
        after = counters(ready["http"])
        child.terminate()
        child.wait()
        count = after["messages"] - before["messages"]
        costs.append((after["cpu_seconds"] - before["cpu_seconds"]) / count * 1e6)
        rates.append(count / seconds)
        reads.append((after["reads"] - before["reads"]) / count)
    return {
        "name": name,
        "messages": messages,
        "message_bytes": len(content[0]) + len(content[1]) + 5,
        "sink_cpu_us_per_message": round(statistics.median(costs), 2),
        "messages_per_second": round(statistics.median(rates)),
        "reads_per_message": round(statistics.median(reads), 2),
    }


def main() -> int:
    """Print one row per case; `--json` prints a list of objects."""
    parser = argparse.ArgumentParser(prog="bench_sink", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--messages", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    plain = ["--no-track-duplicates"]
    cases: list[tuple[str, list[str], int, int, int]] = [
        ("DATA 10 kB, 20 connections", [], 20, 10_000, 0),
        ("the same, duplicates not tracked", plain, 20, 10_000, 0),
        ("the same, accepted log to /dev/null", ["--accepted", "/dev/null"], 20, 10_000, 0),
        ("DATA 2 kB, 20 connections", [], 20, 2_000, 0),
        ("BDAT window 6, 10 kB, 10 connections", [], 10, 10_000, 6),
    ]
    rows = [measure(name, extra, links, chosen.messages, size, window, chosen.rounds) for name, extra, links, size, window in cases]
    if chosen.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'case':<40} {'us/message':>10} {'messages/s':>11} {'reads/message':>14}")
    for row in rows:
        print(f"{row['name']:<40} {row['sink_cpu_us_per_message']:>10} {row['messages_per_second']:>11} {row['reads_per_message']:>14}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
