"""Complaint feedback (RFC 5965, 6591): the machine-readable part, and the older form without one (Microsoft's JMRP).

Which subscriber complained is decided by the token in the returned headers, never by an address written here: reporters redact
addresses, and anybody can write one (S3). The addresses are for people who read the report.
"""

import re
from typing import Final

import msgspec

from inbound.dsn import address_of

MAX_RECIPIENTS: Final = 1000
ACTED_ON: Final = frozenset({"abuse", "fraud", "opt-out", "virus"})  # the others blame nobody or say that all is well
KNOWN: Final = ACTED_ON | {"not-spam", "auth-failure", "other", "miscategorized", "dkim"}

_FIELD = re.compile(r"^([A-Za-z][\w-]{1,60})[ \t]*:[ \t]*(.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_COUNT = re.compile(r"[0-9]{1,6}\Z")
_HIDDEN: Final = ("redact", "undisclosed", "hidden", "anonym")


class FeedbackReport(msgspec.Struct, frozen=True):
    """What a complaint report states. `recipients` are lower case, without redacted ones."""

    feedback_type: str
    recipients: tuple[str, ...]
    original_mail_from: str
    source_ip: str
    user_agent: str
    incidents: int


def parse(text: str) -> FeedbackReport | None:
    """Read a message/feedback-report body. None where it has no Feedback-Type."""
    fields: dict[str, list[str]] = {}
    for number, (name, value) in enumerate(_FIELD.findall(text.replace("\r\n", "\n"))):
        if number >= 5 * MAX_RECIPIENTS:
            break
        fields.setdefault(name.lower(), []).append(" ".join(value.split()))
    if "feedback-type" not in fields:
        return None

    def first(name: str) -> str:
        return fields.get(name, [""])[0]

    feedback_type = first("feedback-type").split(";")[0].strip().lower()
    stated = (*fields.get("original-rcpt-to", ()), *fields.get("removal-recipient", ()), *fields.get("x-hmxmroriginalrecipient", ()))
    incidents = first("incidents")
    return FeedbackReport(
        feedback_type if feedback_type in KNOWN else "other", shown_addresses(stated), address_of(first("original-mail-from")),
        first("source-ip")[:64], first("user-agent")[:200], int(incidents) if _COUNT.match(incidents) else 1,
    )  # fmt: skip


def shown_addresses(values: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """The addresses in these fields, each once, without those a reporter blacked out."""
    found: dict[str, None] = {}
    for value in values[:MAX_RECIPIENTS]:
        address = address_of(value)
        if address and not any(word in address for word in _HIDDEN) and not address.endswith(".invalid"):
            found[address] = None
    return tuple(found)
