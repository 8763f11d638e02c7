"""The API and console as one ASGI application: routes, what handlers may ask for, and the layers around them.

Outermost first: security headers, API keys (`guards`), bodies (`bodies`), Idempotency-Key (`idempotency`), Litestar.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

from litestar import Litestar, Request, Router
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import NotFoundException
from litestar.static_files import create_static_files_router
from litestar.types import ControllerRouterHandler
from redis.asyncio import Redis

from config import tasks
from config.keys import Keyring
from config.settings import Settings
from control import (
    attachments,
    bounce_imports,
    bounce_patterns,
    campaigns,
    conversions,
    custom_headers,
    delivery_servers,
    dkim,
    forwarding,
    health,
    imports,
    inbound,
    lists,
    messages,
    preflight,
    reports,
    seeds,
    sent,
    suppressions,
    users,
)
from control.asgi import App, Message, Receive, Scope, Send
from control.bodies import Bodies, strict_types
from control.console.routes import console_router, no_such_page
from control.errors import HANDLERS
from control.guards import Authentication, Authenticator, Caller, caller_of
from control.idempotency import Idempotency, forget_old
from control.openapi import STATIC, openapi_config
from control.services import Services
from store.postgres import Pool

_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
# Swagger UI sets style attributes and draws its icons from data: URLs
_DOCS_POLICY = f"{_POLICY}; style-src 'self' 'unsafe-inline'; img-src 'self' data:"

CONTROLLERS: list[ControllerRouterHandler] = [
    users.MeController,
    users.UserController,
    users.ApiKeyController,
    delivery_servers.DeliveryServerController,
    custom_headers.CustomHeaderController,
    dkim.DkimKeyController,
    lists.ListController,
    lists.CustomFieldController,
    lists.SubscriberController,
    imports.ListImportController,
    imports.ImportController,
    campaigns.CampaignController,
    attachments.AttachmentController,
    preflight.PreflightController,
    conversions.S2sController,
    conversions.ConversionController,
    messages.MessageController,
    seeds.SeedController,
    sent.SentController,
    reports.ReportController,
    suppressions.SuppressionController,
    bounce_imports.BounceImportController,
    bounce_patterns.BouncePatternController,
    forwarding.ForwardingController,
    inbound.ReceivedController,
    inbound.FeedbackController,
    inbound.CampaignFeedbackController,
    health.StatusController,
]


class SecurityHeaders:
    """ASGI: the headers every answer carries; a route that sets its own keeps it."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        docs = scope["path"].startswith("/docs")
        defaults = {
            b"content-security-policy": (_DOCS_POLICY if docs else _POLICY).encode(),
            b"x-content-type-options": b"nosniff",
            b"x-frame-options": b"DENY",
            b"referrer-policy": b"no-referrer",
            b"cross-origin-opener-policy": b"same-origin",
        }
        if scope["path"].startswith("/api/"):
            defaults[b"cache-control"] = b"no-store"

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                names = {name.lower() for name, _ in headers}
                message["headers"] = headers + [(name, value) for name, value in defaults.items() if name not in names]
            await send(message)

        await self.app(scope, receive, with_headers)


class Application:
    """What the server runs. `litestar` is the framework's application inside."""

    def __init__(self, services: Services) -> None:
        self.litestar = _litestar(services)
        self.authenticator = Authenticator(services.pool)
        app: App = Idempotency(cast(App, self.litestar), services.pool, services.keyring)
        app = Bodies(app, services.settings.control.max_body_bytes)
        self._app: App = SecurityHeaders(Authentication(app, self.authenticator))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection or request."""
        await self._app(scope, receive, send)


def create_app(pool: Pool, redis: Redis, keyring: Keyring, settings: Settings) -> Application:
    """The whole application over open stores; it does not close them."""
    return Application(Services(pool, redis, keyring, settings))


def _litestar(services: Services) -> Litestar:
    def provide_services() -> Services:
        return services

    @contextlib.asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        forgetting = asyncio.create_task(forget_old(services.pool))
        try:
            yield
        finally:
            await tasks.end([forgetting], 1.0)

    return Litestar(
        route_handlers=[
            Router("/api/v1", route_handlers=CONTROLLERS),
            console_router(),
            health.HealthController,
            create_static_files_router(path="/docs/static", directories=[STATIC], include_in_schema=False),
        ],
        dependencies={
            "services": Provide(provide_services, sync_to_thread=False),
            "caller": Provide(_caller, sync_to_thread=False),
        },
        before_request=strict_types,
        exception_handlers={**HANDLERS, NotFoundException: no_such_page},
        lifespan=[lifespan],
        openapi_config=openapi_config(),
        request_max_body_size=services.settings.control.max_body_bytes,
        state=State({"services": services}),
        logging_config=None,
        debug=False,
    )


def _caller(request: Request[Any, Any, Any]) -> Caller:
    return caller_of(request.scope)
