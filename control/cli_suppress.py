"""`sluice suppress`: who must not be mailed."""

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TextIO

from control.cli_base import EPILOG, Stores, click, json_option, table, with_stores, write_json
from control.cli_lists import blocks_of, find_list

if TYPE_CHECKING:
    from store.results import ResultsReport
    from store.suppressions import Suppressed

_SHOWN_REFUSALS: Final = 20
_LIST_PAGE: Final = 1000


@click.group("suppress", epilog=EPILOG)
def suppress_group() -> None:
    """Addresses, domains and local parts that must not be mailed.

    anna@example.com is one address; example.com every address at that domain; *@*.example.com those at its subdomains; info@* the local
    part info at any domain. Quote the stars. Anything else is refused, so nothing is kept that would suppress nobody.
    """


SCOPE_LIST = click.option("--list", "list_name", metavar="NAME", help="For one list only. Default: for all lists.")
_SYSTEM = click.option("--system", "system", is_flag=True, help="For all users of this installation.")


@suppress_group.command("add", epilog=EPILOG)
@click.argument("addresses", nargs=-1, metavar="ADDRESS…")
@click.option(
    "--file", "file", type=click.File("r", encoding="utf-8"), help="One address a line (`-` = standard input), besides the arguments."
)
@_SYSTEM
@SCOPE_LIST
@click.option("--note", default="", help="Why; kept with the suppression.")
@json_option
def suppress_add(addresses: tuple[str, ...], file: "TextIO | None", system: bool, list_name: str | None, note: str,
                 as_json: bool) -> None:  # fmt: skip
    """Suppress addresses or patterns. Engines know within a second, also for what is queued already."""
    given = list(addresses) + ([line.strip() for line in file if line.strip()] if file is not None else [])
    if not given:
        raise click.UsageError("name at least one address, or --file")
    _one_scope(system, list_name)

    async def work(stores: Stores) -> int:
        from domain import suppression_key
        from store import postgres, suppressions

        keys = sorted({suppression_key.parse(text, "address") for text in given})
        list_id = (await find_list(stores, list_name)).id if list_name else None
        async with postgres.transaction(stores.pool) as conn:
            added = await suppressions.add(conn, None if system else stores.user_id, list_id, keys, "manual", note)
        await stores.services.announce("suppressions")
        return added

    added = with_stores(work)
    if as_json:
        write_json({"given": len(given), "added": added})
    else:
        click.echo(f"{added:,} suppressed" + (f", {len(given) - added:,} were already" if len(given) > added else ""))


def _one_scope(system: bool, list_name: str | None) -> None:
    if system and list_name:
        raise click.UsageError("--system and --list exclude each other")


@suppress_group.command("remove", epilog=EPILOG)
@click.argument("address")
@SCOPE_LIST
def suppress_remove(address: str, list_name: str | None) -> None:
    """End every suppression of an address by us or by its recipient, or of a pattern; --list ends that list's only.

    Patterns that cover an address stay: remove them as they were written.
    """

    async def work(stores: Stores) -> int:
        from domain import suppression_key
        from domain.errors import NotFound
        from store import postgres, suppressions

        key = suppression_key.parse(address, "address")
        list_id = (await find_list(stores, list_name)).id if list_name else None
        async with postgres.transaction(stores.pool) as conn:
            found = await suppressions.of_key(conn, stores.user_id, key)
            ended = [entry for entry in found if list_id is None or entry.list_id == list_id]
            if not ended:
                raise NotFound("suppression of", address)
            for entry in ended:
                await suppressions.remove(conn, None, entry.id)
        await stores.services.announce("suppressions")
        return len(ended)

    click.echo(f"{with_stores(work)} removed; the address may be mailed again")


@suppress_group.command("check", epilog=EPILOG)
@click.argument("address")
@SCOPE_LIST
@json_option
def suppress_check(address: str, list_name: str | None, as_json: bool) -> None:
    """Tell whether an address is suppressed, by what and why."""

    async def work(stores: Stores) -> "list[Suppressed]":
        from domain import address as addresses
        from store import postgres, suppressions

        list_id = (await find_list(stores, list_name)).id if list_name else None
        async with postgres.connection(stores.pool) as conn:
            return await suppressions.check(conn, stores.user_id, list_id, addresses.key(address, "address"))

    found = with_stores(work)
    if as_json:
        write_json({"suppressed": bool(found), "suppressions": found})
    elif found:
        _show("suppressed", found)
    else:
        click.echo("not suppressed")


def _show(title: str, found: "list[Suppressed]") -> None:
    table(title, ("address", "scope", "source", "note", "since"),
          ((entry.email, entry.scope, entry.source, entry.note, entry.created_at) for entry in found))  # fmt: skip


@suppress_group.command("list", epilog=EPILOG)
@SCOPE_LIST
@click.option("--reason", type=click.Choice(["manual", "import", "unsubscribed", "bounced", "complained"]), help="Only those.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=_LIST_PAGE, show_default=True, help="So many at most; oldest first.")
@json_option
def suppress_list(list_name: str | None, reason: str | None, limit: int, as_json: bool) -> None:
    """Show what is suppressed, everybody's and the system's; `sluice suppress export` writes all of it."""

    async def work(stores: Stores) -> "tuple[list[Suppressed], dict[str, int]]":
        from store import postgres, suppressions

        list_id = (await find_list(stores, list_name)).id if list_name else None
        async with postgres.connection(stores.pool) as conn:
            shown = await suppressions.list_suppressions(conn, None, list_id, 0, limit, reason)  # type: ignore[arg-type]
            return shown, await suppressions.counts(conn, None)

    found, counts = with_stores(work)
    if as_json:
        write_json({"counts": counts, "suppressions": found})
        return
    _show("suppressions", found)
    table("all of them", ("reason", ">addresses"), counts.items())


@suppress_group.command("import", epilog=EPILOG)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@_SYSTEM
@SCOPE_LIST
@json_option
def suppress_import(file: str, system: bool, list_name: str | None, as_json: bool) -> None:
    """Suppress what a CSV file names; `-` is standard input.

    A column `address` (or `email`) is needed; `text` and `when` are kept. Patterns are taken as in `suppress add`. Rows that cannot be
    used are refused one by one; the same file again changes nothing.
    """
    _one_scope(system, list_name)

    async def work(stores: Stores) -> "ResultsReport":
        from domain.result_rows import ResultReader
        from store import bounce_patterns, results

        list_id = (await find_list(stores, list_name)).id if list_name else None
        reader = ResultReader((await bounce_patterns.rules(stores.pool)).classify, "suppress")
        blocks = blocks_of(None if file == "-" else Path(file))
        report = await results.run(stores.pool, None if system else stores.user_id, list_id, blocks, reader)
        await stores.services.announce("suppressions")
        return report

    show_report(with_stores(work), as_json)


def show_report(report: "ResultsReport", as_json: bool) -> None:
    """What a file of results said and changed."""
    from msgspec.structs import asdict

    if as_json:
        write_json(report)
        return
    table("", ("", ">count"), ((name.replace("_", " "), count) for name, count in asdict(report).items() if isinstance(count, int)))
    if report.refusals:
        click.echo()
        table("refused", (">row", "field", "reason"), ((r.row, r.field, r.reason) for r in report.refusals[:_SHOWN_REFUSALS]))
    if report.refused > _SHOWN_REFUSALS:
        click.echo(f"… {report.refused - _SHOWN_REFUSALS:,} more; --json shows the first 1,000", err=True)


@suppress_group.command("export", epilog=EPILOG)
@click.option("--out", type=click.File("wb"), default="-", metavar="FILE", help="Default: standard output.")
@SCOPE_LIST
def suppress_export(out: "BinaryIO", list_name: str | None) -> None:
    """Write all suppressions as CSV. Cells that a spreadsheet would run begin with an apostrophe; the import takes it off again."""

    async def work(stores: Stores) -> None:
        from control.suppressions import export_rows

        list_id = (await find_list(stores, list_name)).id if list_name else None
        async for block in export_rows(stores.pool, None, list_id, None):
            out.write(block)
        out.flush()

    with_stores(work)


COMMANDS: Final = (suppress_group,)
