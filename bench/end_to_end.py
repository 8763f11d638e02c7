"""The engine end to end: real processes, private PostgreSQL and Valkey with their usual durability, the sink as the way out.

Everything that a campaign needs is on: feeder, queue, leases, suppression check, personalisation, signed return path and unsubscribe
tokens, journal with fsync, ledger, accounting files, heartbeats. CPU counts from the start of the campaign until the ledger has its last
outcome and the accounting files were flushed; starting processes and compiling are outside, and a small campaign before warms up the
connections. Rates come from the times of the outcomes themselves.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from bench import measure, newsletter
from bench.measure import Sample
from compose import dkim_keys
from config.keys import Keyring
from config.settings import Settings
from control import machine
from control.supervise import Child, Supervisor
from domain.dkim import seal_context
from domain.errors import Unavailable
from store import accounting, batch_queue, dkim, embedded, migrate, postgres
from store.embedded import Backends

WARM_UP: Final = 2000
_QUIET_SECONDS: Final = 60.0
FLUSH_SECONDS: Final = 1.2  # accounting files are flushed once a second
_INSERT: Final = (
    "insert into campaigns (user_id, name, state, list_id, delivery_server_id, subject, from_name, from_email, text, html, started_at, "
    "track_links, track_opens) values ($1, $2, 'preparing', $3, $4, $5, $6, $7, $8, $9, now(), true, true) returning id"
)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One way to send."""

    name: str
    recipients: int
    connections: int = 20  # over all engines
    window: int = 0  # 0: DATA, else BDAT with so many messages in flight
    security: str = "none"
    delay_ms: float = 0.0  # how much later the sink answers
    repeat: int = 1  # how often the body's stories stand in the letter: 10 makes about 100 kB
    domains: int = 0  # 0: not signed; else so many campaigns at once, each signed with the RSA-2048 key of a domain of its own


class Bench:
    """Stores, engines and sinks of one run; cases are measured one after the other."""

    def __init__(self, backends: Backends, directory: Path) -> None:
        self._backends = backends
        self._directory = directory
        self._engines: Supervisor | None = None
        self._sinks: dict[float, tuple[Supervisor, str, str]] = {}
        self._lists: dict[int, int] = {}
        self._pool: postgres.Pool
        self._redis: Any
        self._user = 0
        self._secret = secrets.token_bytes(32)  # of these engines' installation
        self._signing = 0  # domains that have a key
        self.message_bytes = len(newsletter.wire()[2])

    async def open(self) -> None:
        """Migrate the database and connect."""
        await migrate.apply(self._backends.database_url)
        self._pool = await postgres.open_pool(self._backends.database_url, 3, 60.0)
        self._redis = batch_queue.connect(self._backends.redis_url, 5.0)
        self._user = await self._pool.fetchval("insert into users (name) values ('bench') returning id")

    @property
    def pool(self) -> postgres.Pool:
        """Of this run's database."""
        return self._pool

    @property
    def redis(self) -> Any:
        """A client of this run's queue."""
        return self._redis

    async def close(self) -> None:
        """Stop every process."""
        if self._engines is not None:
            await self._engines.stop()
        for sink, _, _ in self._sinks.values():
            await sink.stop()
        with contextlib.suppress(AttributeError):
            await self._redis.aclose()
            await self._pool.close()

    def _supervisor(self, children: list[Child], more: dict[str, str] | None = None) -> Supervisor:
        # A run that dies must not leave its processes behind: the supervisor's children end with us.
        own = {
            "SLUICE_NODE__STATE_DIRECTORY": str(self._directory),
            "SLUICE_INBOUND__PUBLIC_URL": "http://127.0.0.1:8080",
            "SLUICE_ENGINE__METRICS_PORT": "0",
            "SLUICE_SECRETS__KEY": self._secret.hex(),
            **(more or {}),
        }
        environment = machine.environment(None, database_url=self._backends.database_url, redis_url=self._backends.redis_url, more=own)
        environment.pop("SLUICE_CONFIG", None)
        return Supervisor(children, environment=environment, say=lambda sentence: None, log_directory=self._directory / "log")

    async def engines(self, count: int, *, lanes: bool = True) -> None:
        """Let exactly `count` new engines run; without `lanes` RSA signatures are OpenSSL's whatever is installed. 0: stop them."""
        if self._engines is not None:
            await self._engines.stop()
            self._engines = None
        if count:
            children = machine.children(Settings(), engines=count)
            more = {} if lanes else {"SLUICE_DKIM_LANES": "off"}
            self._engines = self._supervisor([child for child in children if child.name.startswith("engine.")], more)
            await self._engines.start()

    async def sink(self, delay_ms: float) -> tuple[str, str, int]:
        """(SMTP address, HTTP address, process id) of a sink that answers so much later."""
        if delay_ms not in self._sinks:
            argv = machine.python("bench.sink", "--port", "0", "--http-port", "0", "--reply-delay", str(delay_ms), "--keep", "0")
            made = self._supervisor([Child(name=f"sink.{delay_ms:g}", argv=argv, ready="sink ready")])
            ready = (await made.start())[f"sink.{delay_ms:g}"]
            self._sinks[delay_ms] = (made, ready["smtp"], ready["http"])
        supervisor, smtp, http = self._sinks[delay_ms]
        return smtp, http, next(iter(supervisor.pids().values()))

    def engine_pids(self) -> list[int]:
        """Process ids of the engines that run."""
        return list(self._engines.pids().values()) if self._engines is not None else []

    def store_pids(self) -> list[int]:
        """Process ids of PostgreSQL and Valkey: whatever runs under us and is no engine and no sink."""
        return [pid for pid in measure.descendants(os.getpid()) if pid not in (*self.engine_pids(), *self._sink_pids(), os.getpid())]

    def pin(self) -> bool:
        """With one engine and two cores or more: the engine alone on the first, everything else on the others. Tells whether it did."""
        cores, engines = measure.cores(), self.engine_pids()
        apart = len(cores) > 1 and len(engines) == 1
        for pid in measure.descendants(os.getpid()):
            if pid != os.getpid():
                measure.pin(pid, cores if not apart else cores[:1] if pid in engines else cores[1:])
        return apart

    # --- what is sent -----------------------------------------------------------------------------------------------------
    async def _list(self, count: int) -> int:
        if count not in self._lists:
            made = await self._pool.fetchval(
                "insert into lists (user_id, name) values ($1, $2) returning id", self._user, f"readers {count}"
            )
            records = [(self._user, made, email, email, json.dumps(data)) for email, data in newsletter.rows(count)]
            async with self._pool.acquire() as connection:
                await connection.copy_records_to_table(
                    "subscribers", records=records, columns=("user_id", "list_id", "email", "email_key", "data"), timeout=120
                )
                await connection.execute("analyze subscribers")
            self._lists[count] = made
        return self._lists[count]

    async def _server(self, case: Case, smtp: str) -> int:
        host, _, port = smtp.rpartition(":")
        limits = {"max_connections": case.connections, "chunking": case.window > 0, "bdat_window": max(case.window, 1)}
        made = await self._pool.fetchval(
            "insert into delivery_servers (user_id, name, host, port, security, mfrom, limits, link_domain, open_domain) "
            "values ($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8, $8) returning id",
            self._user, f"{case.name} {time.time_ns()}", host, int(port), case.security, newsletter.MFROM, json.dumps(limits),
            newsletter.LINK_DOMAIN,
        )  # fmt: skip
        await self._pool.execute("update egress_version set version = version + 1")
        await batch_queue.publish_change(self._redis, "egress")
        return int(made)

    async def _keys(self, domains: int) -> None:
        """Let so many sender domains have an RSA-2048 key that signs."""
        keyring = Keyring(self._secret)
        for number in range(self._signing, domains):
            made = await asyncio.to_thread(dkim_keys.make, "rsa-sha256")
            await dkim.create(
                self._pool, self._user, domain=signed_domain(number), selector="s1", algorithm="rsa-sha256", bits=made.bits,
                public_key=made.public_key, seal=partial(_seal, keyring, made.private_key), activate=True,
            )  # fmt: skip
            self._signing = number + 1

    async def insert_campaign(self, connection: postgres.PooledConnection, case: Case, server: int, *, recipients: int = 1,
                              sender: str = newsletter.FROM_EMAIL) -> int:  # fmt: skip
        """A campaign that is started, to a list of so many recipients; the first engine that sees it numbers them. Returns its id."""
        html = newsletter.HTML if case.repeat == 1 else newsletter.long_html(case.repeat)
        made = await connection.fetchval(
            _INSERT, self._user, case.name, await self._list(recipients), server, newsletter.SUBJECT, newsletter.FROM_NAME, sender,
            newsletter.TEXT, html,
        )  # fmt: skip
        return int(made)

    async def _start(self, case: Case, server: int, recipients: int) -> list[int]:
        """Start what `case` says, to so many recipients altogether; returns the ids of the campaigns."""
        count = max(case.domains, 1)
        each = max(1, recipients // count)
        started = []
        await self._list(each)
        async with postgres.transaction(self._pool) as connection:
            for number in range(count):
                sender = f"letter@{signed_domain(number)}" if case.domains else newsletter.FROM_EMAIL
                started.append(await self.insert_campaign(connection, case, server, recipients=each, sender=sender))
        await batch_queue.publish_change(self._redis, "campaigns")
        return started

    async def _send(self, case: Case, server: int, recipients: int) -> list[int]:
        """Start what `case` says and wait until the ledger has all outcomes; returns the ids of the campaigns."""
        campaigns = await self._start(case, server, recipients)
        wanted = max(1, recipients // len(campaigns)) * len(campaigns)
        moved, last = time.monotonic(), -1
        while True:
            done, others = 0, 0
            for campaign in campaigns:
                totals = await accounting.totals(self._pool, campaign)
                done += totals.delivered
                others += totals.bounced + totals.expired + totals.deferrals + totals.uncertain
            self.check(case.name)
            if others:
                raise Unavailable(f"{case.name}: {others} messages were not delivered; the logs are in {self._directory / 'log'}")
            if done >= wanted:
                return campaigns
            if done != last:
                moved, last = time.monotonic(), done
            elif time.monotonic() - moved > _QUIET_SECONDS:
                raise Unavailable(f"{case.name}: nothing moved for {_QUIET_SECONDS:g} s; the logs are in {self._directory / 'log'}")
            await asyncio.sleep(0.05 if len(campaigns) == 1 else 0.5)

    def check(self, name: str) -> None:
        """Raises Unavailable when an engine has ended by itself."""
        if self._engines is not None and self._engines.restarts():
            raise Unavailable(f"{name}: an engine ended by itself; its log is in {self._directory / 'log'}")

    # --- measuring ---------------------------------------------------------------------------------------------------------
    async def prepare(self, case: Case) -> int:
        """Everything before the timed part: sink, list, delivery server, a small campaign for warmth. Returns the server's id."""
        smtp, _, _ = await self.sink(case.delay_ms)
        await self._list(max(1, case.recipients // max(case.domains, 1)))
        await self._keys(case.domains)
        server = await self._server(case, smtp)
        self.pin()
        await self._send(case, server, min(WARM_UP, max(case.recipients // 2, 1)))
        return server

    async def once(self, case: Case, server: int) -> Sample:
        """Send one campaign. Raises Unavailable unless the sink has counted every message, and none twice."""
        _, http, sink = await self.sink(case.delay_ms)
        self.pin()
        before = await asyncio.to_thread(_counters, http)
        engines = self.engine_pids()
        stores = self.store_pids()
        watch = measure.Watch()
        cpu, sink_cpu, store_cpu = measure.cpu_seconds(*engines), measure.cpu_seconds(sink), measure.cpu_seconds(*stores)
        campaigns = await self._send(case, server, case.recipients)
        await asyncio.sleep(FLUSH_SECONDS)
        _, foreign = watch.stop()
        cpu, sink_cpu = measure.cpu_seconds(*engines) - cpu, measure.cpu_seconds(sink) - sink_cpu
        store_cpu = measure.cpu_seconds(*stores) - store_cpu
        after = await asyncio.to_thread(_counters, http)
        if after["messages"] - before["messages"] != case.recipients or after["duplicates"] != before["duplicates"]:
            raise Unavailable(f"{case.name}: the sink counted {after['messages'] - before['messages']} of {case.recipients} messages")
        seconds = await self._pool.fetchval(
            "select extract(epoch from max(at) - min(at))::float8 from accounting where campaign_id = any($1)", campaigns
        )
        return Sample(
            messages=case.recipients,
            seconds=max(seconds, 1e-6) + case.delay_ms / 1e3,  # the first outcome came one round trip after its message
            cpu_seconds=cpu,
            sink_seconds=sink_cpu,
            store_seconds=store_cpu,
            foreign=foreign,
            connections=after["connections"]["max"] if case.connections > 100 else None,
            memory=max(measure.memory(pid)[1] for pid in engines),
        )

    async def measure(self, case: Case, runs: int) -> list[Sample]:
        """Send the letter `runs` times the way `case` says."""
        server = await self.prepare(case)
        return [await self.once(case, server) for _ in range(runs)]

    def _sink_pids(self) -> list[int]:
        return [pid for supervisor, _, _ in self._sinks.values() for pid in supervisor.pids().values()]


def signed_domain(number: int) -> str:
    """A sender domain that has a key, or gets one."""
    return f"signed{number}.example"


def _seal(keyring: Keyring, private_key: bytes, key_id: int) -> bytes:
    return keyring.seal(private_key, seal_context(key_id))


def _counters(http: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{http}/api/v1/counters", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@contextlib.contextmanager
def private() -> Iterator[tuple[Backends, Path]]:
    """Stores of one's own in a directory of one's own, both gone at the end."""
    directory = Path(tempfile.mkdtemp(prefix="sluice-bench-"))
    directory.chmod(0o711)  # private PostgreSQL runs as another user when we are root
    os.environ.pop("SLUICE_CONFIG", None)
    try:
        with embedded.resolve("embedded:", "embedded:", directory) as backends:
            yield backends, directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.asynccontextmanager
async def opened(backends: Backends, directory: Path) -> AsyncIterator[Bench]:
    """A bench whose processes are gone at the end."""
    bench = Bench(backends, directory)
    try:
        await bench.open()
        yield bench
    finally:
        await bench.close()
