"""Real PostgreSQL and Valkey for the tests: private servers in a temporary directory, a fresh database per test.

`SLUICE_DATABASE_URL` and `SLUICE_REDIS_URL` name other servers instead; then only databases made here are touched, and a
Redis database is used only if it is empty.
"""

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
import redis.asyncio as redis_client
import uvloop
from hypothesis import HealthCheck, settings

from store import embedded, migrate, postgres
from store.backends_check import run_apart

# A run says something about the code, not about the machine's speed or luck: the same examples each time, however long one takes.
# The slow tests, which look for what nobody has thought of, draw others each time.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop of production."""
    return {"uvloop": uvloop.new_event_loop}


def with_database(url: str, name: str) -> str:
    """The same server and user, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def _administer(url: str, *statements: str) -> None:
    connection = await postgres.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement, timeout=60)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def short_temporary_directory() -> Iterator[Path]:
    """A directory with a short path that another user can pass through (pytest's own is closed to the servers' user)."""
    directory = Path(tempfile.mkdtemp(prefix="sluice-t-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def backends(short_temporary_directory: Path) -> Iterator[embedded.Backends]:
    """The servers of this test session: `database_url` is an administrative one, tests use the fixtures below."""
    given = [os.environ.get(name) or "embedded:" for name in ("SLUICE_DATABASE_URL", "SLUICE_REDIS_URL")]
    with embedded.resolve(given[0], given[1], short_temporary_directory / "state", durable=False) as found:
        yield found


@pytest.fixture(scope="session")
def template_database(backends: embedded.Backends) -> Iterator[str]:
    """The name of a migrated database that others are cloned from; nobody may be connected to it."""
    name = f"sluice_template_{secrets.token_hex(4)}"
    run_apart(lambda: _administer(backends.database_url, f"create database {name}"))
    run_apart(lambda: migrate.apply(with_database(backends.database_url, name)))
    yield name
    run_apart(lambda: _administer(backends.database_url, f"drop database if exists {name} with (force)"))


@pytest.fixture(scope="session")
def database_url(backends: embedded.Backends, template_database: str) -> Iterator[str]:
    """A migrated database shared by the whole session; use `fresh_database_url` or `pool` for one of your own."""
    name = f"sluice_session_{secrets.token_hex(4)}"
    run_apart(lambda: _administer(backends.database_url, f"create database {name} template {template_database}"))
    yield with_database(backends.database_url, name)
    run_apart(lambda: _administer(backends.database_url, f"drop database if exists {name} with (force)"))


@pytest.fixture
async def empty_database_url(backends: embedded.Backends) -> AsyncIterator[str]:
    """A database without any table, dropped after the test."""
    name = f"sluice_empty_{secrets.token_hex(4)}"
    await _administer(backends.database_url, f"create database {name}")
    yield with_database(backends.database_url, name)
    await _administer(backends.database_url, f"drop database if exists {name} with (force)")


@pytest.fixture
async def fresh_database_url(backends: embedded.Backends, template_database: str) -> AsyncIterator[str]:
    """A migrated, empty database for this test only, also for processes it starts; dropped after it."""
    name = f"sluice_test_{secrets.token_hex(4)}"
    await _administer(backends.database_url, f"create database {name} template {template_database}")
    yield with_database(backends.database_url, name)
    await _administer(backends.database_url, f"drop database if exists {name} with (force)")


@pytest.fixture
async def pool(fresh_database_url: str) -> AsyncIterator[postgres.Pool]:
    """A pool on `fresh_database_url`."""
    opened = await postgres.open_pool(fresh_database_url, 10)
    yield opened
    try:
        await asyncio.wait_for(opened.close(), 5)
    except TimeoutError:
        opened.terminate()


@pytest.fixture(scope="session")
def redis_url(backends: embedded.Backends) -> str:
    """The Redis database of this session: tests may do what they like in it."""
    if not os.environ.get("SLUICE_REDIS_URL"):
        return backends.redis_url

    async def first_empty() -> str:
        parts = urlsplit(backends.redis_url)
        for number in range(15, -1, -1):
            chosen = {"query": f"db={number}"} if parts.scheme == "unix" else {"path": f"/{number}"}
            url = urlunsplit(parts._replace(**chosen))
            client = redis_client.Redis.from_url(url, socket_timeout=5)
            try:
                if await client.dbsize() == 0:
                    return url
            except redis_client.ResponseError:
                continue  # fewer databases than 16
            finally:
                await client.aclose()
        pytest.exit("SLUICE_REDIS_URL has no empty database; tests delete what they find, so give them one", returncode=2)

    return run_apart(first_empty)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[redis_client.Redis]:
    """A client on an empty Redis database."""
    client = redis_client.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=5)
    await client.flushdb()
    yield client
    await client.flushdb()
    await client.aclose()
