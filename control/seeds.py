"""The seed list: who gets a copy of every campaign, such as the mailboxes of a deliverability test."""

import msgspec
from litestar import Controller, delete, get, post
from litestar.di import NamedDependency
from litestar.exceptions import PermissionDeniedException
from litestar.params import JSONBody

from control.guards import Caller
from control.parameters import Id, Page
from control.services import Services
from domain import address
from store import seeds
from store.postgres import connection, transaction
from store.seeds import Seed


class SeedCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One address; `everybody`: it gets the campaigns of all users, which needs a key of admin scope."""

    email: str
    everybody: bool = False


class SeedController(Controller):
    """The seed addresses of one user, and those of the system."""

    path = "/seeds"
    tags = ("seed list",)

    @post("/", operation_id="addSeed", summary="Add a seed address")
    async def create(self, data: JSONBody[SeedCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Seed:
        """It gets one extra copy of each marketing campaign that starts from now on. Copies count in no figure of the campaign."""
        if data.everybody and caller.scope != "admin":
            raise PermissionDeniedException("a seed address for everybody needs an API key of admin scope")
        async with transaction(services.pool) as conn:
            return await seeds.add(conn, None if data.everybody else caller.user_id, address.parse(data.email))

    @get("/", operation_id="listSeeds", summary="List seed addresses")
    async def page(self, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Page[Seed]:
        """All that get copies of your campaigns; those without a user are the system's."""
        async with connection(services.pool) as conn:
            return Page(await seeds.list_seeds(conn, caller.sees), None)

    @delete("/{seed_id:int}", operation_id="deleteSeed", summary="Remove a seed address")
    async def remove(self, seed_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """Copies under way still arrive."""
        async with transaction(services.pool) as conn:
            await seeds.remove(conn, caller.sees, seed_id)
