"""`sluice bounces` and `bounce-pattern`: results that others report, and what the operator says about refusals."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from control.cli_base import EPILOG, Stores, click, convert, json_option, number, table, with_stores, write_json
from control.cli_classify import show_explained
from control.cli_lists import blocks_of, find_list
from control.cli_suppress import SCOPE_LIST, show_report

if TYPE_CHECKING:
    from store.bounce_patterns import BouncePattern
    from store.results import ResultsReport


@click.group("bounces", epilog=EPILOG)
def bounces_group() -> None:
    """Bounces and complaints that other systems report."""


@bounces_group.command("import", epilog=EPILOG)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@SCOPE_LIST
@json_option
def bounces_import(file: str, list_name: str | None, as_json: bool) -> None:
    """Import results: PowerMTA's accounting files (b, rb and f records), or CSV `address,type,when,text`.

    type is hard, soft, complaint, unsubscribe or suppress. A hard bounce and a complaint suppress the address and mark or unsubscribe the
    subscriber on all lists; an unsubscribe is for --list, without it for all lists. Replies in PowerMTA's files are read by the same rules
    as our own. Rows that cannot be used are refused one by one; the same file again changes nothing more. `-` is standard input.
    """

    async def work(stores: Stores) -> "ResultsReport":
        from domain.result_rows import ResultReader
        from store import bounce_patterns, results

        list_id = (await find_list(stores, list_name)).id if list_name else None
        reader = ResultReader((await bounce_patterns.rules(stores.pool)).classify)
        report = await results.run(stores.pool, stores.user_id, list_id, blocks_of(None if file == "-" else Path(file)), reader)
        await stores.services.announce("suppressions")
        return report

    show_report(with_stores(work), as_json)


# --- bounce patterns ----------------------------------------------------------------------------------------------------
@click.group("bounce-pattern", epilog=EPILOG)
def pattern_group() -> None:
    """What you say about refusals, before the shipped rules: `550 5.7.1 Unfortunately, messages from==>Hard`.

    Left of the arrow a text that the reply contains, in any case, or /an RE2 expression/; right of it Hard, Soft, one of PowerMTA's
    categories, or both: bad-mailbox|Soft. The first that matches wins. In force in all engines within a second.
    """


@pattern_group.command("add", epilog=EPILOG)
@click.argument("line", metavar="'TEXT==>Hard'")
@click.option("--position", type=click.IntRange(1), help="From 1; default: the end.")
@click.option("--note", default="", help="Why; kept with the pattern.")
@json_option
def pattern_add(line: str, position: int | None, note: str, as_json: bool) -> None:
    """Add a pattern. Quote it."""

    async def work(stores: Stores) -> Any:
        from control import bounce_patterns as api
        from domain.bounce_patterns import read_line

        wanted = read_line(line, api.WORDS)
        fields = {"pattern": wanted.pattern, "verdict": wanted.verdict, "note": note, "position": position}
        return await _pattern(stores, api.BouncePatternController.add, data=convert(fields, api.BouncePatternCreate))

    made = with_stores(work)
    write_json(made) if as_json else click.echo(f"bounce pattern {made.id} at position {made.position}")


async def _pattern(stores: Stores, handler: Any, **arguments: Any) -> Any:
    """One of the API's handlers for bounce patterns, which do not ask who calls: that is their guard's work."""
    return await handler.fn(None, services=stores.services, **arguments)


@pattern_group.command("list", epilog=EPILOG)
@click.option("--lines", is_flag=True, help="As lines that `bounce-pattern import` takes.")
@json_option
def pattern_list(lines: bool, as_json: bool) -> None:
    """Show the patterns in the order they are tried."""

    async def work(stores: Stores) -> "list[BouncePattern]":
        from store import bounce_patterns, postgres

        async with postgres.connection(stores.pool) as conn:
            return await bounce_patterns.list_patterns(conn)

    found = with_stores(work)
    if as_json:
        write_json(found)
    elif lines:
        for each in found:
            click.echo(f"{each.pattern}==>{each.verdict}")
    else:
        names = ("position", "id", "pattern", "verdict", "note")
        table("bounce patterns", (">position", ">id", *names[2:]), ([getattr(each, name) for name in names] for each in found))


@pattern_group.command("move", epilog=EPILOG)
@number("pattern_id", "ID")
@click.argument("position", type=click.IntRange(1))
def pattern_move(pattern_id: int, position: int) -> None:
    """Put a pattern at another position."""

    async def work(stores: Stores) -> Any:
        from control import bounce_patterns as api

        data = api.BouncePatternMove(position=position)
        return await _pattern(stores, api.BouncePatternController.move, pattern_id=pattern_id, data=data)

    moved = with_stores(work)
    click.echo(f"bounce pattern {pattern_id} at position {moved.position}")


@pattern_group.command("remove", epilog=EPILOG)
@number("pattern_id", "ID")
def pattern_remove(pattern_id: int) -> None:
    """Remove a pattern; what it has decided stays decided."""

    async def work(stores: Stores) -> Any:
        from control import bounce_patterns as api

        return await _pattern(stores, api.BouncePatternController.remove, pattern_id=pattern_id)

    with_stores(work)
    click.echo(f"bounce pattern {pattern_id} removed")


@pattern_group.command("import", epilog=EPILOG)
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--replace", is_flag=True, help="They are all there is then, in their order. Default: new ones go to the end.")
@json_option
def pattern_import(file: "TextIO", replace: bool, as_json: bool) -> None:
    """Take over a file of lines `TEXT==>Hard`, all or none; blank lines and those that begin with # are passed over."""
    lines = file.read().splitlines()

    async def work(stores: Stores) -> Any:
        from control import bounce_patterns as api

        return await _pattern(stores, api.BouncePatternController.take, data=api.BouncePatternFile(lines=lines, replace=replace))

    done = with_stores(work)
    if as_json:
        write_json(done)
    else:
        counts = ", ".join(f"{getattr(done, name):,} {name}" for name in ("added", "changed", "removed", "unchanged"))
        click.echo(counts)


@pattern_group.command("test", epilog=EPILOG)
@click.argument("reply")
@click.option("--with", "line", default="", metavar="'TEXT==>Hard'", help="Try it with this pattern in front, which is not kept.")
@json_option
def pattern_test(reply: str, line: str, as_json: bool) -> None:
    """Tell how a reply is understood, and by which pattern or rule."""

    async def work(stores: Stores) -> Any:
        from control import bounce_patterns as api

        return await _pattern(stores, api.BouncePatternController.test, data=api.ReplyToExplain(reply=reply, line=line))

    show_explained(with_stores(work), as_json)


COMMANDS: Final = (bounces_group, pattern_group)
