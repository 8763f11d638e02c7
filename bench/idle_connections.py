"""`python -m bench.idle_connections`: what open SMTP connections with nothing to do cost an engine in memory; prints one JSON object.

Connected, greeted and handed over as an engine does it, in a process of its own; nothing is sent on them. Memory is that of the process
with all of them open less that with the first fifty.
"""

import argparse
import asyncio
import gc
import json
import os
import sys
from typing import Any, cast

import uvloop

from bench import measure
from domain.egress import DeliveryServer
from engine.connect import connect
from engine.egress_path import Facts
from engine.path_health import ALL
from engine.turn import Turn
from ext.smtp_session import SmtpSession

FIRST = 50


async def _open(turn: Turn, server: DeliveryServer, number: int) -> SmtpSession:
    connected = await connect(server, password="", ehlo_name="bench.example", source_address=None)
    limits = server.limits
    session = SmtpSession(
        turn, None, pipelining=connected.pipelining, chunking=False, window=1, max_messages=0,
        command_timeout=limits.command_timeout_seconds, final_dot_timeout=limits.final_dot_timeout_seconds, connection_id=number,
        facts=Facts(server, connected, ALL),
    )  # fmt: skip
    session.start(connected.transport)
    return session


async def _measure(port: int, count: int) -> dict[str, float]:
    turn = Turn(cast("Any", None), cast("Any", None), 60.0, lambda held: None, lambda: None)
    turn._scheduled = True  # it never runs
    server = DeliveryServer(id=1, user_id=1, name="bench", host="127.0.0.1", port=port)
    sessions: list[SmtpSession] = []
    first = 0
    while len(sessions) < count:
        more = min(FIRST, count - len(sessions))
        sessions += await asyncio.gather(*(_open(turn, server, len(sessions) + number) for number in range(more)))
        if len(sessions) == FIRST:
            gc.collect()
            first, _ = measure.memory(os.getpid())
    gc.collect()
    now, _ = measure.memory(os.getpid())
    for session in sessions:
        session.quit()
    return {"connections": count, "bytes_per_connection": (now - first) / (count - FIRST)}


def main() -> int:
    """Open, look, close."""
    parser = argparse.ArgumentParser(prog="bench.idle_connections", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=2000)
    chosen = parser.parse_args()
    print(json.dumps(uvloop.run(_measure(chosen.port, max(chosen.connections, 2 * FIRST)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
