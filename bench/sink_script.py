"""What the sink answers on purpose: tokens in addresses and rules from a TOML file, both turned into an `Answer`.

A token is the whole local part up to `+`, or the whole first label of the domain (`defer2+ann@x.example`, `ann@defer2.example`).
Everything is deterministic: the same address gets the same fate in every run; shares are taken by a hash of the recipient.
docs/sink.md holds the table for users; `TOKENS` and `ACTIONS` below are the same table for the program.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import translate
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import msgspec

from domain.errors import ConfigurationError

STAGES: Final = ("banner", "ehlo", "starttls", "handshake", "auth", "mail", "rcpt", "data", "body", "dot", "accepted")
CONNECTION_STAGES: Final = frozenset(("banner", "ehlo", "starttls", "handshake", "auth"))
ACTIONS: Final = {
    "accept": "answer as if there were no script",
    "reply": "answer with `reply`",
    "slow": "wait `milliseconds`, then answer as usual",
    "drop": "close the connection without an answer",
    "reset": "reset the connection (TCP RST) without an answer",
    "hang": "never answer, keep the connection open",
    "stall": "never answer and stop reading",
    "double": "send the answer twice",
    "garbage": "send a line that is no reply instead of the answer",
    "lf": "end the answer with a bare LF",
    "wrong": "a code that does not belong there: 354, or 250 for DATA",
    "split": "the answer, one octet per segment",
    "multi": "the answer as 30 lines",
    "short": "the code alone, without text",
    "flood": "16 MiB of continuation lines before the answer",
    "huge": "one line of 1 MiB",
    "extra": "the answer and then a line nobody asked for",
    "bye": "the answer and in the same segment 421, then close",
    "norcpt354": "refuse the recipient, yet answer DATA with 354",
}
# A memory of what a recipient got before (defer, grey): the oldest half is forgotten beyond this, about 150 bytes each.
MAX_REMEMBERED: Final = 1_000_000
_MAX_TOKENS: Final = 65_536

# token base -> (reply line, stage)
_REFUSALS: Final[Mapping[str, tuple[str, str]]] = {
    "defer": ("451 4.3.0 Try again later", "rcpt"),
    "bounce": ("550 5.1.1 No such mailbox", "rcpt"),
    "full": ("552 5.2.2 Mailbox full", "rcpt"),
    "block": ("550 5.7.1 Blocked by policy", "rcpt"),
    "reject-content": ("554 5.7.1 Content refused", "dot"),
}
_PLAYABLE: Final = tuple(a for a in ACTIONS if a not in ("accept", "reply", "slow", "norcpt354"))
_STAGE: Final = r"(?:-(?P<stage>mail|rcpt|data|body|dot|accepted))"
_PATTERNS: Final = (
    re.compile(rf"(?P<name>defer)(?P<number>\d{{1,6}})?{_STAGE}?"),
    re.compile(rf"(?P<name>bounce|full|block){_STAGE}?"),
    re.compile(r"(?P<name>reject-content|accept|norcpt354)"),
    re.compile(rf"(?P<name>slow)(?P<number>\d{{1,6}})?{_STAGE}?"),
    re.compile(r"(?P<name>grey|rate|connlimit)(?P<number>\d{1,6})"),
    re.compile(rf"(?P<code>[45]\d\d)(?:-(?P<enhanced>[45]-\d{{1,3}}-\d{{1,3}}))?{_STAGE}?"),
    re.compile(rf"(?P<name>{'|'.join(_PLAYABLE)}){_STAGE}"),
)
# The first three octets of every token: most addresses are told apart by these alone, in C.
TOKEN_PREFIXES: Final = tuple(
    sorted(
        {f"{name}-"[:3].encode() for name in (*_REFUSALS, *_PLAYABLE, "accept", "norcpt354", "slow", "grey", "rate", "connlimit")}
        | {str(code).encode() for code in range(400, 600)}
    )
)
TOKENS: Final = (
    ("accept", "taken, whatever the domain says"),
    ("defer{n}", "451 4.3.0 the first n times (1) for this recipient, then taken; `-dot` after the content"),
    ("bounce", "550 5.1.1"),
    ("full", "552 5.2.2"),
    ("block", "550 5.7.1"),
    ("reject-content", "554 5.7.1 after the final dot"),
    ("{code}[-x-y-z][-{stage}]", "that code (400-599) with enhanced status x.y.z; 421 also closes"),
    ("slow{ms}[-{stage}]", "the answer comes ms (1000) later"),
    ("grey{s}", "451 4.7.1 until s seconds after the first try for this recipient"),
    ("rate{n}", "at most n recipients a second per domain, else 451 4.7.1"),
    ("connlimit{n}", "421 4.7.0 for the connections beyond n that have a recipient in this domain"),
    ("{action}-{stage}", "drop, reset, hang, stall, double, garbage, lf, wrong, split, multi, short, flood, huge, extra, bye"),
    ("norcpt354", "550 at RCPT, yet 354 to DATA"),
)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One scripted answer. `reply` is complete, CRLF included; `action` is a key of `ACTIONS`, `stage` one of `STAGES`."""

    stage: str
    action: str
    reply: bytes = b""
    milliseconds: int = 0
    times: int = 0  # act only the first n times for one recipient; 0 = always
    seconds: float = 0.0  # greylisting: act until that long after the first try
    per_second: int = 0  # act only beyond n recipients in one second
    connections: int = 0  # act only for connections beyond n


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[rule]]` of a script file; the first that matches decides. Patterns are globs over the lower-cased address."""

    stage: str = "rcpt"
    action: str = "reply"
    recipient: str = "*"
    sender: str = "*"
    reply: str = ""
    percent: float = 100.0
    milliseconds: int = 1000
    times: int = 0
    grey_seconds: float = 0.0
    per_second: int = 0
    connections: int = 0


def reply_line(text: str) -> bytes:
    """`550 5.1.1 text` -> the bytes on the wire. Raises ValueError where it is no single reply line (RFC 5321 §4.2)."""
    if not re.fullmatch(r"[2-5]\d\d( [ -~]*)?", text):
        raise ValueError(f"{text!r:.80} is no reply: write a code of three digits, a blank and one line of ASCII text")
    return text.encode("ascii") + b"\r\n"


def read_token(token: str) -> Answer | None:
    """The answer a token asks for; None where the word means nothing to the sink. Case does not matter."""
    token = token.lower()
    for pattern in _PATTERNS:
        match = pattern.fullmatch(token)
        if match:
            return _answer(match.groupdict())
    return None


def _answer(parts: dict[str, str | None]) -> Answer | None:
    name, stage, number = parts.get("name"), parts.get("stage"), int(parts.get("number") or 0)
    if parts.get("code"):
        code = parts["code"] or ""
        enhanced = (parts.get("enhanced") or f"{code[0]}-0-0").replace("-", ".")
        if enhanced[0] != code[0] or stage in ("body", "accepted"):
            return None
        return Answer(stage=stage or "rcpt", action="reply", reply=reply_line(f"{code} {enhanced} Scripted answer"))
    assert name is not None
    if name in _REFUSALS:
        text, usual = _REFUSALS[name]
        if stage in ("body", "accepted"):
            return None
        return Answer(stage=stage or usual, action="reply", reply=reply_line(text), times=(number or 1) if name == "defer" else 0)
    if name == "grey":
        return Answer(stage="rcpt", action="reply", reply=reply_line("451 4.7.1 Greylisted, try again later"), seconds=number or 0.001)
    if name == "rate":
        return Answer(stage="rcpt", action="reply", reply=reply_line("451 4.7.1 Too many messages, slow down"), per_second=number or 1)
    if name == "connlimit":
        return Answer(stage="rcpt", action="reply", reply=reply_line("421 4.7.0 Too many connections"), connections=number or 1)
    if name == "norcpt354":
        return Answer(stage="rcpt", action=name, reply=reply_line("550 5.1.1 No such mailbox"))
    if name == "slow":
        return Answer(stage=stage or "rcpt", action=name, milliseconds=number or 1000)
    return Answer(stage=stage or "rcpt", action=name)


def read_rules(text: str, source: str) -> list[Rule]:
    """Rules of a TOML text. Raises ConfigurationError with one sentence per problem, each `source: rule n: reason`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError([f"{source}: not TOML: {error}"]) from error
    unknown = set(table) - {"rule"}
    if unknown:
        raise ConfigurationError([f"{source}: {key}: unknown key; only [[rule]] tables belong here" for key in sorted(unknown)])
    return check_rules(table.get("rule", []), source)


def check_rules(tables: Any, source: str) -> list[Rule]:
    """Plain tables (TOML or JSON) -> rules. Raises ConfigurationError naming every rule that is refused."""
    if not isinstance(tables, list):
        raise ConfigurationError([f"{source}: rule: must be a list of tables"])
    rules: list[Rule] = []
    problems: list[str] = []
    for number, table in enumerate(tables, 1):
        try:
            rule = msgspec.convert(table, Rule)
            _check(rule)
            rules.append(rule)
        except (msgspec.ValidationError, ValueError) as error:
            problems.append(f"{source}: rule {number}: {error}")
    if problems:
        raise ConfigurationError(problems)
    return rules


def _check(rule: Rule) -> None:
    if rule.stage not in STAGES:
        raise ValueError(f"stage {rule.stage!r:.40} is unknown; use one of {', '.join(STAGES)}")
    if rule.action not in ACTIONS:
        raise ValueError(f"action {rule.action!r:.40} is unknown; use one of {', '.join(ACTIONS)}")
    if not 0.0 <= rule.percent <= 100.0:
        raise ValueError(f"percent {rule.percent} is outside 0 to 100")
    if min(rule.milliseconds, rule.times, rule.per_second, rule.connections) < 0 or rule.grey_seconds < 0:
        raise ValueError("milliseconds, times, grey_seconds, per_second and connections must not be negative")
    if rule.action in ("reply", "norcpt354") and rule.stage in ("body", "accepted", "handshake"):
        raise ValueError(f"action {rule.action!r} has no place at stage {rule.stage!r}: nothing is answered there")
    if rule.action == "reply" and not rule.reply:
        raise ValueError('action "reply" needs a reply such as "451 4.3.0 Try again later"')
    if rule.reply:
        reply_line(rule.reply)


def share(recipient: bytes, salt: str) -> float:
    """A number 0 <= x < 100 fixed by the recipient and the rule: `percent` takes those below it."""
    # crc32 is linear, so names that differ in one digit would fall close together: one multiplication spreads them.
    return ((crc32(recipient, crc32(salt.encode())) * 0x9E3779B1) & 0xFFFFFFFF) / 0x1_0000_0000 * 100.0


class Script:
    """All scripted answers of one sink, with the memory they need (who was deferred, first tries, seconds, open connections).

    Single-threaded: called by the protocol objects of one event loop. `now` is monotonic seconds.
    """

    def __init__(self, rules: Sequence[Rule] = (), *, tokens: bool = True) -> None:
        self.tokens_on = tokens
        self._tokens: dict[str, Answer | None] = {}
        self._tries: dict[int, float] = {}
        self._seconds: dict[tuple[Answer, bytes], tuple[int, int]] = {}
        self._connections: dict[tuple[Answer, bytes], set[int]] = {}
        self.set_rules(rules)

    def set_rules(self, rules: Sequence[Rule]) -> None:
        """Replace every rule at once; what recipients have been through is forgotten."""
        self.rules = list(rules)
        compiled = [(rule, re.compile(translate(rule.recipient.lower())), re.compile(translate(rule.sender.lower()))) for rule in rules]
        answers = [(rule, to, sender, _from_rule(rule), f"{index} {rule.stage}") for index, (rule, to, sender) in enumerate(compiled)]
        self._connection_rules = [entry for entry in answers if entry[0].stage in CONNECTION_STAGES]
        self._sender_rules = [entry for entry in answers if entry[0].stage == "mail"]
        self._recipient_rules = [entry for entry in answers if entry[0].stage not in CONNECTION_STAGES and entry[0].stage != "mail"]
        self.has_connection_rules = bool(self._connection_rules)
        self.has_sender_rules = bool(self._sender_rules)
        self.has_recipient_rules = bool(self._recipient_rules)
        self.forget()

    def forget(self) -> None:
        """Every recipient is new again."""
        self._tries.clear()
        self._seconds.clear()
        self._connections.clear()

    def token(self, word: bytes) -> Answer | None:
        """`read_token` with a memory, for the protocol."""
        if not self.tokens_on:
            return None
        text = word.decode("ascii", "replace")
        if text not in self._tokens:
            if len(self._tokens) >= _MAX_TOKENS:
                self._tokens.clear()
            self._tokens[text] = read_token(text)
        return self._tokens[text]

    def for_connection(self, stage: str, number: int) -> Answer | None:
        """The answer at a stage before any sender is known; `percent` counts by a hash of the connection's number."""
        for rule, _, _, answer, salt in self._connection_rules:
            if rule.stage == stage and share(b"%d" % number, salt) < rule.percent:
                return None if answer.action == "accept" else answer
        return None

    def for_sender(self, sender: bytes) -> Answer | None:
        """The answer at MAIL: rules of stage `mail`, else a token in the sender that names the stage (`drop-mail+x@…`)."""
        low = sender.lower()
        text = low.decode("utf-8", "replace")
        for rule, _, pattern, answer, salt in self._sender_rules:
            if pattern.match(text) and share(low, salt) < rule.percent:
                return None if answer.action == "accept" else answer
        local, _, domain = low.rpartition(b"@")
        for word in (local.partition(b"+")[0], domain.partition(b".")[0]):
            found = self.token(word)
            if found is not None and found.stage == "mail":
                return found
        return None

    def for_recipient(self, recipient: bytes, sender: bytes, token: Answer | None, connection: int, now: float) -> Answer | None:
        """What happens to this recipient now: the first matching rule, else `token`; None = taken as usual.

        Counts the try where the answer depends on earlier ones.
        """
        low = recipient.lower()
        answer = token
        if self._recipient_rules:
            to, who = low.decode("utf-8", "replace"), sender.lower().decode("utf-8", "replace")
            for rule, pattern, sender_pattern, scripted, salt in self._recipient_rules:
                if pattern.match(to) and sender_pattern.match(who) and share(low, salt) < rule.percent:
                    answer = scripted
                    break
        if answer is None or answer.action == "accept":
            return None
        if answer.times and self._count(answer, low) > answer.times:
            return None
        if answer.seconds and now - self._first_try(answer, low, now) >= answer.seconds:
            return None
        domain = low.rpartition(b"@")[2]
        if answer.per_second and self._in_this_second(answer, domain, now) <= answer.per_second:
            return None
        if answer.connections and self._takes_slot(answer, domain, connection):
            return None
        return answer

    def release(self, connection: int) -> None:
        """The connection is gone: it no longer counts against `connlimit`."""
        for key, held in list(self._connections.items()):
            held.discard(connection)
            if not held:
                del self._connections[key]

    def _count(self, answer: Answer, recipient: bytes) -> int:
        key = hash((answer.stage, answer.times, recipient))
        seen = int(self._tries.get(key, 0)) + 1
        self._remember(key, float(seen))
        return seen

    def _first_try(self, answer: Answer, recipient: bytes, now: float) -> float:
        key = hash((answer.seconds, "grey", recipient))
        if key not in self._tries:
            self._remember(key, now)
        return self._tries[key]

    def _remember(self, key: int, value: float) -> None:
        if len(self._tries) >= MAX_REMEMBERED and key not in self._tries:
            for old in list(self._tries)[: MAX_REMEMBERED // 2]:
                del self._tries[old]
        self._tries[key] = value

    def _in_this_second(self, answer: Answer, domain: bytes, now: float) -> int:
        second, count = self._seconds.get((answer, domain), (0, 0))
        count = count + 1 if second == int(now) else 1
        if len(self._seconds) >= _MAX_TOKENS:
            self._seconds.clear()
        self._seconds[(answer, domain)] = (int(now), count)
        return count

    def _takes_slot(self, answer: Answer, domain: bytes, connection: int) -> bool:
        held = self._connections.setdefault((answer, domain), set())
        if connection in held or len(held) < answer.connections:
            held.add(connection)
            return True
        return False


def _from_rule(rule: Rule) -> Answer:
    reply = reply_line(rule.reply) if rule.reply else b""
    if rule.action == "norcpt354" and not reply:
        reply = reply_line("550 5.1.1 No such mailbox")
    return Answer(
        stage=rule.stage,
        action=rule.action,
        reply=reply,
        milliseconds=rule.milliseconds if rule.action == "slow" else 0,
        times=rule.times,
        seconds=rule.grey_seconds,
        per_second=rule.per_second,
        connections=rule.connections,
    )


def load(path: Path | None) -> Script:
    """The script of a file, or the tokens alone. Raises ConfigurationError where the file is missing or wrong."""
    if path is None:
        return Script()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError([f"{path}: not UTF-8: {error.reason} at octet {error.start}"]) from error
    return Script(read_rules(text, str(path)))
