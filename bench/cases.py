"""What `python -m bench` measures, group by group; docs/performance.md explains the rows, `bench.goals` judges them."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from bench import bench_dkim, deep_queue, goals, measure, peers, relays
from bench.deep_queue import DeepQueue
from bench.end_to_end import Bench, Case
from bench.measure import Row, Sample
from compose import dkim_keys, signing_lanes
from domain.errors import SluiceError

WINDOW: Final = 5  # BDAT messages in flight: so many letters fit into the 64 KiB that leave in one write
FILES_FOR_5000: Final = 5200  # descriptors
NO_LANES: Final = "no 8 lanes here: they need pip install 'sluice[dkim-lanes]' and a processor with AVX-512 IFMA"
SHARED: Final = "queue to accounting, sink and stores on the same cores"
# Recipients of a campaign, and of one in a quick run: many, because to begin and to end one costs an engine 50 ms (a row says so)
_PLAIN, _OPENSSL, _LANES = (120_000, 60_000), (20_000, 5_000), (40_000, 15_000)
_IDLE: Final = 4000

# name, what it measures and for which goals, minutes with three runs of each case
GROUPS: Final[dict[str, tuple[str, float]]] = {
    "core": ("floor, smtp-source and the engine, run by run (goal 1)", 1),
    "signed": ("one signature alone; signed by OpenSSL, by 8 lanes, for 100 domains (3, 4)", 2),
    "delay": ("reply delays of 20 and 80 ms (6)", 1.5),
    "modes": ("BDAT, STARTTLS, messages of 100 kB (7)", 1),
    "keys": ("composition with 10,000 DKIM keys and with 100 keys of 100 domains in turn (7)", 1),
    "connections": ("5,000 connections at 50 ms, memory of idle ones (10)", 1),
    "peers": ("aiosmtplib, smtplib, nodemailer with and without DKIM (2, 4)", 3),
    "relays": ("Postfix with and without opendkim, Haraka (2, 4)", 2),
    "two": ("two engines on two cores, signed and not (5, 8, 12)", 2),
    "deep": ("100,000 and 10 million recipients queued; needs 10 GB of disk (9)", 8),
    "parts": ("composition, Liquid, reply parser, journal, stores alone (11)", 1),
}
QUICK: Final = ("core", "signed", "delay")


class Run:
    """One run: groups in order, rows as they come (`said` is called with each)."""

    def __init__(
        self, bench: Bench, directory: Path, said: Callable[[Row], None], *, runs: int, quick: bool, groups: list[str], texts: list[str],
        node_directory: Path | None = None,
    ) -> None:  # fmt: skip
        self._bench = bench
        self._directory = directory
        self._said = said
        self._runs = runs
        self._quick = quick
        self._groups = groups
        self._texts = texts
        self._node_directory = node_directory
        self._group = ""
        self._others: peers.Peers
        self.rows: list[Row] = []

    def _wants(self, *names: str) -> bool:
        """Whether one of these rows is wanted: its group is, or its name contains what was asked for."""
        return self._group in self._groups or any(text in name for name in names for text in self._texts)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._said(row)

    async def _engine(self, case: Case, runs: int = 0, *, note: str = "") -> None:
        if not self._wants(case.name):
            return
        try:
            self._add(measure.row(case.name, await self._bench.measure(case, runs or self._runs), note=note))
        except SluiceError as error:
            self._add(measure.skipped(case.name, str(error)))

    async def _peer(self, name: str, once: Callable[[], Sample], *, note: str = "") -> None:
        if self._wants(name):
            runs = self._runs
            self._add(await asyncio.to_thread(peers.rows_of, name, lambda: [once() for _ in range(runs)], note=note))

    async def _against(self, name: str, once: Callable[[], Sample], case: Case, *, note: str = "") -> None:
        """A peer with the engine beside it."""
        if not self._wants(name):
            return
        try:
            others, engine = await self._beside(once, case)
        except (SluiceError, *peers.CANNOT_RUN) as error:
            self._add(measure.skipped(name, str(error)))
            return
        self._add(_with(measure.row(name, others, note=note), "the engine", engine))

    async def everything(self) -> None:
        """All groups that are wanted."""
        smtp, http, sink = await self._bench.sink(0.0)
        port = int(smtp.rpartition(":")[2])
        self._others = peers.Peers(port, http, sink, self._directory, self._node_directory)
        await self._bench.engines(1)
        works: dict[str, Callable[[], Awaitable[None]]] = {
            "core": self._core, "signed": self._signed, "delay": self._delay, "modes": self._modes, "keys": self._keys,
            "connections": self._connections, "peers": self._peers, "relays": self._relays, "two": self._two, "deep": self._deep,
        }  # fmt: skip
        for self._group, work in works.items():
            if self._group in self._groups or self._texts:
                await work()
        await self._bench.engines(0)

    def _many(self, recipients: tuple[int, int]) -> int:
        return recipients[self._quick]

    async def _beside(self, first: Callable[[], Sample], case: Case) -> tuple[list[Sample], list[Sample]]:
        """Something else and the engine, run by run, because their ratio is what matters."""
        server = await self._bench.prepare(case)
        others, engine = [], []
        for _ in range(self._runs):
            others.append(await asyncio.to_thread(first))
            engine.append(await self._bench.once(case, server))
        return others, engine

    # --- groups -------------------------------------------------------------------------------------------------------------
    async def _core(self) -> None:
        if not self._wants(goals.FLOOR, goals.SOURCE, goals.ENGINE):
            return
        others, recipients = self._others, self._many(_PLAIN)
        missing = "" if peers.smtp_source_path() else peers.NO_SMTP_SOURCE
        floor: list[Sample] = []

        def before() -> Sample:
            floor.append(others.floor(recipients))
            return floor[-1] if missing else others.smtp_source(recipients)

        source, engine = await self._beside(before, Case(name=goals.ENGINE, recipients=recipients))
        self._add(measure.row(goals.FLOOR, floor))
        self._add(measure.skipped(goals.SOURCE, missing) if missing else measure.row(goals.SOURCE, source))
        self._add(measure.row(goals.ENGINE, engine))

    async def _signed(self) -> None:
        hundred = "engine, DATA, signed RSA-2048, 100 domains"
        if not self._wants(goals.SIGNATURE, goals.OPENSSL, goals.LANES, hundred):
            return
        cost = Signature()
        signatures: list[Sample] = []
        lanes = signing_lanes.load() is not None
        for name, on in ((goals.OPENSSL, False), (goals.LANES, True)):
            if on and not lanes:
                self._add(measure.skipped(name, NO_LANES))
                continue
            await self._bench.engines(1, lanes=on)
            case, alone, engine = self._signed_letter(on), list[Sample](), list[Sample]()
            server = await self._bench.prepare(case)
            for _ in range(self._runs):
                async with cost.beside(self._bench.engine_pids(), alone):
                    engine.append(await self._bench.once(case, server))
            signatures += alone
            self._add(_with(measure.row(name, engine), "one signature", alone))
        note = f"cryptography's OpenSSL, key parsed; {cost.AT_ONCE} in a row, on the engine's core, in pauses of it"
        self._add(measure.row(goals.SIGNATURE, signatures, note=note))
        if not self._quick:
            note = "a campaign each, at once" + (", 8 lanes" if lanes else "")
            await self._engine(Case(name=hundred, recipients=30_000 if lanes else 10_000, domains=100), note=note)
        if not lanes:
            await self._bench.engines(1)

    async def _delay(self) -> None:
        for case in (
            Case(name="engine, DATA, 10 connections, 20 ms", recipients=3000, connections=10, delay_ms=20.0),
            Case(name="engine, BDAT window 5, 10 connections, 20 ms", recipients=16_000, connections=10, window=WINDOW, delay_ms=20.0),
            Case(name="engine, DATA, 32 connections, 80 ms", recipients=2400, connections=32, delay_ms=80.0),
        ):
            await self._engine(case, 1 if self._quick else 0)

    async def _modes(self) -> None:
        others = self._others
        await self._peer("floor, BDAT window 5, 10 connections", lambda: others.floor(200_000, window=WINDOW))
        await self._engine(Case(name="engine, BDAT window 5, 10 connections", recipients=self._many(_PLAIN), connections=10, window=WINDOW))
        await self._engine(Case(name="engine, STARTTLS, DATA, 20 connections", recipients=self._many(_PLAIN), security="starttls"))
        await self._engine(Case(name="engine, DATA, a campaign of 1,000 recipients", recipients=1000))
        await self._engine(Case(name="engine, DATA, 20 connections, 100 kB", recipients=20_000, repeat=13))

    async def _keys(self) -> None:
        if not self._wants(*(name.format(way) for name in (goals.ONE_KEY, goals.MANY_KEYS) for way in goals.WAYS)):
            return
        for way in goals.WAYS:
            lanes = signing_lanes.load() if way == goals.WAYS[1] else None
            if way == goals.WAYS[1] and lanes is None:
                self._add(measure.skipped(goals.MANY_KEYS.format(way), NO_LANES))
                continue
            # Many short runs in turn: the host changes its speed within a second
            for row in await asyncio.to_thread(bench_dkim.many_keys, 400, 5 * self._runs, lanes, way):
                self._add(row)

    async def _connections(self) -> None:
        name = goals.MANY_CONNECTIONS
        if not self._wants(name, goals.IDLE):
            return
        if not raise_file_limit(FILES_FOR_5000):
            for each in (name, goals.IDLE):
                self._add(measure.skipped(each, f"needs {FILES_FOR_5000} open files (ulimit -n)"))
            return
        await self._bench.engines(1)  # with the higher limit
        await self._engine(Case(name=name, recipients=150_000, connections=5000, delay_ms=50.0))
        if self._wants(goals.IDLE):
            self._add(await asyncio.to_thread(self._idle))

    def _idle(self) -> Row:
        command = [sys.executable, "-m", "bench.idle_connections", "--port", str(self._others.port), "--connections", str(_IDLE)]
        try:
            said = self._others.run(command)
        except (OSError, subprocess.SubprocessError) as error:
            return measure.skipped(goals.IDLE, str(error))
        found = json.loads(said)
        note = "connected and handed over as by an engine, nothing sent; a process of its own"
        each = round(found["bytes_per_connection"])
        return Row(name=goals.IDLE, connections=found["connections"], bytes_per_connection=each, runs=1, note=note)

    async def _peers(self) -> None:
        others, plain, signed = self._others, *self._letters()
        await self._against(goals.AIOSMTPLIB, lambda: others.python("aiosmtplib", 1000), plain)
        await self._peer("aiosmtplib, constant octets, 20 connections", lambda: others.python("aiosmtplib-constant", 8000))
        await self._peer("smtplib + EmailMessage, 1 connection", lambda: others.python("smtplib", 1000))
        await self._peer("smtplib, constant octets, 1 connection", lambda: others.python("smtplib-constant", 5000))
        await self._against(goals.NODEMAILER, lambda: others.nodemailer(3000), plain)
        await self._against(goals.NODEMAILER_SIGNED, lambda: others.nodemailer(2000, signed=True), signed)

    def _letters(self) -> tuple[Case, Case]:
        """What the engine sends beside a peer: unsigned, and signed the best way there is."""
        signed = self._signed_letter(signing_lanes.load() is not None)
        return Case(name=goals.ENGINE, recipients=self._many(_PLAIN)), signed

    def _signed_letter(self, lanes: bool) -> Case:
        name, recipients = (goals.LANES, _LANES) if lanes else (goals.OPENSSL, _OPENSSL)
        return Case(name=name, recipients=self._many(recipients), domains=1)

    async def _relays(self) -> None:
        root, port, node, others = self._directory / "relay", self._others.port, self._node_directory, self._others
        note = "receiving from smtp-source and the disk queue included"
        plain, signed = self._letters()
        ways: tuple[tuple[str, int, Case, Callable[[], contextlib.AbstractContextManager[relays.Relay]]], ...] = (
            (goals.POSTFIX, 2000, plain, lambda: relays.postfix(root, port)),
            (goals.POSTFIX_SIGNED, 1000, signed, lambda: relays.postfix(root, port, signed=True)),
            ("Haraka relay, 1 process", 1500, plain, lambda: relays.haraka(root, port, node)),
        )
        for name, messages, case, started in ways:
            if not self._wants(name):
                continue
            relay_runs = contextlib.ExitStack()
            try:
                relay = await asyncio.to_thread(relay_runs.enter_context, started())
                await asyncio.to_thread(relays.once, relay, others, relays.WARM_UP)
                once = partial(relays.once, relay, others, messages)
                await self._against(name, once, case, note=note)
            except peers.CANNOT_RUN as error:
                self._add(measure.skipped(name, str(error)))
            finally:
                await asyncio.to_thread(relay_runs.close)

    async def _two(self) -> None:
        plain = (
            Case(name=goals.TWO, recipients=100_000),
            Case(name="2 engines, BDAT window 5, 100,000 recipients", recipients=100_000, window=WINDOW),
            Case(name=goals.TWO_LARGE, recipients=20_000, repeat=13),
        )
        signed = ((goals.OPENSSL_TWO, False), (goals.LANES_TWO, True))
        wanted = [name for name in (*(case.name for case in plain), *(name for name, _ in signed)) if self._wants(name)]
        if not wanted:
            return
        if len(measure.cores()) < 2:
            for name in wanted:
                self._add(measure.skipped(name, "this machine has one core"))
            return
        await self._bench.engines(2)
        for case in plain:
            await self._engine(case, note=SHARED)
        for name, on in signed:
            if on and signing_lanes.load() is None:
                self._add(measure.skipped(name, NO_LANES))
            elif self._wants(name):
                await self._bench.engines(2, lanes=on)
                await self._engine(msgspec.structs.replace(self._signed_letter(on), name=name), note=SHARED)
        await self._bench.engines(1)

    async def _deep(self) -> None:
        """The short queue before and behind the long one: what a host does with its memory changes while ten million are made."""
        found: dict[str, list[Sample]] = {}
        depths = ((goals.SHALLOW, deep_queue.SHALLOW), (goals.DEEP, deep_queue.DEEP), (goals.SHALLOW, deep_queue.SHALLOW))
        try:
            for name, recipients in depths:
                if self._wants(name):
                    queue = DeepQueue(self._bench, Case(name=name, recipients=20_000))
                    found.setdefault(name, []).extend(await queue.samples(recipients, self._runs))
        except (SluiceError, OSError) as error:
            self._add(measure.skipped(name, str(error)))
        for name, samples in found.items():
            self._add(measure.row(name, samples, note="windows of 80,000 messages in full flow"))


def _with(row: Row, what: str, samples: list[Sample]) -> Row:
    """`row`, with what was measured beside it."""
    row.beside_cpu_us_per_message = measure.row(what, samples).cpu_us_per_message
    row.note = "; ".join(filter(None, (row.note, f"{what} beside it: {row.beside_cpu_us_per_message} us")))
    return row


class Signature:
    """RSA-2048 signatures of OpenSSL and nothing else, on the engine's core, in short pauses of the engine.

    Not before or after it: the host changes its speed by a third within seconds. Not while it runs: what shares a core costs 3 to 7 %
    more than it does alone.
    """

    AT_ONCE: Final = 40  # 12 ms
    EVERY_SECONDS: Final = 0.5

    def __init__(self) -> None:
        key = dkim_keys.parse(dkim_keys.make("rsa-sha256").private_key)
        assert isinstance(key, rsa.RSAPrivateKey)
        self._key = key

    @contextlib.asynccontextmanager
    async def beside(self, engines: list[int], samples: list[Sample]) -> AsyncIterator[None]:
        """Sign now and then while the block runs and those processes stand still; what it took is appended to `samples`."""
        over = threading.Event()
        signing = asyncio.create_task(asyncio.to_thread(self._until, over, engines))
        try:
            yield
        finally:
            over.set()
            samples.append(await signing)

    def _until(self, over: threading.Event, engines: list[int]) -> Sample:
        """Runs in a thread, whose CPU it reads."""
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, measure.cores()[:1])  # of this thread
        signed, cpu, wall = 0, 0.0, 0.0
        try:
            while not over.wait(self.EVERY_SECONDS) or not signed:
                measure.send_signal(engines, signal.SIGSTOP)
                try:
                    began, used = time.perf_counter(), time.thread_time()
                    self._sign()
                    cpu, wall = cpu + time.thread_time() - used, wall + time.perf_counter() - began
                    signed += self.AT_ONCE
                finally:
                    measure.send_signal(engines, signal.SIGCONT)
        finally:
            os.sched_setaffinity(0, cores)
        return Sample(messages=signed, seconds=wall, cpu_seconds=cpu)

    def _sign(self) -> None:
        padding, prehashed, sign = PKCS1v15(), Prehashed(SHA256()), self._key.sign
        for number in range(self.AT_ONCE):
            sign(number.to_bytes(32, "big"), padding, prehashed)


def raise_file_limit(wanted: int) -> bool:
    """Let this process and its children open so many files. False: the hard limit is lower."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return False
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True
