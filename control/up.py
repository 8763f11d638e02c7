"""`sluice up`: the stores, then all processes of one machine, until a signal; then everything in order, the stores last."""

import asyncio
import signal
from pathlib import Path

from config.load import admin_key_path, load, state_directory
from config.settings import Settings
from control import machine
from control.cli_base import OK, say
from control.supervise import Supervisor, check_ports
from domain.errors import ConfigurationError
from store import embedded, embedded_keeper, migrate


def main(settings: Settings, config: Path | None, *, engines: int | None, log_files: bool) -> int:
    """Run until SIGTERM or SIGINT. Raises ConfigurationError (a port is taken), Unavailable (a store), ChildFailed (a process)."""
    check_ports(machine.ports(settings))
    state = state_directory(settings)
    # Private servers are children of the thread that starts them: this happens here and not inside the event loop.
    with machine.own_stores(settings, state) as backends:
        say(f"stores: {backends.chosen}")
        asyncio.run(
            _run(settings, config, backends, engines=machine.engine_count(settings, engines), log=state / "log" if log_files else None)
        )
    say("stopped")
    return OK


async def _run(settings: Settings, config: Path | None, backends: embedded.Backends, *, engines: int, log: Path | None) -> None:
    stop = stop_on_signals()
    applied = await migrate.apply(backends.database_url)
    if applied:
        say(f"database: applied {', '.join(applied)}")
    supervisor = Supervisor(
        machine.children(settings, engines=engines),
        environment=machine.environment(config, database_url=backends.database_url, redis_url=backends.redis_url),
        say=say,
        log_directory=log,
    )
    reload_on_hangup(supervisor, config)
    keeping = keep_stores(backends)
    starting = asyncio.create_task(supervisor.start())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # told to stop before everything was up
        starting.cancel()
        keeping.cancel()
        await asyncio.gather(starting, keeping, return_exceptions=True)
        return
    ready = starting.result()
    listening = [f"{name} {' '.join(words.values())}" for name, words in ready.items() if not name.startswith("engine")]
    say(f"ready: {engines} engine{'s' if engines > 1 else ''}, {', '.join(listening)}")
    say(f"console: http://{ready['control'].get('http', '')}/ (the key to sign in: {admin_key_path(settings)})")
    if log is not None:
        say(f"logs: {log}")
    await stopped
    say(f"stopping: engines finish what they began (at most {settings.engine.drain_timeout_seconds:g} s)")
    await supervisor.stop()
    keeping.cancel()  # not before: engines that drain need their stores
    await asyncio.gather(keeping, return_exceptions=True)


def keep_stores(backends: embedded.Backends) -> "asyncio.Task[None]":
    """Watch over the private servers this process runs, if any, until the task is cancelled."""
    servers = backends.servers if backends.owned else None
    if servers is None:
        return asyncio.create_task(asyncio.sleep(0), name="no private servers")
    return asyncio.create_task(embedded_keeper.keep(servers, say), name="private servers")


def reload_on_hangup(supervisor: Supervisor, config: Path | None) -> None:
    """SIGHUP: check the settings and let the engines read them again; refused whole here already when anything is wrong (P12)."""

    def reload() -> None:
        try:
            load(config)
        except ConfigurationError as error:
            say(f"settings refused, the old ones stay: {error}")
            return
        told = supervisor.send("engine", signal.SIGHUP)
        say(f"settings read again by {told} engine{'s' if told != 1 else ''}; the log says what needs a restart")

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set, for as long as the running loop lives."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
