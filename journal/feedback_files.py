"""Accounting files of what came back: rb and rs records in one, f records in the other, `<stem>-YYYY-MM-DD-NNNN.csv`.

PowerMTA's default columns of each record, and behind them the headers that its users ask for: X-FBLId, which every message of ours
carries, and To. Files begin with the header line and end at midnight (local) or at their largest size.

The events are rows of PostgreSQL and say whether they are in a file; what was written last stands in `feedback_files.cursor`, with the
lengths of the files at that moment. After a crash files are cut back to these, so no line is lost or doubled. One process a node writes:
who holds the lock.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from domain.errors import JournalError
from ext.accounting_lines import csv_line, status_text
from journal.accounting_files import next_file, write_checkpoint
from journal.segments import JournalOwned, take_lock
from store import bounces
from store.bounces import Written
from store.postgres import Pool, connection
from store.trouble import is_store_trouble, sentence

CURSOR_NAME: Final = "feedback_files.cursor"
MOST_AT_ONCE: Final = 1000
STORE_TIMEOUT_SECONDS: Final = 30.0
_LONGEST_PAUSE_SECONDS: Final = 5.0

REMOTE_COLUMNS: Final = (
    "type", "timeLogged", "orig", "rcpt", "orcpt", "dsnAction", "dsnStatus", "dsnDiag", "dsnMta", "dsnReportingMta", "bounceCat",
    "srcType", "srcMta", "envId", "format", "header_X-FBLId",
)  # fmt: skip
FEEDBACK_COLUMNS: Final = (
    "type", "timeLogged", "repSourceIp", "feedbackType", "format", "userAgent", "envId", "orig", "rcpt", "reportingMta", "dlvSourceIp",
    "reportedDomain", "header_From", "header_Return-Path", "header_X-job", "header_Subject", "header_To", "header_X-FBLId",
)  # fmt: skip

_log = logging.getLogger(__name__)


class _Checkpoint(msgspec.Struct):
    """The content of the cursor file: the file of each output with its length, and the events that were written last."""

    files: dict[str, tuple[str, int]] = {}
    ids: list[int] = []


class _Output:
    """One row of files. `fd` < 0: the next line begins a new one."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self.header = ",".join(columns).encode() + b"\n"
        self.fd = -1
        self.day = ""
        self.size = 0


class FeedbackFiles:
    """The writer of one node. `trouble` says why it lags, in words; empty: it does not."""

    def __init__(
        self, node: str, directory: Path, remote_path: Path, feedback_path: Path, *, max_size_bytes: int = 250 * 1024 * 1024,
        interval_seconds: float = 1.0, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`directory`: where the lock and the cursor are. The paths are stem and suffix, `…/remote.csv`."""
        self.trouble = ""
        self._node = node
        self._directory = directory
        self._outputs = {"remote": _Output(remote_path, REMOTE_COLUMNS), "feedback": _Output(feedback_path, FEEDBACK_COLUMNS)}
        self._max_size_bytes = max_size_bytes
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._lock_fd = -1
        self._checkpoint = _Checkpoint()

    async def run(self, pool: Pool) -> None:
        """Write until cancelled; while another process of this node does, stand by."""
        pause = self._interval_seconds
        while True:
            try:
                busy = await self.flush(pool)
            except Exception as error:
                if not (isinstance(error, JournalError | msgspec.MsgspecError) or is_store_trouble(error)):
                    raise
                pause, busy = min(_LONGEST_PAUSE_SECONDS, 2 * pause), False
                if not self.trouble:
                    _log.warning("bounces and complaints are in PostgreSQL but not in the accounting files: %s", error)
                self.trouble = sentence(error)
                self.close()
            else:
                pause, self.trouble = self._interval_seconds, ""
            if not busy:
                await asyncio.sleep(pause)

    async def flush(self, pool: Pool) -> bool:
        """Write what is there, at most MOST_AT_ONCE events; whether there may be more. Raises OSError and Unavailable."""
        if self._lock_fd < 0:
            try:
                await asyncio.to_thread(self._take_up)
            except JournalOwned:
                return False  # another process writes them
        async with connection(pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            events = await bounces.unwritten(conn, self._node, MOST_AT_ONCE)
            if not events:
                return False
            known = set(self._checkpoint.ids)
            work = asyncio.ensure_future(asyncio.to_thread(self._write, [event for event in events if event.id not in known]))
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                with contextlib.suppress(Exception):
                    await work
                raise
            await bounces.mark_written(conn, [event.id for event in events])
        return len(events) == MOST_AT_ONCE

    def close(self) -> None:
        """Let go of the files and the lock."""
        for output in self._outputs.values():
            if output.fd >= 0:
                os.close(output.fd)
            output.fd = -1
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = -1

    # --- in the thread ------------------------------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Go on where the files were left: cut off what came after the last checkpoint. Raises JournalOwned."""
        self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._lock_fd = take_lock(self._directory)
        try:
            content = (self._directory / CURSOR_NAME).read_bytes()
            self._checkpoint = msgspec.json.decode(content, type=_Checkpoint)
        except FileNotFoundError:
            self._checkpoint = _Checkpoint()
        for name, (file, size) in self._checkpoint.files.items():
            with contextlib.suppress(FileNotFoundError):  # a consumer may have taken it away; that is its right
                output = self._outputs[name]
                output.fd = os.open(file, os.O_WRONLY | os.O_APPEND)
                os.ftruncate(output.fd, min(size, os.fstat(output.fd).st_size))
                output.size, output.day = os.fstat(output.fd).st_size, Path(file).stem[len(output.path.stem) + 1 :][:10]

    def _write(self, events: Sequence[Written]) -> None:
        lines: dict[str, list[bytes]] = {"remote": [], "feedback": []}
        for event in events:
            if event.kind in ("rb", "rs"):
                lines["remote"].append(csv_line(_remote(event)))
            elif event.kind == "f":
                lines["feedback"].append(csv_line(_feedback(event)))
        files = dict(self._checkpoint.files)
        for name, group in lines.items():
            for line in group:
                self._append(name, line, files)
        for name, output in self._outputs.items():
            if output.fd >= 0 and lines[name]:
                os.fdatasync(output.fd)
                files[name] = (files[name][0], output.size)
        self._store(_Checkpoint(files, [event.id for event in events]))

    def _append(self, name: str, line: bytes, files: dict[str, tuple[str, int]]) -> None:
        output = self._outputs[name]
        day = time.strftime("%Y-%m-%d", time.localtime(self._clock()))
        if output.fd < 0 or output.day != day or output.size + len(line) > max(self._max_size_bytes, len(output.header) + len(line)):
            if output.fd >= 0:
                os.fdatasync(output.fd)
                os.close(output.fd)
                output.fd = -1
            output.fd, path = next_file(output.path, day)
            output.day, output.size = day, 0
            files[name] = (str(path), 0)
            self._store(_Checkpoint(files, self._checkpoint.ids))  # before anything is in it
        data = line if output.size else output.header + line
        view = memoryview(data)
        while view:
            view = view[os.write(output.fd, view) :]
        output.size += len(data)

    def _store(self, checkpoint: _Checkpoint) -> None:
        write_checkpoint(self._directory / CURSOR_NAME, checkpoint)
        self._checkpoint = checkpoint


def _time(event: Written) -> str:
    return event.at.astimezone().strftime("%Y-%m-%d %H:%M:%S%z")


def _header(event: Written, name: str) -> str:
    headers: Any = event.details.get("headers") or {}
    return str(headers.get(name, ""))


def _detail(event: Written, name: str) -> str:
    return str(event.details.get(name) or "")


def _remote(event: Written) -> list[str]:
    status = event.status or ("2.0.0" if event.action == "delivered" else "4.0.0" if event.action == "delayed" else "5.0.0")
    return [
        event.kind, _time(event), _detail(event, "orig"), event.recipient, "", event.action, status_text(status),
        f"smtp;{event.diagnostic}" if event.diagnostic else "", event.mta, _detail(event, "dsnReportingMta"), event.category, "smtp",
        _detail(event, "srcMta"), _detail(event, "envId"), "dsn" if event.format in ("dsn", "") else event.format,
        _header(event, "X-FBLId"),
    ]  # fmt: skip


def _feedback(event: Written) -> list[str]:
    return [
        event.kind, _time(event), _detail(event, "srcMta"), _detail(event, "feedbackType"), event.format, _detail(event, "userAgent"),
        _detail(event, "envId"), _header(event, "Return-Path").strip("<>"), event.recipient, _detail(event, "dsnReportingMta"),
        _detail(event, "dlvSourceIp"), _detail(event, "reportedDomain"), _header(event, "From"), _header(event, "Return-Path"),
        _header(event, "X-Job"), _header(event, "Subject"), _header(event, "To"), _header(event, "X-FBLId"),
    ]  # fmt: skip
