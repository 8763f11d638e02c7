"""What a store can do to whoever uses it, in one tuple: links that break, servers that refuse, statements that take too long.

All of it is survivable: the truth is in PostgreSQL, what happened is in the journal, and every step that met it can be repeated.
"""

from typing import Final

import asyncpg
import redis.exceptions

from domain.errors import Conflict, Unavailable

# PostgresError: everything the server says (also deadlocks, read-only, disk full, shutting down). InterfaceError and
# InternalClientError: asyncpg about a connection that died under it. EOFError: a stream that ended in the middle of a value.
STORE_ERRORS: Final[tuple[type[Exception], ...]] = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    redis.exceptions.RedisError,
    OSError,
    EOFError,
    TimeoutError,
    Unavailable,
    Conflict,
)
_CLOSED_TRANSPORT: Final = "the handler is closed"


def is_store_trouble(error: BaseException) -> bool:
    """Tell whether `error` is a store's trouble and no bug of ours; uvloop says by a RuntimeError that a link is gone already."""
    return isinstance(error, STORE_ERRORS) or (isinstance(error, RuntimeError) and _CLOSED_TRANSPORT in str(error))


def sentence(error: BaseException) -> str:
    """What to tell an operator about it, in one line."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    said = " ".join(str(error).split())[:300]
    if isinstance(error, Unavailable | Conflict):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
