"""One test message through a delivery server, step by step, so that the answer names the stage that failed (requirement 27).

Engines connect through `engine.connect`, which this process may not import; the rules for TLS and AUTH are in `domain.connect_failure`
for both.
"""

import asyncio
import email.message
import email.policy
import email.utils
import socket
import ssl
import time
from collections.abc import Awaitable
from typing import Any, Literal, TypeVar

import aiosmtplib
import msgspec

from domain.address import Address
from domain.connect_failure import AUTH_MECHANISMS, checks_certificate, choose_auth, shown, tls_sentence
from domain.egress import DeliveryServer
from domain.errors import ConnectFailed
from domain.reply import one_line

STEP_TIMEOUT_SECONDS = 20.0
TOTAL_TIMEOUT_SECONDS = 90.0

Stage = Literal["resolve", "connect", "tls", "greeting", "ehlo", "auth", "mail", "rcpt", "data", "done"]

T = TypeVar("T")


class TrialResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. `stage` is how far it got; `reply` is the server's last word, where it said one."""

    email_delivery: Literal["passed", "failed"]
    stage: Stage
    sentence: str
    seconds: float
    reply: str = ""


async def send(server: DeliveryServer, password: str, to: Address) -> TrialResult:
    """Connect and send. Never raises for what the server does; ends within 90 s whatever it does."""
    began = time.monotonic()
    trial = _Trial(server)
    try:
        async with asyncio.timeout(TOTAL_TIMEOUT_SECONDS):
            reply = await trial.run(password, to)
    except ConnectFailed as error:
        seconds = round(time.monotonic() - began, 3)
        return TrialResult(email_delivery="failed", stage=trial.stage, sentence=str(error), seconds=seconds, reply=error.reply)
    except TimeoutError:
        sentence = f"{trial.where} took longer than {TOTAL_TIMEOUT_SECONDS:.0f} seconds altogether"
        return TrialResult(email_delivery="failed", stage=trial.stage, sentence=sentence, seconds=round(time.monotonic() - began, 3))
    finally:
        trial.close()
    sentence = f"{trial.where} accepted the test message for {to.text}"
    return TrialResult(email_delivery="passed", stage="done", sentence=sentence, seconds=round(time.monotonic() - began, 3), reply=reply)


class _Trial:
    """One attempt; `stage` is where it stands."""

    def __init__(self, server: DeliveryServer) -> None:
        self.server = server
        self.where = f"{server.host}:{server.port}"
        self.stage: Stage = "resolve"
        self.client: aiosmtplib.SMTP | None = None
        self.step_timeout = min(STEP_TIMEOUT_SECONDS, server.limits.command_timeout_seconds)

    def close(self) -> None:
        """Give the connection up."""
        if self.client is not None and self.client.transport is not None:
            transport: Any = self.client.transport
            transport.abort()
            self.client.close()

    async def run(self, password: str, to: Address) -> str:
        """Raises ConnectFailed at the first thing that goes wrong."""
        server = self.server
        limit = f"{server.connect_timeout_seconds:g} seconds"
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(server.connect_timeout_seconds):
                await loop.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise self._failed(f"looking up {server.host} took longer than {limit}") from None
        except (OSError, UnicodeError):
            raise self._failed(f"there is no host {server.host}; check the host name") from None
        self.stage = "connect"
        context = await asyncio.to_thread(_context, checks_certificate(server.host, server.username)) if server.security != "none" else None
        self.client = client = aiosmtplib.SMTP(
            hostname=server.host,
            port=server.port,
            use_tls=server.security == "tls",
            start_tls=False,
            tls_context=context,
            local_hostname=_own_name(),
            timeout=server.connect_timeout_seconds,
        )
        try:
            await client.connect()
        except aiosmtplib.SMTPException as error:
            raise self._not_connected(error, limit) from None
        except OSError as error:
            raise self._failed(f"cannot connect to {self.where}: {error.strerror or error}") from None
        client.timeout = self.step_timeout
        self.stage = "ehlo"
        await self._step("EHLO", client.ehlo())
        if server.security == "starttls":
            self.stage = "tls"
            if not client.supports_extension("starttls"):
                raise self._failed(
                    f"TLS is required but {self.where} does not offer STARTTLS; choose another port, implicit TLS, or security none"
                )
            await self._step("STARTTLS", client.starttls(tls_context=context))
            await self._step("EHLO", client.ehlo())
        if server.username:
            await self._authenticate(client, password, context)
        return await self._message(client, to)

    async def _authenticate(self, client: aiosmtplib.SMTP, password: str, context: ssl.SSLContext | None) -> None:
        self.stage = "auth"
        if not client.supports_extension("auth"):
            hint = "" if context else "; many servers offer it only over TLS"
            raise self._failed(f"{self.where} does not offer authentication, but a user name is configured{hint}")
        offered = client.server_auth_methods
        chosen = choose_auth(offered, encrypted=context is not None)
        if chosen is None:
            raise self._failed(f"{self.where} offers none of {AUTH_MECHANISMS}")
        method = {"plain": client.auth_plain, "login": client.auth_login, "cram-md5": client.auth_crammd5}[chosen]
        try:
            await self._step(f"the password of {self.server.username!r}", method(self.server.username, password))
        except ValueError:
            # its text could quote the password
            raise self._failed("the user name or password holds characters that AUTH cannot carry") from None

    async def _message(self, client: aiosmtplib.SMTP, to: Address) -> str:
        server = self.server
        if to.smtputf8 and not client.supports_extension("smtputf8"):
            self.stage = "rcpt"
            raise self._failed(f"{self.where} does not offer SMTPUTF8, which {to.text} needs")
        sender = server.mfrom if "@" in server.mfrom else f"test@{server.mfrom}" if server.mfrom else to.wire
        visible = server.enforced_from or sender
        message = email.message.EmailMessage()
        message["Subject"] = "Test message of Sluice"
        message["From"] = visible
        message["To"] = to.wire
        message["Date"] = email.utils.localtime()
        message["Message-ID"] = email.utils.make_msgid(domain=sender.rpartition("@")[2])
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(f"This message was sent to try the delivery server {server.name!r}.\nIt works.\n", cte="quoted-printable")
        wire = message.as_bytes(policy=email.policy.EmailPolicy(linesep="\r\n", utf8=to.smtputf8))
        options = ["SMTPUTF8"] if to.smtputf8 else []
        self.stage = "mail"
        await self._step(f"MAIL FROM {sender}", client.mail(sender, options=options, encoding="utf-8"))
        self.stage = "rcpt"
        await self._step(f"RCPT TO {to.text}", client.rcpt(to.wire, encoding="utf-8"))
        self.stage = "data"
        client.timeout = max(self.step_timeout, 60.0)
        reply = await self._step("the message", client.data(wire))
        try:
            async with asyncio.timeout(2):
                await client.quit()
        except (aiosmtplib.SMTPException, OSError, TimeoutError):
            pass  # the message is accepted; how the server says goodbye changes nothing
        return shown(reply.code, reply.message)

    async def _step(self, name: str, action: Awaitable[T]) -> T:
        """One command; whatever goes wrong becomes ConnectFailed."""
        assert self.client is not None
        limit = self.client.timeout or self.step_timeout
        try:
            async with asyncio.timeout(limit + 1.0):
                return await action
        except aiosmtplib.SMTPResponseException as error:
            text = shown(error.code, error.message)
            raise ConnectFailed(self.stage, f"{self.where} refused {name}: {text}", permanent=error.code >= 500, reply=text) from None
        except (aiosmtplib.SMTPTimeoutError, TimeoutError):
            raise self._failed(f"{self.where} did not answer {name} within {limit:g} seconds") from None
        except aiosmtplib.SMTPServerDisconnected:
            raise self._failed(f"{self.where} closed the connection at {name}") from None
        except (aiosmtplib.SMTPException, OSError) as error:
            if self.stage == "tls":
                raise self._failed(tls_sentence(self.where, error)) from None
            raise self._failed(f"{name} with {self.where} failed: {_short(error)}") from None

    def _failed(self, sentence: str) -> ConnectFailed:
        return ConnectFailed(self.stage, sentence)

    def _not_connected(self, error: aiosmtplib.SMTPException, limit: str) -> ConnectFailed:
        cause = error.__cause__ or error
        if isinstance(error, aiosmtplib.SMTPConnectResponseError):
            self.stage = "greeting"
            text = shown(error.code, error.message)
            return ConnectFailed(self.stage, f"{self.where} turned us away at the greeting: {text}", reply=text)
        if isinstance(cause, ConnectionRefusedError) or isinstance(cause.__cause__, ConnectionRefusedError):
            return self._failed(f"{self.where} refused the connection; check that an SMTP server listens there")
        if isinstance(cause, ssl.SSLError):
            self.stage = "tls"
            return self._failed(tls_sentence(self.where, cause))
        if isinstance(error, aiosmtplib.SMTPConnectTimeoutError):
            if isinstance(cause, aiosmtplib.SMTPTimeoutError):
                self.stage = "greeting"
                return self._failed(f"{self.where} is connected but sent no greeting within {limit}")
            return self._failed(f"no answer from {self.where} within {limit}")
        if isinstance(error, aiosmtplib.SMTPServerDisconnected) or isinstance(cause, aiosmtplib.SMTPServerDisconnected):
            self.stage = "greeting"
            return self._failed(f"{self.where} closed the connection before its greeting")
        return self._failed(f"cannot connect to {self.where}: {_short(cause)}")


def _context(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _own_name() -> str:
    name = socket.gethostname()
    return name if name.isascii() and "." in name else "localhost.localdomain"


def _short(error: BaseException) -> str:
    return one_line(str(error).encode("utf-8", "replace"))[:200] or type(error).__name__
