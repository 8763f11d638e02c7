"""The way into PostgreSQL: one pool per process, transactions, and the sentences we say when it does not answer.

Every connect is bounded. What the network or the server does to us becomes `domain.errors.Unavailable`; errors in a
statement stay asyncpg's own, because they are bugs of ours.
"""

import contextlib
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote, urlsplit

import asyncpg

from domain.errors import Unavailable

if TYPE_CHECKING:
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    # What `pool.acquire()` hands out: a connection that goes back to the pool
    PooledConnection: TypeAlias = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
else:  # asyncpg's classes take type parameters in its stubs only
    Pool = asyncpg.Pool
    Connection = asyncpg.Connection
    PooledConnection = asyncpg.pool.PoolConnectionProxy

CONNECT_TIMEOUT_SECONDS = 10.0
_LINK_OPTIONS = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000))
MINIMUM_VERSION = 140000  # server_version_num: what the schema and the partitions need

# The link broke, or the server is up and says that it cannot serve us now. Everything else is our own mistake.
UNAVAILABLE: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidPasswordError,
    asyncpg.InvalidCatalogNameError,
)


def describe(url: str) -> str:
    """The place a URL names, for people: host, port and database, never user or password."""
    try:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2] or "a local socket"
        for pair in parts.query.split("&"):
            key, _, value = pair.partition("=")
            if key == "host":
                place = unquote(value)
    except ValueError:
        return "an address that cannot be read"
    return f"{place}{parts.path}"


def unavailable(url: str, error: BaseException) -> Unavailable:
    """The sentence for a failed connect: what was tried, what came back, what to look at."""
    if isinstance(error, asyncpg.InvalidPasswordError | asyncpg.InvalidAuthorizationSpecificationError):
        advice = "check user and password in database.url"
    elif isinstance(error, asyncpg.InvalidCatalogNameError):
        advice = "create the database or correct its name in database.url"
    elif isinstance(error, asyncpg.TooManyConnectionsError):
        advice = "raise max_connections of the server or lower database.pool_size"
    elif isinstance(error, TimeoutError):
        advice = "no answer in time; check host, port and firewall"
    else:
        advice = "check that the server runs and that database.url names it"
    said = str(error).strip() or type(error).__name__
    return Unavailable(f"PostgreSQL at {describe(url)} is not available: {said}; {advice}")


async def connect(url: str, *, timeout_seconds: float = CONNECT_TIMEOUT_SECONDS) -> Connection:
    """One connection outside any pool. Raises Unavailable."""
    try:
        return await asyncpg.connect(url, timeout=timeout_seconds, server_settings={"application_name": "sluice"})
    except UNAVAILABLE as error:
        raise unavailable(url, error) from error


async def open_pool(
    url: str,
    size: int = 10,
    command_timeout_seconds: float | None = 30.0,
    *,
    connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
    idle_in_transaction_seconds: float = 0.0,
    stateless: bool = False,
) -> Pool:
    """A pool of up to `size` connections, one of them open already. Raises Unavailable when none can be opened.

    `command_timeout_seconds` bounds every statement that does not bring its own `timeout=`; None: no bound.
    `idle_in_transaction_seconds`: PostgreSQL ends a connection that stands still in a transaction for so long, so that a process
    that is stopped or cut off keeps no rows locked; 0: never.
    """
    try:
        # No floor: asyncpg restores one in the background, with a traceback in the log for every try while the server is away
        pool: Pool = await asyncpg.create_pool(
            url,
            min_size=0,
            max_size=size,
            command_timeout=command_timeout_seconds,
            timeout=connect_timeout_seconds,
            init=_watch_link,
            reset=_nothing_to_clean if stateless else None,
            server_settings={
                "application_name": "sluice",
                "idle_in_transaction_session_timeout": str(int(idle_in_transaction_seconds * 1000)),
            },
        )
        async with pool.acquire(timeout=connect_timeout_seconds):
            return pool
    except UNAVAILABLE as error:
        raise unavailable(url, error) from error


async def _nothing_to_clean(_: object) -> None:
    """An open transaction has been rolled back by asyncpg already."""


async def connect_alone(url: str, *, command_timeout_seconds: float, idle_seconds: float) -> Connection:
    """A connection for a session lock: PostgreSQL ends it when it stands still for `idle_seconds`, in a transaction or not.

    So the lock of a process that is stopped or cut off comes free. Raises Unavailable.
    """
    idle = str(int(idle_seconds * 1000))
    try:
        opened = await asyncpg.connect(
            url,
            timeout=CONNECT_TIMEOUT_SECONDS,
            command_timeout=command_timeout_seconds,
            server_settings={
                "application_name": "sluice",
                "idle_session_timeout": idle,
                "idle_in_transaction_session_timeout": idle,
            },
        )
    except UNAVAILABLE as error:
        raise unavailable(url, error) from error
    await _watch_link(opened)
    return opened


async def _watch_link(conn: Connection) -> None:
    """Let the kernel notice a server that vanished without a word; its own defaults take 15 minutes to 2 hours."""
    link = conn._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    if link is None or link.family not in (socket.AF_INET, socket.AF_INET6):
        return
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in _LINK_OPTIONS:
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)


@contextlib.asynccontextmanager
async def broken_links_as_unavailable() -> AsyncIterator[None]:
    """Turns a lost or refused connection inside the block into Unavailable."""
    try:
        yield
    except UNAVAILABLE as error:
        said = str(error).strip() or type(error).__name__
        raise Unavailable(f"PostgreSQL did not answer: {said}; the statement was not confirmed") from error
    except asyncpg.InterfaceError as error:
        # asyncpg reports use of a connection that died under us this way
        if "closed" not in str(error):
            raise
        raise Unavailable(f"PostgreSQL did not answer: {error}; the statement was not confirmed") from error


@contextlib.asynccontextmanager
async def connection(pool: Pool, *, timeout_seconds: float = CONNECT_TIMEOUT_SECONDS) -> AsyncIterator[PooledConnection]:
    """A connection of the pool, waited for at most `timeout_seconds`. Raises Unavailable."""
    async with broken_links_as_unavailable(), pool.acquire(timeout=timeout_seconds) as acquired:
        yield acquired


@contextlib.asynccontextmanager
async def transaction(pool: Pool, *, timeout_seconds: float = CONNECT_TIMEOUT_SECONDS, **options: Any) -> AsyncIterator[PooledConnection]:
    """A connection inside a transaction: committed at the end of the block, rolled back when it raises.

    `options` are those of `asyncpg.Connection.transaction` (isolation, readonly, deferrable). Raises Unavailable; when the
    link breaks during COMMIT nobody knows whether it happened, so the caller must be able to repeat its work.
    """
    async with connection(pool, timeout_seconds=timeout_seconds) as acquired, acquired.transaction(**options):
        yield acquired


async def server_version(url: str) -> int:
    """`server_version_num` of the server, e.g. 180006. Raises Unavailable."""
    opened = await connect(url)
    try:
        return int(await opened.fetchval("show server_version_num", timeout=CONNECT_TIMEOUT_SECONDS))
    finally:
        await opened.close(timeout=CONNECT_TIMEOUT_SECONDS)
