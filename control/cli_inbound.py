"""`sluice inbound`: the process for what the world sends back, and one message through a pipe."""

import os
import sys
from typing import Final

from control.cli_base import EPILOG, become, click, say

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


COMMANDS: Final = (inbound_group,)
