"""What crosses from the process that reads a message to the one that acts on it: small, bounded, every text one clean line (S15).

Also what is kept beside the raw message for people: `sluice inbound show`.
"""

from typing import Final

import msgspec

from domain.bounce import BounceClass
from domain.reply import one_line
from inbound import dsn
from inbound.mime_reader import decoded_words
from inbound.triage import Failure, Reading

MOST_SHOWN: Final = 20  # recipients of one report that are kept by name; all are counted
# Fields of the returned message that the accounting files show, and those in which a token of ours may stand
SHOWN_FIELDS: Final = ("From", "To", "Subject", "Return-Path", "X-Job", "X-FBLId", "CFBL-Feedback-ID", "Message-ID")


class About(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a report says of one recipient. `also`: other spellings of the address."""

    recipient: str
    status: str
    diagnostic: str
    means: BounceClass
    mta: str = ""
    also: tuple[str, ...] = ()


class Summary(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message as it was read."""

    kind: str
    action: str = ""
    failed: tuple[About, ...] = ()
    delayed: tuple[About, ...] = ()
    delivered: tuple[str, ...] = ()
    named: int = 0  # recipients the report names
    feedback_type: str = ""
    complained: tuple[str, ...] = ()  # addresses a complaint names
    source_ip: str = ""
    user_agent: str = ""
    returned: dict[str, str] = {}  # SHOWN_FIELDS of the returned message
    report: dict[str, str] = {}  # fields of the report about the whole message, names in lower case
    format: str = ""
    subject: str = ""
    sender: str = ""
    exceeded: str = ""


def summarize(reading: Reading) -> Summary:
    """Cut a reading down to what is kept of it."""
    feedback = reading.feedback
    named = {failure.recipient for failure in (*reading.failed, *reading.delayed)}
    named.update(reading.delivered, feedback.recipients if feedback else ())
    fields = dsn.message_fields(reading.report) if reading.report else {}
    return Summary(
        kind=reading.kind,
        action=reading.action,
        failed=_shown(reading.failed),
        delayed=_shown(reading.delayed),
        delivered=tuple(clean(address, 320) for address in reading.delivered[:MOST_SHOWN]),
        named=len(named - {""}),
        feedback_type=feedback.feedback_type if feedback else "",
        complained=tuple(clean(address, 320) for address in feedback.recipients[:MOST_SHOWN]) if feedback else (),
        source_ip=clean(feedback.source_ip, 64) if feedback else "",
        user_agent=clean(feedback.user_agent, 200) if feedback else "",
        returned={
            name: clean(decoded_words(value[:1000]))
            for name in SHOWN_FIELDS
            if (value := reading.returned.get(name.lower().encode("ascii")))
        },
        report={name: clean(fields[name], 300) for name in _REPORT_FIELDS if name in fields},
        format=reading.format,
        subject=clean(reading.subject, 300),
        sender=clean(reading.sender, 320),
        exceeded=reading.exceeded,
    )


_REPORT_FIELDS: Final = (
    "reporting-mta", "original-envelope-id", "arrival-date", "reported-domain", "original-rcpt-to", "original-mail-from", "version",
)  # fmt: skip


def _shown(failures: tuple[Failure, ...]) -> tuple[About, ...]:
    return tuple(
        About(
            clean(failure.recipient, 320), clean(failure.status, 12), clean(failure.reason), failure.means, clean(failure.mta, 255),
            tuple(clean(address, 320) for address in failure.also[:3]),
        )
        for failure in failures[:MOST_SHOWN]
    )  # fmt: skip


def clean(text: str, most: int = 512) -> str:
    """One line without control characters, at most `most` characters and 512 octets."""
    return one_line(text[:most].encode("utf-8", "replace")).strip()
