"""What comes back about sent mail and what follows from it: kinds of events, their effects, outcomes of received messages. Pure.

kind  PowerMTA's word    says
rb    remote-bounce      a message that was accepted could not be delivered after all (RFC 3464, action failed)
rs    remote-status      it is delayed, or was delivered
f     feedback-loop      its reader complained (RFC 5965)
u     (none)             its reader asked by mail to be taken off the list
b     bounce             it was refused while being sent; recorded by the engines, only its effect is decided here
"""

import re
from typing import Final, Literal

from domain import states
from domain.bounce import CATEGORIES, BounceClass

Kind = Literal["rb", "rs", "f", "u"]
Effect = Literal["hard", "soft", "sender", "content", "complained", "unsubscribed", "delivered", "none"]

REMOTE_BOUNCE: Final = "rb"
REMOTE_STATUS: Final = "rs"
COMPLAINT: Final = "f"
UNSUBSCRIBE: Final = "u"

# What was done with a received message
ACTED: Final = "acted"  # an address was marked, unsubscribed or suppressed
RECORDED: Final = "recorded"  # an event that changes no address by itself
REPEATED: Final = "repeated"  # the event was known
UNPROVEN: Final = "unproven"  # a report about nobody we can be sure of (S3)
KEPT: Final = "kept"  # nothing for a program: people's mail, automatic answers
UNREADABLE: Final = "unreadable"  # reading it took too much (S17), or a bug of ours met it
OUTCOMES: Final = (ACTED, RECORDED, REPEATED, UNPROVEN, KEPT, UNREADABLE)
TROUBLESOME: Final = (UNPROVEN, UNREADABLE)  # reports that could not be processed: the administrator is told (requirement 69)

_PERMANENT = re.compile(r"(?<![\d.])(?:5\d\d(?![\d.])|5\.\d{1,2}\.\d{1,3}(?![\d.]*\d))")


def is_permanent(status: str, diagnostic: str) -> bool:
    """Whether a report states a permanent failure by number: status 5.x.x, or a reply 5xx where it states none (S3)."""
    return status.startswith("5.") if status else _PERMANENT.search(diagnostic) is not None


def bounce_effect(means: BounceClass) -> Effect:
    """What a report of failure says about its recipient. Blame on the sender or the content marks nobody."""
    if means.hard:
        return "hard"
    if means.fault == "sender":
        return "sender"
    return "content" if means.fault == "content" else "soft"


def refusal_effect(kind: str, category: str, means: BounceClass) -> Effect:
    """The same for an accounting record of kind b or x. `category` is the recorded one, `means` the class of its diagnostic.

    Here only what the server said about the recipient counts: an expiry because no server answered is nobody's soft bounce.
    """
    if category not in (means.category, "message-expired"):  # recorded otherwise than the text reads: it was about something else
        return "sender" if CATEGORIES.get(category) == "sender" else "none"
    if means.hard:
        return "hard" if kind == states.KIND_BOUNCE else "soft"
    if means.fault == "sender":
        return "sender"
    if means.fault != "recipient":
        return "content" if means.fault == "content" else "none"
    return "soft"
