"""Brings a database to the schema this version needs: applies `schema/*.sql` in order, once, whoever calls first.

pogo-core reads the files and remembers them, but has no lock of its own: every node of a fleet may call `apply` at the
same moment, so it runs inside a PostgreSQL advisory lock.
"""

import logging
from pathlib import Path

from domain.errors import ConfigurationError
from store import postgres

SCHEMA_DIRECTORY = Path(__file__).parent / "schema"
LOCK_KEY = 0x5C1CE_0001  # any number will do, as long as nobody else uses it in this database
LOCK_TIMEOUT_SECONDS = 600.0  # another node may be in the middle of a long migration


async def apply(url: str, *, directory: Path = SCHEMA_DIRECTORY) -> list[str]:
    """Apply what is missing and return its names, in order; an empty list when there was nothing to do.

    Raises Unavailable when the server does not answer, ConfigurationError when the database was migrated by a newer
    Sluice: running old code on it could lose mail.
    """
    wanted = sorted(path.stem for path in directory.glob("*.sql"))
    connection = await postgres.connect(url)
    try:
        # The common case at every start: nothing to do, no lock, no SQL parser loaded
        before = await _applied(connection)
        _refuse_newer(url, before, wanted)
        if before == set(wanted):
            return []
        await connection.execute("select pg_advisory_lock($1)", LOCK_KEY, timeout=LOCK_TIMEOUT_SECONDS)
        try:
            before = await _applied(connection)
            _refuse_newer(url, before, wanted)
            from pogo_core.util import migrate

            await migrate.apply(connection, directory, schema_name="public", logger=_quiet_logger())
        finally:
            await connection.execute("select pg_advisory_unlock($1)", LOCK_KEY)
        return [name for name in wanted if name not in before]
    finally:
        await connection.close(timeout=postgres.CONNECT_TIMEOUT_SECONDS)


async def _applied(connection: postgres.Connection) -> set[str]:
    if await connection.fetchval("select to_regclass('public._pogo_migration')") is None:
        return set()
    return {row["migration_id"] for row in await connection.fetch("select migration_id from public._pogo_migration")}


def _refuse_newer(url: str, applied: set[str], wanted: list[str]) -> None:
    unknown = sorted(applied - set(wanted))
    if unknown:
        place = postgres.describe(url)
        raise ConfigurationError(
            [f"database.url: the database at {place} has the schema of a newer Sluice ({', '.join(unknown)}); upgrade Sluice on this node"]
        )


def _quiet_logger() -> logging.Logger:
    """pogo-core reports each file as a warning; the caller gets the names and says what it likes."""
    logger = logging.Logger("store.migrate")
    logger.addHandler(logging.NullHandler())
    return logger
