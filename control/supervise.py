"""Supervisor: starts the processes of one machine as children, keeps them alive, and stops them in order.

Used by `sluice up` and `sluice demo`. It knows processes, pipes and signals and nothing about mail. Three rules hold it together:
every child is spawned from the main thread, because PR_SET_PDEATHSIG fires when the *thread* that spawned it ends; a child leads a
session of its own, so Ctrl-C reaches only us and the order of stopping is ours; and a child that dies is started again with a
growing pause, so that a crash loop can neither spin nor hide.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TextIO

import msgspec

from domain.errors import ConfigurationError, SluiceError

PAUSE_FIRST_SECONDS: Final = 0.5
PAUSE_LAST_SECONDS: Final = 30.0
STEADY_SECONDS: Final = 60.0  # a child that ran this long starts again with the first pause
READY_TIMEOUT_SECONDS: Final = 60.0
LOG_BYTES: Final = 10 * 1024 * 1024
LOG_KEPT: Final = 3  # NAME.log, NAME.log.1 .. NAME.log.3
_LINE_LIMIT: Final = 1024 * 1024
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)

Say = Callable[[str], None]


class ChildFailed(SluiceError):
    """A child ended, or stayed silent, before it said it was ready."""


class Child(msgspec.Struct, frozen=True, kw_only=True):
    """One process to keep alive. `ready` is how its first line on standard output begins (`engine ready`)."""

    name: str  # prefix of its log lines, name of its log file
    argv: tuple[str, ...]
    ready: str
    stop_order: int = 1  # children of a lower order are stopped, and waited for, first
    stop_timeout_seconds: float = 10.0  # from SIGTERM to SIGKILL
    environment: dict[str, str] = {}  # on top of the supervisor's


class LogFile:
    """Appends lines to `NAME.log`; at `limit` bytes it becomes `NAME.log.1` and a new one is begun."""

    def __init__(self, path: Path, *, limit: int = LOG_BYTES) -> None:
        self._path = path
        self._limit = limit
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def write(self, line: bytes) -> None:
        """Append one line, which ends in a line feed. A full disk loses the line, never the process that wrote it."""
        try:
            if self._file.tell() + len(line) > self._limit:
                self._rotate()
            self._file.write(line)
            self._file.flush()
        except OSError:
            return

    def _rotate(self) -> None:
        self._file.close()
        for number in range(LOG_KEPT - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number + 1}"))
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        self._file = self._path.open("ab")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Running:
    """The life of one child: the process of the moment, what it last said, and its next start."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.process: asyncio.subprocess.Process | None = None
        self.ready: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        self.last_lines: deque[str] = deque(maxlen=12)
        self.restarts = 0
        self.keeper: asyncio.Task[None] | None = None
        self.log: LogFile | None = None


class Supervisor:
    """Runs `children` until it is told to stop.

    `environment` is what every child gets; `log_directory` None sends their standard error to ours with a prefix,
    else to one rotated file each; `say` takes what an operator should read, one sentence at a time.
    """

    def __init__(self, children: Sequence[Child], *, environment: Mapping[str, str], say: Say,
                 log_directory: Path | None = None, stderr: TextIO | None = None) -> None:  # fmt: skip
        self._children = list(children)
        self._environment = dict(environment)
        self._say = say
        self._log_directory = log_directory
        self._stderr = stderr or sys.stderr
        self._running: dict[str, _Running] = {}
        self._stopping = False

    async def start(self, *, timeout_seconds: float = READY_TIMEOUT_SECONDS) -> dict[str, dict[str, str]]:
        """Start every child and wait until each has said it is ready.

        Returns the `key=value` words of each ready line by child name. Raises ChildFailed, after stopping the others,
        when one of them ends first or says nothing for `timeout_seconds`.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the supervisor must run in the main thread: its children die with the thread that spawned them")
        for child in self._children:
            running = self._running[child.name] = _Running(child)
            if self._log_directory is not None:
                running.log = LogFile(self._log_directory / f"{child.name}.log")
            running.keeper = asyncio.create_task(self._keep(running), name=f"keep {child.name}")
        try:
            futures = {name: running.ready for name, running in self._running.items()}
            _, silent = await asyncio.wait(futures.values(), timeout=timeout_seconds, return_when=asyncio.FIRST_EXCEPTION)
            for ready in futures.values():
                if ready.done():
                    ready.result()  # raises what ended it
            if silent:
                names = [name for name, ready in futures.items() if ready in silent]
                raise ChildFailed(f"{', '.join(names)} did not get ready within {timeout_seconds:g} s; {self._where(names[0])}")
            return {name: ready.result() for name, ready in futures.items()}
        except BaseException:
            await self.stop()
            raise

    def pids(self) -> dict[str, int]:
        """Process ids of the children that run now."""
        return {name: running.process.pid for name, running in self._running.items()
                if running.process is not None and running.process.returncode is None}  # fmt: skip

    def restarts(self) -> int:
        """How often a child had to be started again."""
        return sum(running.restarts for running in self._running.values())

    def send(self, kind: str, number: signal.Signals) -> int:
        """Send a signal to every child that runs and whose name is `kind` or begins with `kind.`. Returns how many."""
        # One that is only just starting would be ended by it, and reads what it needs to know anyway
        running = [r.process for name, r in self._running.items() if name.partition(".")[0] == kind and r.process and r.ready.done()]
        told = [process for process in running if process.returncode is None]
        for process in told:
            _signal(process, number)
        return len(told)

    async def stop(self) -> None:
        """Stop the children group by group in `stop_order`: SIGTERM, their time to finish, then SIGKILL. Safe to call twice."""
        self._stopping = True
        for order in sorted({running.child.stop_order for running in self._running.values()}):
            group = [running for running in self._running.values() if running.child.stop_order == order]
            await asyncio.gather(*(self._stop_one(running) for running in group))
        for running in self._running.values():
            if running.ready.done() and not running.ready.cancelled():
                running.ready.exception()  # seen: it has been reported, or another child's was
            if running.log is not None:
                running.log.close()
                running.log = None

    async def _stop_one(self, running: _Running) -> None:
        process, keeper = running.process, running.keeper
        if process is not None and process.returncode is None:
            _signal(process, signal.SIGTERM)
            try:
                async with asyncio.timeout(running.child.stop_timeout_seconds):
                    await process.wait()
            except TimeoutError:
                self._say(f"{running.child.name} did not stop within {running.child.stop_timeout_seconds:g} s and was killed")
                _signal(process, signal.SIGKILL)
                await process.wait()
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _keep(self, running: _Running) -> None:
        """Run one child, again and again, until the supervisor stops."""
        child, pause = running.child, PAUSE_FIRST_SECONDS
        while not self._stopping:
            began = time.monotonic()
            try:
                code = await self._run_once(running)
            except OSError as error:
                code = None
                running.last_lines.append(f"{child.argv[0]}: {error.strerror or error}")
            if self._stopping:
                return
            why = "could not be started" if code is None else _how_it_ended(code)
            if not running.ready.done():
                running.ready.set_exception(ChildFailed(f"{child.name} {why} before it was ready; {self._where(child.name)}"))
                return
            if time.monotonic() - began >= STEADY_SECONDS:
                pause = PAUSE_FIRST_SECONDS
            running.restarts += 1
            self._say(f"{child.name} {why}; starting it again in {pause:g} s (restart {running.restarts})")
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_LAST_SECONDS)

    async def _run_once(self, running: _Running) -> int:
        process = await asyncio.create_subprocess_exec(
            *running.child.argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self._environment | running.child.environment, limit=_LINE_LIMIT, start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )  # fmt: skip
        running.process = process
        if self._stopping:  # stop() came while the child was being spawned, and did not see it
            _signal(process, signal.SIGTERM)
        assert process.stdout is not None
        assert process.stderr is not None
        pumps = (asyncio.create_task(self._pump(running, process.stdout, stdout=True)),
                 asyncio.create_task(self._pump(running, process.stderr, stdout=False)))  # fmt: skip
        try:
            code = await process.wait()
            # A grandchild may hold the pipe open for ever: what the child itself wrote is already there.
            await asyncio.wait(pumps, timeout=1.0)
            return code
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, running: _Running, stream: asyncio.StreamReader, *, stdout: bool) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the limit: the reader has dropped it, the next one is fine
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if stdout and not running.ready.done() and text.startswith(running.child.ready):
                running.ready.set_result(ready_words(text))
            running.last_lines.append(text)
            if running.log is not None:
                running.log.write(text.encode() + b"\n")
            elif self._log_directory is None:
                self._stderr.write(f"{running.child.name:<10} | {text}\n")
                self._stderr.flush()

    def _where(self, name: str) -> str:
        """Say where to read on: the last lines of a child, and its log file if it has one."""
        lines = [line for line in self._running[name].last_lines if line.strip()]
        said = f"it last said: {lines[-1][:500]}" if lines else "it said nothing"
        return said if self._log_directory is None else f"{said} (log: {self._log_directory / (name + '.log')})"


def ready_words(line: str) -> dict[str, str]:
    """The `key=value` words of a ready line: `control ready http=http://127.0.0.1:8025` gives {"http": …}."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def check_ports(wanted: Mapping[str, tuple[str, int]]) -> None:
    """Refuse to start when a port is taken. `wanted`: setting -> (host, port). Raises ConfigurationError naming each setting."""
    problems = []
    for setting, (host, port) in wanted.items():
        if port == 0:
            continue
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            variable = "SLUICE_" + setting.upper().replace(".", "__")
            problems.append(f"{setting}: cannot listen on {host}:{port} ({error.strerror or error}); stop what uses it or set {variable}")
    if problems:
        raise ConfigurationError(problems)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports nobody listens on at this moment."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _die_with(parent: int) -> Callable[[], None]:
    """Run in the child before exec: SIGTERM to it when the supervisor dies, however it dies."""

    def set_up() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died between fork and prctl: the signal would never come
            os._exit(1)

    return set_up


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        return


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
