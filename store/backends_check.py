"""Looks at given PostgreSQL and Redis servers before anything is built on them: do they answer, are they new enough?"""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from domain.errors import ConfigurationError, Unavailable
from store import postgres as store_postgres

REDIS_MINIMUM = (6, 2)
TIMEOUT_SECONDS = 10.0

T = TypeVar("T")


def postgres(url: str) -> str:
    """One line about the server for people. Raises Unavailable: no answer, or older than PostgreSQL 14."""
    version = run_apart(lambda: store_postgres.server_version(url))
    place = store_postgres.describe(url)
    if version < store_postgres.MINIMUM_VERSION:
        raise Unavailable(
            f"PostgreSQL at {place} is version {version // 10000}; Sluice needs 14 or newer: upgrade it or change database.url"
        )
    return f"PostgreSQL {version // 10000}.{version % 10000} at {place}"


def redis(url: str) -> str:
    """One line about the server for people, with a warning when it may throw keys away. Raises Unavailable, ConfigurationError."""
    name, version, policy = run_apart(lambda: _ask_redis(url))
    place = describe_redis(url)
    if version < REDIS_MINIMUM:
        raise Unavailable(
            f"Redis at {place} is version {version[0]}.{version[1]}; Sluice needs 6.2 or newer: upgrade it or change redis.url"
        )
    line = f"{name} {version[0]}.{version[1]} at {place}"
    if policy not in ("noeviction", ""):
        # Losing keys loses no mail (they are rebuilt from PostgreSQL), but it costs speed, and nobody would know why
        line += f" (warning: maxmemory-policy is {policy}; set it to noeviction, or announced batches may vanish)"
    return line


def describe_redis(url: str) -> str:
    """Host and port, or socket path, of a Redis URL; never its password."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] or parts.path


def ping_socket(path: Path) -> bool:
    """Does a Redis or Valkey answer PONG on this socket?"""
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(1.0)
            link.connect(str(path))
            link.sendall(b"PING\r\n")
            return link.recv(64).startswith(b"+PONG")
    except OSError:
        return False


async def _ask_redis(url: str) -> tuple[str, tuple[int, int], str]:
    import redis.asyncio
    from redis.exceptions import RedisError

    # Any node of a cluster can tell its version; our own scheme only says how engines shall talk to it
    plain = url.replace("redis+cluster://", "redis://", 1)
    try:
        client = redis.asyncio.Redis.from_url(plain, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS)
    except ValueError as error:
        raise ConfigurationError([f"redis.url: {error}"]) from error
    try:
        info: dict[str, Any] = await client.info()
    except (RedisError, OSError) as error:
        raise Unavailable(
            f"Redis at {describe_redis(url)} is not available: {str(error).rstrip('.') or type(error).__name__}; "
            "check that it runs and that redis.url names it"
        ) from error
    finally:
        await client.aclose()
    name = "Valkey" if "valkey_version" in info else "Redis"
    text = str(info.get("valkey_version") or info.get("redis_version", "0.0"))
    # Valkey speaks for the Redis it is compatible with; the floor is about that one
    floor = str(info.get("redis_version", text)).split(".")
    shown = text.split(".")
    version = (int(floor[0]), int(floor[1]))
    if version >= REDIS_MINIMUM:
        version = (int(shown[0]), int(shown[1]))
    return name, version, str(info.get("maxmemory_policy", ""))


def run_apart(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end in a loop of its own, also when the caller's thread has one running."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(asyncio.run(make()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="backends-check")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
