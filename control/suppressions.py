"""Suppressions: addresses that must not be mailed, for one list, all lists of a user, or (admins) the whole system."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from litestar import Controller, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery, JSONBody, QueryParameter

from control.guards import Caller
from control.parameters import MAX_ID, After, Id, Limit, Page, one_line
from control.services import Services
from domain import address
from domain.errors import Invalid
from domain.suppression import Reason, Scope
from store import lists, suppressions
from store.postgres import connection, transaction

MAX_AT_ONCE = 10_000


class SuppressionCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Addresses to suppress. `scope` list needs `list_id`; system needs a key of admin scope."""

    emails: list[str]
    scope: Scope = "user"
    list_id: int | None = None
    reason: Literal["manual", "import", "unsubscribed", "bounced", "complained"] = "manual"
    note: str = ""


class SuppressionsAdded(msgspec.Struct, frozen=True, kw_only=True):
    """How many of them were not suppressed before."""

    added: int
    already_suppressed: int


class SuppressionShown(msgspec.Struct, frozen=True, kw_only=True):
    """One suppression. `email` is in its comparable form: lower case, A-labels."""

    id: int
    scope: Scope
    user_id: int | None
    list_id: int | None
    email: str
    reason: Reason
    note: str
    created_at: datetime


class SuppressionCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Whether and why an address is suppressed."""

    email: str
    suppressed: bool
    by: list[SuppressionShown]


class SuppressionController(Controller):
    """What one user's mail must not reach."""

    path = "/suppressions"
    tags = ("suppressions",)

    @post("/", operation_id="addSuppressions", summary="Suppress addresses")
    async def add(
        self, data: JSONBody[SuppressionCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> SuppressionsAdded:
        """All or none; engines honour them within a second, at most 5. Suppressing twice is fine."""
        if not 1 <= len(data.emails) <= MAX_AT_ONCE:
            raise Invalid("emails", f"must have 1 to {MAX_AT_ONCE} addresses, not {len(data.emails)}")
        if (data.scope == "list") != (data.list_id is not None):
            raise Invalid("list_id", "goes with scope list, and with no other")
        if data.scope == "system" and caller.scope != "admin":
            raise Invalid("scope", "only a key of admin scope suppresses for the whole system")
        note = one_line("note", data.note, maximum=500)
        keys = sorted({address.key(text, f"emails[{i}]") for i, text in enumerate(data.emails)})
        user_id: int | None = None if data.scope == "system" else caller.user_id
        async with transaction(services.pool) as conn:
            if data.list_id is not None:
                if not 1 <= data.list_id <= MAX_ID:
                    raise Invalid("list_id", "is not an id")
                user_id = (await lists.get(conn, caller.sees, data.list_id)).user_id
            added = await suppressions.add(conn, user_id, data.list_id, keys, data.reason, note)
        await services.announce("suppressions")
        return SuppressionsAdded(added=added, already_suppressed=len(keys) - added)

    @get("/", operation_id="listSuppressions", summary="List suppressions")
    async def page(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        list_id: Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)] = None,
        after: After = 0,
        limit: Limit = 100,
    ) -> Page[SuppressionShown]:
        """By id; those of one list where `list_id` is given."""
        async with connection(services.pool) as conn:
            if list_id is not None:
                await lists.get(conn, caller.sees, list_id)
            found = await suppressions.list_suppressions(conn, caller.sees, list_id, after, limit)
        return Page([_shown(each) for each in found], found[-1].id if len(found) == limit else None)

    @get("/check", operation_id="checkSuppression", summary="Is this address suppressed?")
    async def check(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        email: FromQuery[str],
        list_id: Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)] = None,
    ) -> SuppressionCheck:
        """By the system, by the user, by the list where one is given (else by any list of the user)."""
        key = address.key(email)
        async with connection(services.pool) as conn:
            user_id = caller.user_id
            if list_id is not None:
                user_id = (await lists.get(conn, caller.sees, list_id)).user_id
            found = await suppressions.check(conn, user_id, list_id, key)
        return SuppressionCheck(email=key, suppressed=bool(found), by=[_shown(each) for each in found])

    @delete("/{suppression_id:int}", operation_id="removeSuppression", summary="End a suppression")
    async def remove(self, suppression_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """The address may be mailed again; somebody who unsubscribed stays off their list."""
        async with transaction(services.pool) as conn:
            await suppressions.remove(conn, caller.sees, suppression_id)
        await services.announce("suppressions")


def _shown(found: suppressions.Suppressed) -> SuppressionShown:
    return SuppressionShown(**msgspec.structs.asdict(found), scope=found.scope)
