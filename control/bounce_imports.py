"""Results of others: `POST /bounces/imports` with a CSV of bounces, complaints and unsubscribes, PowerMTA's own files among them.

The work is `store.results.run`, which `sluice bounces import` calls as well; here is only HTTP around it.
"""

from typing import Annotated, Any

from litestar import Controller, Request, post
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter

from control.errors import MEDIA_TYPE, Problem
from control.guards import Caller
from control.imports import bounded
from control.parameters import MAX_ID
from control.services import Services
from domain.result_rows import Result, ResultReader
from store import bounce_patterns, lists, results
from store.postgres import connection

NOT_CSV = ResponseSpec(Problem, generate_examples=False, description="Not CSV, or compressed", media_type=MEDIA_TYPE)


class BounceImportController(Controller):
    """Results that other systems report."""

    path = "/bounces/imports"
    tags = ("bounces",)

    @post(
        "/",
        operation_id="importResults",
        summary="Import bounces, complaints and unsubscribes of others",
        request_max_body_size=None,
        status_code=200,
        responses={415: NOT_CSV},
    )
    async def take(
        self,
        request: Request[Any, Any, Any],
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        list_id: Annotated[
            int | None, QueryParameter(ge=1, le=MAX_ID, description="The list that unsubscribes are for; without it, all lists.")
        ] = None,
    ) -> results.ResultsReport:
        """CSV, UTF-8, with a header line: `address,type,when,text` (type hard, soft, complaint, unsubscribe or suppress), or PowerMTA's
        accounting files (b, rb and f are read, other types skipped).

        A hard bounce and a complaint suppress the address for all lists of the user; the subscriber is marked bounced or unsubscribed.
        All good rows or none; refused rows are listed, the first 1,000. The same file again changes nothing more.
        """
        user_id = caller.user_id
        if list_id is not None:
            async with connection(services.pool) as conn:
                user_id = (await lists.get(conn, caller.sees, list_id)).user_id
        return await import_results(request, services, user_id, list_id)


async def import_results(
    request: Request[Any, Any, Any], services: Services, user_id: int | None, list_id: int | None, usual: Result | None = None
) -> results.ResultsReport:
    """Import the CSV that is the body of a request, for a user (None: the system). `usual`: the type of all rows of a file without types.

    Raises HTTPException (415) for another body.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "text/csv":
        raise HTTPException(f"send the rows as they are, as text/csv, not {kind[:80]!r}", status_code=415)
    rules = await bounce_patterns.rules(services.pool)
    blocks = bounded(request.stream(), "nothing was imported")
    report = await results.run(services.pool, user_id, list_id, blocks, ResultReader(rules.classify, usual))
    await services.announce("suppressions")
    return report
