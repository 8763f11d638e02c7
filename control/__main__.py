"""`python -m control`: the API and console of one machine, until SIGTERM or SIGINT.

Says `control ready http=HOST:PORT` on standard output when it answers. The stores are those of `SLUICE_DATABASE_URL` and
`SLUICE_REDIS_URL`, which the supervisor sets, or private ones that run already or are started. Exit codes: 0 stopped,
1 failed, 2 the settings or a store must be looked at.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from typing import Any

import uvicorn

from config import event_loop, logs
from config.keys import load_keyring
from config.load import admin_key_path, load, state_directory
from config.serving import BoundedHttp, Server
from config.settings import Settings
from control.app import create_app
from domain.errors import ConfigurationError, SluiceError
from store import batch_queue, embedded, migrate, postgres, users

MAX_CONNECTIONS = 1000
SHUTDOWN_SECONDS = 1  # for requests under way; then they are cut


def main() -> int:
    """Run until told to stop; returns the exit code."""
    try:
        settings = load()
        logs.configure(settings.node.log_level)
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        # private servers are children of the thread that starts them, so this happens outside the event loop
        with embedded.resolve(settings.database.url, settings.redis.url, state_directory(settings)) as backends:
            event_loop.run(_serve(settings, backends.database_url, backends.redis_url))
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"control: {problem}\n")
        return 2
    except SluiceError as error:
        sys.stderr.write(f"control: {error}\n")
        return 2
    return 0


async def _serve(settings: Settings, database_url: str, redis_url: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listening = _listen(settings.control.host, settings.control.port)
    await migrate.apply(database_url)
    pool = await postgres.open_pool(database_url, settings.database.pool_size, settings.database.command_timeout_seconds)
    redis = batch_queue.connect(redis_url, settings.redis.timeout_seconds)
    try:
        await users.ensure_admin(pool, admin_key_path(settings), settings.control.admin_key)
        await _run(create_app(pool, redis, load_keyring(settings), settings), listening, stop)
    finally:
        listening.close()
        with contextlib.suppress(Exception):
            await redis.aclose()
        try:
            async with asyncio.timeout(1.0):
                await pool.close()
        except TimeoutError:
            pool.terminate()


async def _run(app: Any, listening: socket.socket, stop: asyncio.Event) -> None:
    server = Server(
        uvicorn.Config(
            app,
            http=BoundedHttp,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # X-Forwarded-For is not believed (S16)
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    stopping = asyncio.create_task(stop.wait())
    while not server.started and not serving.done() and not stop.is_set():
        await asyncio.sleep(0.01)
    if server.started:
        host, port = listening.getsockname()[:2]
        sys.stdout.write(f"control ready http={f'[{host}]' if ':' in host else host}:{port}\n")
        sys.stdout.flush()
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.should_exit = True
    await serving


def _listen(host: str, port: int) -> socket.socket:
    """Raises ConfigurationError when the address cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.setblocking(False)
    except OSError as error:
        raise ConfigurationError(
            [f"control.port: cannot listen on {host}:{port}: {error.strerror or error}; choose another with SLUICE_CONTROL__PORT"]
        ) from error
    return listening


if __name__ == "__main__":
    sys.exit(main())
