"""One machine: which processes it runs, with which environment, in which order they stop. `sluice up` and `sluice demo` share it."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from config.settings import Settings
from control.cli_base import say
from control.supervise import Child
from domain.errors import Unavailable
from store import embedded

_OWNER_SECONDS: Final = 60.0
_SAY_SECONDS: Final = 2.0  # a short command is gone before that

_ROOT = Path(__file__).resolve().parents[1]


def engine_count(settings: Settings, asked: int | None = None) -> int:
    """How many engine processes to run: what was asked, else the setting, else one per core this process may use."""
    return asked or settings.engine.processes or len(os.sched_getaffinity(0))


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """The command line that runs one of our modules in the interpreter we run in."""
    return (sys.executable, "-m", module, *arguments)


def environment(
    config: Path | None, *, database_url: str = "", redis_url: str = "", more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What every child gets: ours, the stores that were chosen, the settings file, and our packages before the working directory's.

    PYTHONSAFEPATH matters: `-m` would otherwise put the working directory first on the path, and names like `config` are common.
    """
    made = dict(os.environ)
    path = [str(_ROOT), *(entry for entry in made.get("PYTHONPATH", "").split(os.pathsep) if entry)]
    made["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    made["PYTHONSAFEPATH"] = "1"
    if config is not None:
        made["SLUICE_CONFIG"] = str(config.resolve())
    if database_url:
        made["SLUICE_DATABASE_URL"] = database_url
    if redis_url:
        made["SLUICE_REDIS_URL"] = redis_url
    return made | dict(more or {})


def children(settings: Settings, *, engines: int, sink: tuple[str, ...] | None = None) -> list[Child]:
    """The processes of one machine. Engines stop first and get their drain time; the sink, which answers them, stops last.

    `sink`: arguments of the built-in sink when it is wanted.
    """
    made = [
        Child(
            name=f"engine.{slot}",
            argv=python("engine", "--slot", str(slot)),
            ready="engine ready",
            stop_order=0,
            # The engine keeps its own limit; the margin covers writing the last outcomes down.
            stop_timeout_seconds=settings.engine.drain_timeout_seconds + 10.0,
        )
        for slot in range(engines)
    ]
    made.append(Child(name="control", argv=python("control"), ready="control ready", stop_order=1))
    made.append(Child(name="inbound", argv=python("inbound"), ready="inbound ready", stop_order=1, stop_timeout_seconds=15.0))
    if sink is not None:
        made.append(Child(name="sink", argv=python("bench.sink", *sink), ready="sink ready", stop_order=2))
    return made


@contextlib.contextmanager
def own_stores(settings: Settings, state: Path) -> Iterator[embedded.Backends]:
    """The stores of the settings; embedded ones are run by this process, for as long as the block lasts.

    A short command (`sluice status`) may be running them at this moment and would take them away when it ends, so it is waited
    for. Raises Unavailable when somebody keeps them, and what `embedded.resolve` raises.
    """
    private = "embedded:" in (settings.database.url, settings.redis.url)
    began, said = time.monotonic(), False
    while True:
        with embedded.resolve(settings.database.url, settings.redis.url, state) as backends:
            if backends.owned or not private:
                yield backends
                return
            chosen = backends.chosen
        if time.monotonic() - began > _SAY_SECONDS and not said:
            said = True
            say(f"waiting up to {_OWNER_SECONDS:.0f} s: another process runs the stores in {state} (another `sluice up`?)")
        if time.monotonic() - began > _OWNER_SECONDS:
            raise Unavailable(
                f"another process keeps running the stores in {state} ({chosen}); stop it, or set another node.state_directory"
            )
        time.sleep(0.1)


def ports(settings: Settings) -> dict[str, tuple[str, int]]:
    """Every port the machine listens on, by setting: to look for one that is taken before anything is started."""
    return {
        "control.port": (settings.control.host, settings.control.port),
        "inbound.smtp_port": (settings.inbound.smtp_host, settings.inbound.smtp_port),
        "inbound.submission_port": (settings.inbound.smtp_host, settings.inbound.submission_port),
        "inbound.lmtp_port": (settings.inbound.smtp_host, settings.inbound.lmtp_port),
        "inbound.http_port": (settings.inbound.http_host, settings.inbound.http_port),
    }
