"""Imports: `POST /lists/{list_id}/imports` with a CSV or NDJSON body of any size, read as it streams in.

The work is `store.imports.run_import`, which `sluice import` calls as well; here is only HTTP around it.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter

from control.errors import MEDIA_TYPE, Problem
from control.guards import Caller
from control.parameters import After, Before, Id, Limit, Page
from control.services import Services
from domain.errors import Invalid
from domain.import_rows import Format, Refusal
from store import imports, lists
from store.postgres import connection

FORMATS: dict[str, Format] = {"text/csv": "csv", "application/x-ndjson": "ndjson", "application/ndjson": "ndjson"}
IDLE_TIMEOUT_SECONDS = 60.0


class ListImportController(Controller):
    """The imports into one list."""

    path = "/lists/{list_id:int}/imports"
    tags = ("imports",)

    @post(
        "/",
        operation_id="importSubscribers",
        summary="Import subscribers",
        request_max_body_size=None,
        responses={
            415: ResponseSpec(Problem, generate_examples=False, description="Neither CSV nor NDJSON, or compressed", media_type=MEDIA_TYPE)
        },
    )
    async def create(
        self,
        request: Request[Any, Any, Any],
        list_id: Id,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        create_fields: Annotated[bool, QueryParameter(description="Create text fields for columns the list does not know.")] = True,
    ) -> Response[imports.ImportReport]:
        """CSV: UTF-8, commas, a header line with `email`; other columns are custom fields. NDJSON: one flat object per line.

        Answered when every good row is on the list, with the first 1,000 refused rows; good rows are kept whatever is refused.
        A file that cannot be read as a whole is refused with 422 and changes nothing.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in FORMATS:
            raise HTTPException(f"send the rows as they are, as text/csv or application/x-ndjson, not {kind[:80]!r}", status_code=415)
        async with connection(services.pool) as conn:
            owner = await lists.get(conn, caller.sees, list_id)
        source = bounded(request.stream(), "nothing was imported")
        report = await imports.run_import(services.pool, owner.user_id, list_id, source, FORMATS[kind], create_fields=create_fields)
        return Response(report, status_code=201, headers={"location": f"/api/v1/imports/{report.id}"})

    @get("/", operation_id="listImports", summary="List imports into a list")
    async def page(
        self,
        list_id: Id,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        before: Before = None,
        limit: Limit = 100,
    ) -> Page[imports.ImportReport]:
        """Newest first, without their refusals."""
        async with connection(services.pool) as conn:
            await lists.get(conn, caller.sees, list_id)
            found = await imports.imports_of(conn, caller.sees, list_id, before, limit)
        return Page(found, found[-1].id if len(found) == limit else None)


class ImportController(Controller):
    """One import."""

    path = "/imports"
    tags = ("imports",)

    @get("/{import_id:int}", operation_id="getImport", summary="One import, with its first 1,000 refusals")
    async def one(self, import_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> imports.ImportReport:
        """By id."""
        async with connection(services.pool) as conn:
            return await imports.report(conn, caller.sees, import_id)

    @get("/{import_id:int}/refusals", operation_id="listRefusals", summary="All refused rows of an import")
    async def refusals(
        self, import_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services], after: After = 0, limit: Limit = 1000
    ) -> Page[Refusal]:
        """By row; row 1 is the first row after the header."""
        found = await imports.refusals(services.pool, caller.sees, import_id, after, limit)
        return Page(found, found[-1].row if len(found) == limit else None)


async def bounded(source: AsyncIterator[bytes], consequence: str) -> AsyncIterator[bytes]:
    """The same blocks, each waited for a bounded time: a client that goes silent must not hold a place for ever."""
    while True:
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_SECONDS):
                block = await anext(source)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Invalid("body", f"nothing arrived for {IDLE_TIMEOUT_SECONDS:.0f} s; {consequence}") from None
        yield block
