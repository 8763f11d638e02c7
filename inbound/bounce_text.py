"""Bounces for people: reports without a machine-readable part, from MTAs of any make and in any language.

What is looked for first does not depend on words: an address alone on its line, at the head of a line or in front of a colon, an SMTP
reply or enhanced status behind it, a command of the transcript (`RCPT TO:<…>`), the To field of the returned message. Words of the
world's MTAs are the last resort. Every step is linear in the text.
"""

import re
from typing import Any, Final

import msgspec

from inbound.report_words import words

MAX_TEXT: Final = 24 * 1024
MAX_RECIPIENTS: Final = 500
MAX_REASON: Final = 1200
MAX_REPLY: Final = 400

_HIGH = "\u00c0-\u058f"  # RFC 6531; not the scripts that write without spaces: there an address ends where its ASCII does
ADDRESS: Final = re.compile(
    rf"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~.{_HIGH}-]{{1,64}}@[A-Za-z0-9{_HIGH}-]{{1,63}}(?:\.[A-Za-z0-9{_HIGH}-]{{1,63}}){{0,10}}"
)
# An SMTP reply or an enhanced status: what counts in every language
REPLY: Final = re.compile(
    r"[45](?<![\w.@-].)(?:\d\d(?=[ -]+(?:[245]\.\d{1,2}\.\d|[^\d\s])|\s+[245]\.\d{1,2}\.\d)"
    r"(?![ -]?(?:px|kb|mb|bytes|days|hours|min|users|usd|eur)\b)|\.\d{1,2}\.\d{1,3}(?!\.?\d))",
    re.IGNORECASE,
)
STATUS: Final = re.compile(r"(?<![\d.])[45]\.\d{1,2}\.\d{1,3}(?!\.?\d)")
_REPLY_END = re.compile(r"\n[ \t]*(?:\n|<<<|>>>|\.\.\. |[245]\d\d[ -](?=\D|[245]\.\d)|<[^<>\s]{1,64}@|-{3,}|={3,})")
_PARAGRAPH = re.compile(r"\n[ \t]*\n|\n[-=*_#]{4}")
_SENDER_FIELD = re.compile(r"^[ >\t]{0,4}(?:from|return-path|sender):([^\n]{1,500})", re.MULTILINE | re.IGNORECASE)
_PERMANENT = re.compile(r"(?<![\w.])5(?:\d\d[ -]|\.\d{1,2}\.\d)")
_STAGE = re.compile(r"\b(mail from|rcpt to|end of data)\b", re.IGNORECASE)
_NESTED_REPLY = re.compile(r"[45]\.\d\.\d - [^\n'\"]{4,60}\s([45]\d\d)-['\"]")

_RETURNED_FIELD = words("returned_field")
_HEADER_LINE = re.compile(r"[A-Za-z][\w-]{1,40}:")
_MARGIN = re.compile(r"[ >\t]*")
_RETURNED_LINE = words("returned_line")
_LEAD = re.compile(r"^[\s>*•·\-–—=+#|\"'(\[<]*(?:\d{1,3}[.)]\s+)?[\s\"'(\[<]*$")
_LEAD_REPLY = re.compile(r"^[ \t<]*[45]\d\d[ -](?:[45]\.\d{1,2}\.\d{1,3} )?[\s\"'(\[<]*$")
_LEAD_NAME = words("recipient_label", r"(?:^|[\s(\[\"'<*-])", r"s?(?: address(?:es)?)?(?:\(s\))?[ \t]*[:=\x{ff1a}][\s\"'(\[<]*$")
_COMMAND = re.compile(r"rcpt to ?: ?[<\s]*$", re.IGNORECASE)
_NOT_ME = words("not_recipient", r"\b", r"(?: \w{1,12}){0,2}[ \t]*[:=\x{ff1a}]?[\s\"'(\[<]*$")
_MACHINE_ADDRESS = re.compile(
    r"^(?:mailer[-_.]?daemon|post-?master|mail[-_.]?daemon|abuse|no-?reply|do-?not-?reply|hostmaster|noc|support|helpdesk)@"
    r"|\.(?:png|gif|jpe?g|html?|php)$",
    re.IGNORECASE,
)
_FAILED_WORDS = words("failed_words")
_DELAYED_WORDS = words("delayed_words")
_ENDED_WORDS = words("ended_words")


class TextBounce(msgspec.Struct, frozen=True):
    """A recipient a text names, lower case, and what it says about it."""

    recipient: str
    reason: str


class TextReport(msgspec.Struct, frozen=True):
    """What a text says: recipients (perhaps none), all of the text up to the returned message, and the returned message's fields."""

    recipients: tuple[TextBounce, ...]
    text: str
    returned: str
    certainty: int  # 4: addresses stand as a list; 3: in a transcript; 2: beside an error; 1: elsewhere; 0: none


def says_failed(text: str) -> bool:
    """Does a text speak of mail that did not arrive?"""
    return _FAILED_WORDS(text) is not None


def says_delayed(text: str, subject: str = "") -> bool:
    """Does a text say that delivery goes on, and not that it has ended?"""
    if _ENDED_WORDS(text) or _ENDED_WORDS(subject):
        return False
    if _DELAYED_WORDS(subject) or _DELAYED_WORDS(text):
        return True
    return "warning" in subject.lower() and _PERMANENT.search(text) is None


def split_returned(text: str) -> tuple[str, str]:
    """Cut a text where the returned message begins: a line that announces it, or header fields no report has of its own."""
    text = text[: 2 * MAX_TEXT]
    cut = len(text)
    line: Any = _RETURNED_LINE(text)
    if line and text[: line.start()].strip():
        cut = line.start()
    field: Any = _RETURNED_FIELD(text[:cut])
    if field:
        start = line = field.start()
        margin = _MARGIN.match(text, start)[0]  # type: ignore[index]  # it matches anything
        while line > 0:  # back over the fields in front of it
            line = text.rfind("\n", 0, line - 1) + 1
            if _HEADER_LINE.match(text, line + len(margin)) and text.startswith(margin, line):
                start = line
            elif text[line : line + 1] not in (" ", "\t"):
                break
        if text[:start].strip():
            cut = start
    return text[:cut][:MAX_TEXT], text[cut:]


def read(text: str, excluded: frozenset[str] = frozenset(), hints: tuple[str, ...] = ()) -> TextReport:
    """Find the recipients in a report's text.

    `excluded`: addresses that are not recipients (the report's own From and To), lower case. `hints`: addresses known from elsewhere to
    be the recipients (X-Failed-Recipients), or where the returned message went; they decide between candidates.
    """
    report, returned = split_returned(text)
    for sender in _SENDER_FIELD.findall(returned[:8192])[:4]:
        excluded |= {found[0].lower() for found in ADDRESS.finditer(sender)}
    places: list[tuple[int, int, str, int]] = []  # certainty, where, address, end
    for found in ADDRESS.finditer(report):
        address = found[0].strip(".'`*=/").lower()
        if "@" not in address[1:-3] or _MACHINE_ADDRESS.search(address):
            continue
        if address.startswith(("3d", "=")) and "mailto" in report[max(0, found.start() - 12) : found.start()].lower():
            continue
        if len(places) >= 4 * MAX_RECIPIENTS:
            break
        places.append((_certainty(report, found.start(), found.end()), found.start(), address, found.end()))
    best = max((place[0] for place in places if place[2] not in excluded or place[0] == 4), default=0)
    chosen: dict[str, int] = {}
    for certainty, start, address, _ in places:
        if certainty == best and certainty > 0 and (address not in excluded or certainty == 4):
            chosen.setdefault(address, start)
    if len(chosen) > 1 and any(address in excluded for address in chosen) and any(address not in excluded for address in chosen):
        chosen = {address: start for address, start in chosen.items() if address not in excluded}
    if best < 3 and hints:
        known = {address: start for address, start in chosen.items() if address in hints}
        chosen = known or chosen
    if not chosen:
        return TextReport((), report, returned, 0)
    starts = sorted(chosen.values())
    recipients = []
    for address, start in list(chosen.items())[:MAX_RECIPIENTS]:
        end = next((other for other in starts if other > start), len(report))
        recipients.append(TextBounce(address, reason_for(report, address, start, end)))
    return TextReport(tuple(recipients), report, returned, best)


def _certainty(text: str, start: int, end: int) -> int:
    """How an address stands in the text.

    4 at the head of a line; 3 in a command or a reply to it; 2 beside an error; 1 elsewhere; 0 somebody else's.
    """
    line_start = text.rfind("\n", 0, start) + 1
    line_end = text.find("\n", end)
    line_end = len(text) if line_end < 0 else line_end
    before = text[max(line_start, start - 200) : start]
    after = text[end : min(line_end, end + 200)]
    if after.startswith(("@", "/")) or before.endswith(("/", "=", "?")):
        return 0  # part of a longer thing: a link, a source route
    if _COMMAND.search(before) or _LEAD_REPLY.match(before):
        return 3
    if _LEAD.match(before):
        # the second line of a reply may begin with an address, and is no new recipient
        previous = text.rfind("\n", 0, max(line_start - 1, 0)) + 1
        indented = len(before) - len(before.lstrip())
        above = text[previous:line_start]
        return 1 if 0 < len(above) - len(above.lstrip()) <= indented and REPLY.search(above) else 4
    if _NOT_ME(before):
        return 0
    named: Any = _LEAD_NAME(before)
    if named:
        return 3 if named[0].strip(" \"'(\t").lower().startswith("to") else 4  # `To:` may be the returned message's
    if REPLY.search(text, line_start, line_end) or _FAILED_WORDS(text[line_start:line_end]):
        return 2
    return 2 if before.rstrip(" \"'(<[").lower().endswith((" to", " for", ":")) and after.strip("> \"')].,;:") == "" else 1


def reason_for(text: str, address: str, start: int, end: int) -> str:
    """The part of a text that gives the reason for one recipient: behind its address, or any line that has both the address and a reply."""
    line = text.rfind("\n", 0, start) + 1
    if _LEAD_REPLY.match(text[max(line, start - 40) : start]):
        start = line  # `550 <a@b.example>... User unknown`
    passage = text[start : min(end, start + MAX_REASON)]
    rest = passage[len(address) :]
    if REPLY.search(rest) or len(rest.strip(" \n\t>:;.,*-=_")) > 12:
        return passage
    lowered = text.lower()
    at = lowered.find(address)
    while at >= 0:  # a transcript elsewhere names it again
        line_start = lowered.rfind("\n", 0, at) + 1
        line_end = lowered.find("\n", at)
        line_end = len(text) if line_end < 0 else line_end
        if at != start and (REPLY.search(text, line_start, line_end) or _FAILED_WORDS(text[line_start:line_end])):
            return text[line_start : line_start + MAX_REASON]
        at = lowered.find(address, line_end)
    return passage


def replies_in(text: str) -> list[str]:
    """Each SMTP reply or enhanced status with its words, one line each: what is classified first. At most six.

    A code in parentheses (`… (#5.1.1)`) stands behind its words, any other in front of them.
    """
    nested = _NESTED_REPLY.search(text) if "-'" in text or '-"' in text else None  # a gateway's own words around the reply it got
    if nested:
        return [f"{nested[1]} {text[nested.end() : nested.end() + MAX_REPLY]}"]
    found: list[str] = []
    end = -1
    for match in REPLY.finditer(text):
        start = match.start()
        if start < end:
            continue
        if text[start - 1 : start] in ("(", "#", "[") and start > 1:
            start = max(text.rfind("\n\n", 0, start), text.rfind(":\n", 0, start), start - MAX_REPLY // 2) + 1
        code = match[0][:3]
        at = match.end()
        while True:
            stop = _REPLY_END.search(text, at)
            if stop is None or not text.startswith(code, stop.end() - 4) or "." in code:
                break
            at = stop.end()
        end = min(stop.start() if stop else len(text), match.start() + MAX_REPLY)
        stage = _STAGE.findall(text[max(0, start - 160) : start])  # an address refused at MAIL FROM is the sender's
        found.append(" ".join(text[start:end].split()) + (f" in reply to {stage[-1]} command" if stage else ""))
        if len(found) == 6:
            break
    return found


def passages(text: str) -> list[str]:
    """The paragraphs of a text, one line each, at most ten: where the reason is looked for when no reply gives one."""
    return [line for line in (" ".join(paragraph.split()) for paragraph in _PARAGRAPH.split(text)[:30]) if len(line) > 8][:10]


def nested_status(text: str) -> str:
    """The enhanced status of a reply that stands inside a gateway's own words (`5.1.0 - Unknown address error 550-'5.4.1 …'`), or empty."""
    nested = _NESTED_REPLY.search(text) if "-'" in text or '-"' in text else None
    found = STATUS.match(text, nested.end()) if nested else None
    return found[0] if found else ""
