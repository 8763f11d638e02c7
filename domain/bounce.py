"""Why a server refused: BounceClass, BounceRules and `classify`, used alike for replies and for delivery reports.

The rules are data (`config/bounce_rules.toml`): an ordered list, the first that matches wins. They are a few RE2 sets, so a
reply is read a few times at most, in time linear in its length, whatever the peer wrote in it; a pattern that RE2 cannot run is refused
when the rules are read.
"""

import copy
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec
import re2  # type: ignore[import-untyped]

from domain.bounce_patterns import BouncePatterns, Pattern, Verdict
from domain.errors import Invalid
from domain.reply import MAX_TEXT_BYTES

Fault = Literal["recipient", "sender", "content", "infrastructure"]
RELAYING_ISSUES: Final = "relaying-issues"

# PowerMTA's categories (powermta.md §2.1) and who is to blame where a rule does not say otherwise
CATEGORIES: Final[dict[str, Fault]] = {
    "bad-configuration": "infrastructure",
    "bad-connection": "infrastructure",
    "bad-domain": "recipient",
    "bad-mailbox": "recipient",
    "content-related": "content",
    "inactive-mailbox": "recipient",
    "invalid-sender": "sender",
    "message-expired": "infrastructure",
    "no-answer-from-host": "infrastructure",
    "other": "infrastructure",
    "policy-related": "sender",
    "protocol-errors": "infrastructure",
    "quota-issues": "recipient",
    RELAYING_ISSUES: "sender",
    "routing-errors": "infrastructure",
    "spam-related": "sender",
    "virus-related": "content",
}
HARD_CATEGORIES: Final = frozenset({"bad-mailbox", "bad-domain", "inactive-mailbox"})

# Several automata one after the other instead of one: for a reply they cost the same, since most match in the first; for a text made of
# all the words that rules look for each has far fewer states to be built of, which is what such a text costs
_SETS: Final = 4
_SET_MEMORY: Final = 16 << 20
_CACHED: Final = 8192  # replies, with what they mean

_PATTERN: Final = "pattern "  # in front of an operator's pattern where else the name of a rule stands
# What nearly every reply begins with: code and, often, status
_HEAD = re.compile(r"(\d{3})(?:[ -](?:([245]\.\d{1,2}\.\d{1,3})(?!\.?\d))?|$)", re.ASCII).match
# A status anywhere: the dot is sought, since that is quick, and what stands before it looked at then
_STATUS = re.compile(r"\.(?<=[245]\.)(?<![\d.]..)\d{1,2}\.\d{1,3}(?!\.?\d)", re.ASCII).finditer
# Nothing is tried twice at any place: on the 512 characters we keep of a reply even the worst text costs microseconds
_ADDRESS = re.compile(r"(?<![^\s<>()\[\]@:;,\"])[^\s<>()\[\]@:;,\"]++@[\w.-]{1,255}+")
_AFTER_COMMAND = re.compile(r"\(?in reply to (?!mail from|end of data)[a-z ]{4,20} command\)?")
_TO_SPACE: Final = bytes(0x20 if byte < 0x20 or chr(byte) in '<>"()[]{}*:;,!|/\\=?&~`' else byte for byte in range(256))


class BounceClass(msgspec.Struct, frozen=True):
    """What a refusal means.

    `category` is one of `CATEGORIES`. `hard`: the address or its domain is unusable for good; never true of a refusal that blames
    the sender, the content or a machine. `transient`: permanent by its code, yet meant for now only (RFC 5321 §4.5.3.1.10).
    `rule` names the rule that fired.
    """

    category: str
    fault: Fault
    hard: bool
    transient: bool = False
    rule: str = ""

    @property
    def by_operator(self) -> bool:
        """Whether a pattern of the operator says so, and not a rule: who wrote it has looked at the text."""
        return self.rule.startswith(_PATTERN)


_OTHER: Final = BounceClass("other", "infrastructure", hard=False)


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the rules file. `patterns` are tried on the text as `readable` makes it; `status` and `code` on the code in front."""

    name: str
    category: str
    fault: Fault | None = None
    transient: bool = False
    patterns: tuple[str, ...] = ()  # RE2; `{who}` stands for an entry of [words]
    status: tuple[str, ...] = ()  # `x.1.1`: the enhanced status, x = 4 or 5, a star for any number
    code: tuple[str, ...] = ()  # the reply code, as RE2
    samples: tuple[str, ...] = ()  # replies this very rule must catch; the tests run them


class _RulesFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    words: dict[str, str]
    rule: list[Rule]


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """How a reply is understood, and why. `status` is what it states, never invented; `seen_as` what the rules' patterns are tried on.

    `rule` is the one that decides, `pattern` what of it matches, `also` the later rules that match, too. `bounce_pattern` is the
    operator's that comes before them all, where one matches: then `rule` is the one that would decide without it.
    """

    category: str
    fault: Fault
    hard: bool
    transient: bool
    status: str | None
    bounce_pattern: str | None
    rule: str
    pattern: str | None
    seen_as: str
    also: list[str]


class BounceRules:
    """An ordered, compiled set of rules."""

    def __init__(self, rules: list[Rule], words: Mapping[str, str]) -> None:
        """Compile. Raises Invalid naming the rule whose category or pattern is refused."""
        self.rules = tuple(rules)
        self._sources: list[str] = []
        self._owner: list[int] = []  # pattern number -> rule number; ascending, so the lowest match is the first rule
        for number, rule in enumerate(self.rules):
            if rule.category not in CATEGORIES:
                raise Invalid(f"rule {rule.name}", "category is none of PowerMTA's", rule.category)
            for pattern in _patterns(rule, words):
                self._owner.append(number)
                self._sources.append(pattern)
        self._sets = self._compiled()
        # pattern number -> what it means, for replies that are meant for now and for good
        self._classes = tuple([_class_of(self.rules[owner], permanent) for owner in self._owner] for permanent in (False, True))
        self.patterns: BouncePatterns | None = None
        self.classify = functools.lru_cache(maxsize=_CACHED)(self._by_rules)

    def _compiled(self) -> list[tuple[int, re2.Set]]:
        """The patterns as RE2 sets in their order, each with the number of its first. Raises Invalid naming the rule."""
        sets = []
        size = -(-len(self._sources) // _SETS)
        for start in range(0, len(self._sources), max(1, size)):
            options = re2.Options()
            options.case_sensitive = False
            options.max_mem = _SET_MEMORY  # upper limit of the automaton's cache, not an allocation
            options.log_errors = False
            group = re2.Set.SearchSet(options)
            for number in range(start, min(start + size, len(self._sources))):
                try:
                    group.Add(self._sources[number])
                except re2.error as failure:
                    rule = self.rules[self._owner[number]].name
                    raise Invalid(f"rule {rule}", f"RE2 refuses the pattern: {failure}", self._sources[number]) from None
            group.Compile()
            sets.append((start, group))
        return sets

    def with_patterns(self, patterns: Sequence[Pattern]) -> "BounceRules":
        """The same rules behind patterns of the operator. Raises Invalid where one of those is refused."""
        made = copy.copy(self)
        made.patterns = BouncePatterns(patterns, frozenset(CATEGORIES)) if patterns else None
        made.classify = functools.lru_cache(maxsize=_CACHED)(made._by_patterns if patterns else made._by_rules)
        return made

    @classmethod
    def from_toml(cls, text: str) -> "BounceRules":
        """Read a rules file. Raises Invalid on an unknown key or a wrong value."""
        try:
            read = msgspec.convert(tomllib.loads(text), _RulesFile)
        except (msgspec.ValidationError, tomllib.TOMLDecodeError) as failure:
            raise Invalid("bounce rules", str(failure)) from None
        return cls(read.rule, read.words)

    def _by_patterns(self, code: int, text: str) -> BounceClass:
        means = self._by_rules(code, text)
        if self.patterns is None or (number := self.patterns.first(code, text)) is None:
            return means
        return _as_operator_says(self.patterns.patterns[number], self.patterns.verdicts[number], means, readable(code, text)[1])

    def _by_rules(self, code: int, text: str) -> BounceClass:
        subject, permanent = readable(code, text)
        for start, group in self._sets:
            if matches := group.Match(subject):
                means: BounceClass = self._classes[permanent][start + min(matches)]
                return means
        return _OTHER

    def explain(self, code: int, text: str) -> Explained:
        """Why `classify` answers what it does."""
        means = self.classify(code, text)
        number = None if self.patterns is None else self.patterns.first(code, text)
        subject, _ = readable(code, text)
        matches = sorted(start + match for start, group in self._sets for match in group.Match(subject) or ())
        names = [self.rules[self._owner[match]].name for match in matches]
        return Explained(
            category=means.category,
            fault=means.fault,
            hard=means.hard,
            transient=means.transient,
            status=stated_status(code, text),
            bounce_pattern=None if self.patterns is None or number is None else str(self.patterns.patterns[number]),
            rule=names[0] if names else "",
            pattern=self._sources[matches[0]] if matches else None,
            seen_as=subject.decode("utf-8", "replace").strip(),
            also=[name for name in dict.fromkeys(names) if name not in (names[0], "other")],
        )


def _class_of(rule: Rule, permanent: bool) -> BounceClass:
    fault = rule.fault or CATEGORIES[rule.category]
    hard = permanent and not rule.transient and fault == "recipient" and rule.category in HARD_CATEGORIES
    return BounceClass(rule.category, fault, hard, rule.transient, rule.name)


def _as_operator_says(pattern: Pattern, verdict: Verdict, means: BounceClass, permanent: bool) -> BounceClass:
    """An operator's Hard is about the recipient, whoever the rules would blame; where he names no category, theirs stays."""
    category = verdict.category or means.category
    fault = CATEGORIES[category] if verdict.category else means.fault
    hard = verdict.hard if verdict.hard is not None else permanent and category in HARD_CATEGORIES
    return BounceClass(category, "recipient" if hard else fault, hard, means.transient and not hard, f"{_PATTERN}{pattern}")


def _patterns(rule: Rule, words: Mapping[str, str]) -> list[str]:
    """Every form of a rule as one expression over `readable`'s output."""
    patterns = []
    for pattern in rule.patterns:
        for word, meaning in words.items():
            pattern = pattern.replace("{" + word + "}", f"(?:{meaning})")
        patterns.append(pattern)
    for status in rule.status:
        subject, detail = (r"\d+" if part == "*" else part for part in status.split(".")[1:])
        patterns.append(rf"^\S+ [45]\.{subject}\.{detail} ")
    patterns += [rf"^{code} " for code in rule.code]
    return patterns


def readable(code: int, text: str) -> tuple[bytes, bool]:
    """Bring a reply into the form patterns are written for, and tell whether it is permanent.

    `CODE STATUS | words`: lower case, punctuation to single spaces, apostrophes gone, every address an `@`; `0` and `-` where there is
    no code or status. The status is the first in the text that agrees with the code, wherever it stands ("(#5.1.1)").
    Text without a code and status (what our own machine says) is permanent unless its rule says `transient`.
    """
    text = text[:MAX_TEXT_BYTES].lower()
    status = None
    if not code and (head := _HEAD(text)) is not None:
        digits, status = head.groups()
        code = int(digits)
        if status is not None and status[0] != digits[0]:
            status = None
    klass = code // 100
    if status is None:
        status = "-"
        if "." in text:
            for found in _STATUS(text):
                at = found.start() - 1
                if not klass or int(text[at]) == klass:
                    status, klass = text[at : found.end()], int(text[at])
                    break
    if "@" in text:
        text = _ADDRESS.sub("@", text)
    if "in reply to" in text:
        text = _AFTER_COMMAND.sub(" ", text)
    raw = text.encode() if text.isascii() else text.replace("\u2019", "").encode("utf-8", "replace")
    words = raw.translate(_TO_SPACE, b"'").split()
    return b"%d %b | %b " % (code, status.encode(), b" ".join(words)), klass == 5 or klass == 0


def stated_status(code: int, text: str) -> str | None:
    """The enhanced status a reply states, as `classify` sees it, or None: never invented."""
    status = readable(code, text)[0].split(b" ", 2)[1].decode()
    return None if status == "-" else status


@functools.cache
def shipped_rules() -> BounceRules:
    """The rules of `config/bounce_rules.toml`, read once."""
    return BounceRules.from_toml(importlib.resources.files("config").joinpath("bounce_rules.toml").read_text("utf-8"))


def classify(code: int, text: str) -> BounceClass:
    """Name the reason of a refusal by the shipped rules.

    `code` is the reply code, 0 where there was no reply; `text` the rest of the reply or, without one, what our own machine says about it.
    Only the first 512 characters count. Never raises on any text.
    """
    return shipped_rules().classify(code, text)
