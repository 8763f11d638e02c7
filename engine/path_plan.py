"""For one egress path: what to open, close and wait for now, and when to look again (pure; the time is passed in).

Decide first, act afterwards: `egress_path` gathers a `PathView`, asks `next_actions`, and does what it says.
"""

import msgspec

MIN_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 300.0
MAX_CONNECTED_BACKOFF_SECONDS = 5.0  # it greets us, and then ends every connection without an answer to any message
LONG_CONNECTED_BACKOFF_SECONDS = 30.0  # and has done so some dozens of times
PATIENCE = 30
OPERATOR_BACKOFF_SECONDS = 60.0  # wrong password, TLS missing: at most one try a minute, so no account is locked out
MESSAGES_PER_NEW_CONNECTION = 20  # do not open another connection for less work than this


class PathView(msgspec.Struct, frozen=True):
    """What the decision needs to know of a path."""

    now: float
    enabled: bool
    draining: bool
    ready: int  # recipients that may be sent now
    open: int
    connecting: int
    idle: int  # open connections with nothing in flight
    leaving: int  # open connections that have been told to end
    max_connections: int  # this engine's share
    retry_at: float  # after a failed connection: not before
    probing: bool  # the server is failing, or has never been reached: one connection tries it
    probes: int  # such connections, open or being opened
    tokens_at: float  # when the throttle allows the next message
    idle_since: float  # when the path last had work
    idle_timeout: float
    more: bool = False  # beyond what is ready, more waits in the queue than this engine may hold
    starved: int = 0  # open connections that found nothing they may send


class Actions(msgspec.Struct, frozen=True):
    """What to do now. `look_again_at` is the time of the next decision if nothing happens before.

    `close` counts any connections: the idle first, then such as have to finish something.
    """

    open: int = 0
    close_idle: int = 0
    close: int = 0
    look_again_at: float = float("inf")


def next_actions(view: PathView) -> Actions:
    """Decide for one path.

    1. Not allowed to send (disabled, draining): idle connections close, nothing opens.
    2. Work is waiting and connections are missing: open as many as the work is worth; one alone while the server is failing or unknown.
    3. Nothing to do: keep connections for `idle_timeout`, then close them.
    """
    if not view.enabled or view.draining or view.max_connections == 0:
        return Actions(close_idle=view.idle)
    surplus = max(0, view.open - view.leaving - view.max_connections)  # another engine has begun, or an operator has lowered the limit
    if view.ready:
        tokens_at = view.tokens_at if view.tokens_at > view.now else float("inf")
        if view.now < view.retry_at:
            return Actions(close=surplus, look_again_at=min(view.retry_at, tokens_at))
        worth = 1 + view.ready // MESSAGES_PER_NEW_CONNECTION
        if view.more:
            worth += view.open - view.starved  # the others have work enough of their own
        target = min(view.max_connections, worth)
        wanted = max(0, target - view.open - view.connecting)
        if view.probing:
            wanted = min(wanted, 1 - min(1, view.probes))
        return Actions(open=wanted, close=surplus, look_again_at=tokens_at)
    if view.idle:
        closes_at = view.idle_since + view.idle_timeout
        if view.now >= closes_at:
            return Actions(close_idle=view.idle)
        return Actions(close=surplus, look_again_at=closes_at)
    return Actions(close=surplus)


def backoff_seconds(failures: int, *, permanent: bool, connected: bool, jitter: float) -> float:
    """How long to wait after `failures` failures in a row; `jitter` in 0..1 spreads the engines over 40 %.

    `permanent`: only an operator can mend it, so never sooner than in a minute. `connected`: the server did greet us.
    """
    longest = MAX_BACKOFF_SECONDS
    if connected:
        longest = MAX_CONNECTED_BACKOFF_SECONDS if failures <= PATIENCE else LONG_CONNECTED_BACKOFF_SECONDS
    base = min(longest, MIN_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16))
    if permanent:
        return max(base, OPERATOR_BACKOFF_SECONDS) * (1.0 + 0.4 * jitter)
    return base * (0.8 + 0.4 * jitter)
