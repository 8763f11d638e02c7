"""Sends on what the rules say: takes due mails from the queue and hands them to a delivery server, again and again until it has them.

The mail goes as it came, so that its signature holds; only trace fields are put in front. The envelope sender is rewritten to an address
of ours (SRS). Nobody is told where a mail went, nor that it could not be sent on: who writes to abuse@ gets no answer from a machine.
"""

import asyncio
import email.utils
import ssl
from typing import Any, Final

import aiosmtplib
import msgspec
import structlog

from config.keys import Keyring
from domain.connect_failure import checks_certificate, choose_auth, shown, tls_sentence
from domain.egress import DeliveryServer, DeliveryServerLimits
from domain.errors import Invalid, NotFound
from domain.forwarding import MARKER, rewritten
from inbound.policy import MailPolicy, today
from store import egress, forwarding, postgres
from store.forwarding import Forward
from store.trouble import is_store_trouble, sentence

log = structlog.get_logger(__name__)

LOOK_SECONDS: Final = 1.0
AT_ONCE: Final = 8  # connections
TOTAL_TIMEOUT_SECONDS: Final = 300.0  # for one mail
LEASE_SECONDS: Final = TOTAL_TIMEOUT_SECONDS + 60.0  # what a process that died was sending is taken by the next one then
STEP_TIMEOUT_SECONDS: Final = 60.0
PRUNE_SECONDS: Final = 3600.0


class Outcome(msgspec.Struct, frozen=True):
    """What came of one try. `permanent`: trying again would be refused again."""

    reply: str
    sent: bool = False
    permanent: bool = False


class Forwarder:
    """Works the queue off for as long as the process lives. Several processes may: each mail is leased by one."""

    def __init__(self, pool: postgres.Pool, policy: MailPolicy, keyring: Keyring, hostname: str) -> None:
        self._pool = pool
        self._policy = policy
        self._keyring = keyring
        self._hostname = hostname
        self.sent = 0
        self.failed = 0
        self._pruned_at = -PRUNE_SECONDS

    async def run(self) -> None:
        """Look every second; while the store is away, nothing is lost."""
        while True:
            try:
                while await self.work():
                    pass
                await self._prune()
            except Exception as failure:
                if not is_store_trouble(failure):
                    log.exception("forwarding failed")
                else:
                    log.warning("mail cannot be forwarded now", reason=sentence(failure))
            await asyncio.sleep(LOOK_SECONDS)

    async def work(self) -> bool:
        """Send what is due, a few at once; whether there was anything. Raises Unavailable."""
        async with postgres.transaction(self._pool) as conn:
            due = await forwarding.claim(conn, AT_ONCE, LEASE_SECONDS)
            server = await self._server(conn) if due else None
        if not due:
            return False
        await asyncio.gather(*(self._one(each, server) for each in due))
        return server is not None

    async def _prune(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._pruned_at > PRUNE_SECONDS:
            async with postgres.transaction(self._pool) as conn:
                await forwarding.prune(conn)
            self._pruned_at = now

    async def _server(self, conn: postgres.PooledConnection) -> DeliveryServer | None:
        chosen = (await forwarding.get(conn)).delivery_server_id
        if chosen is not None:
            try:
                server = await egress.get(conn, None, chosen)
            except NotFound:
                return None
            return server if server.enabled else None
        return next((each for each in await egress.list_servers(conn, None, 0, 1000) if each.enabled), None)

    async def _one(self, mail: Forward, server: DeliveryServer | None) -> None:
        limits = server.limits if server is not None else DeliveryServerLimits()
        if server is None:
            outcome = Outcome("there is no delivery server that is enabled")
        else:
            try:
                async with asyncio.timeout(TOTAL_TIMEOUT_SECONDS):
                    outcome = await self._send(mail, server)
            except TimeoutError:
                outcome = Outcome(f"{server.host}:{server.port} took longer than {TOTAL_TIMEOUT_SECONDS:g} s")
        waits = limits.retry_schedule_seconds or (60.0,)
        wait = waits[min(mail.attempts, len(waits)) - 1]
        age = email.utils.localtime().timestamp() - mail.created_at.timestamp()
        again = None if outcome.sent or outcome.permanent or age + wait > limits.max_age_seconds else wait
        async with postgres.transaction(self._pool) as conn:
            await forwarding.settle(conn, mail.id, outcome.reply, sent=outcome.sent, again_in_seconds=again)
        if outcome.sent:
            self.sent += 1
            log.info("a message was forwarded", id=mail.inbound_id, attempt=mail.attempts)
        elif again is None:
            self.failed += 1
            log.warning("a message cannot be forwarded and is kept", id=mail.inbound_id, attempt=mail.attempts, reason=outcome.reply)
        else:
            log.info("a message will be forwarded later", id=mail.inbound_id, attempt=mail.attempts, reason=outcome.reply)

    async def _send(self, mail: Forward, server: DeliveryServer) -> Outcome:
        where = f"{server.host}:{server.port}"
        context = await asyncio.to_thread(_context, server) if server.security != "none" else None
        client = aiosmtplib.SMTP(
            hostname=server.host, port=server.port, use_tls=server.security == "tls", start_tls=False, tls_context=context,
            local_hostname=self._hostname if "." in self._hostname else "localhost.localdomain", timeout=server.connect_timeout_seconds,
        )  # fmt: skip
        ready = False
        try:
            await client.connect()
            client.timeout = STEP_TIMEOUT_SECONDS
            await client.ehlo()
            if server.security == "starttls":
                await client.starttls(tls_context=context)
                await client.ehlo()
            if server.username:
                await self._sign_in(client, server, encrypted=context is not None)
            ready = True  # from here on a refusal is about this mail
            domain = mail.recipient.rpartition("@")[2]
            sender = rewritten(self._policy.srs_key, mail.mail_from, domain, today())
            eight = client.supports_extension("8bitmime") and not mail.raw.isascii()
            await client.mail(sender, options=["BODY=8BITMIME"] if eight else [])
            await client.rcpt(mail.target)
            client.timeout = max(STEP_TIMEOUT_SECONDS, min(server.limits.final_dot_timeout_seconds, TOTAL_TIMEOUT_SECONDS))
            done = await client.data(self.traced(mail))
            return Outcome(shown(done.code, done.message), sent=True)
        except aiosmtplib.SMTPResponseException as error:
            return Outcome(f"{where}: {shown(error.code, error.message)}", permanent=ready and error.code >= 500)
        except Invalid:
            return Outcome(f"{where}: its password cannot be opened with this installation's key; set it again")
        except (aiosmtplib.SMTPException, OSError) as error:
            if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
                return Outcome(tls_sentence(where, error))
            return Outcome(f"{where}: {' '.join(str(error).split())[:200] or type(error).__name__}")
        finally:
            transport: Any = client.transport
            if transport is not None:
                transport.abort()  # what it has taken it has; how it says goodbye changes nothing
            client.close()

    async def _sign_in(self, client: aiosmtplib.SMTP, server: DeliveryServer, *, encrypted: bool) -> None:
        password = self._keyring.open(server.password_sealed, b"delivery_servers:%d" % server.id).decode() if server.password_sealed else ""
        chosen = choose_auth(client.server_auth_methods, encrypted=encrypted)
        if chosen is None:
            raise aiosmtplib.SMTPException("a user name is configured and no way to authenticate is offered")
        method = {"plain": client.auth_plain, "login": client.auth_login, "cram-md5": client.auth_crammd5}[chosen]
        await method(server.username, password)

    def traced(self, mail: Forward) -> bytes:
        """The mail with the fields that say that it went through here; the marker stops it the next time it comes."""
        date = email.utils.format_datetime(mail.received_at)
        trace = f"Received: by {self._hostname} (Sluice) id {mail.inbound_id};\r\n {date}\r\n{MARKER}: {self._policy.installation}\r\n"
        return trace.encode("ascii", "replace") + mail.raw


def _context(server: DeliveryServer) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not checks_certificate(server.host, server.username):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
