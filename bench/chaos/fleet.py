"""The fleet under attack: sinks, engines, and with `supervised` everything `sluice up` runs; kept alive as a service manager would.

Process ids are those of real processes. One that ends by itself is started again half a second later; whether somebody meant it to
end is written down, because an engine that gives up under a fault is news.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from bench.chaos.load import AcceptedLog
from bench.chaos.proxy import Link
from bench.chaos.servers import children_of, die_with
from bench.chaos.stores import Stores
from bench.chaos.world import ZONE, Authority, Clock, NameServer, Network
from config import load as config_load
from config.keys import load_keyring
from config.settings import Settings
from control import machine
from control.supervise import free_ports, ready_words
from domain.errors import Unavailable
from store import postgres, users
from store.postgres import Pool

ENGINES: Final = 2
CONNECTIONS: Final = 8  # of each delivery server, over all engines
WINDOW: Final = 4  # messages in doubt per connection with BDAT; with DATA it is one
LEASE_SECONDS: Final = 4.0
_RESTART_SECONDS: Final = 0.5
_READY_SECONDS: Final = 60.0


class Way(msgspec.Struct, frozen=True):
    """One delivery server: the sink behind it, and whether it may send with BDAT."""

    name: str
    sink: int
    chunking: bool


WAYS: Final = (Way("a-bdat", 0, True), Way("a-data", 0, False), Way("b-bdat", 1, True), Way("b-data", 1, False))


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How a fleet is built."""

    rate: float = 1200.0  # messages a second over all delivery servers; 0 = as fast as it goes
    on_uncertain: str = "retry"
    proxied: bool = False  # SMTP goes through links
    supervised: bool = False  # engines, control and inbound run under `sluice up`
    journal: Path | None = None  # the journal's directory, when it is not in the state directory
    smtp: tuple[str, int] | None = None  # a foreign server instead of our sinks ...
    accepted: Path | None = None  # ... and where it says what it accepted
    security: str = "none"
    clocks: bool = False  # each engine has a wall clock of its own
    named: bool = False  # delivery servers have host names, which a name server of ours knows
    verified: bool = False  # ... and certificates of an authority of ours; also sinks with certificates that are not right
    lossy: bool = False  # the sinks are in a network that can lose packets


class Process:
    """One process of ours, its ready words, and whether its end is expected."""

    def __init__(self, name: str, argv: tuple[str, ...], ready: str, log: Path, environment: Mapping[str, str], *, on_stderr: bool) -> None:
        self.name = name
        self.words: dict[str, str] = {}
        self.wanted = True
        self.expected = False  # somebody has sent it a signal that ends it
        self.starts = 0
        self._argv = argv
        self._ready = ready
        self.log = log
        self._environment = environment
        self._on_stderr = on_stderr
        self._is_ready = asyncio.Event()
        self.child: asyncio.subprocess.Process | None = None
        self.surprises: list[str] = []
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {name}")

    @property
    def pid(self) -> int:
        """0 when it does not run."""
        return self.child.pid if self.child is not None and self.child.returncode is None else 0

    async def ready(self) -> None:
        """Wait until it has said that it is ready. Raises Unavailable."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._is_ready.wait()
        except TimeoutError:
            raise Unavailable(f"{self.name} did not get ready in {_READY_SECONDS:g} s; see {self.log}") from None

    def send(self, number: signal.Signals, *, ends: bool = True) -> None:
        """A signal; `ends`: its end is expected from now on."""
        self.expected = self.expected or ends
        if self.child is not None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(number)

    async def gone(self, seconds: float) -> float:
        """Wait for the end of the process of this moment; returns the seconds it took, or infinity."""
        began, child = time.monotonic(), self.child
        try:
            async with asyncio.timeout(seconds):
                if child is not None:
                    await child.wait()
        except TimeoutError:
            return float("inf")
        return time.monotonic() - began

    async def _keep(self) -> None:
        while True:
            if not self.wanted:
                await asyncio.sleep(0.02)
                continue
            self._is_ready.clear()
            self.expected = False
            self.starts += 1
            began = time.monotonic()
            with self.log.open("ab") as log:
                self.child = await asyncio.create_subprocess_exec(
                    *self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE if self._on_stderr else log, env=dict(self._environment), limit=1 << 20,
                    preexec_fn=die_with(os.getpid(), signal.SIGKILL), start_new_session=True,
                )  # fmt: skip
                streams = [stream for stream in (self.child.stdout, self.child.stderr) if stream]
                pumps = [asyncio.create_task(self._pump(stream, log.fileno())) for stream in streams]
                try:
                    code = await self.child.wait()
                finally:
                    self._is_ready.clear()
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
            if not self.expected:
                self.surprises.append(f"{self.name} ended by itself with code {code} after {time.monotonic() - began:.1f} s")
            await asyncio.sleep(_RESTART_SECONDS)

    async def _pump(self, stream: asyncio.StreamReader, log: int) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                continue
            if not line:
                return
            os.write(log, line)
            if not self._is_ready.is_set() and line.decode("utf-8", "replace").startswith(self._ready):
                self.words = ready_words(line.decode("utf-8", "replace"))
                self._is_ready.set()

    async def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = 45.0) -> None:
        """End it for good."""
        self.wanted = False
        self.send(signal.SIGCONT)
        self.send(number)
        if await self.gone(seconds) == float("inf"):
            self.send(signal.SIGKILL)
            await self.gone(10.0)
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)


class Fleet:
    """Everything that sends and receives, on fresh ground: a database and a state directory of its own."""

    def __init__(self, directory: Path, stores: Stores, plan: Plan) -> None:
        self.directory = directory
        self.stores = stores
        self.plan = plan
        self.database = ""
        self.user_id = 0
        self.admin_key = ""
        self.server_ids: list[int] = []
        self.sinks: list[Process] = []
        self.engines: list[Process] = []
        self.supervisor: Process | None = None
        self.smtp_links: list[Link] = []
        self.clocks: dict[str, Clock] = {}  # by the engine's name
        self.names: NameServer | None = None
        self.network: Network | None = None
        self.impostors: dict[str, Process] = {}  # sinks with a certificate that is not right, by what is wrong
        self._authority: Authority | None = None
        self.accepted: list[AcceptedLog] = []
        self.inbound_port = 0
        self.inbound_http_port = 0
        self.control_url = ""
        self.pool: Pool
        self.pool_url = ""  # past the links
        self.settings: Settings
        self._http: aiohttp.ClientSession

    # --- life -------------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Start everything and wait until it is ready. Raises Unavailable."""
        (self.directory / "log").mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o711)
        name = await self.stores.new_database()
        self.database = self.stores.linked_database(name)
        self.pool_url = self.stores.direct_database(name)
        self.pool = await postgres.open_pool(self.pool_url, 6, 60.0)
        self.admin_key = await users.ensure_admin(self.pool, self.directory / "admin.key")
        async with postgres.connection(self.pool) as conn:
            owner = await users.find_key(conn, users.prefix_of(self.admin_key) or "")
        if owner is None:
            raise Unavailable("the administrator's key of the database is unknown; use an empty database")
        self.user_id = owner.user_id
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10))
        if self.plan.lossy:
            self.network = Network()
            await self.network.start()
        if self.plan.named:
            self.names = NameServer(self.directory / "resolv.conf")
            await self.names.start()
        if self.plan.verified:
            self._authority = Authority(self.directory)
        if self.plan.smtp is None:
            hosts = [_host_name(way) for way in WAYS]
            for number in range(len({way.sink for way in WAYS})):
                self.sinks.append(self._start_sink(f"{number}", hosts, 30))
            if self.plan.verified:
                self.impostors = {
                    "wrong-name": self._start_sink("wrong-name", [f"elsewhere.{ZONE}"], 30),
                    "expired": self._start_sink("expired", hosts, -1),
                }
        elif self.plan.accepted is not None:
            self.accepted = [AcceptedLog(self.plan.accepted)]
        ports = free_ports(3)
        environment = self._environment(ports)
        if self.plan.supervised:
            self._start_supervisor(environment, ports)
        else:
            self.engines = [self._start_engine(slot, environment) for slot in range(ENGINES)]
        await asyncio.gather(*(process.ready() for process in self.processes))
        await self._make_ways()

    def _start_sink(self, name: str, hosts: list[str], days: int) -> Process:
        """`hosts` and `days`: of its certificate, where that is looked at."""
        file = self.directory / f"accepted-{name}.jsonl"
        file.touch()
        self.accepted.append(AcceptedLog(file))
        certificate = self._authority.issue(f"sink-{name}", hosts, days) if self._authority is not None else ()
        argv = machine.python(
            "bench.sink", "--port", "0", "--http-port", "0", "--keep", "5", "--no-track-duplicates", "--no-tokens",
            "--reply-delay", "5",  # as over a short line: something is in doubt whenever an engine dies
            "--accepted", str(file), "--accepted-before-reply", *certificate,
            "--host", self.network.address if self.network is not None else "127.0.0.1",
        )  # fmt: skip
        if self.network is not None:
            argv = self.network.command(argv)
        return self._process(f"sink.{name}", argv, "sink ready", machine.environment(None))

    def _start_engine(self, slot: int, environment: Mapping[str, str]) -> Process:
        name, argv, own = f"engine.{slot}", machine.python("engine", "--slot", str(slot)), dict(environment)
        if self.plan.clocks:
            self.clocks[name] = Clock(self.directory / f"clock.{slot}")
            own |= self.clocks[name].environment()
        if self.names is not None:
            argv = self.names.command(argv)
        if self._authority is not None:
            own["SSL_CERT_FILE"] = str(self._authority.file)
        return self._process(name, argv, "engine ready", own)

    def _start_supervisor(self, environment: Mapping[str, str], ports: list[int]) -> None:
        self.control_url, self.inbound_port, self.inbound_http_port = f"http://127.0.0.1:{ports[0]}/api/v1", ports[1], ports[2]
        argv = machine.python("control.cli", "up", "--engines", str(ENGINES), "--log-files")
        self.supervisor = self._process("supervisor", argv, "ready:", environment, on_stderr=True)

    def _process(self, name: str, argv: tuple[str, ...], ready: str, environment: Mapping[str, str], *, on_stderr: bool = False) -> Process:
        return Process(name, argv, ready, self.directory / "log" / f"{name}.log", environment, on_stderr=on_stderr)

    def _environment(self, ports: list[int]) -> dict[str, str]:
        made = machine.environment(None, database_url=self.database, redis_url=self.stores.linked_redis)
        made = {name: value for name, value in made.items() if not name.startswith("SLUICE_")}
        made |= {
            "SLUICE_DATABASE__URL": self.database,
            "SLUICE_DATABASE__COMMAND_TIMEOUT_SECONDS": "10",
            "SLUICE_REDIS__URL": self.stores.linked_redis,
            "SLUICE_REDIS__TIMEOUT_SECONDS": "2",
            "SLUICE_NODE__STATE_DIRECTORY": str(self.directory),
            "SLUICE_ENGINE__LEASE_SECONDS": f"{LEASE_SECONDS:g}",
            "SLUICE_ENGINE__LEASE_MARGIN_SECONDS": "1",
            "SLUICE_ENGINE__DRAIN_TIMEOUT_SECONDS": "8",
            "SLUICE_ENGINE__BATCH_RECIPIENTS": "200",
            "SLUICE_JOURNAL__SEGMENT_BYTES": str(1 << 20),
            "SLUICE_CONTROL__PORT": str(ports[0]),
            "SLUICE_INBOUND__SMTP_PORT": str(ports[1]),
            "SLUICE_INBOUND__HTTP_PORT": str(ports[2]),
            "SLUICE_INBOUND__PUBLIC_URL": f"http://127.0.0.1:{ports[2]}",
        }
        if self.plan.journal is not None:
            made["SLUICE_JOURNAL__DIRECTORY"] = str(self.plan.journal)
            made["SLUICE_JOURNAL__SEGMENT_BYTES"] = str(256 * 1024)
        # What these settings are called is checked by the code that will read them
        self.settings = config_load.load(None, {name: value for name, value in made.items() if name.startswith("SLUICE_")})
        return made

    async def _make_ways(self) -> None:
        """One delivery server per way, through its link when the plan says so."""
        for way in WAYS:
            host, port = self.plan.smtp or _address(self.sinks[way.sink].words["smtp"])
            if self.plan.proxied:
                link = Link(f"SMTP {way.name}", (host, port))
                await link.start()
                self.smtp_links.append(link)
                host, port = _host_name(way) if self.plan.named else "127.0.0.1", link.port
            limits: dict[str, object] = {
                "max_connections": CONNECTIONS,
                "max_messages_per_second": self.plan.rate / len(WAYS),
                "chunking": way.chunking,
                "bdat_window": WINDOW,
                "final_dot_timeout_seconds": 60.0,
                "command_timeout_seconds": 5.0,
                "retry_schedule_seconds": (1.0, 2.0, 4.0),
                "on_uncertain": self.plan.on_uncertain,
            }
            self.server_ids.append(
                await self.pool.fetchval(
                    "insert into delivery_servers (user_id, name, host, port, security, mfrom, limits) "
                    "values ($1, $2, $3, $4, $5, 'bounces.sender.example', $6::text::jsonb) returning id",
                    self.user_id, f"{way.name} {self.directory.name}-{os.getpid()}", host, port, self.plan.security,
                    msgspec.json.encode(limits).decode(),
                )
            )  # fmt: skip
            if self.plan.security != "none":
                keyring = load_keyring(self.settings)
                sealed = keyring.seal(b"secret", b"delivery_servers:%d" % self.server_ids[-1])
                await self.pool.execute(
                    "update delivery_servers set username = 'chaos', password_sealed = $2 where id = $1", self.server_ids[-1], sealed
                )
        await self.pool.execute("update egress_version set version = version + 1")

    async def stop(self) -> None:
        """End everything."""
        await asyncio.gather(*(process.end() for process in (*self.engines, *([self.supervisor] if self.supervisor else []))))
        await asyncio.gather(*(process.end() for process in (*self.sinks, *self.impostors.values())))
        for link in self.smtp_links:
            await link.stop()
        if self.names is not None:
            await self.names.stop()
        if self.network is not None:
            await self.network.stop()
        if hasattr(self, "_http"):
            await self._http.close()
        if hasattr(self, "pool"):
            self.pool.terminate()

    # --- what faults ask ------------------------------------------------------------------------------------------------------
    @property
    def processes(self) -> list[Process]:
        """All that we started ourselves."""
        return [*self.sinks, *self.impostors.values(), *self.engines, *([self.supervisor] if self.supervisor is not None else [])]

    def supervised(self, word: str) -> list[int]:
        """Process ids of the supervisor's children that run `-m word`."""
        found = []
        for pid in children_of(self.supervisor.pid) if self.supervisor is not None else ():
            with contextlib.suppress(OSError):
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if word.encode() in argv:
                    found.append(pid)
        return found

    def engine_pids(self) -> list[int]:
        """Engines that run now."""
        return self.supervised("engine") if self.supervisor is not None else [engine.pid for engine in self.engines if engine.pid]

    def window_of_one(self) -> int:
        """Messages one engine can have in doubt: its share of the connections, times the window of each."""
        alive = max(1, len(self.engine_pids()))
        share = -(-CONNECTIONS // alive)
        return sum(share * (WINDOW if way.chunking else 1) for way in WAYS)

    def surprises(self) -> list[str]:
        """Ends nobody had asked for, since the last call."""
        said = [sentence for process in self.processes for sentence in process.surprises]
        for process in self.processes:
            process.surprises.clear()
        return said

    async def script(self, rules: list[dict[str, object]], sinks: tuple[int, ...] = (0, 1)) -> None:
        """Replace the scripted answers of our sinks."""
        for number in sinks:
            url = f"http://{self.sinks[number].words['http']}/api/v1/script"
            async with self._http.put(url, json={"rule": rules}) as answer:
                if answer.status >= 300:
                    raise Unavailable(f"the sink refused its script: {await answer.text()}")

    async def sink_counters(self, number: int) -> dict[str, Any]:
        """The counters of one sink."""
        return await self.counters_of(self.sinks[number])

    async def counters_of(self, sink: Process) -> dict[str, Any]:
        """The counters of one sink, or impostor."""
        async with self._http.get(f"http://{sink.words['http']}/api/v1/counters") as answer:
            return dict(await answer.json())

    async def api(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """One call of the API; (0, b"") when nobody answers."""
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        try:
            async with self._http.request(method, self.control_url + path, json=body, headers=headers) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0, b""


def _host_name(way: Way) -> str:
    return f"{way.name}.{ZONE}"


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)
