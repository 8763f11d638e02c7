"""`sluice message`: send mail to named recipients at once, and see what became of it."""

import mimetypes
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from control.cli_base import EPILOG, Stores, call, click, convert, facts, json_option, number, say, table, with_stores, write_json
from control.cli_lists import find_list
from control.cli_servers import find_server

if TYPE_CHECKING:
    from control.messages import MessageShown
    from store.messages import Message, RecipientState

_MESSAGE = number("message_id", "MESSAGE")
_BLOCK_BYTES: Final = 256 * 1024


@click.group("message", epilog=EPILOG)
def message_group() -> None:
    """Direct messages: receipts, passwords, alerts. MESSAGE is the number that `send` and `list` show."""


@message_group.command("send", epilog=EPILOG)
@click.option("--server", "server_name", required=True, metavar="NAME", help="The way out: a delivery server by name or id.")
@click.option("--subject", required=True, help="Subject, Liquid allowed.")
@click.option("--to", "addresses", multiple=True, metavar="ADDRESS", help="A recipient; may be repeated.")
@click.option("--data", "data", multiple=True, metavar="NAME=VALUE", help="Merge data of all --to recipients; may be repeated.")
@click.option(
    "--recipients",
    "recipients_file",
    type=click.File("rb"),
    metavar="FILE",
    help='NDJSON, any number: {"email": ..., "data": {...}, "headers": {...}, "metadata": {...}} a line; - is standard input.',
)
@click.option("--html", "html_file", type=click.File("r", encoding="utf-8"), help="File with the HTML part (UTF-8, Liquid).")
@click.option("--text", "text_file", type=click.File("r", encoding="utf-8"), help="File with the text part. Default: made of the HTML.")
@click.option(
    "--attach",
    "files",
    type=click.Path(exists=True, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="A file for every recipient; may be repeated. One that the HTML shows as cid:NAME stands in the message, by its name.",
)
@click.option("--preheader", default="", help="What mailboxes show beside the subject, Liquid allowed.")
@click.option("--mjml", "mjml_file", type=click.File("r", encoding="utf-8"), help="File with MJML, of which the HTML part is made.")
@click.option("--amp", "amp_file", type=click.File("r", encoding="utf-8"), help="File with an AMP part (Liquid).")
@click.option("--inline-css", is_flag=True, help="Turn style sheets of the HTML into style attributes.")
@click.option("--from-email", default="", help="Address of the sender.")
@click.option("--from-name", default="", help="Display name of the sender.")
@click.option("--reply-to", default="", help="Where answers go.")
@click.option("--class", "mail_class", type=click.Choice(["transactional", "autoresponder", "marketing"]), default="transactional",
              show_default=True, help="transactional goes before everything else and needs no list.")  # fmt: skip
@click.option("--list", "list_name", metavar="NAME", help="The list that mail of another class belongs to.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header field of your own; may be repeated.")
@click.option("--name", default="", help="For you; recipients never see it.")
@json_option
def message_send(
    server_name: str, addresses: tuple[str, ...], data: tuple[str, ...], recipients_file: Any, html_file: Any, text_file: Any,
    mjml_file: Any, amp_file: Any, files: tuple[str, ...], list_name: str | None, headers: tuple[str, ...], as_json: bool, **fields: Any,
) -> None:  # fmt: skip
    """Send now. Checked as a whole first: nothing is sent if anything is wrong, and each mistake is named by its place."""
    if not html_file and not text_file and not mjml_file:
        raise click.UsageError("name --html (or --mjml), --text or both")
    if bool(addresses) == bool(recipients_file):
        raise click.UsageError("name recipients either by --to or by --recipients")
    fields |= {"html": html_file.read() if html_file else "", "text": text_file.read() if text_file else None}
    fields |= {"mjml": mjml_file.read() if mjml_file else "", "amp": amp_file.read() if amp_file else ""}
    fields["attachments"] = [_attachment(each, fields["html"] + fields["mjml"]) for each in files]
    fields["headers"] = _pairs("--header", headers)
    merge = _pairs("--data", data)

    async def work(stores: Stores) -> "MessageShown":
        from control import messages as api
        from store import messages

        fields["delivery_server_id"] = (await find_server(stores, server_name)).id
        if list_name:
            fields["list_id"] = (await find_list(stores, list_name)).id
        if addresses:
            recipients = [{"email": address, "data": merge} for address in addresses]
            answer = await call(stores, api.MessageController.send, data=convert({**fields, "recipients": recipients}, api.MessageCreate))
            made: MessageShown = answer.content
            return made
        taker = api.Taker(stores.services, stores.user_id, convert(fields, api.MessageContent))
        taken: messages.Message = await taker.take_stream(api.lines_of(_blocks(recipients_file)))
        await stores.services.announce("campaigns")
        return api.shown(taken, {"queued": taken.recipients})

    made = with_stores(work)
    if as_json:
        write_json(made)
    else:
        click.echo(f"message {made.id} taken for {made.recipients:,} recipient{'' if made.recipients == 1 else 's'}")
        say(f"`sluice message show {made.id}` tells what became of it")


def _attachment(path: str, html: str) -> dict[str, Any]:
    file = Path(path)
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    content_id = file.name if f"cid:{file.name}" in html else ""
    return {"filename": file.name, "content_type": kind, "content": file.read_bytes(), "content_id": content_id}


async def _blocks(file: Any) -> AsyncIterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise click.UsageError(f"{option} {text!r}: write NAME=VALUE")
    return {name.strip(): value for name, _, value in (text.partition("=") for text in texts)}


@message_group.command("show", epilog=EPILOG)
@_MESSAGE
@click.option("--recipients", "how_many", type=click.IntRange(0, 1000), default=20, show_default=True, help="How many of them to show.")
@json_option
def message_show(message_id: int, how_many: int, as_json: bool) -> None:
    """Show a message, how many of its recipients are in which state, and the first of them."""

    async def work(stores: Stores) -> "tuple[MessageShown, list[RecipientState]]":
        from control import messages as api
        from store import messages, postgres

        async with postgres.connection(stores.pool) as conn:
            found = await messages.get(conn, None, message_id)
            people = await messages.recipients(conn, found, 0, how_many) if how_many else []
            return api.shown(found, await messages.outcomes(conn, found)), people

    found, people = with_stores(work)
    if as_json:
        write_json({"message": found, "recipients": people})
        return
    facts((name, getattr(found, name)) for name in ("id", "name", "mail_class", "recipients", "created_at"))
    facts(sorted(found.outcomes.items()))
    table("recipients", (">number", "address", "state", ">tries", "said"),
          ((each.number, each.email, each.state, each.attempts, each.diagnostic) for each in people))  # fmt: skip


@message_group.command("list", epilog=EPILOG)
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@json_option
def message_list(limit: int, as_json: bool) -> None:
    """Show messages, the newest first."""

    async def work(stores: Stores) -> "list[Message]":
        from store import messages, postgres

        async with postgres.connection(stores.pool) as conn:
            return await messages.list_messages(conn, None, None, limit)

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        table("messages", (">id", "name", "class", ">recipients", "taken"),
              ((each.id, each.name, each.mail_class, each.recipients, each.created_at) for each in found))  # fmt: skip


COMMANDS: Final = (message_group,)
