"""Forwarding of received mail: alias rules, who gets abuse@, postmaster@ and root@, and what waits (requirements 36-38, 66, 94)."""

from datetime import datetime
from typing import Literal

import msgspec
from litestar import Controller, get, post, put
from litestar.di import NamedDependency
from litestar.params import JSONBody

from control.guards import requires_admin
from control.parameters import MAX_ID, Before, Limit, Page, one_line
from control.services import Services
from domain import address
from domain.errors import Invalid, NotFound
from domain.forwarding import parse_aliases
from store import egress, forwarding
from store.forwarding import Forwarding, ForwardShown
from store.postgres import PooledConnection, connection, transaction

MAX_ALIASES_CHARACTERS = 500_000


class ForwardingUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rules; what is left out is emptied.

    `aliases` has one `pattern:target` a line, `*` stands for anything, the first that matches wins; a last line `*:you@example.com` catches
    the rest. Complaints (abuse@ and the addresses of the settings' `mail` section) go to `abuse_to`, which nobody who writes ever learns.
    """

    aliases: str = ""
    forward_to: str = ""
    abuse_to: str = ""
    delivery_server_id: int | None = None


class ForwardingRecipient(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An address in one of our domains."""

    recipient: str


class ForwardingTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Who gets mail to it; nobody where `target` is empty. `by`: an address of duty, or the alias rule that matched."""

    target: str
    by: Literal["duty", "alias", "nothing"]
    updated_at: datetime | None


class ForwardingController(Controller):
    """One set of rules for the whole installation."""

    path = "/forwarding"
    tags = ("inbound",)
    guards = (requires_admin,)

    @get("/", operation_id="getForwarding", summary="Show the forwarding rules")
    async def show(self, services: NamedDependency[Services]) -> Forwarding:
        """As they stand."""
        async with connection(services.pool) as conn:
            return await forwarding.get(conn)

    @put("/", operation_id="putForwarding", summary="Replace the forwarding rules")
    async def put(self, data: JSONBody[ForwardingUpdate], services: NamedDependency[Services]) -> Forwarding:
        """For mail that comes from two seconds later on. A rule that cannot be read is refused with its line, and nothing changes."""
        async with transaction(services.pool) as conn:
            return await forwarding.put(conn, await checked(conn, data))

    @post("/test", operation_id="testForwarding", summary="Who would get mail to this address?", status_code=200)
    async def test(self, data: JSONBody[ForwardingRecipient], services: NamedDependency[Services]) -> ForwardingTarget:
        """By the rules as they stand. Mail to return paths is never forwarded, automatic mail only to addresses of duty."""
        recipient = address.parse(one_line("recipient", data.recipient, minimum=3, maximum=254), "recipient").wire
        async with connection(services.pool) as conn:
            rules = await forwarding.get(conn)
        mail = services.settings.mail
        complaints = frozenset(each.rpartition("@")[0].lower() for each in (mail.complaints_to, mail.cfbl_address) if each)
        target, duty = rules.routes(complaints).target(recipient)
        by: Literal["duty", "alias", "nothing"] = "nothing" if not target else "duty" if duty else "alias"
        return ForwardingTarget(target=target, by=by, updated_at=rules.updated_at)

    @get("/queue", operation_id="listForwards", summary="List forwarded mail")
    async def queue(self, services: NamedDependency[Services], before: Before = None, limit: Limit = 100) -> Page[ForwardShown]:
        """Newest first: the message that each became, where it stands, and the last word about it (`failed`: it was not queued)."""
        async with connection(services.pool) as conn:
            found = await forwarding.page(conn, before, limit)
        return Page(found, found[-1].id if len(found) == limit else None)


async def checked(conn: PooledConnection, data: ForwardingUpdate) -> Forwarding:
    """Rules that may be stored. Raises Invalid, NotFound."""
    if len(data.aliases) > MAX_ALIASES_CHARACTERS or "\0" in data.aliases:
        raise Invalid("aliases", f"must have at most {MAX_ALIASES_CHARACTERS} characters and no NUL")
    parse_aliases(data.aliases)
    forward_to = address.parse(data.forward_to, "forward_to").wire if data.forward_to else ""
    abuse_to = address.parse(data.abuse_to, "abuse_to").wire if data.abuse_to else ""
    if data.delivery_server_id is not None:
        if not 1 <= data.delivery_server_id <= MAX_ID:
            raise NotFound("delivery server", data.delivery_server_id)
        await egress.get(conn, None, data.delivery_server_id)
    return Forwarding(aliases=data.aliases, forward_to=forward_to, abuse_to=abuse_to, delivery_server_id=data.delivery_server_id)
