"""`sluice s2s`: the address a tracker reports conversions to, and what campaigns brought."""

from typing import TYPE_CHECKING, Any, Final

from control.cli_base import EPILOG, Stores, call, click, convert, facts, json_option, number, table, with_stores, write_json

if TYPE_CHECKING:
    from control.conversions import S2sShown
    from store.conversions import ConversionReport


@click.group("s2s", epilog=EPILOG)
def s2s_group() -> None:
    """Conversions by server-to-server postback: trackers send back the click id that followed links brought along."""


@s2s_group.command("show", epilog=EPILOG)
@json_option
def s2s_show(as_json: bool) -> None:
    """Show the postback address for the tracker (Binom, Voluum, ...)."""

    async def work(stores: Stores) -> "S2sShown":
        from control import conversions as api

        return await call(stores, api.S2sController.show)  # type: ignore[no-any-return]

    _show(with_stores(work), as_json)


@s2s_group.command("set", epilog=EPILOG)
@click.option("--parameter", default="click_id", show_default=True, help="What links and postbacks call the click id.")
@click.option("--value-parameter", default="value", show_default=True, help="What postbacks call the value.")
@click.option("--unit", default="", help='Unit of values where a postback names none: "$", "users".')
@click.option("--channel", default="", help="Channel where a postback names none.")
@json_option
def s2s_set(as_json: bool, **fields: Any) -> None:
    """Say how the tracker speaks."""

    async def work(stores: Stores) -> "S2sShown":
        from control import conversions as api

        return await call(stores, api.S2sController.change, data=convert(fields, api.S2sUpdate))  # type: ignore[no-any-return]

    _show(with_stores(work), as_json)


@s2s_group.command("report", epilog=EPILOG)
@number("campaign_id", "CAMPAIGN")
@json_option
def s2s_report(campaign_id: int, as_json: bool) -> None:
    """Show what a campaign brought, per channel and unit."""

    async def work(stores: Stores) -> "ConversionReport":
        from control import conversions as api

        return await call(stores, api.ConversionController.report, campaign_id=campaign_id)  # type: ignore[no-any-return]

    found = with_stores(work)
    if as_json:
        write_json(found)
        return
    table("conversions", ("channel", "unit", ">conversions", ">recipients", ">value"),
          ((each.channel, each.unit, each.conversions, each.converters, each.value) for each in found.channels))  # fmt: skip


def _show(shown: "S2sShown", as_json: bool) -> None:
    if as_json:
        write_json(shown)
    else:
        facts((name, getattr(shown, name)) for name in shown.__struct_fields__)


COMMANDS: Final = (s2s_group,)
