"""`sluice inbound`: the process for what the world sends back, and one message through a pipe."""

import base64
import os
import sys
from typing import TYPE_CHECKING, Final

from control.cli_base import EPILOG, Stores, become, click, facts, json_option, say, show, table, with_stores, write_json
from control.cli_forwarding import forwarding_group

if TYPE_CHECKING:
    from store.feedback import CampaignFeedback, DomainRates
    from store.received import ReceivedMessage
    from store.unsubscribe_copies import CopiesReport

TEMPORARY_FAILURE: Final = 75  # EX_TEMPFAIL of sysexits.h: every MTA keeps the message and tries again


@click.group("inbound", invoke_without_command=True, epilog=EPILOG)
@click.pass_context
def inbound_group(context: click.Context) -> None:
    """Run the inbound process in the foreground, or use one of the commands below.

    It serves one-click unsubscribe over HTTP, takes returned mail by SMTP, and empties mailboxes.
    """
    if context.invoked_subcommand is None:
        become("inbound")


@inbound_group.command("pipe")
@click.option("--sender", metavar="ADDRESS",
              help="Envelope sender, empty for bounces. Default: $SENDER, else the Return-Path field.")  # fmt: skip
@click.option("--recipient", "recipients", multiple=True, metavar="ADDRESS",
              help="Envelope recipient; repeatable. Default: $ORIGINAL_RECIPIENT or $RECIPIENT, else Delivered-To or To.")  # fmt: skip
def pipe(sender: str | None, recipients: tuple[str, ...]) -> None:
    """Take one message on standard input, as if it had come by SMTP.

    For an MTA that has our MX: in Postfix, `bounces: "|/usr/bin/sluice inbound pipe"` in aliases. Exit codes are those MTAs know
    (sysexits.h): 0 = stored; 65 = the message is refused (empty, too large, a loop); 67 = no such address here; 75 = not now, try again.
    """
    from domain.errors import SluiceError

    recipients = recipients or tuple(filter(None, [os.environ.get("ORIGINAL_RECIPIENT") or os.environ.get("RECIPIENT")]))
    sender = os.environ.get("SENDER") if sender is None else sender
    arguments = [] if sender is None else [f"--sender={sender}"]
    try:
        become("inbound.pipe", *arguments, *(f"--recipient={each}" for each in recipients))
    except SluiceError as failure:  # settings that are refused must not cost the message
        say(f"sluice: {failure}")
        sys.exit(TEMPORARY_FAILURE)


_KINDS: Final = ("dsn", "arf", "unsubscribe", "autoreply", "challenge", "reply", "other", "unreadable")
_OUTCOMES: Final = ("acted", "recorded", "repeated", "unproven", "kept", "unreadable")
_COLUMNS: Final = (">id", "received", "from", "to", "kind", "outcome", ">bytes", "reason")


@inbound_group.command("list", epilog=EPILOG)
@click.option("--kind", type=click.Choice(_KINDS), help="Only what was read as this.")
@click.option("--outcome", type=click.Choice(_OUTCOMES), help="Only what this was done with.")
@click.option("--before", type=click.IntRange(1), metavar="ID", help="Only what came before this one.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many at most.")
@json_option
def list_received(kind: str | None, outcome: str | None, before: int | None, limit: int, as_json: bool) -> None:
    """Show what was received lately, how it was read and what was done.

    Outcomes: acted (an address was marked, unsubscribed or suppressed), recorded (an event that changes no address), repeated (known
    already), unproven (a report about nobody we can be sure of), kept (for people; automatic answers), unreadable (kept raw).
    """

    async def work(stores: Stores) -> "list[ReceivedMessage]":
        from store import received
        from store.postgres import connection

        async with connection(stores.pool) as conn:
            return await received.page(conn, None, before=before, limit=limit, kind=kind, outcome=outcome)

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        table("", _COLUMNS, [
            (each.id, each.received_at, each.mail_from or "<>", each.recipient, each.kind or "waiting", each.outcome, each.bytes,
             each.reason)
            for each in found
        ])  # fmt: skip


@inbound_group.command("show", epilog=EPILOG)
@click.argument("message_id", type=click.IntRange(1), metavar="ID")
@click.option("--raw", "as_raw", is_flag=True, help="Write the message as it came, octet for octet.")
@json_option
def show_received(message_id: int, as_raw: bool, as_json: bool) -> None:
    """Show one received message: what came, how it was read, what was done and why.

    ID is what `sluice inbound list` shows, and the number in our answer `250 2.0.0 Stored as ID`. With --raw it can be read again by hand:
    `sluice inbound show 7 --raw > 7.eml`, then `echo 7.eml | sluice classify --eml`.
    """

    async def work(stores: Stores) -> "tuple[ReceivedMessage, bytes]":
        from store import received
        from store.postgres import connection

        async with connection(stores.pool) as conn:
            raw = await received.raw(conn, None, message_id) if as_raw else b""
            return await received.get(conn, None, message_id), raw

    found, raw = with_stores(work)
    if as_raw:
        sys.stdout.buffer.write(raw)
    elif as_json:
        write_json(found)
    else:
        facts((name.replace("_", " "), getattr(found, name)) for name in found.__struct_fields__ if name != "reading")
        for name, value in (found.reading or {}).items():
            _say_reading(name, value)


_RATE_COLUMNS: Final = ("domain", ">delivered", ">refused", ">bounced later", ">complaints", ">bounce rate", ">complaint rate")


@inbound_group.command("rates", epilog=EPILOG)
@click.option("--campaign", "campaign_id", type=click.IntRange(1), metavar="ID", help="One campaign's, by recipient domain.")
@click.option("--days", type=click.IntRange(1, 366), default=30, show_default=True, help="Of campaigns started in so many days.")
@json_option
def rates(campaign_id: int | None, days: int, as_json: bool) -> None:
    """Show how much bounces and is complained of: by sender domain, or one campaign's by recipient domain.

    Gmail and Yahoo ask for complaint rates below 0.1 % and act above 0.3 %.
    """

    async def work(stores: Stores) -> "CampaignFeedback | list[DomainRates]":
        from store import campaigns, feedback
        from store.postgres import connection

        async with connection(stores.pool) as conn:
            if campaign_id is None:
                return await feedback.of_sender_domains(conn, None, days)
            await campaigns.get(conn, None, campaign_id)
            return await feedback.of_campaign(conn, campaign_id)

    found = with_stores(work)
    if as_json:
        write_json(found)
        return
    if not isinstance(found, list):
        facts((name.replace("_", " "), getattr(found, name)) for name in found.__struct_fields__ if name not in ("domains", *_RATES))
        facts((name.replace("_", " "), _percent(getattr(found, name))) for name in _RATES)
    table("", _RATE_COLUMNS, [
        (each.domain, each.delivered, each.bounced, each.remote_bounces, each.complaints, _percent(each.bounce_rate),
         _percent(each.complaint_rate))
        for each in (found if isinstance(found, list) else found.domains)
    ])  # fmt: skip


@inbound_group.command("copies", epilog=EPILOG)
@click.option("--retry", is_flag=True, help="Send those that were given up once more.")
@click.option("--secret", is_flag=True, help="Print the secret that signs the requests, for the receiver, and nothing else.")
@json_option
def copies(retry: bool, secret: bool, as_json: bool) -> None:
    """Show how many copies of unsubscribes wait for the URL in mail.list_unsubscribe_to.

    Each is a JSON POST signed as the Standard Webhooks specification says, tried again for three days until it is answered 2xx, and given
    up then. Given up ones are kept for 30 days.
    """

    async def work(stores: Stores) -> "tuple[str, int, CopiesReport]":
        from store import unsubscribe_copies
        from store.postgres import transaction

        key = "whsec_" + base64.b64encode(stores.services.keyring.derive("unsubscribe-copy")).decode()
        async with transaction(stores.services.pool) as conn:
            again = await unsubscribe_copies.retry(conn) if retry else 0
            return key, again, await unsubscribe_copies.report(conn)

    key, again, found = with_stores(work)
    if secret:
        click.echo(key)
    elif as_json:
        write_json(found)
    else:
        facts((name.replace("_", " "), getattr(found, name)) for name in found.__struct_fields__)
    if retry:
        say(f"{again} are sent once more")


_RATES: Final = ("bounce_rate", "complaint_rate")


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.2f} %"


def _say_reading(name: str, value: object) -> None:
    """What was read: one line a value, one a recipient."""
    if isinstance(value, dict):
        facts((f"{name}: {key}", each) for key, each in value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for each in value:
            means = each.get("means", {})
            side = "hard" if means.get("hard") else "soft"
            why = f"{means.get('category', '')}, {side}, rule {means.get('rule', '')}"
            said = f"{each.get('status', '')} {each.get('diagnostic', '')} ({why})"
            facts([(f"{name}: {show(each.get('recipient', ''))}", said)])
    else:
        facts([(name.replace("_", " "), value)])


inbound_group.add_command(forwarding_group)
COMMANDS: Final = (inbound_group,)
