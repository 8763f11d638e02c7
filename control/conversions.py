"""Conversions: how a user's tracker reports them (S2S postback), and what a campaign brought."""

import re

import msgspec
from litestar import Controller, get, put
from litestar.di import NamedDependency
from litestar.params import JSONBody

from control.guards import Caller
from control.parameters import Id, one_line
from control.services import Services
from domain import links
from domain.errors import Invalid
from store import campaigns, conversions
from store.conversions import ConversionReport, S2sSettings
from store.postgres import connection, transaction

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}").fullmatch
_TAKEN = ("unit", "channel", "transaction_id")


class S2sUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the tracker calls the click id and the value; `unit` ("$", "users") and `channel` stand where a postback names none."""

    parameter: str = "click_id"
    value_parameter: str = "value"
    unit: str = ""
    channel: str = ""


class S2sShown(msgspec.Struct, frozen=True, kw_only=True):
    """The same, and the address to give to the tracker, with its own placeholders put in for those in braces."""

    parameter: str
    value_parameter: str
    unit: str
    channel: str
    postback_url: str


class S2sController(Controller):
    """One user's tracker."""

    path = "/s2s"
    tags = ("conversions",)

    @get("/", operation_id="getS2s", summary="How conversions are reported")
    async def show(self, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> S2sShown:
        """`postback_url` holds a token of yours; whoever has it and a click id can report a conversion."""
        async with connection(services.pool) as conn:
            return _shown(services, caller.user_id, await conversions.settings_of(conn, caller.user_id))

    @put("/", operation_id="setS2s", summary="Set how conversions are reported")
    async def change(self, data: JSONBody[S2sUpdate], caller: NamedDependency[Caller], services: NamedDependency[Services]) -> S2sShown:
        """Clicks from a minute later on carry the new name; links that were followed before keep the old one."""
        for field in ("parameter", "value_parameter"):
            value = getattr(data, field)
            if not _NAME(value) or value in _TAKEN:
                reason = "must be up to 40 letters, digits, _ and -, beginning with a letter, and none of unit, channel, transaction_id"
                raise Invalid(field, reason, value)
        if data.parameter == data.value_parameter:
            raise Invalid("value_parameter", "must not be the name of the click id", data.value_parameter)
        one_line("unit", data.unit, maximum=100)
        one_line("channel", data.channel, maximum=100)
        settings = S2sSettings(**{name: getattr(data, name) for name in data.__struct_fields__})
        async with transaction(services.pool) as conn:
            await conversions.set_settings(conn, caller.user_id, settings)
        return _shown(services, caller.user_id, settings)


class ConversionController(Controller):
    """What a campaign brought."""

    path = "/campaigns/{campaign_id:int}/conversions"
    tags = ("conversions",)

    @get("/", operation_id="getConversions", summary="Conversions of a campaign")
    async def report(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> ConversionReport:
        """Per channel and unit."""
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
            return await conversions.report(conn, campaign_id)


def _shown(services: Services, user_id: int, settings: S2sSettings) -> S2sShown:
    token = links.token(services.keyring.derive("s2s"), links.LinkParts(user_id, 0, 0))
    base = services.settings.inbound.public_url.rstrip("/") + links.PATHS["postback"] + token
    query = f"{settings.parameter}={{click_id}}&{settings.value_parameter}={{value}}&transaction_id={{transaction_id}}"
    return S2sShown(**msgspec.structs.asdict(settings), postback_url=f"{base}?{query}")
