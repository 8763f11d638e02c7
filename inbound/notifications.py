"""Bounces and complaints as JSON in a mail: what Amazon SES sends through SNS, to people and to addresses like ours."""

import re
from typing import Any, Final

import msgspec

from inbound.dsn import DELAYED, FAILED, RecipientStatus, address_of
from inbound.feedback_report import FeedbackReport

MAX_BYTES: Final = 256 * 1024
_START = re.compile(r'\{\s*"(?:notificationType|eventType|Type)"')


def read(text: str) -> list[RecipientStatus] | FeedbackReport | None:
    """Find such an object in a text and read it. None where there is none, or it is about neither."""
    start = _START.search(text)
    if start is None:
        return None
    body = text[start.start() : start.start() + MAX_BYTES].replace("!\n ", "").replace("\n", "")  # mailers wrap the one long line
    end = body.rfind("}")
    try:
        found: Any = msgspec.json.decode(body[: end + 1])
    except msgspec.DecodeError:
        return None
    if isinstance(found, dict) and isinstance(found.get("Message"), str):  # as SNS passes it on unless told to send it raw
        try:
            found = msgspec.json.decode(found["Message"])
        except msgspec.DecodeError:
            return None
    if not isinstance(found, dict):
        return None
    kind = found.get("notificationType") or found.get("eventType")
    if kind == "Complaint":
        about = found.get("complaint")
        people = _people(about, "complainedRecipients")
        kind = about.get("complaintFeedbackType") if isinstance(about, dict) else None
        stated = str(kind) if kind in ("abuse", "fraud", "not-spam", "virus") else "abuse"
        return FeedbackReport(stated, tuple(address for address, _ in people), "", "", "SES", 1)
    if kind == "Bounce":
        about = found.get("bounce")
        action = DELAYED if isinstance(about, dict) and about.get("bounceType") == "Undetermined" else FAILED
        return [_status(address, person, action) for address, person in _people(about, "bouncedRecipients")] or None
    if kind == "DeliveryDelay":
        return [_status(address, person, DELAYED) for address, person in _people(found.get("deliveryDelay"), "delayedRecipients")] or None
    return None


def _people(about: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    listed = about.get(name) if isinstance(about, dict) else None
    people = [item for item in listed[:50] if isinstance(item, dict)] if isinstance(listed, list) else []
    return [(address, item) for item in people if (address := address_of(str(item.get("emailAddress", ""))))]


def _status(address: str, person: dict[str, Any], action: str) -> RecipientStatus:
    diagnostic = str(person.get("diagnosticCode", ""))[:1000]
    kind, semicolon, rest = diagnostic.partition(";")
    status = str(person.get("status", ""))
    if semicolon and " " not in kind.strip():
        diagnostic = rest.strip()
    return RecipientStatus(address, action, status if len(status) < 10 else "", diagnostic)
