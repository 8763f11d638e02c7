"""What operators say about refusals: `550 5.7.1 Unfortunately, messages from==>Hard`. Tried before the rules of `domain.bounce`. Pure.

    text==>Hard                   a reply that contains the text, whatever its case; runs of blanks count as one
    text==>Soft
    text==>quota-issues           one of PowerMTA's categories instead: hard or soft follows from it
    text==>bad-mailbox|Soft       both
    /regular expression/==>Hard   RE2, whatever the case ((?-i) to tell cases apart)

The first that matches, in their order, wins. What is matched is the reply as it was received, code first, in one line of up to 512
characters. All of them are one RE2 set: a reply is read once, in time linear in its length, whatever is in the patterns.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import re2  # type: ignore[import-untyped]

from domain.errors import Invalid
from domain.reply import MAX_TEXT_BYTES

MAX_PATTERN_OCTETS: Final = 8192  # S8
MAX_PATTERNS: Final = 2000
MAX_ALL_OCTETS: Final = 256 * 1024
MAX_ALL_STEPS: Final = 20_000  # of RE2's programs of all expressions: the worst reply then costs some 50 ms, not seconds
ARROW: Final = "==>"

_MEMORY: Final = 4 << 20  # of one pattern's program and automaton: what is larger is refused
_SET_MEMORY: Final = 64 << 20  # upper limit of the automaton's cache, not an allocation
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SIDES: Final = {"hard": True, "soft": False}


class Verdict(msgspec.Struct, frozen=True):
    """What a pattern says of a reply: a category or "", and whether the address is unusable for good (None: the category says)."""

    category: str
    hard: bool | None

    def __str__(self) -> str:
        side = "" if self.hard is None else "Hard" if self.hard else "Soft"
        return "|".join(filter(None, (self.category, side)))


class Pattern(msgspec.Struct, frozen=True):
    """One pattern as it is kept; `id` 0: not kept anywhere."""

    pattern: str
    verdict: str
    id: int = 0

    def __str__(self) -> str:
        return f"{self.pattern}{ARROW}{self.verdict}"


def read_line(line: str, categories: frozenset[str]) -> Pattern:
    """Read `pattern==>verdict` and check both. Raises Invalid(field, reason) with field pattern or verdict."""
    pattern, arrow, verdict = line.strip().rpartition(ARROW)
    if not arrow:
        raise Invalid("pattern", f"has no {ARROW}; write text{ARROW}Hard, text{ARROW}Soft or /regular expression/{ARROW}Hard", line[:200])
    return checked(pattern.strip(), verdict, categories)


def checked(pattern: str, verdict: str, categories: frozenset[str]) -> Pattern:
    """The two in the form they are kept in. Raises Invalid(field, reason)."""
    expression(pattern)
    return Pattern(pattern, str(read_verdict(verdict, categories)))


def read_verdict(text: str, categories: frozenset[str]) -> Verdict:
    """Read `Hard`, `Soft`, a category, or both. Raises Invalid: a word that is not known is never taken for anything."""
    category, hard = "", None
    for word in (part.strip().lower() for part in text.split("|")):
        if word in _SIDES and hard is None:
            hard = _SIDES[word]
        elif word in categories and not category:
            category = word
        else:
            raise Invalid("verdict", f"must be Hard, Soft, a category ({', '.join(sorted(categories))}), or category|Hard", text[:100])
    return Verdict(category, hard)


def expression(pattern: str) -> tuple[str, int]:
    """The RE2 expression of a pattern, and the size of its program (0 for a text). Raises Invalid("pattern", reason)."""
    if len(pattern.encode("utf-8", "surrogatepass")) > MAX_PATTERN_OCTETS:
        raise Invalid("pattern", f"is longer than {MAX_PATTERN_OCTETS} octets")
    if _CONTROL.search(pattern):
        raise Invalid("pattern", "contains a control character; it is one line of text", pattern)
    try:
        pattern.encode("utf-8")
    except UnicodeEncodeError:
        raise Invalid("pattern", "is not UTF-8") from None
    if len(pattern) > 2 and pattern[0] == pattern[-1] == "/":
        source = pattern[1:-1]
        try:
            compiled = re2.compile(source, _options(_MEMORY))
        except re2.error as failure:
            raise Invalid("pattern", f"RE2 refuses the expression: {_reason(failure)}", pattern) from None
        if compiled.search(b"") is not None:
            raise Invalid("pattern", "matches every reply, an empty one too; say what must be there", pattern)
        return source, int(compiled.programsize)
    text = " ".join(pattern.split())
    if len(text) < 3:
        raise Invalid("pattern", "is shorter than 3 characters, so it would match nearly everything", pattern)
    return str(re2.escape(text)), 0


class BouncePatterns:
    """Patterns in their order, compiled."""

    def __init__(self, patterns: Sequence[Pattern], categories: frozenset[str]) -> None:
        """Compile. Raises Invalid for one that `checked` would refuse, or when they are too many."""
        self.patterns = tuple(patterns)
        self.verdicts = tuple(read_verdict(each.verdict, categories) for each in patterns)
        if len(patterns) > MAX_PATTERNS or sum(len(each.pattern) for each in patterns) > MAX_ALL_OCTETS:
            raise Invalid("pattern", f"there are more than {MAX_PATTERNS} of them or more than {MAX_ALL_OCTETS // 1024} KiB; remove some")
        expressions = [expression(each.pattern) for each in patterns]
        if sum(size for _, size in expressions) > MAX_ALL_STEPS:
            raise Invalid("pattern", "the expressions together are too costly; use smaller counts ({n}), texts instead, or fewer")
        self._sources = [source for source, _ in expressions]
        self._set = re2.Set.SearchSet(_options(_SET_MEMORY))
        for source in self._sources:
            self._set.Add(source)
        self._set.Add("")  # always matches: a set that answers nothing at all has run out of memory, and not found nothing
        self._set.Compile()
        self._alone: list[Any] = []

    def first(self, code: int, text: str) -> int | None:
        """The number of the first pattern that matches the reply, or None."""
        reply = f"{code} {text[:MAX_TEXT_BYTES]}" if code else text[:MAX_TEXT_BYTES]
        if "  " in reply or not reply.isprintable():
            reply = " ".join(reply.split())
        matches = self._set.Match(reply if reply.isascii() else reply.encode("utf-8", "replace"))
        if not matches:
            return self._one_by_one(reply.encode("utf-8", "replace"))
        number: int = min(matches)
        return number if number < len(self.patterns) else None

    def _one_by_one(self, subject: bytes) -> int | None:
        if not self._alone:
            self._alone = [re2.compile(source, _options(_MEMORY)) for source in self._sources]
        return next((number for number, alone in enumerate(self._alone) if alone.search(subject) is not None), None)


def _options(memory: int) -> Any:
    options = re2.Options()
    options.case_sensitive = False
    options.max_mem = memory
    options.log_errors = False
    return options


def _reason(failure: Exception) -> str:
    said = failure.args[0] if failure.args else failure
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
