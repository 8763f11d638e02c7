"""How many messages may leave now, and when the next one may: TokenBucket. How many a server likes: Pace. Pure; the time is passed in."""

from typing import Final

LOWEST_PACE: Final = 1.0  # messages per second: slower than that nothing could be learnt
_REFUSED_SHARE: Final = 0.1  # fewer "slow down" among the answers are about single recipients
_REFUSED_LEAST: Final = 3
_DECREASE: Final = 0.5
_HEADROOM: Final = 0.9
_INCREASE: Final = 0.02  # of the pace, at the first quiet look; there are two looks a second
_GAIN: Final = 0.002  # and so much more at each quiet look after it: a server that has long stopped asking is trusted sooner
_LARGEST_INCREASE: Final = 0.1


class TokenBucket:
    """Allows `per_second` on average and at most `burst` at once; `per_second` 0 means no limit.

    Tokens are taken when a message is handed to a connection, so an engine that is throttled waits for nothing: it asks
    `ready_at` and looks again then.
    """

    def __init__(self, per_second: float, now: float, burst: float | None = None) -> None:
        self._updated = now
        self._tokens = 0.0
        self.set_rate(per_second, burst)
        self._tokens = self._burst

    def set_rate(self, per_second: float, burst: float | None = None) -> None:
        """Change the rate; what has been saved up is kept, up to the new burst."""
        self.per_second = per_second
        # A tenth of a second's worth: big enough to fill a pipelined window, small enough that no second exceeds the limit by 10 %.
        self._burst = max(1.0, per_second / 10) if burst is None else burst
        self._tokens = min(self._tokens, self._burst)

    def _refill(self, now: float) -> None:
        if now > self._updated:
            self._tokens = min(self._burst, self._tokens + (now - self._updated) * self.per_second)
            self._updated = now

    def take(self, wanted: int, now: float) -> int:
        """Take up to `wanted` tokens; returns how many were there."""
        if not self.per_second:
            return wanted
        self._refill(now)
        taken = min(wanted, int(self._tokens + 1e-9))
        self._tokens -= taken
        return taken

    def give_back(self, count: int) -> None:
        """Return tokens that were taken and not used."""
        self._tokens = min(self._burst, self._tokens + count)

    def ready_at(self, now: float) -> float:
        """When at least one token will be there; `now` if one already is."""
        if not self.per_second:
            return now
        self._refill(now)
        missing = 1.0 - self._tokens
        return now if missing <= 1e-9 else now + missing / self.per_second


class Pace:
    """Finds the rate at which a server stops asking to slow down: down at once to what it took, up again a little at every look."""

    def __init__(self, now: float) -> None:
        self.per_second = 0.0  # 0 = the server has not asked
        self._looked_at = now
        self._ceiling = 0.0
        self._increase = _INCREASE

    def look(self, now: float, answered: int, refused: int) -> None:
        """Adapt to what happened since the last look: `refused` of the `answered` messages were told to slow down."""
        elapsed, self._looked_at = now - self._looked_at, now
        if elapsed <= 0.0:
            return
        if refused > _REFUSED_SHARE * answered and (refused >= _REFUSED_LEAST or self.per_second):
            if not self.per_second:
                self._ceiling = answered / elapsed
            taken = _HEADROOM * (answered - refused) / elapsed
            self.per_second = max(LOWEST_PACE, taken, _DECREASE * self.per_second)
            self._increase = _INCREASE
        elif self.per_second:
            self.per_second *= 1.0 + self._increase
            self._increase = min(_LARGEST_INCREASE, self._increase + _GAIN)
            if self.per_second >= self._ceiling:
                self.per_second = 0.0
