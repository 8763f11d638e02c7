"""Suppressions: addresses that must not be mailed, for one list, all lists of a user, or (admins) the whole system."""

import csv
import io
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from litestar import Controller, Request, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery, JSONBody, QueryParameter
from litestar.response import Stream

from control.bounce_imports import NOT_CSV, import_results
from control.guards import Caller
from control.parameters import MAX_ID, After, Id, Limit, Page, one_line
from control.services import Services
from domain import address, suppression_key
from domain.errors import Invalid
from domain.suppression import Reason, Scope
from store import lists, results, suppressions
from store.postgres import Pool, PooledConnection, connection, transaction

MAX_AT_ONCE = 10_000
EXPORT_PAGE = 5_000
EXPORT_COLUMNS = ("address", "scope", "list_id", "source", "text", "when")


class SuppressionCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom to suppress. `scope` list needs `list_id`; system needs a key of admin scope.

    Besides addresses: a domain (`example.com`), its subdomains (`*@*.example.com`), a local part at any domain (`info@*`).
    """

    emails: list[str]
    scope: Scope = "user"
    list_id: int | None = None
    reason: Literal["manual", "import", "unsubscribed", "bounced", "complained"] = "manual"
    note: str = ""


class SuppressionRemove(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to end, as it was written when it was suppressed, under one scope."""

    emails: list[str]
    scope: Scope = "user"
    list_id: int | None = None


class SuppressionsRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """How many of them were suppressed under that scope."""

    removed: int


class SuppressionsAdded(msgspec.Struct, frozen=True, kw_only=True):
    """How many of them were not suppressed before."""

    added: int
    already_suppressed: int


class SuppressionShown(msgspec.Struct, frozen=True, kw_only=True):
    """One suppression. `email` is in its comparable form: lower case, A-labels; a domain is `@domain`."""

    id: int
    scope: Scope
    user_id: int | None
    list_id: int | None
    email: str
    reason: Reason
    source: suppressions.Source
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
        """All or none; engines honour them within a second, for what is queued already, too. Suppressing twice is fine."""
        note = one_line("note", data.note, maximum=500)
        keys = _keys(data.emails)
        async with transaction(services.pool) as conn:
            user_id = await _owner(conn, caller, data.scope, data.list_id)
            added = await suppressions.add(conn, user_id, data.list_id, keys, data.reason, note)
        await services.announce("suppressions")
        return SuppressionsAdded(added=added, already_suppressed=len(keys) - added)

    @get("/", operation_id="listSuppressions", summary="List suppressions")
    async def page(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        list_id: Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)] = None,
        reason: Annotated[Reason | None, QueryParameter(description="Only those of this reason.")] = None,
        after: After = 0,
        limit: Limit = 100,
    ) -> Page[SuppressionShown]:
        """By id; those of one list where `list_id` is given."""
        async with connection(services.pool) as conn:
            if list_id is not None:
                await lists.get(conn, caller.sees, list_id)
            found = await suppressions.list_suppressions(conn, caller.sees, list_id, after, limit, reason)
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

    @post("/remove", operation_id="removeSuppressions", summary="End suppressions", status_code=200)
    async def end(
        self, data: JSONBody[SuppressionRemove], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> SuppressionsRemoved:
        """Of addresses and patterns under one scope; those that are not suppressed there are passed over."""
        keys = _keys(data.emails)
        async with transaction(services.pool) as conn:
            user_id = await _owner(conn, caller, data.scope, data.list_id)
            removed = await suppressions.remove_keys(conn, user_id, data.list_id, keys)
        await services.announce("suppressions")
        return SuppressionsRemoved(removed=removed)

    @post(
        "/imports",
        operation_id="importSuppressions",
        summary="Import suppressions",
        request_max_body_size=None,
        status_code=200,
        responses={415: NOT_CSV},
    )
    async def take(
        self,
        request: Request[Any, Any, Any],
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        reach: Annotated[Scope, QueryParameter(name="scope", description="list needs `list_id`; system a key of admin scope.")] = "user",
        list_id: Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)] = None,
    ) -> results.ResultsReport:
        """CSV, UTF-8, of any size, with a column `address` (or `email`); `text` and `when` are kept. Also what the export gives.

        All good rows or none; refused rows are listed, the first 1,000. The same file again changes nothing more.
        """
        async with connection(services.pool) as conn:
            user_id = await _owner(conn, caller, reach, list_id)
        return await import_results(request, services, user_id, list_id, "suppress")

    @get("/export", operation_id="exportSuppressions", summary="Export suppressions", media_type="text/csv")
    async def export(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        list_id: Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)] = None,
        reason: Annotated[Reason | None, QueryParameter(description="Only those of this reason.")] = None,
    ) -> Stream:
        """CSV by id. Cells that a spreadsheet would run as a formula begin with an apostrophe, which the import takes off again."""
        if list_id is not None:
            async with connection(services.pool) as conn:
                await lists.get(conn, caller.sees, list_id)
        headers = {"content-disposition": 'attachment; filename="suppressions.csv"'}
        return Stream(export_rows(services.pool, caller.sees, list_id, reason), media_type="text/csv; charset=utf-8", headers=headers)

    @delete("/{suppression_id:int}", operation_id="removeSuppression", summary="End a suppression")
    async def remove(self, suppression_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """The address may be mailed again; somebody who unsubscribed stays off their list."""
        async with transaction(services.pool) as conn:
            await suppressions.remove(conn, caller.sees, suppression_id)
        await services.announce("suppressions")


def _keys(emails: list[str]) -> list[str]:
    if not 1 <= len(emails) <= MAX_AT_ONCE:
        raise Invalid("emails", f"must have 1 to {MAX_AT_ONCE} addresses, not {len(emails)}")
    return sorted({suppression_key.parse(text, f"emails[{i}]") for i, text in enumerate(emails)})


async def _owner(conn: PooledConnection, caller: Caller, scope: Scope, list_id: int | None) -> int | None:
    """Whose suppressions they are; None: the system's. Raises Invalid, NotFound (a list of somebody else)."""
    if (scope == "list") != (list_id is not None):
        raise Invalid("list_id", "goes with scope list, and with no other")
    if scope == "system":
        if caller.scope != "admin":
            raise Invalid("scope", "only a key of admin scope suppresses for the whole system")
        return None
    if list_id is None:
        return caller.user_id
    if not 1 <= list_id <= MAX_ID:
        raise Invalid("list_id", "is not an id")
    return (await lists.get(conn, caller.sees, list_id)).user_id


async def export_rows(pool: Pool, sees: int | None, list_id: int | None, reason: Reason | None) -> AsyncIterator[bytes]:
    """The export in blocks; `sees` None: everybody's and the system's."""
    text = io.StringIO()
    write = csv.writer(text).writerow
    write(EXPORT_COLUMNS)
    after, full = 0, True
    while full:
        async with connection(pool) as conn:
            found = await suppressions.list_suppressions(conn, sees, list_id, after, EXPORT_PAGE, reason)
        for each in found:
            write((unrunnable(each.email), each.scope, each.list_id, each.source, unrunnable(each.note), each.created_at.isoformat()))
        yield text.getvalue().encode()
        text.seek(0)
        text.truncate()
        full = len(found) == EXPORT_PAGE
        after = found[-1].id if found else after


def unrunnable(cell: str) -> str:
    """A cell no spreadsheet takes for a formula (S15)."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def _shown(found: suppressions.Suppressed) -> SuppressionShown:
    return SuppressionShown(**msgspec.structs.asdict(found), scope=found.scope, source=found.source)
