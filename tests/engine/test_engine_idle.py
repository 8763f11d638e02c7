"""An engine that has nothing left to send: it closes its connections, stays quiet, and stops at once when told."""

import asyncio
import time

from store.postgres import Pool
from tests.machine import Machine, campaign_state, until
from tests.store import seed


async def test_idle_connections_are_closed_and_sigterm_ends_an_idle_engine_at_once(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    engine = await machine.engine()
    campaign = await seed.campaign(pool, recipients=2000, port=machine.sink_port)

    async def completed() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(completed, "campaign completed", 60.0, machine)

    async def closed() -> bool:
        return bool((await machine.sink_json("/api/v1/counters"))["connections"]["now"] == 0)

    await until(closed, "idle connections closed", 30.0, machine)
    await asyncio.sleep(0.5)
    begun = time.monotonic()
    assert await engine.stop() == 0, machine.words()
    assert time.monotonic() - begun < 10  # not the drain timeout: there was nothing to wait for
