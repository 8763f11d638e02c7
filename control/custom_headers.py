"""Custom header fields: added to all mail, to some classes of it, or to what one delivery server sends (requirements 45-47)."""

import msgspec
from litestar import Controller, delete, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from compose.mail_headers import check_custom
from control.guards import Caller
from control.parameters import MAX_ID, After, Id, Limit, Page, one_line
from control.services import Services
from domain.errors import NotFound
from store import custom_headers, egress
from store.custom_headers import CustomHeader, MailClass
from store.postgres import connection, transaction

MAX_VALUE_CHARACTERS = 2000


class CustomHeaderCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A header field. `value` is a template; without `mail_classes` it is for all, without `delivery_server_id` for all servers."""

    name: str
    value: str
    mail_classes: list[MailClass] = []
    delivery_server_id: int | None = None


class CustomHeaderController(Controller):
    """The custom headers of one user."""

    path = "/headers"
    tags = ("custom headers",)

    @post("/", operation_id="createCustomHeader", summary="Add a custom header")
    async def create(
        self, data: JSONBody[CustomHeaderCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> CustomHeader:
        """For campaigns that start from now on. A name that Sluice or relays use is refused; an empty value leaves the header out."""
        value = one_line("value", data.value, minimum=1, maximum=MAX_VALUE_CHARACTERS)
        check_custom(data.name, value)
        async with transaction(services.pool) as conn:
            if data.delivery_server_id is not None:
                if not 1 <= data.delivery_server_id <= MAX_ID:
                    raise NotFound("delivery server", data.delivery_server_id)
                await egress.get(conn, caller.user_id, data.delivery_server_id)
            classes = sorted(set(data.mail_classes))
            return await custom_headers.create(conn, caller.user_id, data.name, value, classes, data.delivery_server_id)

    @get("/", operation_id="listCustomHeaders", summary="List custom headers")
    async def page(
        self, caller: NamedDependency[Caller], services: NamedDependency[Services], after: After = 0, limit: Limit = 100
    ) -> Page[CustomHeader]:
        """By id."""
        async with connection(services.pool) as conn:
            found = await custom_headers.list_headers(conn, caller.sees, after, limit)
        return Page(found, found[-1].id if len(found) == limit else None)

    @delete("/{header_id:int}", operation_id="deleteCustomHeader", summary="Remove a custom header")
    async def remove(self, header_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """Campaigns that were started keep the headers they started with."""
        async with transaction(services.pool) as conn:
            await custom_headers.delete(conn, caller.sees, header_id)
