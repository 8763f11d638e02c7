"""Faults of what surrounds a fleet: packets, certificates, name servers, clocks, and many readers (rows 30, 32, 34, 35, 40)."""

import asyncio
import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import redis.exceptions

from bench.chaos.fault import Fault, Scene, Step
from bench.chaos.peer_faults import operator_acts
from bench.chaos.store_faults import start_postgres, stop_postgres
from config.keys import load_keyring
from domain import links
from inbound.tracking import Keys
from store import redis_keys

_LOSS_PERCENT: Final = 30
_HOUR: Final = 3600
_DECADE: Final = 87660 * _HOUR
_DEFERRED_PERCENT: Final = 2.0  # while a clock is wrong, so that retries are planned by it
_BESIDE_SECONDS: Final = 2.5  # an engine says every second what time it is
_MOST_RECORDS: Final = 8  # of one recipient: 2 of 100 tries are deferred
_READERS: Final = 32
_BURST_SECONDS: Final = 5.0
_COUNTED_SECONDS: Final = 30.0  # for opens and clicks to reach PostgreSQL
_LENGTH: Final = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


# --- packets (row 30) -------------------------------------------------------------------------------------------------------


async def lose_packets(scene: Scene) -> None:
    """30 of 100 packets between engines and sinks vanish, each way."""
    assert scene.fleet.network is not None
    ports = [int(sink.words["smtp"].rpartition(":")[2]) for sink in scene.fleet.sinks]
    await scene.fleet.network.lose(_LOSS_PERCENT, ports)


async def keep_packets(scene: Scene) -> None:
    """Nothing is lost any more."""
    assert scene.fleet.network is not None
    lost = await scene.fleet.network.lost()
    await scene.fleet.network.heal()
    scene.notes.append(f"{lost:,} packets lost")
    if not lost:
        scene.did_not_happen("the packet filter dropped nothing")


# --- certificates (row 32) --------------------------------------------------------------------------------------------------


def _impostor(wrong: str) -> Step:
    """Somebody else answers at the address of every delivery server, with a certificate that is not right."""

    async def step(scene: Scene) -> None:
        host, _, port = scene.fleet.impostors[wrong].words["smtp"].rpartition(":")
        scene.memory["wrong"] = wrong
        scene.memory["targets"] = [link.target for link in scene.fleet.smtp_links]
        for link in scene.fleet.smtp_links:
            link.target = (host, int(port))
            link.reset()

    return step


async def unmask(scene: Scene) -> None:
    """The right servers again, and an operator has looked: no engine goes on trying by itself what only he can mend."""
    for link, target in zip(scene.fleet.smtp_links, scene.memory["targets"], strict=True):
        link.target = target
        link.reset()
    counters = await scene.fleet.counters_of(scene.fleet.impostors[scene.memory["wrong"]])
    met = counters["connections"]["total"]
    scene.notes.append(f"{met} connections to the impostor, {counters['messages']} messages")
    if not met:
        scene.did_not_happen("no engine met the wrong certificate")
    if counters["messages"]:
        scene.broken.append(f"S13: {counters['messages']} messages were given to a server whose certificate is not right")
    await operator_acts(scene)


# --- names (row 34) ---------------------------------------------------------------------------------------------------------


def _names(mode: str) -> Step:
    """The name server answers badly, one engine has forgotten what it knew, and every connection has to be opened anew."""

    async def step(scene: Scene) -> None:
        fleet = scene.fleet
        assert fleet.names is not None
        fleet.names.mode = mode
        scene.memory["asked"] = fleet.names.asked
        engine = scene.rng.choice(fleet.engines)
        engine.send(signal.SIGTERM)
        await engine.gone(30.0)
        for link in fleet.smtp_links:
            link.reset()
        await engine.ready()

    return step


async def right_names(scene: Scene) -> None:
    """Good answers again; where the name server had said that there is no such host, an operator has looked, too."""
    names = scene.fleet.names
    assert names is not None
    asked, mode = names.asked - scene.memory["asked"], names.mode
    names.mode = "good"
    scene.notes.append(f"{asked} questions answered badly")
    if not asked:
        scene.did_not_happen("no engine asked the name server")
    if mode in ("nxdomain", "loop"):
        await operator_acts(scene)


# --- clocks (row 35) --------------------------------------------------------------------------------------------------------


def _jump(text: str) -> Step:
    """The wall clock of one engine jumps; some recipients are deferred meanwhile, so that retries are planned by that engine."""

    async def step(scene: Scene) -> None:
        name = scene.rng.choice(sorted(scene.fleet.clocks))
        scene.memory["name"] = name
        await scene.fleet.script([{"stage": "rcpt", "reply": "451 4.3.0 Later", "percent": _DEFERRED_PERCENT}])
        scene.fleet.clocks[name].set(text or f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}")

    return step


async def right_clock(scene: Scene) -> None:
    """The clock is right again. What the engine says of the time before that tells whether it was wrong."""
    name, wrong, deadline = scene.memory["name"], 0.0, time.monotonic() + 5.0
    while abs(wrong) < _BESIDE_SECONDS and time.monotonic() < deadline:
        wrong = await _beside(scene, name)
        await asyncio.sleep(0.2)
    scene.fleet.clocks[name].set("+0")
    await scene.fleet.script([])
    scene.notes.append(f"{name} was {wrong:+,.0f} s beside the time")
    if abs(wrong) < _BESIDE_SECONDS:
        scene.did_not_happen("the engine's clock went right")


async def _beside(scene: Scene, engine: str) -> float:
    """How far the time in an engine's heartbeat is from ours; 0 when there is none to read."""
    with contextlib.suppress(redis.exceptions.RedisError, OSError, TimeoutError):
        async with scene.fleet.stores.redis() as client:
            keys = [key async for key in client.scan_iter(match=redis_keys.ENGINE_STATUS_PATTERN)]
            beats = [json.loads(value) for value in (await client.mget(keys) if keys else []) if value]
        slot = engine.rpartition(".")[2]
        return max((beat["at"] - time.time() for beat in beats if beat["id"].split(".")[-2] == slot), key=abs, default=0.0)
    return 0.0


async def clock_did_no_harm(scene: Scene) -> None:
    """No record bears the wrong time, no retry waits for it, and nobody was tried again and again because of it."""
    row: Any = await scene.fleet.pool.fetchrow(
        "select (select count(*) from accounting where campaign_id = any($1) and abs(extract(epoch from now() - at)) > 2700), "
        "(select count(*) from retries where campaign_id = any($1) and due_at > now() + interval '10 minutes'), "
        "(select max(n) from (select count(*) as n from accounting where campaign_id = any($1) group by recipient) s)",
        scene.load.campaigns, timeout=60,
    )  # fmt: skip
    if row[0] or row[1]:
        scene.broken.append(f"{row[0]} records bear the time of the wrong clock, {row[1]} retries wait for it")
    if (row[2] or 0) > _MOST_RECORDS:
        scene.broken.append(f"a recipient has {row[2]} records: a storm of retries")


# --- readers (row 40) -------------------------------------------------------------------------------------------------------


async def burst_of_readers(scene: Scene) -> None:
    """PostgreSQL is away, and everybody opens and follows links at once: each gets an answer, none is forgotten."""
    fleet = scene.fleet
    await fleet.pool.executemany(
        "insert into campaign_links (campaign_id, link, url) values ($1, 1, 'https://island.example/timetable')",
        [(campaign,) for campaign in scene.load.campaigns],
    )
    paths = _paths(scene)
    # One click each, for the addresses of the campaigns' links: an inbound that never saw a campaign must look them up
    first = [next(paths[index]) for index in range(len(paths))]
    answers = [await _read(fleet.inbound_http_port, iter([path]), time.monotonic() + 10.0) for path in first]
    if sum(bad for _, bad in answers):
        scene.broken.append("a link was not followed before the fault")
    await stop_postgres(scene)
    began = time.monotonic()
    found = await asyncio.gather(*(_read(fleet.inbound_http_port, paths[n % len(paths)], began + _BURST_SECONDS) for n in range(_READERS)))
    took = time.monotonic() - began
    good, bad = sum(one for one, _ in found), sum(one for _, one in found)
    scene.memory["counted"] = good + sum(one for one, _ in answers)
    scene.notes.append(f"{good:,} opens and clicks answered in {took:.1f} s while PostgreSQL was away, {good / took:,.0f} a second")
    if bad:
        scene.broken.append(f"{bad} opens or clicks were not answered as they should while PostgreSQL was away")
    if not good:
        scene.did_not_happen("nobody could read")


def _paths(scene: Scene) -> list[Iterator[str]]:
    fleet = scene.fleet
    keys = Keys.derived(load_keyring(fleet.settings).derive)
    return [_Paths(keys, fleet.user_id, campaign) for campaign in scene.load.campaigns]


class _Paths(Iterator[str]):
    """Addresses of opens and clicks of one campaign, each another recipient's."""

    def __init__(self, keys: Keys, user_id: int, campaign: int) -> None:
        self._keys = keys
        self._user_id = user_id
        self._campaign = campaign
        self._number = 0

    def __next__(self) -> str:
        """In turns: a link of the campaign, a link of the recipient's own, an open."""
        self._number += 1
        keys, parts = self._keys, links.LinkParts(self._user_id, self._campaign, self._number)
        if self._number % 3 == 0:
            return links.PATHS["open"] + links.token(keys.open, parts)
        token = links.token(keys.click, parts) + links.link_part(keys.link, self._user_id, self._campaign, 1)
        own = "" if self._number % 3 == 1 else "/" + links.seal_destination(keys.destination, token, "https://island.example/pier")
        return links.PATHS["click"] + token + own


async def _read(port: int, paths: Iterator[str], until: float) -> tuple[int, int]:
    """One reader after the other on one connection; (well answered, badly answered)."""
    good = bad = 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(until - time.monotonic() + 20.0):
            for path in paths:
                writer.write(b"GET %b HTTP/1.1\r\nHost: island\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n\r\n" % path.encode())
                head = await reader.readuntil(b"\r\n\r\n")
                length = _LENGTH.search(head)
                await reader.readexactly(int(length[1]) if length else 0)
                if head[9:12] in (b"200", b"302"):
                    good += 1
                else:
                    bad += 1
                if time.monotonic() > until:
                    break
    except (OSError, EOFError, TimeoutError):
        bad += 1
    finally:
        writer.close()
    return good, bad


async def every_reader_is_counted(scene: Scene) -> None:
    """What was answered is in PostgreSQL, once each."""
    deadline, wanted, found = time.monotonic() + _COUNTED_SECONDS, scene.memory.get("counted", 0), 0
    while time.monotonic() < deadline:
        found = await scene.fleet.pool.fetchval("select count(*) from events where campaign_id = any($1)", scene.load.campaigns, timeout=60)
        if found >= wanted:
            break
        await asyncio.sleep(0.2)
    scene.notes.append(f"{found:,} of {wanted:,} in PostgreSQL afterwards")
    if found != wanted:
        scene.broken.append(f"{wanted:,} opens and clicks were answered, {found:,} are in PostgreSQL")


def _clock(name: str, about: str, text: str) -> Fault:
    return Fault(
        name=name, row=35, about=about, inject=_jump(text), heal=right_clock, hold=(4.0, 6.0), proof=clock_did_no_harm, duplicates="named",
        needs=frozenset({"faketime", "own-sink"}), mixed=True,
    )  # fmt: skip


def _named(name: str, about: str, mode: str) -> Fault:
    return Fault(name=name, row=34, about=about, inject=_names(mode), heal=right_names, hold=(4.0, 6.0), duplicates="named",
                 needs=frozenset({"named", "own-sink", "proxied"}))  # fmt: skip


def _certified(name: str, about: str, wrong: str) -> Fault:
    return Fault(name=name, row=32, about=about, inject=_impostor(wrong), heal=unmask, hold=(3.0, 5.0), duplicates="named",
                 needs=frozenset({"named", "own-sink", "proxied", "starttls", "verified"}))  # fmt: skip


FAULTS: Final = (
    Fault(name="packet-loss", row=30, about="30 of 100 packets lost each way", inject=lose_packets, heal=keep_packets, hold=(6.0, 8.0),
          duplicates="named", needs=frozenset({"lossy", "own-sink"})),
    _certified("certificate-wrong-name", "a certificate for another name", "wrong-name"),
    _certified("certificate-expired", "a certificate that expired yesterday", "expired"),
    _named("dns-servfail", "SERVFAIL for every name", "servfail"),
    _named("dns-silent", "the name server does not answer", "silent"),
    _named("dns-nxdomain", "no such name, until an operator acts", "nxdomain"),
    _named("dns-many-records", "1,000 addresses, nobody at 999 of them", "many"),
    _named("dns-cname-loop", "names that point at each other, until an operator acts", "loop"),
    _clock("clock-forward", "one engine's clock an hour ahead", f"+{_HOUR}"),
    _clock("clock-back", "one engine's clock an hour behind", f"-{_HOUR}"),
    _clock("clock-decade", "one engine's clock ten years ahead", f"+{_DECADE}"),
    _clock("clock-stuck", "one engine's clock stands still", ""),
    Fault(name="readers-burst", row=40, about="opens and clicks in crowds while PostgreSQL is away", inject=burst_of_readers,
          heal=start_postgres, proof=every_reader_is_counted, needs=frozenset({"own-postgres", "supervised"})),
)  # fmt: skip
