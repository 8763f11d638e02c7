"""What an engine writes to standard error: one event, one line; control characters escaped (S15). The level follows a reload."""

import logging
import sys
from typing import Final

import structlog


class _Words:
    """Standard error, but a reader that is gone (a killed supervisor, a full disk) costs the line and never the drain of the engine."""

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            sys.stderr.flush()
        except OSError:
            return


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
