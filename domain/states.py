"""Campaign and recipient states, the allowed transitions, and which store holds which. The only place they are named.

A campaign's state is a column of `campaigns`. A recipient has no state column: its state is derived (PENDING, QUEUED and
LEASED from its batch, DEFERRED from a row of `retries`, the terminal ones from its last terminal accounting record), so no
statement ever updates a row per recipient.
"""

from typing import Final

# --- campaigns --------------------------------------------------------------------------------------------------------
DRAFT: Final = "draft"  # being written; content and list may change
PREPARING: Final = "preparing"  # started; the feeder is numbering its recipients
RUNNING: Final = "running"
PAUSED: Final = "paused"
CANCELLING: Final = "cancelling"  # engines hand their batches back, then every recipient left is recorded as cancelled
CANCELLED: Final = "cancelled"
COMPLETED: Final = "completed"

CAMPAIGN_STATES: Final = (DRAFT, PREPARING, RUNNING, PAUSED, CANCELLING, CANCELLED, COMPLETED)

NEXT_CAMPAIGN_STATES: Final[dict[str, frozenset[str]]] = {
    DRAFT: frozenset({PREPARING, CANCELLED}),
    PREPARING: frozenset({RUNNING, PAUSED, CANCELLING}),
    RUNNING: frozenset({PAUSED, CANCELLING, COMPLETED}),
    PAUSED: frozenset({PREPARING, RUNNING, CANCELLING}),
    CANCELLING: frozenset({CANCELLED}),
    CANCELLED: frozenset(),
    COMPLETED: frozenset(),
}

# --- recipients -------------------------------------------------------------------------------------------------------
PENDING: Final = "pending"  # PostgreSQL: numbered, its batch not announced
QUEUED: Final = "queued"  # its batch is announced in Redis
LEASED: Final = "leased"  # one engine may send it
DEFERRED: Final = "deferred"  # a row of `retries`
DELIVERED: Final = "delivered"
BOUNCED: Final = "bounced"
EXPIRED: Final = "expired"  # given up without a refusal for good: too old, or could not be rendered
SUPPRESSED: Final = "suppressed"
# CANCELLED is shared with campaigns: the same word for the same thing

NEXT_STATES: Final[dict[str, frozenset[str]]] = {
    PENDING: frozenset({QUEUED, CANCELLED}),
    QUEUED: frozenset({LEASED, PENDING, CANCELLED}),  # PENDING: Redis was lost, the batch is announced anew
    LEASED: frozenset({DELIVERED, DEFERRED, BOUNCED, EXPIRED, SUPPRESSED, QUEUED, PENDING}),
    DEFERRED: frozenset({PENDING, CANCELLED, EXPIRED}),
    DELIVERED: frozenset({BOUNCED}),  # a DSN can follow a 250
    BOUNCED: frozenset(),
    EXPIRED: frozenset(),
    SUPPRESSED: frozenset(),
    CANCELLED: frozenset(),
}

# --- accounting record kinds, and the recipient state each one is -------------------------------------------------------
KIND_DELIVERY: Final = "d"
KIND_BOUNCE: Final = "b"
KIND_EXPIRY: Final = "x"
KIND_SUPPRESSION: Final = "s"
KIND_CANCELLATION: Final = "c"
KIND_TRANSIENT: Final = "t"  # not terminal: refused for now, will be tried again
KIND_UNCERTAIN: Final = "u"  # not terminal: lost after the final octet, possible duplicate (R8)

TERMINAL_KINDS: Final[dict[str, str]] = {
    KIND_DELIVERY: DELIVERED,
    KIND_BOUNCE: BOUNCED,
    KIND_EXPIRY: EXPIRED,
    KIND_SUPPRESSION: SUPPRESSED,
    KIND_CANCELLATION: CANCELLED,
}
KINDS: Final = (*TERMINAL_KINDS, KIND_TRANSIENT, KIND_UNCERTAIN)


def may_follow(table: dict[str, frozenset[str]], state: str, following: str) -> bool:
    """Tell whether `following` may come right after `state` in `table`; a state not in the table leads nowhere."""
    return following in table.get(state, frozenset())
