"""The inbound process: builds the listener and the web side, starts them in order, ends them within two seconds of SIGTERM."""

import asyncio
import contextlib
import re
import signal
import sys
import time
from typing import Final

import redis.asyncio
import redis.exceptions
import structlog

from config import load
from config.keys import load_keyring
from config.settings import Settings
from domain import return_path
from domain.errors import ConfigurationError, Unavailable
from inbound.listener import Listener, Policy
from inbound.tracking import Keys, Tracker
from inbound.web import Web, WebServer
from inbound.web_view import WebView
from journal.visits import Visits
from store import batch_queue, inbound, postgres, redis_keys

log = structlog.get_logger(__name__)

REFRESH_SECONDS: Final = 2.0  # a new MFROM domain is taken mail for this soon
STORE_TIMEOUT_SECONDS: Final = 10.0
PUBLISH_TIMEOUT_SECONDS: Final = 1.0
RETURN_PATH_DAYS: Final = 60  # reports come within days; later than this a stolen address is worth nothing
ROLES: Final = frozenset({"postmaster", "abuse"})  # RFC 5321 §4.5.1, RFC 2142

_ADDRESS = re.compile(
    r"([A-Za-z0-9!#$&'*+/=?^_`{|}~.-]{1,64})@([A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+)"
)  # no quotes, no %-hack, no routes


class MailPolicy(Policy):
    """Our addresses: signed return paths and unsubscribe addresses, postmaster@ and abuse@, below the domains we send from."""

    def __init__(self, pool: postgres.Pool, return_path_key: bytes, unsubscribe_key: bytes, relay_domains: tuple[str, ...]) -> None:
        self._pool = pool
        self._keys = {return_path.BOUNCE: return_path_key, return_path.UNSUBSCRIBE: unsubscribe_key}
        self._own_domains = frozenset(domain.lower() for domain in relay_domains)
        self._domains = self._own_domains
        self._addresses: frozenset[str] = frozenset()
        self.kept = 0
        self.refused_at_store = 0

    async def refresh(self) -> None:
        """Read the MFROM domains anew. Raises Unavailable; then the ones known before stay."""
        domains, self._addresses = await inbound.return_addresses(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS)
        self._domains = self._own_domains | domains

    def recipient(self, address: str) -> tuple[inbound.Received | None, str]:
        """What an address stands for, or the reply that refuses it."""
        match = _ADDRESS.fullmatch(address)
        if match is None or match[2].lower() not in self._domains:
            return None, "550 5.7.1 Relaying denied"
        local = match[1].lower()
        address = f"{match[1]}@{match[2].lower()}"
        if local in ROLES or address.lower() in self._addresses:
            return inbound.Received(recipient=address), ""
        for prefix, key in self._keys.items():
            path = return_path.read(key, local, prefix)
            if path is None:
                continue
            age = int(time.time() // 86400) - path.day
            # An unsubscribe address works as long as somebody keeps the message it stands in
            if prefix == return_path.UNSUBSCRIBE or -1 <= age <= RETURN_PATH_DAYS:
                return inbound.Received(recipient=address, user_id=path.user_id, campaign_id=path.campaign_id, number=path.number), ""
        return None, "550 5.1.1 No such address here"

    async def deliver(self, peer: str, mail_from: str, recipients: list[inbound.Received], content: bytes) -> str:
        """Store the message; 250 only when it is durable (P11)."""
        try:
            ids = await inbound.keep(
                self._pool,
                peer=peer or None,
                mail_from=mail_from,
                recipients=recipients,
                raw=content,
                timeout_seconds=STORE_TIMEOUT_SECONDS,
            )
        except Unavailable as failure:
            self.refused_at_store += 1
            log.warning("a message could not be stored; its sender will try again", peer=peer, reason=str(failure))
            return "451 4.3.0 Cannot store it now, try again later"
        self.kept += 1
        log.info("message stored", peer=peer, recipients=len(recipients), size=len(content), id=ids[0])
        return f"250 2.0.0 Stored as {ids[0]}"


class Inbound:
    """The parts and their life."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._redis: redis.asyncio.Redis

    async def run(self) -> None:
        """Live until SIGTERM or SIGINT. Raises Unavailable, ConfigurationError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        settings = self.settings.inbound
        keyring = load_keyring(self.settings)
        database = self.settings.database
        pool = await postgres.open_pool(database.url, database.pool_size, database.command_timeout_seconds)
        self._redis = batch_queue.connect(self.settings.redis.url, self.settings.redis.timeout_seconds)
        mail = self.settings.mail
        ours = tuple(filter(None, (*settings.relay_domains, mail.sender_domain, mail.catch_all_domain)))
        policy = MailPolicy(pool, keyring.derive("return-path"), keyring.derive("unsubscribe"), ours)
        await policy.refresh()
        listener = Listener(
            policy,
            host=settings.smtp_host,
            port=settings.smtp_port,
            hostname=load.node_name(self.settings),
            max_message_bytes=settings.max_message_bytes,
            max_connections=settings.max_connections,
        )
        web: WebServer | None = None
        visits = Visits(load.state_directory(self.settings) / "visits" / f"{settings.http_port}")
        try:
            tracker = Tracker(pool, Keys.derived(keyring.derive), visits.add)
            view = WebView(pool, keyring, settings.public_url, self.settings.mail)
            web = _bind(Web(pool, keyring.derive("unsubscribe"), self._changed, tracker, view), settings.http_host, settings.http_port)
            await web.start()
            await _listen(listener, settings.smtp_host, settings.smtp_port)
            self._tasks.append(asyncio.create_task(self._follow(policy)))
            self._tasks.append(asyncio.create_task(visits.run(pool)))
            sys.stdout.write(f"inbound ready smtp={_shown(listener.address)} http={_shown(web.address)}\n")
            sys.stdout.flush()
            await self._stop.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(listener.stop(), *([web.stop()] if web else []), *self._tasks, return_exceptions=True)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._redis.aclose(), 0.2)
            pool.terminate()
            visits.close()

    async def _follow(self, policy: MailPolicy) -> None:
        """Keep the domains fresh; while PostgreSQL is away the last known ones stand."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await policy.refresh()
            except Unavailable as failure:
                log.warning("cannot read the return-path domains", reason=str(failure))

    async def _changed(self) -> None:
        """Tell the engines. They also look every second, so a lost word costs a second and a Redis that is away nothing more."""
        with contextlib.suppress(redis.exceptions.RedisError, OSError, TimeoutError):
            await asyncio.wait_for(self._redis.publish(redis_keys.CHANGES, "suppressions"), PUBLISH_TIMEOUT_SECONDS)


def _bind(web: Web, host: str, port: int) -> WebServer:
    try:
        return WebServer(web, host, port)
    except OSError as failure:
        raise ConfigurationError([f"inbound.http_port: cannot listen on {host}:{port}: {failure.strerror or failure}"]) from failure


async def _listen(listener: Listener, host: str, port: int) -> None:
    try:
        await listener.start()
    except OSError as failure:
        raise ConfigurationError([f"inbound.smtp_port: cannot listen on {host}:{port}: {failure.strerror or failure}"]) from failure


def _shown(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
