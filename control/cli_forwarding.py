"""`sluice inbound forwarding`: who gets the mail that people send to our domains."""

from typing import TYPE_CHECKING, Any

from control.cli_base import EPILOG, Stores, click, convert, facts, json_option, table, with_stores, write_json
from control.cli_servers import find_server

if TYPE_CHECKING:
    from control.forwarding import ForwardingTarget
    from store.forwarding import Forwarding, ForwardShown


@click.group("forwarding", epilog=EPILOG)
def forwarding_group() -> None:
    """Who gets the mail that people send to our domains.

    Alias rules are `pattern:target`, one per line, `*` stands for anything, the first that matches wins:

    \b
    reply@news.example.com:support@example.com
    *@news.example.com:office@example.com
    *:catchall@example.com

    Mail to abuse@, postmaster@ and root@ comes first and has its own targets. Bounces, other automatic mail and mail that was forwarded
    here before are kept and not sent on.
    """


@forwarding_group.command("show", epilog=EPILOG)
@json_option
def forwarding_show(as_json: bool) -> None:
    """Show the rules."""
    _show(with_stores(_get), as_json)


@forwarding_group.command("set", epilog=EPILOG)
@click.option("--aliases", "aliases", type=click.File("r", encoding="utf-8"), metavar="FILE",
              help="File with alias rules, - for standard input. They replace those there are; an empty one removes them.")  # fmt: skip
@click.option("--to", "forward_to", metavar="ADDRESS", help='Who gets abuse@, postmaster@ and root@; "" for nobody.')
@click.option("--abuse-to", metavar="ADDRESS", help='Who gets complaints instead; "" for who gets the rest.')
@click.option("--server", "server_name", metavar="NAME", help='The delivery server that sends it on; "" for the first that is enabled.')
@json_option
def forwarding_set(aliases: Any, forward_to: str | None, abuse_to: str | None, server_name: str | None, as_json: bool) -> None:
    """Change the rules; what is not named stays. In force within two seconds."""

    async def work(stores: Stores) -> "Forwarding":
        from control import forwarding as api

        now = await _get(stores)
        server = now.delivery_server_id
        if server_name is not None:
            server = (await find_server(stores, server_name)).id if server_name else None
        fields = {
            "aliases": now.aliases if aliases is None else aliases.read(),
            "forward_to": now.forward_to if forward_to is None else forward_to,
            "abuse_to": now.abuse_to if abuse_to is None else abuse_to,
            "delivery_server_id": server,
        }
        return await _call(stores, api.ForwardingController.put, data=convert(fields, api.ForwardingUpdate))  # type: ignore[no-any-return]

    _show(with_stores(work), as_json)


@forwarding_group.command("test", epilog=EPILOG)
@click.argument("recipient", metavar="ADDRESS")
@json_option
def forwarding_test(recipient: str, as_json: bool) -> None:
    """Show who would get mail to ADDRESS."""

    async def work(stores: Stores) -> "ForwardingTarget":
        from control import forwarding as api

        data = convert({"recipient": recipient}, api.ForwardingRecipient)
        return await _call(stores, api.ForwardingController.test, data=data)  # type: ignore[no-any-return]

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        facts([("target", found.target or "nobody"), ("by", found.by)])


@forwarding_group.command("queue", epilog=EPILOG)
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many, newest first.")
@json_option
def forwarding_queue(limit: int, as_json: bool) -> None:
    """Show what waits, what was sent on, and what was given up."""

    async def work(stores: Stores) -> "list[ForwardShown]":
        from store import forwarding, postgres

        async with postgres.connection(stores.pool) as conn:
            return await forwarding.page(conn, None, limit)

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        table("", (">id", ">received", "rule", "to", ">message", "state", ">tries", "since", "reply"),
              ((f.id, f.inbound_id, f.rule, f.target, f.message_id or "", f.state, f.attempts, f.created_at, f.reply)
               for f in found))  # fmt: skip


async def _get(stores: Stores) -> "Forwarding":
    from store import forwarding, postgres

    async with postgres.connection(stores.pool) as conn:
        return await forwarding.get(conn)


async def _call(stores: Stores, handler: Any, **arguments: Any) -> Any:
    """Like `call`, for a handler that acts for the whole installation and asks for no caller."""
    return await handler.fn(None, services=stores.services, **arguments)


def _show(rules: "Forwarding", as_json: bool) -> None:
    if as_json:
        write_json(rules)
        return
    server = "the first that is enabled" if rules.delivery_server_id is None else rules.delivery_server_id
    facts([("forward to", rules.forward_to or "nobody"), ("abuse to", rules.abuse_to or "as the others"), ("delivery server", server)])
    click.echo(rules.aliases.strip() or "no alias rules")
