"""The machine-readable part of a delivery status notification (RFC 3464, 3463, 6533): which recipient, what became of it, why.

Written for what the world sends: fields missing, doubled, run together without blank lines, recipients as names instead of addresses.
"""

import re
from typing import Final

import msgspec

MAX_RECIPIENTS: Final = 1000
MAX_DIAGNOSTIC: Final = 1000

FAILED: Final = "failed"
DELAYED: Final = "delayed"
DELIVERED: Final = "delivered"

_FIELD = re.compile(r"^([A-Za-z][\w-]{1,60})[ \t]*:[ \t]*(.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*\n")
_STATUS = re.compile(r"(?<![\d.])([245])\.(\d{1,3})\.(\d{1,3})(?![\d.]*\d)")
_ADDRESS = re.compile(r"[^\s<>()\[\]:;,\"@]{1,64}@[^\s<>()\[\]:;,\"@]{1,255}|\"[^\"\n@]{1,62}\"@[\w.-]{1,255}")
_XTEXT = re.compile(r"\+([0-9A-F]{2})")
_UNICODE_XTEXT = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")
_COMMENT = re.compile(r"\s*\([^()]{0,200}\)\s*$")
_ACTIONS: Final = {
    **dict.fromkeys(("failed", "failure", "fail", "bounced", "error", "expired", "undeliverable"), FAILED),
    **dict.fromkeys(("delayed", "delay", "deferred"), DELAYED),
    **dict.fromkeys(("delivered", "relayed", "expanded", "deliverable"), DELIVERED),
}


class RecipientStatus(msgspec.Struct, frozen=True):
    """What a report says of one recipient. `recipient` is lower case, or empty where no address is given; `also` its other spellings."""

    recipient: str
    action: str  # failed, delayed, delivered
    status: str  # `5.1.1`, or empty: never invented
    diagnostic: str
    also: tuple[str, ...] = ()
    category: str = ""  # PowerMTA's own name for the reason, where it sent the report
    mta: str = ""  # the host that said so


def parse(text: str) -> list[RecipientStatus]:
    """Read a message/delivery-status body: one entry for each recipient, in order. Empty where it names none."""
    found: list[RecipientStatus] = []
    for fields in _groups(text.replace("\r\n", "\n")):
        status = _recipient(fields)
        if status is not None:
            found.append(status)
            if len(found) >= MAX_RECIPIENTS:
                break
    return found


def _groups(text: str) -> list[dict[str, str]]:
    """The fields of each recipient. A new group starts at a blank line or where a recipient field comes again."""
    groups: list[dict[str, str]] = []
    for block in _BLANK.split(text):
        group: dict[str, str] = {}
        for name, value in _FIELD.findall(block):
            key = name.lower()
            if key == "final-recipient" and key in group:
                groups.append(group)
                group = {}
                if len(groups) > MAX_RECIPIENTS:
                    return groups
            if "\n" in value:
                value = " ".join(value.split())
            group.setdefault(key, value.strip())
        if not group:
            continue
        if (
            groups
            and "final-recipient" not in group
            and "original-recipient" not in group
            and "reporting-mta" not in groups[-1]
            and not groups[-1].keys() & group.keys()
        ):
            groups[-1].update(group)  # a blank line inside a group
        else:
            groups.append(group)
            if len(groups) > MAX_RECIPIENTS:
                break
    return groups


def _recipient(fields: dict[str, str]) -> RecipientStatus | None:
    final = address_of(fields.get("final-recipient", ""))
    original = address_of(fields.get("original-recipient", ""))
    also = [address_of(fields.get(name, "")) for name in ("x-actual-recipient", "x-display-name", "x-original-recipient")]
    if not (final or original or "action" in fields or "final-recipient" in fields or "original-recipient" in fields):
        return None
    if not (final or original):
        final = next((address for address in also if address), "")
    stated = _STATUS.search(fields.get("status", ""))
    status = ".".join(stated.groups()) if stated else ""
    words = re.findall(r"[a-z]+", fields.get("action", "").lower()[:60])
    action = next((_ACTIONS[word] for word in words if word in _ACTIONS), "")
    if not action:
        action = {"2": DELIVERED, "4": DELAYED}.get(status[:1], FAILED)
    if action == DELIVERED and status[:1] == "5" and "status" in fields:
        action = FAILED if not words else action  # contradictory: what the report calls delivered is not a failure
    diagnostic = fields.get("diagnostic-code", "") or fields.get("x-supplementary-info", "")
    kind, _, rest = diagnostic.partition(";")
    if rest and len(kind) <= 24 and " " not in kind.strip():
        diagnostic = rest.strip()
    if not diagnostic and stated and fields["status"].strip() != status:
        diagnostic = fields["status"]  # some put the reason behind the code, as a comment
    spellings = [address for address in (final, original, *also) if address]
    name = original or final
    return RecipientStatus(
        name, action, status, diagnostic[:MAX_DIAGNOSTIC], tuple(dict.fromkeys(address for address in spellings if address != name)),
        fields.get("x-powermta-bouncecategory", "").lower(), without_type(fields.get("remote-mta", "")),
    )  # fmt: skip


def message_fields(text: str) -> dict[str, str]:
    """The fields at the top of a message/delivery-status or message/feedback-report body, names in lower case, the first of each."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(_BLANK.split(text[:4096].replace("\r\n", "\n").lstrip("\n"), maxsplit=1)[0]):
        fields.setdefault(name.lower(), " ".join(value.split()))
    return fields


def without_type(value: str) -> str:
    """`mx.example.com` of `dns; mx.example.com` (RFC 3464 §2.1.2)."""
    kind, semicolon, rest = value[:300].partition(";")
    return rest.strip() if semicolon and " " not in kind.strip() else value[:300].strip()


def address_of(value: str) -> str:
    """The address in a recipient field (`rfc822; <a@b.example>`), lower case; empty where there is none."""
    kind, semicolon, rest = value[:2000].partition(";")
    text = rest if semicolon and "@" not in kind else value[:2000]
    if kind.strip().lower() == "utf-8":
        text = _UNICODE_XTEXT.sub(lambda found: chr(min(int(found[1], 16), 0x10FFFF)), text)
    elif "+" in text:
        text = _XTEXT.sub(lambda found: chr(int(found[1], 16)) if 0x20 < int(found[1], 16) < 0x7F else found[0], text)
    text = _COMMENT.sub("", text)
    found = _ADDRESS.search(text)
    return found[0].strip(".'").lower() if found else ""
