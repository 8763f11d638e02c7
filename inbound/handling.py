"""What follows from a message that was read: one function for each kind. Pure; `worker` carries it out.

Only evidence that we issued counts (S3): the signed return path the report came to, or a signed token in the header of the returned
message. Whom it is about stands in that token; an address in the text of a report is for people. A bounce acts only with a null sender, an
action `failed` and a permanent status; where it names somebody else than the token does (a forwarding that ended), it counts as soft.
"""

import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from domain import feedback, return_path
from domain.return_path import ReturnPath
from inbound.feedback_report import ACTED_ON
from inbound.policy import RETURN_PATH_DAYS
from inbound.summary import About, Summary, clean
from store.bounces import Event
from store.received import Waiting

_TOKEN_IN_SUBJECT: Final = re.compile(r"\bu-[a-z2-7]{24,64}\b", re.IGNORECASE).search
_TOKEN_FIELDS: Final = ("X-FBLId", "CFBL-Feedback-ID", "Return-Path")


class Keys(NamedTuple):
    """What our tokens are signed with."""

    return_path: bytes
    unsubscribe: bytes


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What follows: an event, or why nothing does. `path`: whose message it is about, where that is certain."""

    outcome: str
    reason: str
    event: Event | None = None
    path: ReturnPath | None = None


class Case(NamedTuple):
    """A message, how it was read, and the token that proves whom it is about."""

    message: Waiting
    summary: Summary
    path: ReturnPath | None
    unsubscribes: bool  # it came to an address that is there for nothing else
    doubt: str  # why there is no proof, in words


def judge(message: Waiting, summary: Summary, keys: Keys) -> Verdict:
    """What follows from one message."""
    case = _case(message, summary, keys)
    verdict = HANDLERS[summary.kind](case)
    return msgspec.structs.replace(verdict, path=case.path) if case.path else verdict


# --- whose it is ------------------------------------------------------------------------------------------------------------------


def _case(message: Waiting, summary: Summary, keys: Keys) -> Case:
    days = int(message.received_at.timestamp() // 86400)
    to_unsubscribe = return_path.read(keys.unsubscribe, message.recipient, return_path.UNSUBSCRIBE)
    if to_unsubscribe is not None:  # these do not age: they work as long as somebody keeps the message they stand in
        return Case(message, summary, to_unsubscribe, True, "")
    asked = _TOKEN_IN_SUBJECT(summary.subject)  # as our List-Unsubscribe asks for where its mailto is somebody else's, who passed it on
    to_unsubscribe = return_path.read(keys.unsubscribe, asked[0], return_path.UNSUBSCRIBE) if asked else None
    if to_unsubscribe is not None:
        return Case(message, summary, to_unsubscribe, True, "")
    envelope = return_path.read(keys.return_path, message.recipient)
    texts = [summary.returned.get(name, "").strip("<> ") for name in _TOKEN_FIELDS]
    embedded = next(filter(None, (_embedded(keys.return_path, text) for text in texts)), None)
    if envelope is not None and embedded is not None and envelope[:3] != embedded[:3]:
        return Case(message, summary, None, False, "its return path and the returned message belong to different recipients")
    path = envelope or embedded
    if path is None:
        return Case(message, summary, None, False, "no token of ours verifies: neither the address it came to nor a returned header")
    if not -1 <= days - path.day <= RETURN_PATH_DAYS:
        return Case(message, summary, None, False, f"its token is older than {RETURN_PATH_DAYS} days")
    return Case(message, summary, path, False, "")


def _embedded(key: bytes, text: str) -> ReturnPath | None:
    return return_path.read(key, text if "@" in text else f"{return_path.BOUNCE}{text}@x") if text else None


# --- one function for each kind -----------------------------------------------------------------------------------------------------


def _report(case: Case) -> Verdict:
    """A delivery status notification (RFC 3464, or in words)."""
    summary, path = case.summary, case.path
    if path is None:
        return _unproven(case.doubt)
    if case.message.mail_from:
        return _unproven("a report whose envelope sender is not empty is nobody's report (RFC 3464 §2)")
    if case.unsubscribes:
        return _unproven("nothing is sent from an unsubscribe address, so nothing can bounce to it")
    if summary.action == "delivered":
        return _event(case, path, feedback.REMOTE_STATUS, "delivered", "delivered", None, "a server says that it was delivered")
    if summary.action == "delayed":
        about = _about(summary.delayed)
        return _event(case, path, feedback.REMOTE_STATUS, "delayed", "none", about, "a server says that it is delayed")
    about = _about(summary.failed)
    if about is None:
        return _event(case, path, feedback.REMOTE_BOUNCE, "failed", "soft", None, "failed, without a reason: counts as soft")
    effect = str(feedback.bounce_effect(about.means))
    reason = f"{about.means.category} by rule {about.means.rule or 'none'}: {effect}"
    if effect == "hard" and not _is_hard(about):
        effect, reason = "soft", f"{reason} by its words, but no permanent status is stated: counts as soft"
    return _event(case, path, feedback.REMOTE_BOUNCE, "failed", effect, about, reason)


def _about(entries: tuple[About, ...]) -> About | None:
    """The entry that gives the reason. Our recipients are alone on their message, so where there are several none may say more than all."""
    return next((entry for entry in entries if not _is_hard(entry)), entries[0] if entries else None)


def _is_hard(entry: About) -> bool:
    return entry.means.hard and (entry.means.by_operator or feedback.is_permanent(entry.status, entry.diagnostic))


def _complaint(case: Case) -> Verdict:
    """A feedback report (RFC 5965), JMRP, or a complaint notification."""
    summary = case.summary
    if case.path is None:
        return _unproven(case.doubt)
    kind = summary.feedback_type
    if kind not in ACTED_ON:
        return _event(case, case.path, feedback.COMPLAINT, kind, "none", None, f"feedback of type {kind} asks for nothing")
    # one complaint of a recipient about a message, whatever it is called
    return _event(case, case.path, feedback.COMPLAINT, "complaint", "complained", None, f"complaint ({kind})")


def _unsubscribe(case: Case) -> Verdict:
    """Mail that asks to be taken off the list."""
    if case.path is None:
        return Verdict(outcome=feedback.UNPROVEN, reason=f"asks to be unsubscribed, but {case.doubt}")
    if not case.message.mail_from:
        return _unproven("a request has a sender")
    return _event(case, case.path, feedback.UNSUBSCRIBE, "unsubscribe", "unsubscribed", None, "asked to be unsubscribed")


def _automatic(case: Case) -> Verdict:
    return Verdict(outcome=feedback.KEPT, reason="an automatic answer: nothing follows from it")


def _for_people(case: Case) -> Verdict:
    """A reply, or anything else. To an unsubscribe address people write for one reason only."""
    if case.unsubscribes and case.message.mail_from:
        return _unsubscribe(case)
    return Verdict(outcome=feedback.KEPT, reason="for people: nothing follows from it")


HANDLERS: Final[dict[str, Callable[[Case], Verdict]]] = {
    "dsn": _report,
    "arf": _complaint,
    "unsubscribe": _unsubscribe,
    "autoreply": _automatic,
    "challenge": _automatic,
    "reply": _for_people,
    "other": _for_people,
}


def _unproven(reason: str) -> Verdict:
    return Verdict(outcome=feedback.UNPROVEN, reason=reason)


def _event(case: Case, path: ReturnPath, kind: str, action: str, effect: str, about: About | None, reason: str) -> Verdict:
    summary, message = case.summary, case.message
    details: dict[str, Any] = {
        "orig": message.recipient, "srcMta": message.peer, "dsnReportingMta": _host(summary.report.get("reporting-mta", "")),
        "envId": summary.report.get("original-envelope-id", ""), "headers": summary.returned,
    }  # fmt: skip
    if kind == feedback.COMPLAINT:
        details |= {
            "feedbackType": summary.feedback_type, "userAgent": summary.user_agent, "dlvSourceIp": summary.source_ip,
            "reportedDomain": summary.report.get("reported-domain", ""),
        }  # fmt: skip
    return Verdict(
        outcome=feedback.RECORDED,
        reason=reason,
        event=Event(
            kind=kind, action=action, user_id=path.user_id, campaign_id=path.campaign_id, number=path.number, effect=effect,
            status=about.status if about else "", category=about.means.category if about and kind == feedback.REMOTE_BOUNCE else "",
            diagnostic=about.diagnostic if about else "", mta=about.mta if about else "", format=summary.format, details=details,
            inbound_id=message.id,
            named=frozenset(name for entry in summary.failed for name in (entry.recipient, *entry.also) if name),
        ),
    )  # fmt: skip


def _host(value: str) -> str:
    kind, semicolon, rest = value.partition(";")
    return clean(rest.strip() if semicolon else kind.strip(), 255)
