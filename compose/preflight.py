"""Pre-flight: what mailbox providers would object to in a campaign, seen in composed samples and in the DNS (rules B1-B10).

Pure: it looks at messages and facts that were gathered before. Each finding says who would answer with which code, so that the figures
of a campaign need not teach it.
"""

import email
import email.policy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from email.message import EmailMessage
from html.parser import HTMLParser
from ipaddress import ip_address
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from compose.tags import TAG
from compose.verifying import split_fields, verdicts
from domain.campaign import CampaignContent
from domain.errors import Invalid
from domain.sender_domain import (
    PUBLIC_DOMAINS,
    SenderFacts,
    aligned,
    dmarc_policy,
    dmarc_records,
    same_key,
    spf_allows_all,
    spf_records,
)

Severity = Literal["blocking", "warning"]

GMAIL_CLIPS_BYTES: Final = 102 * 1024  # of the HTML part; what lies behind is hidden, the pixel and the way to unsubscribe with it
MAX_MESSAGE_BYTES: Final = 20 * 1024 * 1024
MAX_LINE_OCTETS: Final = 998  # RFC 5322 §2.1.1
MANY_LINKS: Final = 100
ONCE: Final = ("date", "from", "sender", "reply-to", "to", "cc", "message-id", "subject", "mime-version", "content-type",
               "list-unsubscribe", "list-unsubscribe-post", "list-id", "feedback-id", "cfbl-address", "cfbl-feedback-id")  # fmt: skip
SHORTENERS: Final = frozenset(("bit.ly", "tinyurl.com", "t.co", "goo.gl", "ow.ly", "is.gd", "buff.ly", "rebrand.ly", "cutt.ly", "t.ly"))


class Answer(msgspec.Struct, frozen=True):
    """What a provider does; `code` is its SMTP reply, empty where it accepts the message and punishes it otherwise."""

    provider: str
    code: str
    effect: str = ""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One objection. `what` is the fact, `advice` what to do about it."""

    name: str
    severity: Severity
    what: str
    advice: str
    answers: tuple[Answer, ...] = ()


_OURS: Final = "this is a mistake of Sluice; please report it"
_FORMAT = (Answer("Gmail", "550 5.7.1", "not RFC 5322 compliant"), Answer("Yahoo", "", "refused as malformed"))
_MICROSOFT = Answer("Microsoft", "550 5.7.515", "the sending domain does not meet the required authentication level")
_SPF = (Answer("Gmail", "4.7.27 / 5.7.27"), _MICROSOFT)
_DKIM = (Answer("Gmail", "4.7.30 / 5.7.30"), _MICROSOFT)
_DMARC = (Answer("Gmail", "4.7.31"), _MICROSOFT)
_ALIGNMENT = (Answer("Gmail", "4.7.32"), _MICROSOFT)
_UNAUTHENTICATED = (Answer("Gmail", "5.7.26"), _MICROSOFT)
_ONE_CLICK = (Answer("Gmail", "", "no one-click button; spam folder for bulk senders"), Answer("Yahoo", "", "no one-click button"))
_NO_REPORTS = (Answer("all", "", "CFBL-Address is ignored: no complaint is reported to it"),)
_SPAM = (Answer("all", "", "counts as a sign of spam"),)


def _blocking(name: str, what: str, advice: str, answers: tuple[Answer, ...] = ()) -> Finding:
    return Finding(name=name, severity="blocking", what=what, advice=advice, answers=answers)


def _warning(name: str, what: str, advice: str, answers: tuple[Answer, ...] = ()) -> Finding:
    return Finding(name=name, severity="warning", what=what, advice=advice, answers=answers)


# --- the messages -----------------------------------------------------------------------------------------------------------
def content(
    said: CampaignContent, built: Sequence[bytes | Invalid], data: Sequence[Mapping[str, Any]], known_fields: Iterable[str],
    cfbl_domain: str = "",
) -> list[Finding]:  # fmt: skip
    """What is wrong with the samples themselves. `built` are their wire octets; `data` the merge data of a larger sample.

    `cfbl_domain`: the domain that must sign beside the From domain for the messages to carry CFBL-Address; empty where none need.
    """
    wires = [wire for wire in built if isinstance(wire, bytes)]
    refusals = [each for each in built if isinstance(each, Invalid)]
    found: list[Finding] = []
    if refusals:
        share = f"{len(refusals)} of {len(built)} sample recipients get no message: {refusals[0].field}: {refusals[0].reason}"
        found.append((_warning if wires else _blocking)("not_composed", share, "correct their merge data, or give the tag a default"))
    seen: dict[str, Finding] = {}
    for wire in wires:
        for finding in [*_structure(wire), *_rules(said, wire), *_cfbl(wire, cfbl_domain)]:
            seen.setdefault(finding.name, finding)
    return found + list(seen.values()) + fields(said, data, known_fields)


def _structure(wire: bytes) -> list[Finding]:
    """B4 and B17: what every parser must be able to read."""
    found = []
    head, blank, _ = wire.partition(b"\r\n\r\n")
    if not blank or re.search(rb"(?<!\r)\n|\r(?!\n)", wire) or b"\0" in wire:
        found.append(_blocking("malformed", "a bare CR, LF or NUL, or no end of the header", _OURS, _FORMAT))
    longest = max(map(len, wire.split(b"\r\n")))
    if longest > MAX_LINE_OCTETS:
        found.append(_blocking("line_too_long", f"a line has {longest} octets", f"no line may exceed {MAX_LINE_OCTETS}", _FORMAT))
    names = Counter(field.partition(b":")[0].strip().lower().decode("latin-1") for field in split_fields(head + b"\r\n"))
    if twice := [name for name in ONCE if names[name] > 1]:
        found.append(
            _blocking("header_twice", f"{', '.join(twice)} is there more than once", "leave out the custom header of this name", _FORMAT)
        )
    if missing := [name for name in ("date", "from", "message-id") if not names[name]]:
        found.append(_blocking("header_missing", f"there is no {', '.join(missing)}", _OURS, _FORMAT))
    message = email.message_from_bytes(wire, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    defects = [type(defect).__name__ for part in message.walk() for defect in part.defects]
    if defects:
        found.append(_blocking("mime_defect", f"the MIME structure is broken: {defects[0]}", "look at the HTML and attachments", _FORMAT))
    senders = message["from"].addresses if message["from"] else ()
    if len(senders) != 1:
        found.append(_blocking("from_count", f"From holds {len(senders)} addresses", "name exactly one", _FORMAT))
    if not re.fullmatch(r"<[^<>@\s]+@[^<>@\s]+>", str(message["message-id"] or "")):
        found.append(_blocking("message_id", "the Message-ID is not <left@right>", _OURS, _FORMAT))
    if not str(message["subject"] or "").strip():
        found.append(_blocking("no_subject", "the subject is empty", "write one, or give its tags a default", _SPAM))
    if len(wire) > MAX_MESSAGE_BYTES:
        megabytes = f"the message has {len(wire) / 1048576:.1f} MiB"
        found.append(_blocking("too_large", megabytes, "put attachments on a page and link them", (Answer("Gmail", "552 5.3.4"),)))
    return found + _parts(message)


def _parts(message: EmailMessage) -> list[Finding]:
    found = []
    html, text = message.get_body(("html",)), message.get_body(("plain",))
    if html is not None and (text is None or not str(text.get_content()).strip()):
        found.append(_warning("no_text", "there is no text part", "write one, or have it made from the HTML", _SPAM))
    if html is None:
        return found
    source = str(html.get_content())
    octets = len(source.encode("utf-8", "replace"))
    if octets > GMAIL_CLIPS_BYTES:
        what = f"the HTML part has {octets / 1024:.0f} KiB; Gmail shows the first {GMAIL_CLIPS_BYTES // 1024}"
        found.append(
            _warning("clipped", what, "shorten it: the pixel and the unsubscribe link are at its end", (Answer("Gmail", "", "clipped"),))
        )
    reader = _Links()
    reader.feed(source)
    reader.close()
    return found + _links(reader.links)


class _Links(HTMLParser):
    """Addresses of links with the text a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (address := dict(attrs).get("href")):
            self.links.append((address, ""))
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag != "a"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.links[-1] = (self.links[-1][0], self.links[-1][1] + data)


def _links(links: Sequence[tuple[str, str]]) -> list[Finding]:
    found = []
    if len(links) > MANY_LINKS:
        found.append(_warning("many_links", f"there are {len(links)} links", "fewer links are read more", _SPAM))
    for address, text in links:
        try:
            host = urlsplit(address).hostname or ""
        except ValueError:
            host = ""
        if address.lower().startswith(("http:", "https:")) and not host:
            found.append(_warning("link_broken", f"the link {address[:80]!r} names no host", "correct it", _SPAM))
        if _is_address(host) and not host.startswith("127.") and host != "::1":
            found.append(_warning("link_to_address", f"a link leads to the address {host}", "use a domain name", _SPAM))
        if host in SHORTENERS:
            found.append(
                _warning("link_shortener", f"a link leads over {host}", "link the page itself; shorteners are on block lists", _SPAM)
            )
        shown = re.fullmatch(r"\s*(?:https?://)?((?:[a-z0-9-]+\.)+[a-z]{2,})(?:/\S*)?\s*", text.lower())
        if shown and host and not aligned(shown[1].removeprefix("www."), host, "") and "/c/" not in address:
            what = f"a link shows {shown[1]} and leads to {host}"
            found.append(
                _warning("link_disguised", what, "show words, or the address it leads to", (Answer("all", "", "looks like phishing"),))
            )
    return found


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _rules(said: CampaignContent, wire: bytes) -> list[Finding]:
    """B1, B2, B7-B10: what bulk senders must say."""
    found = []
    message = email.message_from_bytes(wire, policy=email.policy.default)
    sender = message["from"].addresses[0].domain.lower() if message["from"] and message["from"].addresses else ""
    if sender in PUBLIC_DOMAINS:
        advice = "send from a domain of your own; put this address into Reply-To"
        found.append(_blocking("from_public_domain", f"nobody but {sender} may send mail from {sender}", advice, _UNAUTHENTICATED))
    header = str(message["list-unsubscribe"] or "")
    if said.list_id:
        links = re.findall(r"<(https?://[^<>]+)>", header)
        if not links or message["list-unsubscribe-post"] != "List-Unsubscribe=One-Click":
            found.append(_blocking("no_unsubscribe", "there is no List-Unsubscribe with one click", _OURS, _ONE_CLICK))
        elif len(links) > 1 or not links[0].startswith("https://"):
            advice = "give the delivery server a link domain, or inbound.public_url an https address"
            found.append(
                _warning("unsubscribe_not_https", "List-Unsubscribe has not exactly one https address (RFC 8058)", advice, _ONE_CLICK)
            )
        if links and said.mail_class == "marketing" and urlsplit(links[0]).path not in _words(message):
            advice = "put {{ links.unsubscribe }} into the text and into the HTML"
            found.append(_warning("no_unsubscribe_link", "the reader sees no way to unsubscribe", advice, _ONE_CLICK))
    if message["feedback-id"]:
        parts = str(message["feedback-id"]).split(":")
        if not 1 <= len(parts) <= 4 or not re.fullmatch(r"[A-Za-z0-9._-]{5,15}", parts[-1]) or len(set(parts)) < len(parts):
            advice = "mail.feedback_sender_id must be 5 to 15 characters and stay the same"
            found.append(
                _warning(
                    "feedback_id", f"Feedback-ID {message['feedback-id']} is not a:b:c:SenderId", advice, (Answer("Gmail", "", "ignored"),)
                )
            )
    signed = [set(verdict.headers) for verdict in verdicts(wire, {})]
    wanted = [n for n in ("list-unsubscribe", "list-unsubscribe-post", "feedback-id", "cfbl-address", "cfbl-feedback-id") if message[n]]
    if signed and (bare := [name for name in wanted if not any(name in names for names in signed)]):
        found.append(_warning("not_signed", f"{', '.join(bare)} is not covered by the signature", _OURS, _ONE_CLICK))
    return found


def _cfbl(wire: bytes, domain: str) -> list[Finding]:
    """B10: who must sign for a CFBL-Address (RFC 9477 §3.1)."""
    message = email.message_from_bytes(wire, policy=email.policy.default)
    if not message["cfbl-address"]:
        if not domain:
            return []
        what = f"no DKIM key signs for {domain}, the domain of mail.cfbl_address, so the messages carry no CFBL-Address"
        return [_warning("cfbl_left_out", what, f"`sluice dkim new {domain}` makes one and prints its DNS record", _NO_REPORTS)]
    sender = message["from"].addresses[0].domain.lower() if message["from"] and message["from"].addresses else ""
    if any(sender == each.domain or sender.endswith("." + each.domain) for each in verdicts(wire, {})):
        return []
    advice = f"`sluice dkim new {sender}` makes one and prints its DNS record"
    return [_warning("cfbl_unsigned", f"CFBL-Address is there, but no DKIM key signs for {sender}", advice, _NO_REPORTS)]


def _words(message: email.message.Message) -> str:
    assert isinstance(message, EmailMessage)
    parts = [message.get_body((kind,)) for kind in ("html", "plain")]
    return "".join(str(part.get_content()) for part in parts if part is not None)


# --- merge fields -----------------------------------------------------------------------------------------------------------
_OUTPUT = re.compile(r"\{\{-?(.*?)-?\}\}", re.DOTALL)
_LOGIC = re.compile(r"\{%-?(.*?)-?%\}", re.DOTALL)
_FIELD = re.compile(r"""\bsubscriber(?:\.([A-Za-z_]\w*)|\[\s*["']([^"']+)["']\s*\])""")


def plain(name: str) -> str:
    """The form in which names are compared: without case and underscores."""
    return name.replace("_", "").lower()


def asked(source: str) -> list[str]:
    """The fields of the subscriber that a template shows, each once."""
    shown = [name for output in _OUTPUT.findall(source) for pair in _FIELD.findall(output) for name in pair if name]
    shown += [plain(match[2]) for match in TAG.finditer(source) if match[1] and plain(match[1]) == "subscriber"]
    return list(dict.fromkeys(shown))


_ASSIGNED = re.compile(r"^\s*(?:assign|capture|increment|decrement|for|tablerow)\s+([A-Za-z_]\w*)")
_ROOT = re.compile(r"^\s*([A-Za-z_][\w-]*)\s*(?=[.|\[]|$)")
_KNOWN_ROOTS: Final = frozenset(
    (
        "subscriber",
        "links",
        "campaign",
        "list",
        "user",
        "now",
        "today",
        "forloop",
        "tablerowloop",
        "true",
        "false",
        "nil",
        "null",
        "empty",
        "blank",
    )
)


def unknown_variables(source: str) -> list[str]:
    """The variables a template shows that no message has: `{{ first_name }}` where `{{ subscriber.first_name }}` was meant."""
    own = {match[1] for logic in _LOGIC.findall(source) if (match := _ASSIGNED.match(logic))}
    roots = [match[1] for output in _OUTPUT.findall(source) if (match := _ROOT.match(output))]
    return sorted({root for root in roots if root not in _KNOWN_ROOTS and root not in own})


def fields(said: CampaignContent, data: Sequence[Mapping[str, Any]], known_fields: Iterable[str]) -> list[Finding]:
    """Variables and fields that nobody has. What is empty for some is counted by `compose.empty_values`."""
    known = {plain(name): name for name in known_fields}
    ours = {"id", "email", "subscriberid", "hashedsubscriberid", "emailaddress", "subscriptionip", "subscriptiondate"}
    found = []
    sources = (said.subject, said.from_name, said.html, said.text, *(value for _, value in said.headers))
    for name in unknown_variables("\n".join(sources)):
        what = f"{{{{ {name} }}}} is always empty: there is no such variable"
        found.append(_warning(f"variable_unknown:{name}", what, f"fields of the recipient are {{{{ subscriber.{name} }}}}"))
    for name in asked("\n".join(sources)):
        if plain(name) in ours:
            continue
        values = [each.get(name, each.get(known.get(plain(name), ""))) for each in data]
        empty = sum(value is None or value == "" or value == [] for value in values)
        if plain(name) not in known and empty == len(values):
            what = f"no recipient has the field {name!r}" if values else f"the list has no field {name!r}"
            found.append(_warning(f"field_unknown:{name}", what, f"the list has {', '.join(sorted(known.values())[:20]) or 'no fields'}"))
    return found


# --- the DNS ----------------------------------------------------------------------------------------------------------------
def sender(facts: SenderFacts, wire: bytes | None) -> list[Finding]:
    """What is wrong in the DNS for mail from these domains; `wire` is a sample, whose signatures are verified with what is published."""
    found: list[Finding] = []
    domain, back = facts.sender, facts.return_path
    for each, what in ((domain, "From"), (back, "return-path")):
        if each.exists is False:
            answers = (Answer("Yahoo", "", "refused: the domain must have a SOA record"), Answer("Gmail", "5.7.26"), _MICROSOFT)
            found.append(
                _blocking(f"{_slug(what)}_missing", f"the {what} domain {each.name} does not exist", "register it, or correct it", answers)
            )
    if domain.exists and domain.takes_mail is False:
        advice = "give it an MX record: From and Reply-To must take answers"
        found.append(_warning("from_takes_no_mail", f"nobody takes mail for {domain.name}", advice, (_MICROSOFT,)))
    reply = facts.reply_to
    if reply is not None and (reply.exists is False or reply.takes_mail is False):
        advice = "answer at a domain with an MX record: From and Reply-To must take answers"
        found.append(_warning("reply_to_takes_no_mail", f"nobody takes mail for {reply.name}, which Reply-To names", advice, (_MICROSOFT,)))
    if back.exists and back.takes_mail is False:
        found.append(
            _warning(
                "return_path_takes_no_mail", f"nobody takes returned mail for {back.name}", "point its MX to the inbound process", _SPAM
            )
        )
    found += _spf(facts) + _dmarc(facts) + _dkim(facts, wire) + _alignment(facts)
    for host, there in facts.hosts.items():
        if there is False:
            found.append(
                _blocking(f"host_missing:{host}", f"links lead over {host}, which has no address", "make its A or CNAME record", _SPAM)
            )
    unknown = list(dict.fromkeys(name for name, value in _lookups(facts) if value is None))
    if unknown:
        found.append(_warning("dns_silent", f"no answer for {', '.join(unknown[:5])}", "try again; see preflight.nameservers"))
    return found


def _slug(text: str) -> str:
    return text.lower().replace("-", "_")


def _lookups(facts: SenderFacts) -> list[tuple[str, object]]:
    domains = filter(None, (facts.sender, facts.return_path, facts.reply_to))
    named = [(each.name, value) for each in domains for value in (each.exists, each.mx, each.txt)]
    named += [(key.name, key.found) for key in (*facts.keys, *facts.beside)]
    return [*named, (f"_dmarc.{facts.dmarc_name}", facts.dmarc), *facts.hosts.items()]


def _spf(facts: SenderFacts) -> list[Finding]:
    back = facts.return_path
    if back.txt is None or back.exists is False:
        return []
    records = spf_records(back.txt)
    if not records:
        advice = f"publish one at {back.name} that names the servers which send for it"
        return [_blocking("spf_missing", f"{back.name} has no SPF record", advice, _SPF)]
    if len(records) > 1:
        return [_blocking("spf_several", f"{back.name} has {len(records)} SPF records, so none counts", "keep one", _SPF)]
    if spf_allows_all(records[0]):
        return [_warning("spf_allows_all", f"the SPF record of {back.name} lets everybody send", "end it with ~all or -all", _SPAM)]
    return []


def _dmarc(facts: SenderFacts) -> list[Finding]:
    if facts.dmarc is None or facts.sender.exists is False:
        return []
    records = dmarc_records(facts.dmarc)
    if len(records) != 1:
        what = f"{facts.sender.name} has {'no DMARC record' if not records else f'{len(records)} DMARC records, so none counts'}"
        advice = f'publish one at _dmarc.{facts.sender.name}: "v=DMARC1; p=none" is enough'
        return [_blocking("dmarc_missing", what, advice, _DMARC)]
    if not dmarc_policy(records[0]):
        return [_blocking("dmarc_broken", f"the DMARC record of {facts.dmarc_name} has no valid p=", 'write "v=DMARC1; p=none"', _DMARC)]
    return []


def _dkim(facts: SenderFacts, wire: bytes | None) -> list[Finding]:
    found: list[Finding] = []
    if not facts.keys:
        advice = f"`sluice dkim new {facts.sender.name}` makes one and prints its DNS record"
        found.append(_blocking("dkim_missing", f"no DKIM key signs for {facts.sender.name}", advice, _DKIM))
    published: dict[str, str] = {}
    every = (*facts.keys, *facts.beside)
    for at, key in enumerate(every):
        if key.found is None:
            continue
        good = [text for text in key.found if same_key(key.expected, text)]
        if good:
            published[key.name] = good[0]
        else:
            what = f"{key.name} {'holds another key' if key.found else 'is not in the DNS'}"
            say, answers = (_blocking, _DKIM) if at < len(facts.keys) else (_warning, _NO_REPORTS)
            found.append(say(f"dkim_record:{key.name}", what, f"publish the TXT record {key.expected}", answers))
        if 0 < key.bits < 2048 and "ed25519" not in key.expected:
            found.append(
                _warning(
                    "dkim_short", f"the key {key.name} has {key.bits} bits", "2048 are advised: make another one", (Answer("Gmail", ""),)
                )
            )
    if wire is not None and every and len(published) == len(every):
        for verdict in verdicts(wire, published):
            if not verdict.good:
                what = f"the signature of {verdict.selector}._domainkey.{verdict.domain} does not verify: {verdict.reason}"
                found.append(_blocking("signature", what, _OURS, _DKIM))
    return found


def _alignment(facts: SenderFacts) -> list[Finding]:
    organisation = facts.dmarc_name if facts.dmarc else ""
    name = facts.sender.name
    by_key = any(aligned(name, key.domain, organisation) for key in facts.keys)
    if by_key or aligned(name, facts.return_path.name, organisation):
        return []
    domains = ", ".join(sorted({facts.return_path.name, *(key.domain for key in facts.keys)}))
    advice = f"sign with a key of {name}, or use a return path below it"
    return [_blocking("not_aligned", f"mail from {name} proves {domains} only", advice, _ALIGNMENT)]
