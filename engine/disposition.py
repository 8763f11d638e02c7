"""The one policy table: stage and reply (or lost link) -> what becomes of the recipient, its connection and its egress path.

Pure. The rows are in `TABLE`; what is not in it does not happen. Choices that are ours, not RFC 5321's:

- A 421 says "I am closing" about the connection, at whatever stage, so the recipient goes back unsent and no attempt is used
  (RFC 5321 §3.8). The same holds for a link that is lost before the final octet.
- A 5xx to MAIL is final for this message (RFC 5321 §4.2.1), so it bounces, with path trouble noted: the recipient was not even named,
  and `bounce.classify` says "sender", so nothing is ever suppressed by it. A demand to authenticate or to use TLS (530, 534, 538)
  is about our configuration: the path is suspended until an operator acts, and the recipients wait.
- 503 means that one of us lost step: the recipient goes back, the connection is not used again (R6).
- A message that always goes back unsent would never end. The caller sends one that has lost several connections alone; when that
  connection is lost too, and the server answers others, it is `guilty`, and its loss is a deferral. So is that of one that has gone
  back for longer than a message may wait; trouble of a server by itself uses up no attempt.
- A link lost after the final octet is in doubt (RFC 1047): a `u` record, then what the delivery server's `on_uncertain` says (R8).
"""

from typing import Final, Literal

import msgspec

from domain import states
from domain.bounce import RELAYING_ISSUES, BounceClass
from domain.egress import OnUncertain
from ext.smtp_session import STAGE_CONTENT, STAGE_DATA, STAGE_LOST, STAGE_MAIL, STAGE_RCPT, STAGE_UNSENT

Connection = Literal["keep", "close"]
Path = Literal["none", "connect-trouble", "throttle", "suspend"]

REQUEUED: Final = states.PENDING  # back to its batch, unsent: no record, no attempt used


class Disposition(msgspec.Struct, frozen=True):
    """What follows from one outcome.

    `recipient` is a state of `domain.states`; `kind` the accounting record to write, "" for none. `uncertain_first` asks for a `u`
    record before that one. `path`: nothing, back off connecting, slow down, or stop until an operator acts.
    """

    recipient: str
    kind: str
    connection: Connection
    path: Path = "none"
    uncertain_first: bool = False


_DELIVERED: Final = Disposition(states.DELIVERED, states.KIND_DELIVERY, "keep")
_DEFERRED: Final = Disposition(states.DEFERRED, states.KIND_TRANSIENT, "keep")
_BOUNCED: Final = Disposition(states.BOUNCED, states.KIND_BOUNCE, "keep")
_OUT_OF_STEP: Final = Disposition(REQUEUED, "", "close")
_CLOSING: Final = Disposition(REQUEUED, "", "close", "connect-trouble")
_LOCKED_OUT: Final = Disposition(REQUEUED, "", "close", "suspend")
_IN_DOUBT: Final = Disposition(states.DEFERRED, states.KIND_UNCERTAIN, "close", "connect-trouble")

# Each stage: kind of answer -> disposition. "2xx" where it is no answer to be had means that we lost step.
TABLE: Final[dict[int, dict[str, Disposition]]] = {
    STAGE_MAIL: {
        "4xx": Disposition(states.DEFERRED, states.KIND_TRANSIENT, "keep", "throttle"),  # no recipient named yet: it is about us
        "5xx": Disposition(states.BOUNCED, states.KIND_BOUNCE, "keep", "throttle"),
        "421": _CLOSING,
        "503": _OUT_OF_STEP,
        "locked out": _LOCKED_OUT,
        "nonsense": _OUT_OF_STEP,
    },
    STAGE_RCPT: {
        "4xx": _DEFERRED,
        "5xx": _BOUNCED,
        "421": _CLOSING,
        "503": _OUT_OF_STEP,
        "locked out": _LOCKED_OUT,
        "nonsense": _OUT_OF_STEP,
    },
    STAGE_DATA: {
        "4xx": _DEFERRED,
        "5xx": _BOUNCED,
        "421": _CLOSING,
        "503": _OUT_OF_STEP,
        "locked out": _LOCKED_OUT,
        "nonsense": _OUT_OF_STEP,
    },
    STAGE_CONTENT: {
        "2xx": _DELIVERED,
        "4xx": _DEFERRED,
        "5xx": _BOUNCED,
        "421": _CLOSING,
        "503": _OUT_OF_STEP,
        "locked out": _LOCKED_OUT,
        "nonsense": _IN_DOUBT,  # an answer that is none, after the final octet: it may have been taken
    },
    STAGE_LOST: {
        "retry": _IN_DOUBT,
        "assume_delivered": Disposition(states.DELIVERED, states.KIND_DELIVERY, "close", "connect-trouble", uncertain_first=True),
        "fail": Disposition(states.EXPIRED, states.KIND_EXPIRY, "close", "connect-trouble", uncertain_first=True),  # P5: no 5xx was read
    },
    STAGE_UNSENT: {
        "never begun": _OUT_OF_STEP,
        "cut off": _CLOSING,
    },
}

_LOCKED_OUT_CODES: Final = frozenset({530, 534, 538})  # RFC 4954 §6, RFC 3207 §4.1


def decide(
    stage: int,
    code: int,
    reason: BounceClass | None = None,
    *,
    begun: bool = True,
    guilty: bool = False,
    on_uncertain: OnUncertain = "retry",
) -> Disposition:
    """Say what becomes of one message's recipient.

    `stage` is a STAGE_ constant of `ext.smtp_session`: STAGE_LOST when the link went after the final octet, STAGE_UNSENT when it went
    before. `code` is the reply's, 0 without one. `reason` is `bounce.classify` of the reply; it is needed for 4xx and 5xx only.
    `begun`: its MAIL had left. `guilty`: it is the message that ends the connections it is sent on, not the server.
    Raises KeyError on a stage that is not in the table.
    """
    row = TABLE[stage]
    if stage == STAGE_CONTENT and 200 <= code <= 299:
        return _DELIVERED
    if stage == STAGE_LOST:
        return row[on_uncertain]
    if stage == STAGE_UNSENT:
        return _charged(row["cut off"], guilty) if begun else row["never begun"]
    answer = _answer(code, reason)
    disposition = row[answer]
    if disposition is _IN_DOUBT:
        return TABLE[STAGE_LOST][on_uncertain]
    if disposition.recipient == REQUEUED:
        return disposition if answer == "locked out" else _charged(_with_path(disposition, reason), guilty)
    return _with_path(disposition, reason)


def _answer(code: int, reason: BounceClass | None) -> str:
    """Name the column of the table."""
    if code in (421, 503):
        return str(code)
    if code in _LOCKED_OUT_CODES:
        return "locked out"
    if 400 <= code <= 499 or (500 <= code <= 599 and reason is not None and reason.transient):
        return "4xx"
    return "5xx" if 500 <= code <= 599 else "nonsense"


def _with_path(disposition: Disposition, reason: BounceClass | None) -> Disposition:
    """Slow the path down where the reply blames the sender (rate, reputation, authentication) or refuses to relay for us."""
    if reason is None or (reason.fault != "sender" and reason.category != RELAYING_ISSUES):
        return disposition
    return msgspec.structs.replace(disposition, path="throttle")


def _charged(disposition: Disposition, guilty: bool) -> Disposition:
    """Turn a guilty message's return into a deferral."""
    if not guilty:
        return disposition
    return Disposition(states.DEFERRED, states.KIND_TRANSIENT, disposition.connection, disposition.path)
