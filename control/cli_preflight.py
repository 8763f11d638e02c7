"""`sluice preflight`: what mailbox providers would object to, before the campaign starts."""

from typing import TYPE_CHECKING, Final

from control.cli_base import EPILOG, Stores, call, click, fail, json_option, number, say, with_stores, write_json

if TYPE_CHECKING:
    from control.preflight import PreflightReport


@click.command("preflight", epilog=EPILOG)
@number("campaign_id", "CAMPAIGN")
@click.option("--no-dns", is_flag=True, help="Look at composed samples only and ask no name server.")
@json_option
def preflight(campaign_id: int, no_dns: bool, as_json: bool) -> None:
    """Say what Gmail, Yahoo and Microsoft would object to in a campaign.

    Composes samples for recipients all over the list, holds them against the rules for bulk senders, and asks the DNS about the domains
    of From, return path, DKIM keys and links. Nothing is sent. Exit code 1 when something blocking was found.
    """

    async def work(stores: Stores) -> "PreflightReport":
        from control import preflight as api

        if no_dns:
            return await api.report(stores.services, campaign_id, dns=False)
        found: PreflightReport = await call(stores, api.PreflightController.run, campaign_id=campaign_id)
        return found

    found = with_stores(work)
    if as_json:
        write_json(found)
    for finding in [] if as_json else found.findings:
        click.echo(f"{finding.severity:<8}  {finding.what}")
        click.echo(f"          {finding.advice}")
        for answer in finding.answers:
            click.echo(f"          {answer.provider}: {' '.join(filter(None, (answer.code, answer.effect)))}")
    blocking = sum(finding.severity == "blocking" for finding in found.findings)
    if not found.ready:
        fail(f"campaign {campaign_id} is not ready: {blocking} of {len(found.findings)} findings are blocking")
    if not as_json:
        say(f"campaign {campaign_id} is ready ({found.samples} samples looked at)")


COMMANDS: Final = (preflight,)
