"""How benches measure: CPU of processes from /proc, CPU that others used meanwhile, medians, and what machine it was.

The figure that counts is CPU (user and system) per message; rates say how it felt. Foreign CPU is what ran on the machine and
was not ours: it makes rates worthless and spoils caches, so every row says how much of it there was.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

_TICK: Final = os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")
NOISY_CORES: Final = 0.3  # from here on a row is marked: others used that much of the machine
# What the newest instructions of a processor do to the numbers; in the order of interest
_FLAGS: Final = ("avx512ifma", "avx512f", "avx2", "sha_ni", "vaes", "adx", "sse4_2")


class Row(msgspec.Struct, kw_only=True, omit_defaults=False):
    """One line of the table; the names are part of the command's contract. CPU in microseconds per message (user + system)."""

    name: str
    messages: int = 0
    messages_per_second: float | None = None
    cpu_us_per_message: float | None = None  # of the sender (of an engine: queue, composition, journal, ledger, accounting, all of it)
    sink_cpu_us_per_message: float | None = None
    store_cpu_us_per_message: float | None = None  # PostgreSQL and Redis servers, where they run
    foreign_cpu: float | None = None  # cores that others used meanwhile (the median run)
    ratio: float | None = None  # CPU per message against smtp-source of the same run
    beside_cpu_us_per_message: float | None = None  # of what a goal compares it with, measured beside it run by run; the note says what
    connections: int | None = None  # open at once at the sink, at most; only where it was looked at
    memory_mib: float | None = None  # most resident memory of one engine, up to the end of the row
    bytes_per_connection: float | None = None
    runs: int = 0
    note: str = ""
    skipped: str = ""  # why there is nothing; empty: there is


class Goal(msgspec.Struct, kw_only=True):
    """One goal of docs/performance.md and whether this run met it."""

    number: int
    name: str
    value: float
    goal: str
    met: bool


class Report(msgspec.Struct, kw_only=True):
    """What `--json` prints."""

    machine: dict[str, Any]
    rows: list[Row]
    goals: list[Goal]


class Sample(msgspec.Struct, kw_only=True):
    """One run of one case."""

    messages: int
    seconds: float
    cpu_seconds: float
    sink_seconds: float | None = None
    store_seconds: float | None = None
    foreign: float = 0.0
    connections: int | None = None
    memory: int | None = None  # octets


def row(name: str, samples: list[Sample], *, note: str = "") -> Row:
    """Medians over the runs of one case; each figure is the median of its own, so one disturbed run moves none of them."""

    def middle(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    def per_message(values: Iterable[tuple[float | None, int]]) -> float | None:
        found = middle(seconds / messages * 1e6 if seconds is not None else None for seconds, messages in values)
        return None if found is None else round(found, 2)

    return Row(
        name=name,
        messages=samples[0].messages,
        messages_per_second=round(middle(sample.messages / sample.seconds for sample in samples) or 0.0, 1),
        cpu_us_per_message=per_message((sample.cpu_seconds, sample.messages) for sample in samples),
        sink_cpu_us_per_message=per_message((sample.sink_seconds, sample.messages) for sample in samples),
        store_cpu_us_per_message=per_message((sample.store_seconds, sample.messages) for sample in samples),
        foreign_cpu=round(middle(sample.foreign for sample in samples) or 0.0, 2),
        connections=max((sample.connections for sample in samples if sample.connections is not None), default=None),
        memory_mib=max((round(sample.memory / 2**20, 1) for sample in samples if sample.memory is not None), default=None),
        runs=len(samples),
        note=note,
    )


def skipped(name: str, reason: str) -> Row:
    """A case that cannot be measured here, and why."""
    return Row(name=name, skipped=reason)


# --- CPU of processes ---------------------------------------------------------------------------------------------------------


def _stat(pid: int | str) -> list[str] | None:
    """The fields of /proc/PID/stat behind the command name: [0] state, [1] parent, [11..14] times."""
    with contextlib.suppress(OSError):
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return None


def cpu_seconds(*pids: int) -> float:
    """User and system time of these processes so far, those of their children that have ended included."""
    total = 0
    for pid in pids:
        fields = _stat(pid)
        if fields is not None:
            total += sum(map(int, fields[11:15]))
    return total / _TICK


def memory(pid: int) -> tuple[int, int]:
    """Resident memory of a process now, and the most it ever was, in octets; (0, 0) when it is gone."""
    with contextlib.suppress(OSError):
        facts = dict(line.split(":", 1) for line in (_PROC / str(pid) / "status").read_text().splitlines())
        now, peak = (int(facts[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    return 0, 0


def descendants(root: int) -> list[int]:
    """`root` and every process below it."""
    below: dict[int, list[int]] = {}
    for name in os.listdir(_PROC):  # noqa: PTH208 - thousands of names, several times a second
        if name.isdigit() and (fields := _stat(name)) is not None:
            below.setdefault(int(fields[1]), []).append(int(name))
    found, look = [], [root]
    while look:
        pid = look.pop()
        found.append(pid)
        look.extend(below.get(pid, ()))
    return found


class Watch:
    """From its making until `stop`: wall time, and how many cores were used by processes that are not below ours."""

    def __init__(self) -> None:
        self._busy = _busy_seconds()
        self._own = cpu_seconds(*descendants(os.getpid()))
        self._began = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """(seconds, foreign cores)."""
        seconds = time.perf_counter() - self._began
        busy = _busy_seconds() - self._busy
        own = cpu_seconds(*descendants(os.getpid())) - self._own
        return seconds, round(max(0.0, busy - own) / max(seconds, 1e-9), 2)


def _busy_seconds() -> float:
    """What all cores have done so far: everything but idle and waiting; time the hypervisor took away counts as foreign too."""
    fields = [int(word) for word in (_PROC / "stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICK


# --- which core ---------------------------------------------------------------------------------------------------------------


def cores() -> list[int]:
    """The cores this process may use, in order."""
    return sorted(os.sched_getaffinity(0))


def pin(pid: int, wanted: Iterable[int]) -> None:
    """Keep every thread of a process on these cores; a process that has ended is left alone."""
    for task in (_PROC / str(pid) / "task").iterdir() if (_PROC / str(pid)).exists() else ():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), set(wanted))


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Send it to each of them; a process that has ended is left alone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# --- the machine --------------------------------------------------------------------------------------------------------------


def machine(**more: Any) -> dict[str, Any]:
    """What has to be known to read the numbers."""
    information = (_PROC / "cpuinfo").read_text() if (_PROC / "cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in information.splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in facts.items()}
    flags = known.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {}
    for name in ("uvloop", "cython", "aiosmtplib", "asyncpg", "redis", "hiredis", "msgspec", "python-liquid"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "processor": known.get("model name", platform.machine()),
        "cores": len(cores()),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        **more,
    }


def program_version(*command: str) -> str:
    """First line a program says about its version, or empty."""
    if shutil.which(command[0]) is None:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return (said.stdout or said.stderr).strip().splitlines()[0] if (said.stdout or said.stderr).strip() else ""
    return ""
