"""Health for load balancers and supervisors, without a key; status for people and `sluice status`, with one."""

import msgspec
from litestar import Controller, Response, get
from litestar.di import NamedDependency

from control.guards import Caller
from control.services import Services
from store import status


class Health(msgspec.Struct, frozen=True):
    """Whether this process can do its work."""

    status: str
    postgresql: str = "ok"
    redis: str = "ok"


class HealthController(Controller):
    """Open to everybody who can connect; says no more than up or down."""

    path = "/health"
    tags = ("health",)

    @get("/live", operation_id="healthLive", summary="The process runs", security=[{}])
    async def live(self) -> Health:
        """Always 200."""
        return Health("ok")

    @get("/ready", operation_id="healthReady", summary="PostgreSQL and Redis answer", security=[{}])
    async def ready(self, services: NamedDependency[Services]) -> Response[Health]:
        """200, or 503 and which store does not answer; within seconds."""
        postgresql = "ok" if await status.ping_postgresql(services.pool) == "ok" else "not answering"
        redis = "ok" if await status.ping_redis(services.redis) == "ok" else "not answering"
        ready = postgresql == redis == "ok"
        return Response(Health("ok" if ready else "unavailable", postgresql, redis), status_code=200 if ready else 503)


class StatusController(Controller):
    """What `sluice status` shows."""

    path = "/status"
    tags = ("health",)

    @get("/", operation_id="getStatus", summary="Engines, delivery servers, unfinished campaigns")
    async def show(self, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> status.Status:
        """Also when a store does not answer; `trouble` says what needs somebody."""
        return await status.gather(services.pool, services.redis, caller.sees)
