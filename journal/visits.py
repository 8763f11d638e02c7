"""Visits: opens and clicks on local disk before they are answered, and their way into PostgreSQL.

Beside them stand the postbacks and reports of abuse that came while PostgreSQL was away, as they came (`Held`); they are carried out
before the cursor moves, and doing one twice is doing it once.

Each inbound process has a directory of its own, locked by it. A visit is one JSON line, written with one write(2) before its redirect is
sent, so `kill -9` loses none; a power cut may lose the last second. Files are read behind a cursor in PostgreSQL that moves in the
transaction of the rows, so each line counts once. While PostgreSQL is away they wait, up to a budget; what is beyond it is counted
in `lost`: an answer to a reader is never held back for statistics.
"""

import asyncio
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
from store.postgres import Pool
from store.tracking import Visit
from store.trouble import is_store_trouble

MOST_BYTES_PER_TRANSACTION: Final = 1024 * 1024
SUFFIX: Final = ".visits"
_LONGEST_PAUSE_SECONDS: Final = 5.0
_STATEMENT_TIMEOUT_SECONDS: Final = 30.0

_log = logging.getLogger(__name__)


class Held(msgspec.Struct, frozen=True, tag=True):
    """A request that was answered and is yet to be carried out; whose it is was proved. `at`: POSIX seconds."""

    kind: Literal["postback", "abuse"]
    user_id: int
    campaign_id: int
    number: int
    query: bytes
    body: bytes
    at: float


CarryOut = Callable[[Held], Awaitable[None]]
_decoder: Final = msgspec.json.Decoder(Visit | Held)


async def _nothing(held: Held) -> None:
    raise RuntimeError(f"nobody carries out a {held.kind}")


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

    def hold(self, held: Held) -> bool:
        """Write it down for good, power cut or not; False where the disk does not take it."""
        try:
            self._write(held)
            os.fdatasync(self._fd)
        except OSError as error:
            _log.error("a %s cannot be kept: %s", held.kind, error)
            return False
        return True

    def _write(self, event: Visit | Held) -> None:
        line = msgspec.json.encode(event) + b"\n"
        if self._waiting_bytes + len(line) > self._budget_bytes:
            raise OSError("the disk budget for visits is used up")
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

    async def run(self, pool: Pool, carry_out: CarryOut = _nothing) -> None:
        """Carry over until cancelled. `carry_out` may be told the same twice; it raises only what passes, such as Unavailable."""
        pause = self._interval_seconds
        while True:
            await asyncio.sleep(pause)
            try:
                await self.catch_up(pool, carry_out)
            except Exception as error:
                if not is_store_trouble(error):
                    raise
                pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)
                if not self.trouble:
                    _log.warning("opens and clicks are safe on disk but not in PostgreSQL: %s", error)
                self.trouble = str(error) or type(error).__name__
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
                for line in block[:end].splitlines():
                    try:
                        found = _decoder.decode(line)
                    except msgspec.MsgspecError:
                        _log.error("%s: a line behind octet %d is no visit and is left out", path, at)
                        continue
                    if isinstance(found, Held):
                        await carry_out(found)
                    else:
                        visits.append(found)
                await tracking.record(pool, path.name, at, at + end, visits, timeout_seconds=_STATEMENT_TIMEOUT_SECONDS)
                at += end

    def close(self) -> None:
        """Let go of the file and the lock; what is not carried over waits for the next start."""
        if self.lost:
            _log.error("%d visits were lost since the start", self.lost)
        self._end_file()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = -1
