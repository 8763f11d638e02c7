"""What one egress path has learnt of its delivery server: failures and their back-off, "slow down" replies, loss of step.

Pure: the clock (monotonic seconds), the dice and the numbers of connections are passed in. Connections are numbered in the order they
were begun, so that ten that fail together count as one failure and only a connection begun after a failure can prove it over.
"""

from typing import Final

from engine.path_plan import backoff_seconds
from engine.throttle import Pace

DEMOTION_SECONDS: Final = 300.0
CAUTION_SECONDS: Final = 60.0
# How much of a server's capabilities is used: a peer that loses step is spoken to more slowly and more safely for a while (R6).
ALL, NO_CHUNKING, LOCK_STEP = 0, 1, 2
_MANNERS: Final = ("", "DATA instead of BDAT", "one command at a time")


class PathHealth:
    """The memory of one egress path. `failures` counts failures in a row; `retry_at`: no new connection before."""

    def __init__(self, now: float) -> None:
        self.failures = 0
        self.failing_since = 0.0  # the first of these failures
        self.permanent = False
        self.retry_at = 0.0
        self.failure = ""
        self.proven = False  # a connection was opened with this host, user name and password
        self.pace = Pace(now)
        self.throttled = 0  # replies that asked to slow down
        self.throttle_said = ""
        self.level = ALL
        self.demoted_until = 0.0
        self.violations = 0
        self.demoted_for = ""
        self._failed_at = 0

    def forget_failures(self, *, moved: bool) -> None:
        """An operator changed the server; `moved`: host, port, TLS or login."""
        self.failures, self.permanent, self.retry_at, self.failure = 0, False, 0.0, ""
        if moved:
            self.proven = False
            self.level, self.demoted_until = ALL, 0.0

    # --- failures -------------------------------------------------------------------------------------------------------
    def failed(
        self, sentence: str, connection: int, newest: int, now: float, *, permanent: bool, connected: bool, engines: int, dice: float
    ) -> bool:
        """Count a failed connection; False when it belongs to a failure that was counted already.

        `connection` and `newest` are the numbers of this one and of the newest there is; `connected` when it got as far as MAIL.
        What only an operator can mend is tried by each of `engines` so seldom that all together try once a minute.
        """
        if connection <= self._failed_at and not (permanent and not self.permanent):
            return False
        if not self.failures:
            self.failing_since = now
        self.failures += 1
        self.permanent = permanent
        self.failure = sentence
        self._failed_at = newest
        pause = backoff_seconds(self.failures, permanent=permanent, connected=connected, jitter=dice)
        self.retry_at = now + pause * (engines if permanent else 1)
        return True

    def since_failure(self, connection: int) -> bool:
        """Whether that connection was begun after the last failure."""
        return connection > self._failed_at

    def answered(self, connection: int, *, last: bool = False) -> bool:
        """A recipient was decided on that connection; True when that ends a series of failures.

        `last`: it has ended since and no other one is left. What failed beside it is over then, unless an operator has to mend it.
        """
        over = self.since_failure(connection) or (last and not self.permanent)
        if not self.failures or not over:
            return False
        self.failures, self.permanent, self.retry_at, self.failure = 0, False, 0.0, ""
        return True

    def next_try(self, now: float) -> str:
        """When, in words."""
        wait = self.retry_at - now
        return f"next try in {wait:.0f} s" if wait >= 0.5 else "trying again now"

    # --- loss of step ---------------------------------------------------------------------------------------------------
    def lost_step(self, sentence: str, level: int, now: float) -> None:
        """A connection of that level ended by a protocol violation: the next ones use less, for a while."""
        self.violations += 1
        self.demoted_for = f"the server broke the protocol: {sentence.removeprefix('protocol violation: ')}"
        self.level = max(self.level, min(LOCK_STEP, level + 1))
        self.demoted_until = now + DEMOTION_SECONDS

    def lost_window(self, in_doubt: int, now: float) -> None:
        """A connection was lost with several messages in doubt: one at a time for a while, in case one of them is the reason."""
        if self.level == ALL:
            self.level = NO_CHUNKING
            self.demoted_until = now + CAUTION_SECONDS
            self.demoted_for = f"a connection was lost with {in_doubt} messages in doubt"

    def trust_again(self, now: float) -> bool:
        """True once when the time of a demotion has passed."""
        if self.level == ALL or now < self.demoted_until:
            return False
        self.level = ALL
        return True

    # --- words ----------------------------------------------------------------------------------------------------------
    def notes(self, now: float) -> list[str]:
        """What is not as it should be although mail goes out, one sentence each."""
        notes = []
        if self.failures:
            notes.append(f"another connection failed: {self.failure}; {self.next_try(now)}")
        if self.pace.per_second:
            notes.append(f"slowed to {self.pace.per_second:.3g} messages/s because the server says: {self.throttle_said}")
        if self.level != ALL:
            minutes = max(1, round((self.demoted_until - now) / 60))
            notes.append(f"{_MANNERS[self.level]} for {minutes} min, because {self.demoted_for}")
        return notes
