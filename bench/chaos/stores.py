"""The two stores of a fleet: our own servers or foreign ones, in either case reached by the fleet through links that can be harmed.

The harness itself talks to them directly, past the links, so that it sees the truth while the fleet does not.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

import redis.asyncio

from bench.chaos.proxy import Link, Target
from bench.chaos.servers import Postgres, Valkey
from domain.errors import ConfigurationError
from store import batch_queue, migrate, postgres

_TEMPLATE = "chaos_template"


class Stores:
    """PostgreSQL and Redis. `postgres` and `valkey` are None where they are foreign: those can only be harmed through their links."""

    def __init__(self, directory: Path, database_url: str = "", redis_url: str = "", *, small_disk: Path | None = None) -> None:
        """`small_disk`: where PostgreSQL's data go instead, a file system that will be filled."""
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        (directory / "log").mkdir(mode=0o755, exist_ok=True)
        self._directory = directory
        self._given_database = database_url
        self._given_redis = redis_url
        settings = {"shared_buffers": "128MB"}
        if small_disk is not None:
            settings |= {"max_wal_size": "96MB", "min_wal_size": "32MB"}
        self.postgres = None if database_url else Postgres(directory, small_disk, settings)
        self.valkey = None if redis_url else Valkey(directory)
        self.postgres_link = Link("PostgreSQL", _database_target(database_url) if database_url else str(self._own_postgres.socket))
        self.redis_link = Link("Redis", _redis_target(redis_url) if redis_url else str(self._own_valkey.socket))
        self._databases = 0

    @property
    def _own_postgres(self) -> Postgres:
        assert self.postgres is not None
        return self.postgres

    @property
    def _own_valkey(self) -> Valkey:
        assert self.valkey is not None
        return self.valkey

    async def start(self) -> None:
        """Start what is ours and the links. Raises Unavailable."""
        if self.valkey is not None:
            await self.valkey.start()
        if self.postgres is not None:
            await self.postgres.initialise()
            await self.postgres.start()
        await self.postgres_link.start()
        await self.redis_link.start()

    async def stop(self) -> None:
        """End what is ours."""
        import signal

        await self.postgres_link.stop()
        await self.redis_link.stop()
        for server, number in ((self.postgres, signal.SIGINT), (self.valkey, signal.SIGTERM)):
            if server is not None:
                server.send(signal.SIGCONT)
                await server.end(number)

    async def new_database(self) -> str:
        """The name of a fresh, migrated database; of a foreign server the one its URL names, migrated."""
        if self._given_database:
            await migrate.apply(self._given_database)
            return ""
        conn = await postgres.connect(self._own_postgres.url("postgres"))
        try:
            if not self._databases:
                await conn.execute(f'create database "{_TEMPLATE}"')
                await migrate.apply(self._own_postgres.url(_TEMPLATE))
            self._databases += 1
            name = f"chaos_{self._databases}"
            await conn.execute(f'create database "{name}" template "{_TEMPLATE}"')
            return name
        finally:
            await conn.close(timeout=5)

    def direct_database(self, name: str) -> str:
        """URL for the harness."""
        return self._given_database or self._own_postgres.url(name)

    def linked_database(self, name: str) -> str:
        """URL for the fleet, through the link."""
        if not self._given_database:
            return f"postgresql://sluice@127.0.0.1:{self.postgres_link.port}/{name}"
        parts = urlsplit(self._given_database)
        user = parts.netloc.rpartition("@")[0]
        query = "&".join(pair for pair in parts.query.split("&") if pair and pair.partition("=")[0] not in ("host", "port"))
        netloc = f"{user}@127.0.0.1:{self.postgres_link.port}" if user else f"127.0.0.1:{self.postgres_link.port}"
        return urlunsplit((parts.scheme, netloc, parts.path, query, ""))

    @property
    def linked_redis(self) -> str:
        """URL for the fleet, through the link."""
        if not self._given_redis:
            return f"redis://127.0.0.1:{self.redis_link.port}/0"
        parts = urlsplit(self._given_redis)
        user = parts.netloc.rpartition("@")[0]
        number = parse_qs(parts.query).get("db", [""])[0] if parts.scheme == "unix" else parts.path.strip("/")
        netloc = f"{user}@127.0.0.1:{self.redis_link.port}" if user else f"127.0.0.1:{self.redis_link.port}"
        return urlunsplit(("redis", netloc, f"/{number or 0}", "", ""))

    @contextlib.asynccontextmanager
    async def redis(self) -> AsyncIterator[redis.asyncio.Redis]:
        """A direct client."""
        url = self._given_redis or f"unix://{quote(str(self._own_valkey.socket))}?db=0"
        client = batch_queue.connect(url, 10.0)
        try:
            yield client
        finally:
            await client.aclose()


def _database_target(url: str) -> Target:
    parts = urlsplit(url)
    host = parse_qs(parts.query).get("host", [""])[0]
    if host.startswith("/"):
        return f"{host}/.s.PGSQL.{parse_qs(parts.query).get('port', ['5432'])[0]}"
    if not (parts.hostname or host):
        raise ConfigurationError(["--database-url: name a host, the link to it is what gets harmed"])
    return (host or unquote(parts.hostname or ""), parts.port or 5432)


def _redis_target(url: str) -> Target:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return unquote(parts.path)
    if parts.scheme != "redis":
        raise ConfigurationError([f"--redis-url: {parts.scheme}: only redis:// and unix:// can be led through a link"])
    return (parts.hostname or "127.0.0.1", parts.port or 6379)
