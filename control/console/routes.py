"""The pages at `/`: sign-in, overview, campaigns, delivery servers.

Server-side HTML from Jinja with autoescaping. A page asks for itself once a second (`X-Console-Refresh`), gets the same HTML, and its
script replaces the parts that changed: one mechanism for everything that is live, and the page works without the script. Nothing is
loaded from elsewhere.
"""

import asyncio
import functools
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import redis.exceptions
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from litestar import Controller, Response, Router, get, post
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException, NotAuthorizedException, NotFoundException
from litestar.params import FromPath, QueryParameter
from litestar.response import Redirect
from litestar.static_files import create_static_files_router
from litestar.types import ExceptionHandlersMap

from control import delivery_servers, trial
from control.console import session
from control.console.session import AnyRequest
from control.errors import STATUS, on_http
from control.guards import Caller, Failures
from control.parameters import Id
from control.services import Services
from domain import address, states
from domain.errors import Conflict, Invalid
from store import accounting, campaigns, console_sessions, egress, status
from store.postgres import connection

HERE = Path(__file__).parent
PAGE_CAMPAIGNS = 50
REPORT_SECONDS = 5.0  # the reasons of a campaign are counted anew at most this often, whoever looks
MAX_REPORTS = 100
FORM_TIMEOUT_SECONDS = 10.0
MAX_FORM_FIELD = 400

# state -> (word shown, colour of its badge)
BADGES = {
    states.DRAFT: "quiet",
    states.PREPARING: "busy",
    states.RUNNING: "busy",
    states.PAUSED: "warn",
    states.CANCELLING: "warn",
    states.CANCELLED: "quiet",
    states.COMPLETED: "good",
    "sending": "busy",
    "connecting": "busy",
    "idle": "good",
    "failing": "bad",
    "suspended": "bad",
    "disabled": "quiet",
    "unknown": "quiet",
}
# What may be done to a campaign in a state: action -> words of the button
ACTIONS = {
    states.PREPARING: {"pause": "Pause", "cancel": "Cancel"},
    states.RUNNING: {"pause": "Pause", "cancel": "Cancel"},
    states.PAUSED: {"resume": "Resume", "cancel": "Cancel"},
}
_DO = {"pause": campaigns.pause, "resume": campaigns.resume, "cancel": campaigns.cancel}

# The referrer must stay within the console: with "no-referrer" browsers send `Origin: null` and no form would be ours
_HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "same-origin"}


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0.0"


def _ago(at: float) -> str:
    seconds = max(0, int(time.time() - at))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _moment(at: datetime | None) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if at else "\u2013"


@functools.cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(number=_number, ago=_ago, moment=_moment)
    made.globals.update(share=_share, badges=BADGES, actions=ACTIONS)
    return made


def page(name: str, status_code: int = 200, **context: Any) -> Response[str]:
    """One rendered page."""
    html = _templates().get_template(f"{name}.html").render(**context)
    return Response(html, status_code=status_code, media_type="text/html; charset=utf-8", headers=dict(_HEADERS))


class Reports:
    """The last report of each campaign, so that an open page does not count a million records every second."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, accounting.Report]] = {}
        self._counting: dict[int, asyncio.Lock] = {}

    async def of(self, services: Services, campaign_id: Id) -> accounting.Report:
        """At most `REPORT_SECONDS` old."""
        async with self._counting.setdefault(campaign_id, asyncio.Lock()):
            known = self._known.get(campaign_id)
            if known and time.monotonic() - known[0] < REPORT_SECONDS:
                return known[1]
            found = await accounting.report(services.pool, campaign_id, diagnostics=8)
            while len(self._known) >= MAX_REPORTS:
                oldest = next(iter(self._known))
                del self._known[oldest]
                self._counting.pop(oldest, None)
            self._known[campaign_id] = (time.monotonic(), found)
            return found


class SignInController(Controller):
    """The way in and out."""

    include_in_schema = False
    failures = Failures()

    @get("/login")
    async def form(self) -> Response[str]:
        """Ask for an API key."""
        return page("login", error="")

    @post("/login", status_code=200)
    async def sign_in(self, request: AnyRequest, services: NamedDependency[Services]) -> Response[Any]:
        """Take the key; answer with a session and never show the key again."""
        session.require_own_form(request)
        client = request.client.host if request.client else ""
        if self.failures.exhausted(client, time.monotonic()):
            return page("login", 429, error="Too many wrong keys from this address. Wait a little.")
        token = await session.sign_in(services, (await _form(request)).get("key", "").strip())
        if token is None:
            self.failures.count(client, time.monotonic())
            return page("login", 401, error="That is no valid API key. The first one is in the file admin.key of the state directory.")
        return Redirect("/", status_code=303, cookies=[session.cookie(request, token)], headers=dict(_HEADERS))

    @post("/logout", status_code=303)
    async def sign_out(self, request: AnyRequest, services: NamedDependency[Services]) -> Redirect:
        """End the session here and in Redis."""
        session.require_own_form(request)
        await console_sessions.end(services.redis, request.cookies.get(session.COOKIE, ""))
        return Redirect("/login", status_code=303, cookies=[session.cookie(request, "")], headers=dict(_HEADERS))


class ConsoleController(Controller):
    """What a signed-in person sees. Everything is looked up with the caller (S10)."""

    include_in_schema = False
    reports = Reports()

    @get("/")
    async def overview(self, request: AnyRequest, services: NamedDependency[Services]) -> Response[str]:
        """The whole machine at one look."""
        caller = await session.caller_of(request, services)
        found = await status.gather(services.pool, services.redis, caller.sees)
        return page(
            "overview", caller=caller, here="overview", status=found, rate=sum(s.delivered_per_second for s in found.delivery_servers)
        )

    @get("/campaigns")
    async def campaigns(
        self,
        request: AnyRequest,
        services: NamedDependency[Services],
        before: Annotated[int | None, QueryParameter(ge=1, le=2**62)] = None,
    ) -> Response[str]:
        """Newest first."""
        caller = await session.caller_of(request, services)
        async with connection(services.pool) as conn:
            found = await campaigns.list_campaigns(conn, caller.sees, before, PAGE_CAMPAIGNS, None)
            progress = {each.id: await campaigns.progress(conn, caller.sees, each.id) for each in found if each.state != states.DRAFT}
        following = found[-1].id if len(found) == PAGE_CAMPAIGNS else None
        return page("campaigns", caller=caller, here="campaigns", campaigns=found, progress=progress, following=following)

    @get("/campaigns/{campaign_id:int}")
    async def campaign(self, request: AnyRequest, services: NamedDependency[Services], campaign_id: Id) -> Response[str]:
        """One campaign: how far, and what servers answer."""
        caller = await session.caller_of(request, services)
        return await self._campaign(services, caller, campaign_id)

    async def _campaign(
        self, services: Services, caller: Caller, campaign_id: int, error: str = "", status_code: int = 200
    ) -> Response[str]:
        async with connection(services.pool) as conn:
            found = await campaigns.get(conn, caller.sees, campaign_id)
            progress = services.rates.with_rate(await campaigns.progress(conn, caller.sees, campaign_id))
        report = None if found.state == states.DRAFT else await self.reports.of(services, campaign_id)
        return page("campaign", status_code, caller=caller, here="campaigns", campaign=found, progress=progress, report=report, error=error)

    @post("/campaigns/{campaign_id:int}/{action:str}", status_code=303)
    async def act(self, request: AnyRequest, services: NamedDependency[Services], campaign_id: Id, action: FromPath[str]) -> Response[Any]:
        """Pause, resume or cancel."""
        session.require_own_form(request)
        caller = await session.caller_of(request, services)
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
        if action not in _DO:
            raise HTTPException(status_code=404, detail="There is no such action.")
        try:
            await _DO[action](services.pool, campaign_id)
        except Conflict as refused:
            return await self._campaign(services, caller, campaign_id, str(refused), 409)
        await services.announce("campaigns")
        return Redirect(f"/campaigns/{campaign_id}", status_code=303, headers=dict(_HEADERS))

    @get("/delivery-servers")
    async def servers(self, request: AnyRequest, services: NamedDependency[Services]) -> Response[str]:
        """Every way out, and how it is."""
        caller = await session.caller_of(request, services)
        return await self._servers(services, caller)

    async def _servers(
        self, services: Services, caller: Caller, tested: int = 0, result: trial.TrialResult | None = None, error: str = ""
    ) -> Response[str]:
        found = await status.gather(services.pool, services.redis, caller.sees)
        async with connection(services.pool) as conn:
            configured = {server.id: server for server in await egress.list_servers(conn, caller.sees, 0, 1000)}
        return page(
            "servers", 422 if error else 200, caller=caller, here="servers", servers=found.delivery_servers, configured=configured,
            tested=tested, result=result, error=error,
        )  # fmt: skip

    @post("/delivery-servers/{server_id:int}/test", status_code=200)
    async def test(self, request: AnyRequest, services: NamedDependency[Services], server_id: Id) -> Response[str]:
        """Really send one message."""
        session.require_own_form(request)
        caller = await session.caller_of(request, services)
        async with connection(services.pool) as conn:
            server = await egress.get(conn, caller.sees, server_id)
        try:
            to = address.parse((await _form(request)).get("to", ""), "to")
        except Invalid as refused:
            return await self._servers(services, caller, server_id, error=refused.reason)
        sealed = server.password_sealed
        password = services.keyring.open(sealed, delivery_servers.password_context(server.id)).decode() if sealed else ""
        return await self._servers(services, caller, server_id, await trial.send(server, password, to))


async def _form(request: AnyRequest) -> dict[str, str]:
    """The text fields of a form, each cut at `MAX_FORM_FIELD` characters."""
    async with asyncio.timeout(FORM_TIMEOUT_SECONDS):
        data = await request.form()
    return {name: value[:MAX_FORM_FIELD] for name, value in data.items() if isinstance(value, str)}


def _to_login(request: AnyRequest, _: Exception) -> Response[Any]:
    if request.headers.get("x-console-refresh"):
        return Response("", status_code=401, media_type="text/plain", headers=dict(_HEADERS))
    return Redirect("/login", status_code=303, headers=dict(_HEADERS))


def _explain(request: AnyRequest, error: Exception) -> Response[str]:
    """What went wrong, as a page."""
    if isinstance(error, HTTPException):
        return page("error", error.status_code, code=error.status_code, sentence=error.detail, live=False)
    code = next(status_code for kind, status_code in STATUS if isinstance(error, kind))
    sentence = "A store does not answer. Sending goes on as far as it can; this page comes back by itself." if code == 503 else str(error)
    return page("error", code, code=code, sentence=sentence, live=code == 503)


def no_such_page(request: AnyRequest, error: NotFoundException) -> Response[Any]:
    """A path that leads nowhere: a page for browsers, a problem for programs."""
    if "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/"):
        return page("error", 404, code=404, sentence="There is no such page.", live=False)
    return on_http(request, error)


HANDLERS: ExceptionHandlersMap = {
    **{kind: _explain for kind, _ in STATUS},  # type: ignore[misc]
    redis.exceptions.RedisError: _explain,
    HTTPException: _explain,
    NotAuthorizedException: _to_login,
}


def console_router() -> Router:
    """Everything at `/` that is not the API: one line in `control.app`."""
    return Router(
        "/",
        route_handlers=[
            SignInController,
            ConsoleController,
            create_static_files_router(path="/static", directories=[HERE / "static"], include_in_schema=False),
        ],
        exception_handlers=HANDLERS,
        include_in_schema=False,
    )
