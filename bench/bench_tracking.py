"""Bench of opens and clicks: GETs a second of the web side, and what each costs, with every visit written to the journal.

    python -m bench.bench_tracking [--seconds N] [--clients N] [--json]

The web side is the real one, alone in this process, with its journal on disk; the peers run in a process of their own, keep their
connections as a reverse proxy does, and ask for another recipient's link each time. PostgreSQL is not asked: links lead where their
signature says.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import asyncpg
import uvloop

from config.keys import Keyring
from config.settings import Mail
from domain import links
from domain.links import LinkParts
from inbound.postback import Postbacks
from inbound.requests import Requests
from inbound.tracking import Keys, Tracker
from inbound.web import Web, WebServer
from inbound.web_view import WebView
from journal.visits import Visits
from store.postgres import Pool

GOAL: Final = 5000  # GETs a second of one core
KEYRING: Final = Keyring(bytes(range(32)))
_LINKS: Final = 20_000
_HEAD: Final = "Host: go.example\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) Firefox/148.0\r\nAccept: */*\r\n\r\n"
_URL: Final = "https://shop.example/offer"


def paths(kind: str) -> list[str]:
    """Links of one kind, each of another recipient."""
    derive = KEYRING.derive
    people = [LinkParts(3, 7, number) for number in range(1, _LINKS + 1)]
    if kind == "open":
        return [f"/o/{links.token(derive('open'), each)}" for each in people]
    part = links.link_part(derive("click-link"), 3, 7, 1)
    tokens = [links.token(derive("click"), each) + part for each in people]
    return [f"/c/{token}/{links.seal_destination(derive('click-destination'), token, _URL)}" for token in tokens]


def ask(address: tuple[str, int], kind: str, clients: int, seconds: float, told: Connection) -> None:
    """The peers' process: tells how many answers came, and how many were not what they should be."""
    told.send(uvloop.run(_ask(address, [f"GET {path} HTTP/1.1\r\n{_HEAD}".encode() for path in paths(kind)], clients, seconds)))


async def _ask(address: tuple[str, int], requests: list[bytes], clients: int, seconds: float) -> tuple[int, int]:
    counts = [0, 0]
    until = time.monotonic() + seconds

    async def one(start: int) -> None:
        reader, writer = await asyncio.open_connection(*address)
        at = start
        while time.monotonic() < until:
            writer.write(requests[at % len(requests)])
            at += clients
            async with asyncio.timeout(10):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
            counts[head.split(b" ", 2)[1] not in (b"200", b"302")] += 1
        writer.close()

    await asyncio.gather(*(one(start) for start in range(clients)))
    return counts[0], counts[1]


async def measure(pool: Pool, directory: Path, kind: str, clients: int, seconds: float) -> dict[str, Any]:
    """GETs of one kind against a web side of its own."""
    visits = Visits(directory / kind)
    tracker = Tracker(pool, Keys.derived(KEYRING.derive), visits.add)
    url = "http://127.0.0.1:8080"

    async def changed() -> None:
        """Nobody listens."""

    postbacks = Postbacks(pool, KEYRING.derive)
    view = WebView(pool, KEYRING, url, Mail())
    site = Web(KEYRING.derive("unsubscribe"), changed, tracker, view, postbacks, Requests(visits, postbacks))
    server = WebServer(site, "127.0.0.1", 0)
    await server.start()
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    peers = multiprocessing.get_context("spawn").Process(target=ask, args=(server.address, kind, clients, seconds, there))
    peers.start()
    while not visits.recorded:  # until the first request: starting the peers is not measured
        await asyncio.sleep(0.01)
    cpu, wall = time.process_time(), time.monotonic()
    while not here.poll():
        await asyncio.sleep(0.02)
    used, took = time.process_time() - cpu, time.monotonic() - wall
    answered, wrong = here.recv()
    await asyncio.to_thread(peers.join, 10)
    await server.stop()
    visits.close()
    return {
        "kind": kind, "answered": answered, "wrong": wrong, "recorded": visits.recorded, "per_second": round(answered / took),
        "cpu_us": round(1e6 * used / max(1, answered), 1), "per_second_and_core": round(answered / used) if used else 0,
    }  # fmt: skip


async def run(clients: int, seconds: float) -> list[dict[str, Any]]:
    """Opens, then clicks."""
    pool: Pool = await asyncpg.create_pool("postgresql://nobody@127.0.0.1:1/nothing", min_size=0, max_size=1)  # away
    with tempfile.TemporaryDirectory() as directory:
        return [await measure(pool, Path(directory), kind, clients, seconds) for kind in ("open", "click")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = uvloop.run(run(given.clients, given.seconds))
    if given.json:
        json.dump(found, sys.stdout, indent=1)
        return
    for each in found:
        sys.stdout.write(
            f"{each['kind']:5}  {each['per_second']:>7,} GET/s  {each['cpu_us']:>6} us of CPU each  "
            f"{each['per_second_and_core']:>7,}/s of one core (goal {GOAL:,})  {each['recorded']:,} written, {each['wrong']} wrong\n"
        )


if __name__ == "__main__":
    main()
