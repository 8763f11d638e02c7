"""Keeps private servers alive: one that ended by itself is started again on the same data and socket.

Clients find it where it was and only have to connect anew. What it had promised to keep it has kept: PostgreSQL recovers from its
log, Valkey from its append-only file, and what Valkey lost is announced anew.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from domain.errors import Unavailable
from store.embedded import START_TIMEOUT_SECONDS, EmbeddedServers

PAUSE_FIRST_SECONDS: Final = 0.25
PAUSE_LAST_SECONDS: Final = 30.0
STEADY_SECONDS: Final = 60.0  # one that ran this long starts again with the first pause
_LOOK_SECONDS: Final = 0.2


async def keep(servers: EmbeddedServers, say: Callable[[str], None]) -> None:
    """Watch `servers` until cancelled; `say` takes what an operator should read. Run it in the main thread: the servers end with it."""
    pauses: dict[str, float] = {}
    began: dict[str, float] = {}
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        for name in servers.dead():
            why = servers.died().splitlines()
            if time.monotonic() - began.get(name, 0.0) >= STEADY_SECONDS:
                pauses.pop(name, None)
            pause = pauses.get(name, PAUSE_FIRST_SECONDS)
            pauses[name] = min(PAUSE_LAST_SECONDS, 2 * pause)
            last = f"; it last said: {why[-1]}" if len(why) > 1 else ""
            say(f"{name} ended by itself and is started again in {pause:g} s{last}")
            await asyncio.sleep(pause)
            began[name] = time.monotonic()
            try:
                is_ready = servers.start_again(name)
            except (Unavailable, OSError) as error:
                say(f"{name} could not be started: {error}")
                continue
            while not is_ready() and name not in servers.dead():
                if time.monotonic() - began[name] > START_TIMEOUT_SECONDS:
                    say(f"{name} is not ready after {START_TIMEOUT_SECONDS:.0f} s; still waiting for it")
                    break
                await asyncio.sleep(0.05)
            else:
                if name not in servers.dead():
                    say(f"{name} answers again after {time.monotonic() - began[name]:.1f} s")
