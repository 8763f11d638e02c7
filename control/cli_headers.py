"""`sluice header`: custom header fields, by mail class and delivery server."""

from typing import TYPE_CHECKING, Final

from control.cli_base import EPILOG, Stores, call, click, convert, facts, json_option, number, table, with_stores, write_json
from control.cli_servers import find_server

if TYPE_CHECKING:
    from store.custom_headers import CustomHeader


@click.group("header", epilog=EPILOG)
def header_group() -> None:
    """Custom headers of outgoing mail. They hold for campaigns that start after the change."""


@header_group.command("add", epilog=EPILOG)
@click.argument("name")
@click.argument("value")
@click.option("--class", "mail_classes", multiple=True, type=click.Choice(["marketing", "autoresponder", "transactional"]),
              help="Only mail of this class; repeatable. Default: all mail.")  # fmt: skip
@click.option("--server", "server_name", metavar="NAME", help="Only what this delivery server sends. Default: all of them.")
@json_option
def header_add(name: str, value: str, mail_classes: tuple[str, ...], server_name: str | None, as_json: bool) -> None:
    """Add header NAME with VALUE, a template: %Campaign:ID%, {{ subscriber.plan }}, complaints@%sender_domain%."""

    async def work(stores: Stores) -> "CustomHeader":
        from control import custom_headers as api

        server = await find_server(stores, server_name) if server_name else None
        fields = {"name": name, "value": value, "mail_classes": list(mail_classes), "delivery_server_id": server and server.id}
        return await call(  # type: ignore[no-any-return]
            stores, api.CustomHeaderController.create, data=convert(fields, api.CustomHeaderCreate)
        )

    made = with_stores(work)
    if as_json:
        write_json(made)
    else:
        facts((field, getattr(made, field)) for field in made.__struct_fields__ if field != "user_id")


@header_group.command("list", epilog=EPILOG)
@json_option
def header_list(as_json: bool) -> None:
    """Show all custom headers."""

    async def work(stores: Stores) -> "list[CustomHeader]":
        from store import custom_headers, postgres

        async with postgres.connection(stores.pool) as conn:
            return await custom_headers.list_headers(conn, None, 0, 10_000)

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        table("headers", (">id", "name", "value", "classes", "server"),
              ((h.id, h.name, h.value, " ".join(h.mail_classes) or "all", h.delivery_server_id or "all") for h in found))  # fmt: skip


@header_group.command("remove", epilog=EPILOG)
@number("header_id", "ID")
def header_remove(header_id: int) -> None:
    """Remove a custom header; campaigns that were started keep it."""

    async def work(stores: Stores) -> None:
        from store import custom_headers, postgres

        async with postgres.transaction(stores.pool) as conn:
            await custom_headers.delete(conn, None, header_id)

    with_stores(work)
    click.echo(f"custom header {header_id} removed")


COMMANDS: Final = (header_group,)
