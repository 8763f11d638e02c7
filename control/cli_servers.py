"""`sluice server`: delivery servers, the configured ways out. Rules and checks are those of the API's own handlers, called in process."""

import sys
from typing import TYPE_CHECKING, Any, Final

from control.cli_base import (
    EPILOG,
    FAILED,
    OK,
    Command,
    Stores,
    call,
    click,
    convert,
    facts,
    find_by_name,
    json_option,
    table,
    with_stores,
    write_json,
)

if TYPE_CHECKING:
    from control.delivery_servers import DeliveryServerShown
    from control.trial import TrialResult
    from domain.egress import DeliveryServer

_SERVER = click.argument("name", metavar="NAME")


async def find_server(stores: Stores, reference: str) -> "DeliveryServer":
    """A delivery server by name or id. Raises NotFound."""
    from store import egress, postgres

    async with postgres.connection(stores.pool) as conn:
        return await find_by_name(
            "delivery server", reference, lambda after, limit: egress.list_servers(conn, stores.user_id, after, limit)
        )


@click.group("server", epilog=EPILOG)
def server_group() -> None:
    """Delivery servers: where mail goes out. NAME is a server's name or id."""


def _options(command: Command) -> Command:
    """What `add` and `update` have in common; what is not given stays as it is (`update`) or takes its default (`add`)."""
    for option in reversed((
        click.option("--port", type=click.IntRange(1, 65535), help="Default 25."),
        click.option("--security", type=click.Choice(["none", "starttls", "tls"]), help="Default none. starttls is required once chosen."),
        click.option("--connect-timeout", "connect_timeout_seconds", type=float, help="Seconds; default 10."),
        click.option("--username", help="User name for AUTH."),
        click.option("--password-file", type=click.File("r", encoding="utf-8"), help="File with the password; - = standard input."),
        click.option("--link-domain", help="Domain of links to us: tracking, unsubscribe."),
        click.option("--open-domain", help="Domain of the open pixel."),
        click.option("--mfrom", help="Domain of the signed return paths, or one address that is used exactly so."),
        click.option("--enforced-from", help="From address of everything sent through it."),
        click.option("--fallback", metavar="NAME", help="Server that takes over while this one is unusable (limit fallback_after_seconds, "
                     "default 300); none = no such server."),
        click.option("--limit", "limits", multiple=True, metavar="KEY=VALUE", help="A limit, repeatable: max_connections=20, "
                     "max_messages_per_second=100, bdat_window=4, eightbitmime=true, retry_schedule_seconds=60,300,900, retry_growth=2 …"),
        click.option("--enabled/--disabled", "enabled", default=None, help="Use it or not; waiting mail waits."),
    )):  # fmt: skip
        command = option(command)
    return command


async def _fields(stores: Stores, password_file: Any, limits: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as the API takes them. Raises Invalid, NotFound."""
    from domain.errors import Invalid

    fields = {name: value for name, value in given.items() if value is not None}
    if (fallback := fields.pop("fallback", None)) is not None:
        fields["fallback_server_id"] = None if fallback in ("", "none") else (await find_server(stores, fallback)).id
    if password_file is not None:
        fields["password"] = password_file.read().rstrip("\r\n")
    if limits:
        wanted: dict[str, Any] = {}
        for entry in limits:
            name, equals, value = entry.partition("=")
            if not equals:
                raise Invalid("--limit", "write KEY=VALUE", entry)
            wanted[name] = [part.strip() for part in value.split(",")] if name == "retry_schedule_seconds" else value
        fields["limits"] = wanted
    return fields


@server_group.command("add", epilog=EPILOG)
@_SERVER
@click.option("--host", required=True, help="Host name or IP address.")
@_options
@json_option
def server_add(name: str, as_json: bool, password_file: Any, limits: tuple[str, ...], **given: Any) -> None:
    """Add a delivery server. `sluice server test NAME` then shows whether it works."""

    async def work(stores: Stores) -> "DeliveryServerShown":
        from control import delivery_servers as api

        data = convert({"name": name, **await _fields(stores, password_file, limits, given)}, api.DeliveryServerCreate)
        return await call(stores, api.DeliveryServerController.create, data=data)  # type: ignore[no-any-return]

    _show(with_stores(work), as_json)


@server_group.command("update", epilog=EPILOG)
@_SERVER
@click.option("--name", "new_name", help="A new name.")
@click.option("--host", help="Host name or IP address.")
@_options
@json_option
def server_update(name: str, new_name: str | None, as_json: bool, password_file: Any, limits: tuple[str, ...], **given: Any) -> None:
    """Change what is given; engines use it within a second. An empty --username switches authentication off."""

    async def work(stores: Stores) -> "DeliveryServerShown":
        from control import delivery_servers as api

        server = await find_server(stores, name)
        fields = await _fields(stores, password_file, limits, {"name": new_name, **given})
        if not fields:
            raise click.UsageError("nothing to change is given; `sluice server update --help` names what can be")
        data = convert(fields, api.DeliveryServerUpdate)
        return await call(stores, api.DeliveryServerController.update, server_id=server.id, data=data)  # type: ignore[no-any-return]

    _show(with_stores(work), as_json)


@server_group.command("list", epilog=EPILOG)
@json_option
def server_list(as_json: bool) -> None:
    """Show all delivery servers."""

    async def work(stores: Stores) -> "list[DeliveryServerShown]":
        from control import delivery_servers as api
        from store import egress, postgres

        async with postgres.connection(stores.pool) as conn:
            return [api.shown(server) for server in await egress.list_servers(conn, None, 0, 10_000)]

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        table("delivery servers", (">id", "name", "host", "security", "user", "return path", "enabled"),
              ((s.id, s.name, f"{s.host}:{s.port}", s.security, s.username, s.mfrom, s.enabled) for s in found))  # fmt: skip


@server_group.command("show", epilog=EPILOG)
@_SERVER
@json_option
def server_show(name: str, as_json: bool) -> None:
    """Show a delivery server and its limits; never its password."""

    async def work(stores: Stores) -> "DeliveryServerShown":
        from control import delivery_servers as api

        return api.shown(await find_server(stores, name))

    _show(with_stores(work), as_json)


@server_group.command("delete", epilog=EPILOG)
@_SERVER
def server_delete(name: str) -> None:
    """Take a delivery server out of use. Refused while a campaign that has not ended needs it."""

    async def work(stores: Stores) -> "DeliveryServer":
        from control import delivery_servers as api

        server = await find_server(stores, name)
        await call(stores, api.DeliveryServerController.remove, server_id=server.id)
        return server

    server = with_stores(work)
    click.echo(f"delivery server {server.id} deleted: {server.name}")


@server_group.command("test", epilog=EPILOG)
@_SERVER
@click.option("--to", required=True, metavar="ADDRESS", help="Who gets the test message.")
@json_option
def server_test(name: str, to: str, as_json: bool) -> None:
    """Really send one message, step by step. Exit code 1 when it fails: the sentence names the stage and what to do."""

    async def work(stores: Stores) -> "TrialResult":
        from control import delivery_servers as api

        server = await find_server(stores, name)
        data = api.DeliveryServerTest(to=to)
        return await call(stores, api.DeliveryServerController.test, server_id=server.id, data=data)  # type: ignore[no-any-return]

    result = with_stores(work)
    if as_json:
        write_json(result)
    else:
        click.echo(f"Email Delivery: {result.email_delivery.upper()} ({result.sentence}; {result.seconds:.1f} s)")
    sys.exit(OK if result.email_delivery == "passed" else FAILED)


def _show(server: "DeliveryServerShown", as_json: bool) -> None:
    if as_json:
        write_json(server)
        return
    facts((name, getattr(server, name)) for name in server.__struct_fields__ if name not in ("limits", "user_id", "version"))
    facts((f"limits.{name}", getattr(server.limits, name)) for name in server.limits.__struct_fields__)


COMMANDS: Final = (server_group,)
