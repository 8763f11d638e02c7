"""Private PostgreSQL and Valkey for one machine: finds the programs, starts them for us alone, stops them with us.

Wheels that carry the programs come first, then PATH and the directories of the distributions. The wheels' own Python
wrappers are never imported: they change permissions of directories that are not theirs and leave servers behind.

Layout of the state directory: `embedded.lock` (flock: somebody runs the servers), `embedded.json` (how to reach them),
`pg18/` (data, one directory per major version), `valkey/` (append-only file), `run/` (sockets), `log/`, `programs-*/`
(copies for a user who cannot reach the originals). Servers listen on sockets in a 0700 directory only, never on TCP.
"""

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from domain.errors import ConfigurationError, Unavailable
from store import backends_check, embedded_programs
from store.embedded_programs import Program, ServerUser

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 60.0
ATTACH_TIMEOUT_SECONDS = 90.0  # longer than a start: the owner may be in the middle of its first one
POLL_SECONDS = 0.01
SOCKET_PATH_LIMIT = 107  # sun_path of Linux, without the closing zero
LOG_LIMIT_BYTES = 16 * 1024 * 1024

# For one machine that sends in bulk: few long transactions, much COPY. Checkpoints are rare so that full-page writes are,
# JIT costs more than it gives on short queries, partitions (four for fifty campaigns) need many locks.
POSTGRES_SETTINGS = {
    "shared_buffers": "256MB",
    "max_connections": "200",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "checkpoint_completion_target": "0.9",
    "synchronous_commit": "on",
    "jit": "off",
    "max_locks_per_transaction": "256",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
}
# A server whose data is thrown away with the test that made it
POSTGRES_SETTINGS_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_wal_size": "1GB"}
VALKEY_SETTINGS = {"port": "0", "save": "", "maxmemory-policy": "noeviction", "appendfsync": "everysec", "daemonize": "no"}


@dataclass(frozen=True)
class Backends:
    """Where the stores are. `chosen` is one line for people; `owned`: this process runs at least one of them."""

    database_url: str
    redis_url: str
    chosen: str
    owned: bool
    servers: "EmbeddedServers | None" = field(default=None, compare=False, repr=False)  # for `embedded_keeper.keep`


@dataclass(frozen=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    stop_signal: signal.Signals
    log: Path


@dataclass(frozen=True)
class _Started:
    child: _Child
    url: str
    is_ready: Callable[[], bool]

    def wait(self) -> None:
        _wait_until_ready(self.child, self.is_ready)


class EmbeddedServers:
    """Servers of one state directory, run by this process (`owned`) or by another one that we attached to."""

    def __init__(
        self,
        backends: Backends,
        children: Sequence[_Child] = (),
        lock: int = -1,
        record: Path | None = None,
        starters: Mapping[str, Callable[[], _Started]] | None = None,
    ) -> None:
        self.backends = backends
        self._children = list(children)
        self._lock = lock
        self._record = record
        self._starters = dict(starters or {})

    def died(self) -> str:
        """A sentence about the first server that ended by itself; empty while all run (or are not ours)."""
        for child in self._children:
            code = child.process.poll()
            if code is not None:
                return f"{child.name} ended by itself with exit code {code}; the end of {child.log}:\n{_tail(child.log)}"
        return ""

    def dead(self) -> list[str]:
        """The names of the servers that ended by themselves."""
        return [child.name for child in self._children if child.process.poll() is not None]

    def start_again(self, name: str) -> Callable[[], bool]:
        """Start a dead server on the same data and socket, so that clients only have to connect anew.

        Returns at once, with a function that tells whether it is ready. Main thread only, as `start`. Raises Unavailable.
        """
        started = self._starters[name]()
        self._children = [started.child if child.name == name else child for child in self._children]
        return started.is_ready

    def stop(self) -> None:
        """Stop what this process started, in order and cleanly; nothing when the servers belong to another process."""
        children, self._children = self._children, []
        if self._record is not None:
            self._record.unlink(missing_ok=True)
            self._record = None
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(child.stop_signal)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        for child in children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # SIGQUIT lets PostgreSQL end its own children too; both recover from their logs at the next start
                child.process.send_signal(signal.SIGQUIT if child.name == "PostgreSQL" else signal.SIGKILL)
                child.process.wait()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def start(state_directory: Path, *, database: bool, redis: bool, durable: bool = True, wheels: bool = True) -> EmbeddedServers:
    """Start the wanted servers, or attach to those another process runs in the same directory.

    `durable=False` is for tests: no fsync, no append-only file. `wheels=False` looks at PATH and the distribution's
    directories only. Must be called from the main thread: the kernel ends the servers when the *thread* that started
    them ends. Raises Unavailable (no program, no start, running ones do not fit), ConfigurationError (directory).
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("embedded servers must be started from the main thread")
    _prepare_directory(state_directory)
    record = state_directory / "embedded.json"
    lock = _lock_or_attach(state_directory / "embedded.lock", record, database=database, redis=redis)
    if isinstance(lock, Backends):
        return EmbeddedServers(lock)
    children: list[_Child] = []
    try:
        record.unlink(missing_ok=True)
        programs = embedded_programs.Finder(state_directory, wheels=wheels)
        urls = {"database_url": "", "redis_url": ""}
        chosen: list[str] = []
        starters: dict[str, Callable[[], _Started]] = {}
        started: list[_Started] = []
        if redis:
            valkey = programs.valkey()
            starters["Valkey"] = functools.partial(_start_valkey, valkey, state_directory, durable=durable)
            started.append(starters["Valkey"]())
            children.append(started[-1].child)
            urls["redis_url"] = started[-1].url
            chosen.append(f"{valkey.describe()}, private in {state_directory / 'valkey'}")
        if database:
            postgres = programs.postgres()
            starters["PostgreSQL"] = functools.partial(_start_postgres, postgres, state_directory, durable=durable)
            started.append(starters["PostgreSQL"]())
            children.append(started[-1].child)
            urls["database_url"] = started[-1].url
            chosen.insert(0, f"{postgres.describe()}, private in {_data_directory(postgres, state_directory)}")
        for server in started:
            server.wait()
        line = "; ".join(chosen)
        partial = record.with_suffix(".new")
        partial.write_text(json.dumps({**urls, "chosen": line, "pid": os.getpid()}))
        partial.chmod(0o644)
        partial.replace(record)
        # Stopped in this order: PostgreSQL holds the truth and is given its time first
        children.sort(key=lambda child: child.name)
        return EmbeddedServers(Backends(urls["database_url"], urls["redis_url"], line, owned=True), children, lock, record, starters)
    except BaseException:
        EmbeddedServers(Backends("", "", "", True), children, lock, record).stop()
        raise


@contextlib.contextmanager
def resolve(database_url: str, redis_url: str, state_directory: Path, durable: bool = True, *, wheels: bool = True) -> Iterator[Backends]:
    """The stores to use for these settings: given URLs are checked, `embedded:` starts or attaches to private servers.

    What was started is stopped at the end of the block. Raises Unavailable (no answer, too old), ConfigurationError.
    """
    database = database_url == "embedded:"
    redis = redis_url == "embedded:"
    chosen: list[str] = []
    if not database:
        chosen.append(backends_check.postgres(database_url))
    if not redis:
        chosen.append(backends_check.redis(redis_url))
    if not database and not redis:
        yield Backends(database_url, redis_url, "; ".join(chosen), owned=False)
        return
    servers = start(state_directory, database=database, redis=redis, durable=durable, wheels=wheels)
    try:
        own = servers.backends
        yield Backends(
            database_url=own.database_url if database else database_url,
            redis_url=own.redis_url if redis else redis_url,
            chosen="; ".join([own.chosen, *chosen]),
            owned=own.owned,
            servers=servers,
        )
    finally:
        servers.stop()


def _prepare_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        (directory / "log").mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        reason = f"{directory} cannot be made: {error.strerror}; name a writable directory"
        raise ConfigurationError([f"node.state_directory: {reason}"]) from error
    if os.geteuid() == 0 and directory.stat().st_uid == 0 and directory.stat().st_mode & 0o001 == 0:
        # Our own directory, and the servers' user has to pass through it (0711 shows nothing of its content)
        directory.chmod(0o711)


def _lock_or_attach(path: Path, record: Path, *, database: bool, redis: bool) -> int | Backends:
    """The lock's descriptor when nobody runs the servers, else where they are."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = f"{path} cannot be opened: {error.strerror}; run as the user it belongs to"
        raise ConfigurationError([f"node.state_directory: {reason}"]) from error
    deadline = time.monotonic() + ATTACH_TIMEOUT_SECONDS
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        # The owner writes the record when the servers are ready and removes it before it stops them
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(record.read_text())
            os.close(descriptor)
            missing = [name for name, want in (("database", database), ("redis", redis)) if want and not found[f"{name}_url"]]
            if missing:
                raise Unavailable(
                    f"process {found['pid']} runs the embedded servers of {record.parent}, but no {' and '.join(missing)}; "
                    f"stop it first, or set {' and '.join(f'{name}.url' for name in missing)}"
                )
            chosen = f"{found['chosen']} (run by process {found['pid']})"
            return Backends(found["database_url"], found["redis_url"], chosen, owned=False)
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise Unavailable(f"another process holds {path} but its servers did not get ready in {ATTACH_TIMEOUT_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS * 5)


def _data_directory(program: Program, state_directory: Path) -> Path:
    return state_directory / f"pg{program.version[0]}"  # majors do not read each other's files


def _start_postgres(program: Program, state_directory: Path, *, durable: bool) -> _Started:
    data = _data_directory(program, state_directory)
    sockets = _socket_directory(state_directory, program.user)
    log = state_directory / "log" / "postgres.log"
    if not (data / "PG_VERSION").exists():
        _initdb(program, data, log, durable=durable)
    _wait_for_predecessor(data / "postmaster.pid", ("postgres",))
    settings = POSTGRES_SETTINGS if durable else POSTGRES_SETTINGS | POSTGRES_SETTINGS_NOT_DURABLE
    command = [str(program.path), "-D", str(data), "-h", "", "-k", str(sockets)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    child = _spawn("PostgreSQL", command, program.user, log, stop_signal=signal.SIGINT)  # SIGINT: fast shutdown

    def is_ready() -> bool:
        with contextlib.suppress(OSError):
            lines = (data / "postmaster.pid").read_text().splitlines()
            return len(lines) >= 8 and lines[0].strip() == str(child.process.pid) and lines[7].strip() == "ready"
        return False

    return _Started(child, f"postgresql://sluice@/postgres?host={quote(str(sockets))}", is_ready)


def _initdb(program: Program, data: Path, log: Path, *, durable: bool) -> None:
    # Made aside and renamed, so a killed first start leaves nothing that looks like a database
    fresh = data.with_name(data.name + ".new")
    embedded_programs.remove_tree(fresh)
    fresh.mkdir(mode=0o700)
    program.user.own(fresh)
    command = [str(program.path.with_name("initdb")), "-D", str(fresh), "-U", "sluice", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    if not durable:
        command.append("--no-sync")
    child = _spawn("initdb", command, program.user, log, stop_signal=signal.SIGTERM)
    try:
        code = child.process.wait(START_TIMEOUT_SECONDS * 2)
    except BaseException:
        child.process.kill()
        child.process.wait()
        raise
    if code != 0:
        raise Unavailable(f"initdb failed with exit code {code}; the end of {log}:\n{_tail(log)}")
    fresh.rename(data)


def _start_valkey(program: Program, state_directory: Path, *, durable: bool) -> _Started:
    data = state_directory / "valkey"
    data.mkdir(mode=0o700, exist_ok=True)
    program.user.own(data)
    sockets = _socket_directory(state_directory, program.user)
    log = state_directory / "log" / "valkey.log"
    socket_path = sockets / "valkey.sock"
    pid_file = data / "valkey.pid"
    _wait_for_predecessor(pid_file, ("valkey", "redis"))
    settings = {
        **VALKEY_SETTINGS,
        "dir": str(data),
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "pidfile": str(pid_file),
        "appendonly": "yes" if durable else "no",
    }
    command = [str(program.path)]
    for name, value in settings.items():
        command += [f"--{name}", value]
    child = _spawn("Valkey", command, program.user, log, stop_signal=signal.SIGTERM)

    def is_ready() -> bool:
        return backends_check.ping_socket(socket_path)

    return _Started(child, f"unix://{quote(str(socket_path))}?db=0", is_ready)


def _socket_directory(state_directory: Path, user: ServerUser) -> Path:
    """`run/` in the state directory, or a short path elsewhere when that would not fit into a socket's address."""
    directory = state_directory / "run"
    if len(os.fsencode(directory / ".s.PGSQL.5432.lock")) > SOCKET_PATH_LIMIT:
        # Root's runtime directory is closed to the servers' user
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") if os.geteuid() != 0 else Path("/tmp")
        directory = embedded_programs.short_directory(base if base.is_dir() else Path("/tmp"), state_directory)
    try:
        directory.mkdir(mode=0o700)
        user.own(directory)
    except FileExistsError:
        found = directory.lstat()
        # In /tmp anybody could have made it before us and would then hold our sockets
        if directory.is_symlink() or not directory.is_dir() or found.st_uid not in (os.geteuid(), user.uid):
            reason = f"{directory} is not ours (owner {found.st_uid}); remove it or choose a shorter node.state_directory"
            raise Unavailable(reason) from None
        directory.chmod(0o700)
        user.own(directory)
    return directory


def _wait_for_predecessor(pid_file: Path, names: tuple[str, ...]) -> None:
    """After a `kill -9` of its owner a server still needs a moment to shut down; two on the same files would be the end of them."""
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            pid = int(pid_file.read_text().split()[0])
            running = Path(f"/proc/{pid}/comm").read_text()
        except (OSError, ValueError, IndexError):
            return
        if not any(name in running for name in names):
            return  # the number was given to somebody else
        time.sleep(POLL_SECONDS)
    raise Unavailable(f"a server from before still runs as process {pid} on {pid_file.parent}; stop it and try again")


def _wait_until_ready(child: _Child, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while not is_ready():
        code = child.process.poll()
        if code is not None:
            raise Unavailable(f"{child.name} ended at its start with exit code {code}; the end of {child.log}:\n{_tail(child.log)}")
        if time.monotonic() > deadline:
            seconds = f"{START_TIMEOUT_SECONDS:.0f} s"
            raise Unavailable(f"{child.name} was not ready after {seconds}; the end of {child.log}:\n{_tail(child.log)}")
        time.sleep(POLL_SECONDS)


def _spawn(name: str, command: list[str], user: ServerUser, log: Path, *, stop_signal: signal.Signals) -> _Child:
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.old"))
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=embedded_programs.clean_environment(),
            start_new_session=True,  # Ctrl-C reaches only us, and we stop the servers in order
            preexec_fn=_die_with_parent(stop_signal),
            **user.popen_arguments(),
        )
    return _Child(name, process, stop_signal, log)


def _die_with_parent(stop_signal: signal.Signals) -> Callable[[], None] | None:
    """For the child, after its change of user (which would clear the wish): be sent `stop_signal` when our parent dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(1, int(stop_signal), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died between fork and here: no signal will come any more
            os._exit(1)

    return prepare


def _tail(log: Path, lines: int = 12) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
