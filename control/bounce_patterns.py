"""Bounce patterns: what the operator says about refusals, before the shipped rules; and trying both out. For the whole installation."""

import msgspec
from litestar import Controller, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from control.guards import requires_admin
from control.parameters import Id, one_line
from control.services import Services
from domain.bounce import CATEGORIES, Explained
from domain.bounce_patterns import Pattern, checked, read_line
from domain.errors import Invalid
from store import bounce_patterns
from store.bounce_patterns import BouncePattern, Imported
from store.postgres import connection, transaction

MAX_REPLY_CHARACTERS = 10_000
WORDS = frozenset(CATEGORIES)


class BouncePatternCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pattern: text that a reply contains, or `/RE2 expression/`; `verdict` is Hard, Soft, a category, or category|Hard.

    `position` counts from 1, the first that matches wins; without it the pattern goes to the end.
    """

    pattern: str
    verdict: str
    note: str = ""
    position: int | None = None


class BouncePatternMove(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where it goes; those between close up."""

    position: int


class BouncePatternFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lines of `pattern==>verdict`; blank ones and those that begin with `#` are passed over. `replace`: they are all there is then."""

    lines: list[str]
    replace: bool = False


class ReplyToExplain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A reply such as `550 5.1.1 unknown`; `line`: try it with this pattern in front, which is not kept."""

    reply: str
    line: str = ""


class BouncePatternController(Controller):
    """What the operator says about refusals."""

    path = "/bounce-patterns"
    tags = ("bounces",)
    guards = (requires_admin,)

    @post("/", operation_id="addBouncePattern", summary="Add a bounce pattern")
    async def add(self, data: JSONBody[BouncePatternCreate], services: NamedDependency[Services]) -> BouncePattern:
        """In force in all engines within a second, for replies and for reports. 409 where there is one with this text already."""
        wanted = checked(data.pattern.strip(), data.verdict, WORDS)
        note = one_line("note", data.note, maximum=500)
        if data.position is not None and data.position < 1:
            raise Invalid("position", "counts from 1")
        async with transaction(services.pool) as conn:
            made = await bounce_patterns.add(conn, wanted, note, data.position)
        await services.announce("bounce_patterns")
        return made

    @get("/", operation_id="listBouncePatterns", summary="List bounce patterns")
    async def page(self, services: NamedDependency[Services]) -> list[BouncePattern]:
        """All of them, in the order they are tried."""
        async with connection(services.pool) as conn:
            return await bounce_patterns.list_patterns(conn)

    @patch("/{pattern_id:int}", operation_id="moveBouncePattern", summary="Move a bounce pattern")
    async def move(self, pattern_id: Id, data: JSONBody[BouncePatternMove], services: NamedDependency[Services]) -> BouncePattern:
        """To another position."""
        if data.position < 1:
            raise Invalid("position", "counts from 1")
        async with transaction(services.pool) as conn:
            moved = await bounce_patterns.move(conn, pattern_id, min(data.position, 2**31 - 1))
        await services.announce("bounce_patterns")
        return moved

    @delete("/{pattern_id:int}", operation_id="removeBouncePattern", summary="Remove a bounce pattern")
    async def remove(self, pattern_id: Id, services: NamedDependency[Services]) -> None:
        """What was decided by it stays decided."""
        async with transaction(services.pool) as conn:
            await bounce_patterns.remove(conn, pattern_id)
        await services.announce("bounce_patterns")

    @post("/import", operation_id="importBouncePatterns", summary="Take over a file of bounce patterns", status_code=200)
    async def take(self, data: JSONBody[BouncePatternFile], services: NamedDependency[Services]) -> Imported:
        """All or none: a line that cannot be used is named. Known ones get the verdict of the file; twice is once."""
        wanted = read_lines(data.lines)
        async with transaction(services.pool) as conn:
            done = await bounce_patterns.take(conn, wanted, replace=data.replace)
        await services.announce("bounce_patterns")
        return done

    @post("/test", operation_id="testBouncePattern", summary="How is this reply understood?", status_code=200)
    async def test(self, data: JSONBody[ReplyToExplain], services: NamedDependency[Services]) -> Explained:
        """Nothing is recorded: it only tells which pattern or rule decides, and what it says."""
        if not 1 <= len(data.reply) <= MAX_REPLY_CHARACTERS:
            raise Invalid("reply", f"must have 1 to {MAX_REPLY_CHARACTERS} characters")
        rules = await bounce_patterns.rules(services.pool)
        if data.line:
            kept = rules.patterns.patterns if rules.patterns is not None else ()
            rules = rules.with_patterns([read_line(data.line, WORDS), *kept])
        return rules.explain(0, data.reply)


def read_lines(lines: list[str]) -> list[Pattern]:
    """The patterns of a file. Raises Invalid naming the line."""
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            found.append(read_line(line, WORDS))
        except Invalid as error:
            raise Invalid(f"line {number}", f"{error.field} {error.reason}") from None
    return found
