"""The inbound process: builds the listener and the web side, starts them in order, ends them within two seconds of SIGTERM.

A part that dies of anything but a store's trouble ends the process: half of it looks alive. The supervisor starts a whole one.
"""

import asyncio
import contextlib
import ipaddress
import signal
import ssl
import sys
from collections.abc import Coroutine
from typing import Any, Final

import msgspec
import redis.asyncio
import redis.exceptions
import structlog

from config import load, tasks
from config.keys import Keyring, load_keyring
from config.settings import Settings
from domain.errors import ConfigurationError, Invalid
from domain.links import is_web_address
from domain.mailbox import parse as parse_mailbox
from inbound import handling, metrics
from inbound.door import Door, Patience
from inbound.listener import Certificate, Listener
from inbound.mailboxes import collectors
from inbound.policy import MailPolicy
from inbound.postback import Postbacks
from inbound.requests import Requests
from inbound.session import Limits
from inbound.submission import Submission
from inbound.tracking import Keys, Tracker
from inbound.unsubscribe_copies import UnsubscribeCopies
from inbound.web import Web, WebServer
from inbound.web_view import WebView
from inbound.worker import Worker
from journal.feedback_files import FeedbackFiles
from journal.visits import Visits
from store import batch_queue, bounces, postgres, redis_keys
from store.trouble import is_store_trouble, sentence

log = structlog.get_logger(__name__)

REFRESH_SECONDS: Final = 2.0  # a new MFROM domain is taken mail for this soon
PUBLISH_TIMEOUT_SECONDS: Final = 1.0
STATUS_LIFETIME_SECONDS: Final = 5
STOPPING_SECONDS: Final = 1.5


class Inbound:
    """The parts and their life."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stop = asyncio.Event()
        self._failed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._redis: redis.asyncio.Redis

    async def run(self) -> bool:
        """Live until SIGTERM or SIGINT. False: a part died, and the process with it. Raises Unavailable, ConfigurationError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        settings = self.settings.inbound
        keyring = load_keyring(self.settings)
        database = self.settings.database
        pool = await postgres.open_pool(database.url, database.pool_size, database.command_timeout_seconds)
        self._redis = batch_queue.connect(self.settings.redis.url, self.settings.redis.timeout_seconds)
        policy = MailPolicy.of(self.settings, pool, keyring)
        await policy.refresh()
        certificate = Certificate(settings.tls_certificate_file, settings.tls_key_file) if settings.tls_certificate_file else None
        submission = Submission(pool, keyring, self.settings, self._tell)
        listeners = self._listeners(policy, certificate, submission)
        collecting = collectors(
            pool,
            policy,
            map(parse_mailbox, settings.mailboxes),
            interval_seconds=settings.mailbox_interval_seconds,
            max_message_bytes=settings.max_message_bytes,
        )
        web: WebServer | None = None
        state = load.state_directory(self.settings)
        visits = Visits(state / "visits" / f"{settings.http_port}")
        asked = Visits(state / "requests" / f"{settings.http_port}")
        files = self._files()
        try:
            tracker = Tracker(pool, Keys.derived(keyring.derive), visits.add)
            view = WebView(pool, keyring, settings.public_url, self.settings.mail)
            postbacks = Postbacks(pool, keyring.derive)
            requests = Requests(asked, postbacks, self.settings.mail.list_unsubscribe_to)
            site = Web(keyring.derive("unsubscribe"), self._changed, tracker, view, postbacks, requests)
            web = _bind(site, settings.http_host, settings.http_port)
            await web.start()
            for name, listener in listeners.items():
                await _listen(listener, name, settings.smtp_host)
            self._start("domains and rules", self._follow(policy, certificate))
            for each in collecting:
                self._start("mailbox", each.run())
            self._start("visits", visits.run(pool, requests.carry_out))
            self._start("requests", requests.run(pool))
            copies = self._copies(pool, keyring)
            self._start("copies of unsubscribes", copies.run())
            worker = self._worker(pool, keyring, policy)
            self._start("worker", worker.run())
            self._start("accounting files", files.run(pool))
            if settings.metrics_port:
                metrics.serve(settings.metrics_port, worker, visits, asked, copies)
            node = load.node_name(self.settings)
            status = metrics.Status(f"{node}:{web.address[1]}", node, worker, visits, asked, files, copies, collecting)
            self._start("heartbeat", self._publish(status))
            doors = " ".join(f"{name}={_shown(listener.address)}" for name, listener in listeners.items())
            sys.stdout.write(f"inbound ready {doors} http={_shown(web.address)}\n")
            sys.stdout.flush()
            await self._stop.wait()
        finally:
            await asyncio.gather(
                *(listener.stop() for listener in listeners.values()),
                *([web.stop()] if web else []),
                tasks.end(self._tasks, STOPPING_SECONDS),
                return_exceptions=True,
            )
            with contextlib.suppress(Exception):
                async with asyncio.timeout(0.2):
                    await self._redis.aclose()
            pool.terminate()
            visits.close()
            asked.close()
            files.close()
        return not self._failed

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:
                if self._stop.is_set():
                    raise  # an answer to its cancellation: `tasks.end` says so
                log.exception("a part of the inbound process failed; the process stops", part=name)
                self._failed = True
                self._stop.set()

        self._tasks.append(asyncio.create_task(guarded(), name=name))

    def _worker(self, pool: postgres.Pool, keyring: Keyring, policy: MailPolicy) -> Worker:
        settings = self.settings.inbound
        rules = bounces.Rules(
            soft_bounce_threshold=settings.soft_bounce_threshold,
            pause_sender_faults=settings.pause_sender_faults,
            pause_sender_fault_percent=settings.pause_sender_fault_percent,
            node=load.node_name(self.settings),
            unsubscribe_copy_to=self.settings.mail.list_unsubscribe_to,
        )
        keys = handling.Keys(keyring.derive("return-path"), keyring.derive("unsubscribe"))
        return Worker(
            pool, keys, rules, self._tell, keep_days=settings.keep_days, admin_address=settings.admin_address, forwards=policy.forwards
        )

    def _copies(self, pool: postgres.Pool, keyring: Keyring) -> UnsubscribeCopies:
        copy_to = self.settings.mail.list_unsubscribe_to
        return UnsubscribeCopies(pool, copy_to if is_web_address(copy_to) else "", keyring.derive("unsubscribe-copy"))

    def _files(self) -> FeedbackFiles:
        accounting = self.settings.accounting
        return FeedbackFiles(
            load.node_name(self.settings),
            load.state_directory(self.settings) / "feedback",
            load.remote_path(self.settings),
            load.feedback_path(self.settings),
            max_size_bytes=accounting.max_size_bytes,
            interval_seconds=accounting.flush_interval_seconds,
        )

    def _listeners(self, policy: MailPolicy, certificate: Certificate | None, submission: Submission) -> dict[str, Listener]:
        """By the names of their settings, without `_port`; those of port 0 are left out."""
        settings = self.settings.inbound
        limits = Limits(settings.max_connections, Patience())
        door = Door(
            hostname=load.node_name(self.settings),
            max_message_bytes=settings.max_message_bytes,
            tls=certificate.context if certificate else None,
            proxies=tuple(ipaddress.ip_network(each) for each in settings.proxy_addresses),
        )
        ports = {"smtp": settings.smtp_port, "submission": settings.submission_port, "lmtp": settings.lmtp_port}
        return {
            name: Listener(
                policy,
                limits,
                door._replace(lmtp=name == "lmtp", submissions=submission if name == "submission" else None),
                host=settings.smtp_host,
                port=port,
            )
            for name, port in ports.items()
            if port
        }

    async def _follow(self, policy: MailPolicy, certificate: Certificate | None) -> None:
        """Keep domains, forwarding rules and certificate fresh; while something is away or wrong, the last good one stands."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            if certificate is not None:
                try:
                    certificate.refresh()
                except (OSError, ssl.SSLError) as failure:
                    log.warning("the new TLS certificate cannot be used; the old one stays", reason=str(failure))
            try:
                await policy.refresh()
            except Exception as failure:
                if not (isinstance(failure, Invalid) or is_store_trouble(failure)):  # Invalid: somebody wrote rules into the table
                    raise
                log.warning("cannot read the return-path domains and forwarding rules", reason=sentence(failure))

    async def _publish(self, status: metrics.Status) -> None:
        """Say every second how it goes, for `sluice status`; nothing here depends on it."""
        while True:
            try:
                async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
                    said = msgspec.json.encode(status.heartbeat())
                    await self._redis.set(redis_keys.inbound_status(status.id), said, ex=STATUS_LIFETIME_SECONDS)
            except Exception as error:
                if not is_store_trouble(error):
                    raise
            await asyncio.sleep(1.0)

    async def _changed(self) -> None:
        await self._tell("suppressions")

    async def _tell(self, what: str) -> None:
        """Tell the engines. They also look every second, so a lost word costs a second and a Redis that is away nothing more."""
        with contextlib.suppress(redis.exceptions.RedisError, OSError, TimeoutError):
            async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
                await self._redis.publish(redis_keys.CHANGES, what)


def _bind(web: Web, host: str, port: int) -> WebServer:
    try:
        return WebServer(web, host, port)
    except OSError as failure:
        raise ConfigurationError([f"inbound.http_port: cannot listen on {host}:{port}: {failure.strerror or failure}"]) from failure


async def _listen(listener: Listener, name: str, host: str) -> None:
    try:
        await listener.start()
    except OSError as failure:
        raise ConfigurationError(
            [f"inbound.{name}_port: cannot listen on {host}:{listener.port}: {failure.strerror or failure}"]
        ) from failure


def _shown(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
