"""What a process writes to standard error: one event, one line; control characters escaped (S15). The same in all of ours.

Losing the reader must cost the lines and nothing else: a supervisor that was killed leaves a pipe whose writes fail, one that stands
still leaves a pipe that fills up, and a write into a full pipe would stop the event loop and with it every connection.
"""

import logging
import os
import select
import stat
import sys
from typing import Final

import structlog

_WITHOUT_WAITING: Final = select.PIPE_BUF  # so much fits into a pipe that poll(2) calls writable


class _Words:
    """Standard error without exceptions and without waiting; it says how many lines were lost once somebody reads again."""

    def __init__(self) -> None:
        self.lost = 0

    def write(self, text: str) -> int:
        try:
            pipe = _pipe()
            if pipe < 0:
                sys.stderr.write(text)
            else:
                self._write(pipe, text)
        except (OSError, ValueError):  # ValueError: it has been closed
            self.lost += text.count("\n")
        return len(text)

    def _write(self, pipe: int, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if self.lost:
            data = b"%d lines were lost: nobody read them\n" % self.lost + data
        for start in range(0, len(data), _WITHOUT_WAITING):
            poll = select.poll()
            poll.register(pipe, select.POLLOUT)
            if not poll.poll(0):
                self.lost += text.count("\n")
                return
            os.write(pipe, data[start : start + _WITHOUT_WAITING])
        self.lost = 0

    def flush(self) -> None:
        try:
            if _pipe() < 0:
                sys.stderr.flush()
        except (OSError, ValueError):
            return


def _pipe() -> int:
    """The descriptor of standard error when it is a pipe, else -1: terminals and files do not fill up for want of a reader."""
    try:
        descriptor = sys.stderr.fileno()
        return descriptor if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else -1
    except (OSError, ValueError, AttributeError):
        return -1


_WORDS: Final = _Words()


def configure(level: str) -> None:
    """Write events of `level` (debug, info, warning, error) and above; may be called again."""
    number = logging.getLevelName(level.upper())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(_WORDS),  # type: ignore[arg-type]  # it only writes and flushes
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=number, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=_WORDS, force=True)
