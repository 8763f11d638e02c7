"""What comes over HTTP, on local disk before it is answered, and its way into PostgreSQL: opens and clicks (`Visit`), and what a token
asks for (`Held`): unsubscribes, reports of abuse, and the postbacks that came while PostgreSQL was away.

Each inbound process has directories of its own, locked by it. An event is one JSON line, written with one write(2) before its answer is
sent, so `kill -9` loses none; a power cut may lose the last second of visits, and nothing that was held. Files are read in order, behind a
cursor in PostgreSQL that moves in the transaction of the rows, so each line counts once. While PostgreSQL is away they wait, up to a
budget. A visit beyond it is counted in `lost`: an answer to a reader is never held back for statistics.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from journal.segments import take_lock
from store import tracking
from store.postgres import Pool, PooledConnection
from store.tracking import Visit
from store.trouble import is_store_trouble

MOST_BYTES_PER_TRANSACTION: Final = 1024 * 1024
SUFFIX: Final = ".visits"
_LONGEST_PAUSE_SECONDS: Final = 5.0
_STATEMENT_TIMEOUT_SECONDS: Final = 30.0
_SYNC_TIMEOUT_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


class Held(msgspec.Struct, frozen=True, tag=True):
    """A request that was answered and is yet to be carried out; whose it is was proved. `at`: POSIX seconds."""

    kind: Literal["unsubscribe", "abuse", "postback"]
    user_id: int
    campaign_id: int
    number: int
    query: bytes
    body: bytes
    at: float
    id: str = ""  # by which the one who answers hears what became of it


Settled = Callable[[], None]
CarryOut = Callable[[PooledConnection, Held], Awaitable[Settled]]
_decoder: Final = msgspec.json.Decoder(Visit | Held)


async def _nothing(_: PooledConnection, held: Held) -> Settled:
    raise RuntimeError(f"nobody carries out a {held.kind}")


def _sync(path: Path, *, new: bool) -> None:
    with contextlib.suppress(FileNotFoundError):  # it was carried over and removed meanwhile
        for place in (path, path.parent) if new else (path,):
            fd = os.open(place, os.O_RDONLY)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)


class Visits:
    """The journal of one inbound process. Raises JournalError when another living process holds the directory."""

    def __init__(
        self, directory: Path, *, interval_seconds: float = 1.0, file_bytes: int = 16 * 1024 * 1024, budget_bytes: int = 1024 * 1024 * 1024
    ) -> None:
        self.lost = 0  # visits the disk did not take
        self.recorded = 0
        self.trouble = ""  # why PostgreSQL has not got everything, in words
        self.lost_because = ""  # the last time
        self._directory = directory
        self._interval_seconds = interval_seconds
        self._file_bytes = file_bytes
        self._budget_bytes = budget_bytes
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._lock_fd = take_lock(directory)
        self._fd = -1
        self._written = 0
        self._path = directory
        self._read: dict[str, int] = {}  # file -> how far it is in PostgreSQL, where that is certain
        self._waiting_bytes = sum(path.stat().st_size for path in self.files())
        self._syncing = asyncio.Lock()
        self._synced: tuple[Path, int] = (directory, 0)  # the file, and how far it is safe from a power cut
        self._unsafe = directory  # the file that could not be synced
        self._wake = asyncio.Event()

    @property
    def waiting_bytes(self) -> int:
        """About how much of the disk is taken by what is not in PostgreSQL yet."""
        return self._waiting_bytes

    def files(self) -> list[Path]:
        """What is there, the oldest first."""
        return sorted(self._directory.glob(f"*{SUFFIX}"))

    def add(self, visit: Visit) -> None:
        """Write it down. Never raises: what cannot be written is counted as lost."""
        try:
            self._write(visit)
        except OSError as error:
            if not self.lost:
                _log.error("visits are lost: %s", error)
            self.lost += 1
            self.lost_because = str(error)
        else:
            self.recorded += 1

    async def hold(self, held: Held) -> bool:
        """Write it down for good, power cut or not; False where the disk does not take it. It is carried out at once where that can be."""
        try:
            self._write(held)
            async with asyncio.timeout(_SYNC_TIMEOUT_SECONDS):
                await self._settle_on_disk(self._path, self._written)
        except OSError as error:  # a time limit is one, too
            _log.error("a request (%s) cannot be kept: %s", held.kind, error or "the disk does not answer")
            return False
        self._wake.set()
        return True

    async def _settle_on_disk(self, path: Path, written: int) -> None:
        """Wait until the file is on disk up to there; one fdatasync serves all who wait. Raises OSError."""
        async with self._syncing:
            if path == self._synced[0] and written <= self._synced[1]:
                return
            if path == self._unsafe:  # the kernel tells of a failure once, and forgets what it could not write
                raise OSError("an earlier fdatasync of this file failed")
            reached = self._written if path == self._path else written
            try:
                await asyncio.to_thread(_sync, path, new=path != self._synced[0])
            except OSError:
                self._unsafe = path
                if path == self._path:
                    self._end_file()
                raise
            self._synced = path, reached

    def _write(self, event: Visit | Held) -> None:
        line = msgspec.json.encode(event) + b"\n"
        if self._waiting_bytes + len(line) > self._budget_bytes:
            raise OSError("the disk budget is used up")
        if self._fd < 0 or self._written >= self._file_bytes:
            self._next_file()
        if os.write(self._fd, line) != len(line):
            self._end_file()  # the half line stays behind as the torn end of this file
            raise OSError("the disk is full")
        self._written += len(line)
        self._waiting_bytes += len(line)

    def _next_file(self) -> None:
        self._end_file()
        path = self._directory / f"{time.time_ns():020}-{secrets.token_hex(4)}{SUFFIX}"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)
        self._path, self._written = path, 0

    def _end_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    async def run(self, pool: Pool, carry_out: CarryOut = _nothing, stuck: Callable[[], None] = lambda: None) -> None:
        """Carry over until cancelled: every second, and at once what is held. `carry_out` gets the connection of the transaction that
        moves the cursor, and returns what follows its commit; it raises only what passes, such as Unavailable. `stuck` is called when
        nothing more can be carried over for now.
        """
        pause = self._interval_seconds
        while True:
            if self.trouble:
                await asyncio.sleep(pause)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
            self._wake.clear()
            try:
                await self.catch_up(pool, carry_out)
            except Exception as error:
                pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)
                if not is_store_trouble(error):
                    _log.exception("what came over HTTP is safe on disk, and carrying it over failed")
                elif not self.trouble:
                    _log.warning("what came over HTTP is safe on disk but not in PostgreSQL: %s", error)
                self.trouble = str(error) or type(error).__name__
                stuck()
            else:
                pause = self._interval_seconds
                self.trouble = ""

    async def catch_up(self, pool: Pool, carry_out: CarryOut = _nothing) -> None:
        """Carry over everything that is written now; files that are finished and read are removed. Raises Unavailable."""
        for path in self.files():
            current = path == self._path and self._fd >= 0
            await self._carry(pool, path, carry_out)
            if current and path == self._path and self._fd >= 0:
                continue
            # First the file: a cursor without a file is nothing, a file without its cursor would be counted again
            self._waiting_bytes -= path.stat().st_size
            path.unlink()
            self._read.pop(path.name, None)
            await tracking.forget(pool, path.name, timeout_seconds=_STATEMENT_TIMEOUT_SECONDS)

    async def _carry(self, pool: Pool, path: Path, carry_out: CarryOut) -> None:
        known = self._read.pop(path.name, None)
        if known == path.stat().st_size:
            self._read[path.name] = known
            return
        at = await tracking.position(pool, path.name, timeout_seconds=_STATEMENT_TIMEOUT_SECONDS)
        with path.open("rb") as file:
            while True:
                file.seek(at)
                block = file.read(MOST_BYTES_PER_TRANSACTION)
                end = block.rfind(b"\n") + 1
                if not end:  # nothing new, or half a line
                    self._read[path.name] = at
                    return
                visits: list[Visit] = []
                upto = at
                for line in block[:end].splitlines(keepends=True):
                    upto += len(line)
                    try:
                        found = _decoder.decode(line)
                    except msgspec.MsgspecError:
                        _log.error("%s: a line before octet %d is no event and is left out", path, upto)
                        continue
                    if not isinstance(found, Held):
                        visits.append(found)
                        continue
                    await self._carry_held(pool, path, at, upto, visits, found, carry_out)
                    at, visits = upto, []
                if at < upto:
                    await tracking.record(pool, path.name, at, upto, visits, timeout_seconds=_STATEMENT_TIMEOUT_SECONDS)
                    at = upto

    async def _carry_held(self, pool: Pool, path: Path, start: int, end: int, visits: list[Visit], held: Held, carry_out: CarryOut) -> None:
        """One request with the visits before it, in one transaction with the cursor: once, however often this is broken off."""
        settled: list[Settled] = []

        async def act(conn: PooledConnection) -> None:
            settled.append(await carry_out(conn, held))

        await tracking.record(pool, path.name, start, end, visits, also=act, timeout_seconds=_STATEMENT_TIMEOUT_SECONDS)
        for each in settled:
            each()

    def close(self) -> None:
        """Let go of the file and the lock; what is not carried over waits for the next start."""
        if self.lost:
            _log.error("%d visits were lost since the start", self.lost)
        self._end_file()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = -1
