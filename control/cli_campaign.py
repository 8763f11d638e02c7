"""`sluice campaign`: write, start, steer and look at campaigns."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from control.cli_base import EPILOG, Stores, call, click, convert, facts, json_option, number, say, table, with_stores, write_json
from control.cli_lists import find_list
from control.cli_servers import find_server

if TYPE_CHECKING:
    from store.accounting import Report
    from store.attachments import AttachmentInfo
    from store.campaigns import Campaign, Progress
    from store.tracking import TrackingReport

_POLL_SECONDS: Final = 0.5

_CAMPAIGN = number("campaign_id", "CAMPAIGN")


@click.group("campaign", epilog=EPILOG)
def campaign_group() -> None:
    """Campaigns: one content to one list. CAMPAIGN is the number that `create` and `list` show."""


@campaign_group.command("create", epilog=EPILOG)
@click.option("--name", required=True, help="For you; recipients never see it.")
@click.option("--list", "list_name", required=True, metavar="NAME", help="Who gets it: a list by name or id.")
@click.option("--server", "server_name", required=True, metavar="NAME", help="The way out: a delivery server by name or id.")
@click.option("--subject", required=True, help="Subject, Liquid allowed. A recipient whose value would break the line is refused.")
@click.option("--from-name", default="", help="Display name of the sender.")
@click.option("--from-email", default="", help="Address of the sender. Default: the list's.")
@click.option("--reply-to", default="", help="Where answers go.")
@click.option("--html", "html_file", type=click.Path(exists=True, dir_okay=False), help="File with the HTML part (UTF-8, Liquid).")
@click.option(
    "--text", "text_file", type=click.Path(exists=True, dir_okay=False), help="File with the text part. Default: made of the HTML."
)
@click.option("--mjml", "mjml_file", type=click.Path(exists=True, dir_okay=False), help="File with an MJML document, instead of --html.")
@click.option("--amp", "amp_file", type=click.Path(exists=True, dir_okay=False), help="File with an AMP part, beside --html.")
@click.option("--inline-css", is_flag=True, help="Turn style sheets of the HTML part into style attributes.")
@click.option("--preheader", default="", help="What mail programs preview: hidden text at the start of the HTML part, Liquid allowed.")
@click.option("--class", "mail_class", type=click.Choice(["marketing", "autoresponder", "transactional"]), default="marketing",
              show_default=True, help="Priority class; transactional overtakes the others.")  # fmt: skip
@click.option("--track-links", is_flag=True, help="Lead the links of the HTML part over the link domain and count clicks.")
@click.option("--track-opens", is_flag=True, help="Put a pixel of the open domain at the end of the HTML part.")
@click.option("--track-conversions", is_flag=True, help="Let followed links bring a click id along, for postbacks (sluice s2s show).")
@click.option("--utm-source", default="", help="utm_source for every link that has none.")
@click.option("--utm-medium", default="", help="utm_medium for every link that has none.")
@click.option("--start", "start_now", is_flag=True, help="Start it at once.")
@click.option("--force", is_flag=True, help="With --start: also when pre-flight finds something blocking.")
@json_option
def campaign_create(
    list_name: str,
    server_name: str,
    html_file: str | None,
    text_file: str | None,
    mjml_file: str | None,
    amp_file: str | None,
    start_now: bool,
    force: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Create a campaign as a draft. The content is compiled and checked: an error in a template names line and column."""
    if not (html_file or text_file or mjml_file):
        raise click.UsageError("name --html, --mjml, --text or several of them")
    for file in (html_file, mjml_file, amp_file, None if html_file or mjml_file else text_file):
        if file and not _read(file).strip():
            raise click.UsageError(f"{file} is empty: there is nothing to send")
    content = {"html": _read(html_file), "mjml": _read(mjml_file), "text": _read(text_file) if text_file else None, "amp": _read(amp_file)}

    async def work(stores: Stores) -> "Campaign":
        from control import campaigns as api
        from domain.errors import Conflict, Invalid

        target = await find_list(stores, list_name)
        server = await find_server(stores, server_name)
        data = convert({**fields, **content, "list_id": target.id, "delivery_server_id": server.id}, api.CampaignCreate)
        made: Campaign = await call(stores, api.CampaignController.create, data=data)
        if start_now:
            try:
                made = await call(stores, api.CampaignController.start, campaign_id=made.id, force=force)
            except (Invalid, Conflict):
                say(f"campaign {made.id} is there as a draft, but was not started; `sluice campaign start {made.id}` starts it, "
                    f"`sluice campaign delete {made.id}` deletes it")  # fmt: skip
                raise
        return made

    made = with_stores(work)
    if as_json:
        write_json(_brief(made))
    else:
        click.echo(f"campaign {made.id} created: {made.name} ({made.state})")
        if not start_now:
            say(f"`sluice campaign start {made.id}` sends it")


def _read(file: str | None) -> str:
    from domain.errors import Invalid

    if file is None:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(file, f"is not UTF-8 (octet {error.start}); convert it first") from None


def _brief(campaign: "Campaign") -> dict[str, Any]:
    """A campaign without its bodies."""
    return {name: getattr(campaign, name) for name in campaign.__struct_fields__ if name not in ("html", "text", "amp")}


@campaign_group.command("delete", epilog=EPILOG)
@_CAMPAIGN
def campaign_delete(campaign_id: int) -> None:
    """Delete a draft. A campaign that was started stays, with what became of it; `cancel` ends one that runs."""

    async def work(stores: Stores) -> None:
        from control import campaigns as api

        await call(stores, api.CampaignController.remove, campaign_id=campaign_id)

    with_stores(work)
    click.echo(f"campaign {campaign_id} deleted")


@campaign_group.command("attach", epilog=EPILOG)
@_CAMPAIGN
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--name", default="", help="The name that recipients see. Default: that of FILE.")
@click.option("--type", "content_type", default="", help="Its media type. Default: what the name says.")
@click.option("--inline", "content_id", default="", metavar="ID", help='It stands in the HTML part as <img src="cid:ID">.')
@json_option
def campaign_attach(campaign_id: int, file: str, name: str, content_type: str, content_id: str, as_json: bool) -> None:
    """Attach FILE to a draft; it goes with every message. `detach` takes it off again."""
    import mimetypes

    name = name or Path(file).name
    content_type = content_type or mimetypes.guess_type(name)[0] or "application/octet-stream"

    async def work(stores: Stores) -> "AttachmentInfo":
        from control.attachments import attach
        from domain.campaign import Attachment

        content = Path(file).read_bytes()
        wanted = Attachment(filename=name, content_type=content_type.lower(), content=content, content_id=content_id)
        return await attach(stores.services, None, campaign_id, wanted)

    added = with_stores(work)
    if as_json:
        write_json(added)
    else:
        click.echo(f"attachment {added.id}: {added.filename}, {added.content_type}, {added.size:,} bytes")


@campaign_group.command("detach", epilog=EPILOG)
@_CAMPAIGN
@number("attachment_id", "ATTACHMENT")
def campaign_detach(campaign_id: int, attachment_id: int) -> None:
    """Take an attachment from a draft. `campaign show` names them."""

    async def work(stores: Stores) -> None:
        from store import attachments, postgres

        async with postgres.transaction(stores.pool) as conn:
            await attachments.remove(conn, campaign_id, attachment_id)

    with_stores(work)
    say(f"attachment {attachment_id} is gone")


@campaign_group.command("start", epilog=EPILOG)
@_CAMPAIGN
@click.option("--wait", is_flag=True, help="Wait until every recipient has its end, and show progress.")
@click.option("--force", is_flag=True, help="Start it although pre-flight found something blocking.")
@json_option
def campaign_start(campaign_id: int, wait: bool, force: bool, as_json: bool) -> None:
    """Start a draft. Its list is taken as it stands now; who is added later is not part of it.

    With --wait the command may be interrupted (Ctrl-C): the campaign goes on.
    """

    async def work(stores: Stores) -> "Progress":
        from control import campaigns as api

        await call(stores, api.CampaignController.start, campaign_id=campaign_id, force=force)
        return await (_wait(stores, campaign_id) if wait else _progress(stores, campaign_id))

    try:
        _show_progress(with_stores(work), as_json)
    except KeyboardInterrupt:
        say(f"sluice: interrupted; the campaign goes on (`sluice campaign show {campaign_id}`, `pause`, `cancel`)")
        raise


def _change(name: str, summary: str) -> None:
    """Define one of the commands that move a campaign from state to state."""

    @campaign_group.command(name, epilog=EPILOG, help=summary)
    @_CAMPAIGN
    @json_option
    def change(campaign_id: int, as_json: bool) -> None:
        async def work(stores: Stores) -> "Progress":
            from store import campaigns

            await getattr(campaigns, name)(stores.pool, campaign_id)
            await stores.services.announce("campaigns")
            return await _progress(stores, campaign_id)

        _show_progress(with_stores(work), as_json)


_change("pause", "Pause: engines stop within a second, every recipient waits.")
_change("resume", "Go on where it was paused.")
_change("cancel", "Cancel: every recipient who has no end yet ends as cancelled. Cannot be undone.")


@campaign_group.command("show", epilog=EPILOG)
@_CAMPAIGN
@json_option
def campaign_show(campaign_id: int, as_json: bool) -> None:
    """Show a campaign and where it stands."""

    async def work(stores: Stores) -> "tuple[Campaign, Progress, list[AttachmentInfo]]":
        from store import attachments, campaigns, postgres

        async with postgres.connection(stores.pool) as conn:
            found, progress = await campaigns.get(conn, None, campaign_id), await campaigns.progress(conn, None, campaign_id)
            return found, progress, await attachments.listed(conn, campaign_id)

    found, progress, files = with_stores(work)
    if as_json:
        write_json({**_brief(found), "progress": progress, "attachments": files})
        return
    facts((name, value) for name, value in _brief(found).items() if name not in ("user_id", "version", "recipients"))
    if files:
        table("attachments", (">id", "name", "type", "content id", ">bytes"),
              ((each.id, each.filename, each.content_type, each.content_id, each.size) for each in files))  # fmt: skip
    facts((name, getattr(progress, name)) for name in progress.__struct_fields__
          if getattr(progress, name) is not None and (name not in found.__struct_fields__ or name == "recipients"))  # fmt: skip


@campaign_group.command("list", epilog=EPILOG)
@click.option("--state", type=click.Choice(["draft", "preparing", "running", "paused", "cancelling", "cancelled", "completed"]))
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def campaign_list(state: str | None, limit: int, as_json: bool) -> None:
    """Show campaigns, the newest first."""

    async def work(stores: Stores) -> "list[Campaign]":
        from store import campaigns, postgres

        async with postgres.connection(stores.pool) as conn:
            return await campaigns.list_campaigns(conn, None, None, limit, state)

    found = with_stores(work)
    if as_json:
        write_json([_brief(entry) for entry in found])
    else:
        table("campaigns", (">id", "name", "state", ">recipients", "created", "started", "finished"),
              ((c.id, c.name, c.state, c.recipients, c.created_at, c.started_at, c.finished_at) for c in found))  # fmt: skip


@campaign_group.command("report", epilog=EPILOG)
@_CAMPAIGN
@json_option
def campaign_report(campaign_id: int, as_json: bool) -> None:
    """Show what became of a campaign: outcomes by kind and category, and what servers said most often."""

    async def work(stores: Stores) -> "Report":
        from store import accounting

        return await accounting.report(stores.pool, campaign_id)

    found = with_stores(work)
    if as_json:
        write_json(found)
        return
    totals = found.totals
    facts([*((name, getattr(totals, name)) for name in totals.__struct_fields__), ("queued", totals.queued)])
    table("records", ("kind", "category", "status", ">records"), ((o.kind, o.category, o.status, o.records) for o in found.outcomes))
    table("what servers said", ("kind", "answer", ">records"), ((d.kind, d.diagnostic, d.records) for d in found.diagnostics))


@campaign_group.command("tracking", epilog=EPILOG)
@_CAMPAIGN
@json_option
def campaign_tracking(campaign_id: int, as_json: bool) -> None:
    """Show opens and clicks, people and machines apart, and each followed link."""

    async def work(stores: Stores) -> "TrackingReport":
        from store import campaigns, postgres, tracking

        async with postgres.connection(stores.pool) as conn:
            await campaigns.get(conn, None, campaign_id)
            return await tracking.report(conn, campaign_id)

    found = with_stores(work)
    if as_json:
        write_json(found)
        return
    facts((name, getattr(found, name)) for name in found.__struct_fields__ if name != "links")
    table("links", (">link", ">clicks", ">clickers", ">by machines", "address"),
          ((each.link, each.clicks, each.clickers, each.bot_clicks, each.url or "(merge tags)") for each in found.links))  # fmt: skip


async def _progress(stores: Stores, campaign_id: int) -> "Progress":
    from store import campaigns, postgres

    async with postgres.connection(stores.pool) as conn:
        return await campaigns.progress(conn, None, campaign_id)


async def _wait(stores: Stores, campaign_id: int) -> "Progress":
    """Wait until the campaign has ended, or is paused: then nothing will happen by itself."""
    import asyncio

    from control.demo_view import Progress as View
    from domain import states

    with View() as view:
        while True:
            found = await _progress(stores, campaign_id)
            view.update(found.recipients, found.recipients - found.queued, f"{found.delivered:,} delivered, {found.deferrals:,} deferrals")
            if found.state in (states.COMPLETED, states.CANCELLED, states.PAUSED):
                return found
            await asyncio.sleep(_POLL_SECONDS)


def _show_progress(progress: "Progress", as_json: bool) -> None:
    if as_json:
        write_json(progress)
    else:
        facts((name, getattr(progress, name)) for name in progress.__struct_fields__ if getattr(progress, name) is not None)


COMMANDS: Final = (campaign_group,)
