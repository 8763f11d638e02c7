"""`sluice import`, `list` and `key`: recipients, and who may use the API."""

import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from control.cli_base import (
    EPILOG,
    Stores,
    call,
    click,
    convert,
    facts,
    find_by_name,
    json_option,
    number,
    say,
    table,
    with_stores,
    write_json,
)

if TYPE_CHECKING:
    from domain.import_rows import Format
    from store.imports import ImportReport
    from store.lists import List
    from store.users import ApiKey

_BLOCK_BYTES: Final = 256 * 1024
_SHOWN_REFUSALS: Final = 20


async def find_list(stores: Stores, reference: str) -> "List":
    """A list by name or id. Raises NotFound."""
    from store import lists, postgres

    async with postgres.connection(stores.pool) as conn:
        return await find_by_name("list", reference, lambda after, limit: lists.list_lists(conn, stores.user_id, after, limit))


# --- import -------------------------------------------------------------------------------------------------------------
@click.command("import", epilog=EPILOG)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--list", "list_name", required=True, metavar="NAME", help="List to import into: its name or id.")
@click.option("--create", is_flag=True, help="Create the list if there is none of that name.")
@click.option(
    "--format", "form", type=click.Choice(["csv", "ndjson"]), help="Default: by the ending of the file (.ndjson, .jsonl; else CSV)."
)
@click.option(
    "--refusals", type=click.Path(dir_okay=False, writable=True), help="Write every refused row to this CSV file: row, field, reason."
)
@json_option
def import_command(file: str, list_name: str, create: bool, form: str | None, refusals: str | None, as_json: bool) -> None:
    """Import recipients into a list.

    FILE is CSV or NDJSON, `-` standard input. CSV needs a header line with a column `email`; every other column becomes a field of
    the list. NDJSON: one object a line. Rows that cannot be used are refused one by one, with row number, field and reason; the
    good ones are imported. Row 1 is the first one after the header. Importing the same file again changes nothing.
    """
    if refusals:
        Path(refusals).open("w", encoding="utf-8").close()  # nobody wants to hear after ten million rows that it cannot be written
    try:
        report = with_stores(lambda stores: _import(stores, file, list_name, create, form, refusals))
    except KeyboardInterrupt:
        say("sluice: interrupted; rows that were imported stay, and importing the same file again changes nothing for them")
        raise
    if as_json:
        write_json(report)
        return
    facts([
        ("list", f"{list_name} (id {report.list_id})"),
        ("rows", report.rows),
        ("imported", report.imported),
        ("updated", report.updated),
        ("refused", report.refused),
    ])  # fmt: skip
    if report.refusals:
        click.echo()
        table("", (">row", "field", "reason"), ((r.row, r.field, r.reason) for r in report.refusals[:_SHOWN_REFUSALS]))
    if report.refused > _SHOWN_REFUSALS and not refusals:
        say(f"… {report.refused - _SHOWN_REFUSALS:,} more; --refusals FILE writes them all, --json the first 1,000")


async def _import(stores: Stores, file: str, list_name: str, create: bool, form: str | None, refusals: str | None) -> "ImportReport":
    from domain.errors import Invalid, NotFound

    created = False
    try:
        target = await find_list(stores, list_name)
    except NotFound:
        if not create:
            raise
        target = await _create_list(stores, list_name, "", "", ())
        created = True
    format_name = form or ("ndjson" if Path(file).suffix.lower() in (".ndjson", ".jsonl") else "csv")
    try:
        report = await import_file(stores, target.id, None if file == "-" else Path(file), format_name)
    except Invalid as error:  # the file as a whole: nothing was imported
        if created:
            await _delete_list_if_empty(stores, target.id)
        raise Invalid("standard input" if file == "-" else file, f"{error.field} {error.reason}"
                      if error.field not in ("body", "header") else error.reason) from None  # fmt: skip
    if refusals:
        await _write_refusals(stores, report.id, Path(refusals))
    return report


async def _delete_list_if_empty(stores: Stores, list_id: int) -> None:
    from store import lists, postgres, subscribers

    async with postgres.transaction(stores.pool) as conn:
        if not any((await subscribers.count(conn, list_id)).values()):
            await lists.delete(conn, stores.user_id, list_id)


async def import_file(stores: Stores, list_id: int, path: Path | None, form: str) -> "ImportReport":
    """Import a file (None: standard input) into a list, with progress on standard error at a terminal. The demo uses it as well."""
    from store import imports

    progress = _progress() if sys.stderr.isatty() else None
    kind: Format = "ndjson" if form == "ndjson" else "csv"
    try:
        return await imports.run_import(stores.pool, stores.user_id, list_id, blocks_of(path), kind, progress=progress)
    finally:
        if progress is not None:
            click.echo("\r\x1b[K", nl=False, err=True)


def _progress() -> Callable[[int, int], None]:
    last = 0.0

    def show(rows: int, refused: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 0.2:
            last = time.monotonic()
            click.echo(f"\r\x1b[Kimporting: {rows:,} rows read, {refused:,} refused", nl=False, err=True)

    return show


async def blocks_of(path: Path | None) -> AsyncIterator[bytes]:
    import asyncio

    file = sys.stdin.buffer if path is None else path.open("rb")
    try:
        while block := await asyncio.to_thread(file.read, _BLOCK_BYTES):
            yield block
    finally:
        if path is not None:
            file.close()


async def _write_refusals(stores: Stores, import_id: int, path: Path) -> None:
    import csv

    from store import imports

    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(("row", "field", "reason"))
        after = 0
        while page := await imports.refusals(stores.pool, None, import_id, after, 10_000):
            out.writerows((refusal.row, refusal.field, refusal.reason) for refusal in page)
            after = page[-1].row


# --- lists --------------------------------------------------------------------------------------------------------------
@click.group("list", epilog=EPILOG)
def list_group() -> None:
    """Lists of recipients."""


@list_group.command("create", epilog=EPILOG)
@click.argument("name")
@click.option("--sender-name", default="", help="Name shown beside that address where a campaign names none.")
@click.option("--sender-email", default="", help="Address used as sender where a campaign or delivery server says so.")
@click.option(
    "--field", "fields", multiple=True, metavar="NAME[:KIND]", help="A field of merge data; KIND is text (default), number, date or list."
)
@json_option
def list_create(name: str, sender_name: str, sender_email: str, fields: tuple[str, ...], as_json: bool) -> None:
    """Create a list. Fields need not be named: an import adds those of its header."""
    made = with_stores(lambda stores: _create_list(stores, name, sender_name, sender_email, fields))
    write_json(made) if as_json else click.echo(f"list {made.id} created: {made.name}")


async def _create_list(stores: Stores, name: str, sender_name: str, sender_email: str, fields: tuple[str, ...]) -> "List":
    from control import lists as api

    made: List = await call(
        stores, api.ListController.create, data=api.ListCreate(name=name, sender_name=sender_name, sender_email=sender_email)
    )
    for field in fields:
        field_name, _, kind = field.partition(":")
        data = convert({"name": field_name, "kind": kind or "text"}, api.CustomFieldCreate)
        await call(stores, api.CustomFieldController.create, list_id=made.id, data=data)
    return made


@list_group.command("show", epilog=EPILOG)
@click.argument("name")
@json_option
def list_show(name: str, as_json: bool) -> None:
    """Show a list (name or id): sender, fields, subscribers by state."""

    async def work(stores: Stores) -> dict[str, object]:
        from store import lists, postgres, subscribers

        found = await find_list(stores, name)
        async with postgres.connection(stores.pool) as conn:
            fields = await lists.fields(conn, None, found.id)
            counts = await subscribers.count(conn, found.id)
        return {"id": found.id, "name": found.name, "sender_name": found.sender_name, "sender_email": found.sender_email,
                "created_at": found.created_at, "fields": fields, "subscribers": counts}  # fmt: skip

    shown = with_stores(work)
    if as_json:
        write_json(shown)
        return
    fields, counts = shown.pop("fields"), shown.pop("subscribers")
    facts(shown.items())
    facts([("fields", ", ".join(f"{field.name} ({field.kind})" for field in fields) or "none")])  # type: ignore[attr-defined]
    table("subscribers", ("state", ">count"), counts.items())  # type: ignore[attr-defined]


@list_group.command("list", epilog=EPILOG)
@json_option
def list_list(as_json: bool) -> None:
    """Show all lists."""

    async def work(stores: Stores) -> "list[List]":
        from store import lists, postgres

        async with postgres.connection(stores.pool) as conn:
            return await lists.list_lists(conn, None, 0, 10_000)

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        table(
            "lists", (">id", "name", "sender", "created"), ((entry.id, entry.name, entry.sender_email, entry.created_at) for entry in found)
        )


@list_group.command("delete", epilog=EPILOG)
@click.argument("name")
def list_delete(name: str) -> None:
    """Take a list (name or id) out of use. Refused while a campaign that has not ended needs it."""

    async def work(stores: Stores) -> "List":
        from control import lists as api

        found = await find_list(stores, name)
        await call(stores, api.ListController.remove, list_id=found.id)
        return found

    found = with_stores(work)
    click.echo(f"list {found.id} deleted: {found.name}")


# --- API keys -----------------------------------------------------------------------------------------------------------
@click.group("key", epilog=EPILOG)
def key_group() -> None:
    """Keys for the HTTP API."""


@key_group.command("new", epilog=EPILOG)
@click.argument("name")
@click.option(
    "--scope",
    type=click.Choice(["admin", "user"]),
    default="user",
    show_default=True,
    help="admin: everything; user: own lists and campaigns.",
)
@json_option
def key_new(name: str, scope: str, as_json: bool) -> None:
    """Make a key. It is shown once, here, and cannot be read again."""

    async def work(stores: Stores) -> dict[str, object]:
        from control.parameters import one_line
        from store import postgres, users

        one_line("name", name, minimum=1)
        async with postgres.transaction(stores.pool) as conn:
            made, text = await users.create_key(conn, stores.user_id, name, "admin" if scope == "admin" else "user")
        return {"id": made.id, "name": made.name, "scope": made.scope, "prefix": made.prefix, "key": text}

    made = with_stores(work)
    if as_json:
        write_json(made)
    else:
        say("keep it safe: it is shown only now")
        click.echo(made["key"])


@key_group.command("list", epilog=EPILOG)
@json_option
def key_list(as_json: bool) -> None:
    """Show all keys, without their secrets."""

    async def work(stores: Stores) -> "list[ApiKey]":
        from store import postgres, users

        async with postgres.connection(stores.pool) as conn:
            return await users.list_keys(conn, stores.user_id)

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        table("API keys", (">id", "name", "scope", "prefix", "created", "revoked"),
              ((key.id, key.name, key.scope, key.prefix, key.created_at, key.revoked_at) for key in found))  # fmt: skip


@key_group.command("revoke", epilog=EPILOG)
@number("key_id", "ID")
def key_revoke(key_id: int) -> None:
    """Revoke a key; it stops working everywhere within 5 s."""

    async def work(stores: Stores) -> None:
        from store import postgres, users

        async with postgres.transaction(stores.pool) as conn:
            await users.revoke_key(conn, stores.user_id, key_id)

    with_stores(work)
    click.echo(f"key {key_id} revoked")


COMMANDS: Final = (import_command, list_group, key_group)
