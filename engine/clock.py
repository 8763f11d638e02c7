"""The time of day of an engine: PostgreSQL's, carried on by the monotonic clock, so that a jump of the machine's own clock moves nothing.

Retries become due by PostgreSQL's clock; planned by another one they could wait for years, or expire at once.
"""

import time
from typing import Final

_QUICK_ANSWER_SECONDS: Final = 0.5  # a slower answer does not tell well enough when it was made


class SteadyClock:
    """Until PostgreSQL has been heard it goes on from what the machine said at the start."""

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()  # of the monotonic clock, seconds

    def now_us(self) -> int:
        """Microseconds since 1970."""
        return int((time.monotonic() + self._ahead) * 1e6)

    def heard(self, timestamp: float, asked_at: float, answered_at: float) -> None:
        """PostgreSQL said `timestamp` (seconds since 1970) between these two moments of the monotonic clock."""
        if answered_at - asked_at <= _QUICK_ANSWER_SECONDS:
            self._ahead = timestamp - (asked_at + answered_at) / 2.0
