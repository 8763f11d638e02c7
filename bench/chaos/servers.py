"""PostgreSQL and Valkey of our own, to be killed: each on a Unix socket in the harness's directory, started and ended one by one.

The programs are found as `store.embedded` finds them and run with its settings; what it does not offer is here: ending them by any
signal, starting them again on the same data, and taking the data away in between.
"""

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from domain.errors import Unavailable
from store import backends_check, embedded, embedded_programs
from store.embedded_programs import Program

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.01


class Server:
    """One server process on its data directory."""

    _parent_gone = signal.SIGTERM  # what it is sent when the harness dies

    def __init__(self, name: str, program: Program, data: Path, log: Path, command: list[str]) -> None:
        self.name = name
        self.data = data
        self._program = program
        self._log = log
        self._command = command
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id; 0 when it does not run."""
        return self.process.pid if self.process is not None and self.running else 0

    async def start(self) -> None:
        """Start it and wait until it answers. Raises Unavailable."""
        await asyncio.to_thread(self._wait_for_predecessor)
        self._spawn()
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if not self.running:
                raise Unavailable(f"{self.name} ended at its start; {self._log} says why:\n{_tail(self._log)}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} was not ready after {_START_SECONDS:g} s; {self._log} says why")
            await asyncio.sleep(_POLL_SECONDS)

    def _spawn(self) -> None:
        # In the main thread: the kernel ends the server when the thread that started it ends
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd="/",
                env=embedded_programs.clean_environment(), start_new_session=True,
                preexec_fn=die_with(os.getpid(), self._parent_gone), **self._program.user.popen_arguments(),
            )  # fmt: skip

    def _is_ready(self) -> bool:
        raise NotImplementedError

    def _wait_for_predecessor(self) -> None:
        return

    def send(self, number: signal.Signals) -> None:
        """A signal to the server's main process."""
        if self.process is not None and self.running:
            self.process.send_signal(number)

    async def end(self, number: signal.Signals) -> None:
        """Send a signal that ends it, and wait for the end."""
        self.send(number)
        await self._gone(_STOP_SECONDS)

    async def _gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.running:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            await asyncio.sleep(_POLL_SECONDS)


class Valkey(Server):
    """`socket` is where it answers."""

    def __init__(self, directory: Path) -> None:
        program = embedded_programs.Finder(directory).valkey()
        data = directory / "valkey"
        data.mkdir(mode=0o700, exist_ok=True)
        program.user.own(data)
        run = _run_directory(directory, program)
        self.socket = run / "valkey.sock"
        settings = {
            **embedded.VALKEY_SETTINGS,
            "dir": str(data),
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "appendonly": "yes",
            "enable-debug-command": "local",
        }
        command = [str(program.path)]
        for name, value in settings.items():
            command += [f"--{name}", value]
        super().__init__("Valkey", program, data, directory / "log" / "valkey.log", command)

    def _is_ready(self) -> bool:
        return backends_check.ping_socket(self.socket)

    async def start(self) -> None:
        """Start it; its data directory is made where it is gone."""
        if not self.data.exists():
            self.data.mkdir(mode=0o700)
            self._program.user.own(self.data)
        self.socket.unlink(missing_ok=True)
        await super().start()

    def copy_data(self, to: Path) -> None:
        """Copy the append-only files as they are at this moment, as a disk would hold them."""
        if to.exists():
            shutil.rmtree(to)
        shutil.copytree(self.data, to)

    def replace_data(self, by: Path | None) -> None:
        """While it is stopped: its data become a copy made before, or nothing."""
        shutil.rmtree(self.data)
        if by is not None:
            shutil.copytree(by, self.data)
            for directory, _, files in os.walk(self.data):
                self._program.user.own(Path(directory))
                for name in files:
                    self._program.user.own(Path(directory) / name)


class Postgres(Server):
    """`socket` is where it answers. `data_parent` may be another file system than `directory`."""

    _parent_gone = signal.SIGINT

    def __init__(self, directory: Path, data_parent: Path | None = None, more: dict[str, str] | None = None) -> None:
        program = embedded_programs.Finder(directory).postgres()
        data = (data_parent or directory) / f"pg{program.version[0]}"
        self._run = _run_directory(directory, program)
        self.socket = self._run / ".s.PGSQL.5432"
        command = [str(program.path), "-D", str(data), "-h", "", "-k", str(self._run)]
        for name, value in {**embedded.POSTGRES_SETTINGS, **(more or {})}.items():
            command += ["-c", f"{name}={value}"]
        super().__init__("PostgreSQL", program, data, directory / "log" / "postgres.log", command)

    def url(self, database: str) -> str:
        """Straight to the server, past every proxy."""
        return f"postgresql://sluice@/{database}?host={quote(str(self._run))}"

    async def initialise(self) -> None:
        """Make the data directory where there is none. Raises Unavailable."""
        if (self.data / "PG_VERSION").exists():
            return
        self.data.mkdir(mode=0o700)
        self._program.user.own(self.data)
        initdb = str(self._program.path.with_name("initdb"))
        command = [initdb, "-D", str(self.data), "-U", "sluice", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]

        def run() -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(
                command, capture_output=True, cwd="/", env=embedded_programs.clean_environment(), check=False,
                **self._program.user.popen_arguments(),
            )  # fmt: skip

        done = await asyncio.to_thread(run)
        if done.returncode:
            raise Unavailable(f"initdb failed: {done.stderr.decode(errors='replace').strip()}")

    def _is_ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def _wait_for_predecessor(self) -> None:
        # Its children may outlive a killed postmaster for a moment; a second one on the same shared memory is refused
        deadline = time.monotonic() + _STOP_SECONDS
        while any(self._backends()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _backends(self) -> list[int]:
        """Processes that still work in the data directory although the main process is gone."""
        if self.running:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if (entry / "cwd").readlink() == self.data and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def processes(self) -> list[int]:
        """The main process and all its children."""
        if not self.pid:
            return []
        return [self.pid, *children_of(self.pid)]


def children_of(pid: int) -> list[int]:
    """Direct children of a process."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    except OSError:
        pass
    return found


def die_with(parent: int, number: signal.Signals) -> Callable[[], None]:
    """Run in a child before exec: `number` is sent to it when `parent` dies, so that nothing of ours outlives the harness."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _run_directory(directory: Path, program: Program) -> Path:
    run = directory / "run"
    if len(os.fsencode(run / ".s.PGSQL.5432.lock")) > embedded.SOCKET_PATH_LIMIT:
        run = embedded_programs.short_directory(Path("/tmp"), directory)
    run.mkdir(mode=0o700, exist_ok=True)
    program.user.own(run)
    return run


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    except OSError:
        return ""
