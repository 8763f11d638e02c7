"""Faults of the stores and of the links to them (rows 7-15). None of them may bring a second copy."""

import asyncio
import contextlib
import shutil
import signal
from typing import TYPE_CHECKING

import asyncpg

from bench import measure
from bench.chaos.fault import Fault, Scene, Step
from bench.chaos.load import free_octets
from bench.chaos.proxy import Link, Weather
from store import postgres as store_postgres

if TYPE_CHECKING:
    from bench.chaos.servers import Postgres, Valkey


def _valkey(scene: Scene) -> "Valkey":
    valkey = scene.fleet.stores.valkey
    assert valkey is not None
    return valkey


def _postgres(scene: Scene) -> "Postgres":
    postgres = scene.fleet.stores.postgres
    assert postgres is not None
    return postgres


# --- Valkey -----------------------------------------------------------------------------------------------------------------


async def kill_valkey(scene: Scene) -> None:
    """kill -9."""
    await _valkey(scene).end(signal.SIGKILL)


async def start_valkey(scene: Scene) -> None:
    """Start it again on its data."""
    await _valkey(scene).start()


async def flush_valkey(scene: Scene) -> None:
    """FLUSHALL."""
    async with scene.fleet.stores.redis() as client:
        await client.flushall()


async def lose_valkey_data(scene: Scene) -> None:
    """kill -9, and its data directory is gone."""
    valkey = _valkey(scene)
    await valkey.end(signal.SIGKILL)
    valkey.replace_data(None)


async def roll_valkey_back(scene: Scene) -> None:
    """It loses its last two seconds, as by a power cut with `appendfsync everysec`."""
    valkey = _valkey(scene)
    copy = scene.fleet.directory / "valkey-before"
    valkey.copy_data(copy)
    await asyncio.sleep(2.0)
    await valkey.end(signal.SIGKILL)
    valkey.replace_data(copy)
    shutil.rmtree(copy)


async def hang_valkey(scene: Scene) -> None:
    """SIGSTOP: connections stay, answers do not come."""
    _valkey(scene).send(signal.SIGSTOP)


async def continue_valkey(scene: Scene) -> None:
    """SIGCONT."""
    _valkey(scene).send(signal.SIGCONT)


def _config(name: str, value: str) -> Step:
    async def step(scene: Scene) -> None:
        async with scene.fleet.stores.redis() as client:
            await client.config_set(name, value)

    return step


async def make_read_only(scene: Scene) -> None:
    """It becomes the read-only replica of a server that is not there."""
    async with scene.fleet.stores.redis() as client:
        await client.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call]


async def make_writable(scene: Scene) -> None:
    """A primary again."""
    async with scene.fleet.stores.redis() as client:
        await client.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]


async def ask_for_password(scene: Scene) -> None:
    """Every client is cut off and asked for a password it does not have."""
    async with scene.fleet.stores.redis() as client:
        await client.config_set("requirepass", "chaos")
        with contextlib.suppress(Exception):
            await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")  # type: ignore[no-untyped-call]


async def forget_password(scene: Scene) -> None:
    """No password any more."""
    import redis.asyncio

    client = redis.asyncio.Redis(unix_socket_path=str(_valkey(scene).socket), password="chaos")
    try:
        await client.config_set("requirepass", "")
    finally:
        await client.aclose()


# --- links --------------------------------------------------------------------------------------------------------------------


def _weather(which: str, weather: Weather) -> Step:
    async def step(scene: Scene) -> None:
        await _link(scene, which).set(weather)

    return step


def _heal(which: str) -> Step:
    async def step(scene: Scene) -> None:
        await _link(scene, which).heal()

    return step


def _resets(which: str) -> Step:
    async def step(scene: Scene) -> None:
        for _ in range(5):
            _link(scene, which).reset()
            scene.strike()
            await asyncio.sleep(scene.rng.uniform(0.2, 0.9))

    return step


def _link(scene: Scene, which: str) -> Link:
    stores = scene.fleet.stores
    return stores.redis_link if which == "redis" else stores.postgres_link


# --- PostgreSQL -----------------------------------------------------------------------------------------------------------------


async def stop_postgres(scene: Scene) -> None:
    """`pg_ctl stop -m immediate`: SIGQUIT."""
    await _postgres(scene).end(signal.SIGQUIT)


async def start_postgres(scene: Scene) -> None:
    """Start it again; it recovers from its log."""
    await _postgres(scene).start()


async def kill_backends(scene: Scene) -> None:
    """pg_terminate_backend of everybody's connections, five times."""
    for _ in range(5):
        killed = await scene.fleet.pool.fetchval(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity where backend_type = 'client backend' "
            "and datname = current_database() and application_name <> 'chaos' and pid not in (select unnest($1::int[]))",
            await _own_pids(scene),
        )
        scene.notes.append(f"{killed} backends ended")
        scene.strike()
        await asyncio.sleep(scene.rng.uniform(0.3, 1.0))


async def _own_pids(scene: Scene) -> list[int]:
    """Backends of the harness: the only ones that came past the link."""
    own = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(scene.fleet.pool.get_size()):
            conn = await stack.enter_async_context(scene.fleet.pool.acquire())
            own.append(conn.get_server_pid())
    return own


async def lock_tables(scene: Scene) -> None:
    """Somebody holds a lock on the tables everybody writes."""
    conn = await store_postgres.connect(scene.fleet.pool_url)
    transaction = conn.transaction()
    await transaction.start()
    # the fleet's own transactions take these in this order
    await conn.execute("lock table journal_cursors, batches, retries, accounting in access exclusive mode", timeout=30)
    scene.memory["conn"] = conn


async def unlock_tables(scene: Scene) -> None:
    """The lock goes."""
    await scene.memory["conn"].close(timeout=5)


async def hang_postgres(scene: Scene) -> None:
    """SIGSTOP of all its processes."""
    processes = _postgres(scene).processes()
    scene.memory["processes"] = processes
    measure.send_signal(reversed(processes), signal.SIGSTOP)


async def continue_postgres(scene: Scene) -> None:
    """SIGCONT."""
    measure.send_signal({*scene.memory["processes"], *_postgres(scene).processes()}, signal.SIGCONT)


async def take_connections(scene: Scene) -> None:
    """Every connection the server gives is taken, and the fleet's are ended."""
    taken: list[store_postgres.Connection] = []
    scene.memory["taken"] = taken
    await kill_fleet_backends(scene)
    with contextlib.suppress(Exception):
        while len(taken) < 250:
            taken.append(await asyncpg.connect(scene.fleet.pool_url, timeout=5, server_settings={"application_name": "chaos"}))
    scene.notes.append(f"{len(taken)} connections taken")


async def kill_fleet_backends(scene: Scene) -> None:
    """Their sockets end at the link."""
    scene.fleet.stores.postgres_link.reset()
    await asyncio.sleep(0.05)


async def give_connections(scene: Scene) -> None:
    """They are given back."""
    taken: list[store_postgres.Connection] = scene.memory["taken"]
    for conn in taken:
        conn.terminate()


async def fill_postgres_disk(scene: Scene) -> None:
    """The file system of the data directory is full."""
    data = _postgres(scene).data
    filler = data.parent / "filler"
    scene.memory["filler"] = filler
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"\0" * max(4096, min(1 << 20, free_octets(data))))
            except OSError:
                break


async def free_postgres_disk(scene: Scene) -> None:
    """Space again, and the server is started where it gave up."""
    scene.memory["filler"].unlink()
    await asyncio.sleep(0.5)
    postgres = _postgres(scene)
    if not postgres.running:
        scene.notes.append("PostgreSQL had given up and was started again")
        await postgres.start()


_OWN_VALKEY = frozenset({"own-valkey"})
_OWN_POSTGRES = frozenset({"own-postgres"})
_SLOW = Weather(delay_seconds=0.2)
_STALLED = Weather(stalled=True)
_DEAF = Weather(lose_up=True, lose_down=True)
_REPLIES_LOST = Weather(lose_down=True)

FAULTS = (
    Fault(name="valkey-killed", row=7, about="kill -9, started at once", inject=kill_valkey, heal=start_valkey, needs=_OWN_VALKEY,
          process=True,
          mixed=True),
    Fault(name="valkey-away", row=7, about="kill -9, started after 8 s", inject=kill_valkey, heal=start_valkey, hold=(7.0, 9.0),
          needs=_OWN_VALKEY, mixed=True),
    Fault(name="valkey-wiped", row=8, about="FLUSHALL", inject=flush_valkey, mixed=True),
    Fault(name="valkey-data-lost", row=8, about="kill -9, data directory gone", inject=lose_valkey_data, heal=start_valkey,
          needs=_OWN_VALKEY,
          process=True, mixed=True),
    Fault(name="valkey-rolled-back", row=9, about="back by two seconds", inject=roll_valkey_back, heal=start_valkey, needs=_OWN_VALKEY,
          process=True, mixed=True),
    Fault(name="valkey-hangs", row=10, about="SIGSTOP", inject=hang_valkey, heal=continue_valkey, hold=(6.0, 9.0), needs=_OWN_VALKEY,
          process=True, mixed=True),
    Fault(name="valkey-out-of-memory", row=11, about="maxmemory reached, noeviction", inject=_config("maxmemory", "1mb"),
          heal=_config("maxmemory", "0"), hold=(3.0, 5.0), mixed=True),
    Fault(name="valkey-read-only", row=11, about="a read-only replica", inject=make_read_only, heal=make_writable, hold=(3.0, 5.0),
          needs=_OWN_VALKEY, mixed=True),
    Fault(name="valkey-wrong-password", row=11, about="asks for another password", inject=ask_for_password, heal=forget_password,
          hold=(3.0, 5.0), needs=_OWN_VALKEY, mixed=True),
    Fault(name="redis-link-slow", row=12, about="200 ms each way", inject=_weather("redis", _SLOW), heal=_heal("redis"), hold=(4.0, 6.0),
          mixed=True),
    Fault(name="redis-link-reset", row=12, about="resets", inject=_resets("redis"), mixed=True),
    Fault(name="redis-link-half-open", row=12, about="nothing arrives either way", inject=_weather("redis", _DEAF), heal=_heal("redis"),
          hold=(5.0, 8.0), mixed=True),
    Fault(name="redis-replies-lost", row=12, about="commands arrive, replies do not", inject=_weather("redis", _REPLIES_LOST),
          heal=_heal("redis"), hold=(3.0, 6.0), mixed=True),
    Fault(name="postgres-stopped", row=13, about="immediate stop for 5 s", inject=stop_postgres, heal=start_postgres, hold=(5.0, 6.0),
          needs=_OWN_POSTGRES, process=True, mixed=True),
    Fault(name="postgres-stopped-long", row=13, about="immediate stop for 20 s", inject=stop_postgres, heal=start_postgres, hold=(20.0,
          21.0),
          needs=_OWN_POSTGRES),
    Fault(name="postgres-backends-killed", row=14, about="pg_terminate_backend, five times", inject=kill_backends, mixed=True),
    Fault(name="postgres-locked", row=14, about="tables locked", inject=lock_tables, heal=unlock_tables, hold=(8.0, 12.0), mixed=True),
    Fault(name="postgres-connections-taken", row=14, about="no connection left", inject=take_connections, heal=give_connections,
          hold=(3.0, 5.0), needs=_OWN_POSTGRES, mixed=True),
    Fault(name="postgres-hangs", row=14, about="SIGSTOP of every process", inject=hang_postgres, heal=continue_postgres, hold=(6.0, 9.0),
          needs=_OWN_POSTGRES, mixed=True),
    Fault(name="postgres-link-stalled", row=14, about="windows fill up", inject=_weather("postgres", _STALLED), heal=_heal("postgres"),
          hold=(6.0, 12.0), mixed=True),
    Fault(name="postgres-link-slow", row=14, about="200 ms each way", inject=_weather("postgres", _SLOW), heal=_heal("postgres"),
          hold=(4.0, 6.0), mixed=True),
    Fault(name="postgres-link-reset", row=14, about="resets", inject=_resets("postgres"), mixed=True),
    Fault(name="postgres-link-half-open", row=14, about="nothing arrives either way", inject=_weather("postgres", _DEAF),
          heal=_heal("postgres"),
          hold=(6.0, 12.0), mixed=True),
    Fault(name="postgres-replies-lost", row=14, about="COMMIT arrives, its reply does not", inject=_weather("postgres", _REPLIES_LOST),
          heal=_heal("postgres"), hold=(3.0, 6.0), mixed=True),
    Fault(name="postgres-disk-full", row=15, about="data directory on a full tmpfs", inject=fill_postgres_disk, heal=free_postgres_disk,
          hold=(4.0, 6.0), needs=_OWN_POSTGRES | {"small-postgres"}),
)  # fmt: skip
