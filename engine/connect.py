"""Opens one SMTP connection to a delivery server, as far as the first MAIL, and hands its transport over.

aiosmtplib does greeting, EHLO, STARTTLS and AUTH; the transport then belongs to `ext.smtp_session`. Every step is bounded.
Whatever goes wrong becomes a ConnectFailed with one sentence that a user can act on; no password is ever part of it.
How TLS is checked and when AUTH is allowed is said in `domain.connect_failure`.
"""

import asyncio
import functools
import os
import re
import socket
import ssl
from collections.abc import Awaitable
from typing import Any, TypeVar

import aiosmtplib
import msgspec

from domain.connect_failure import AUTH_MECHANISMS, checks_certificate, choose_auth, is_loopback, shown, tls_sentence
from domain.egress import DeliveryServer
from domain.errors import ConnectFailed
from domain.reply import one_line

STEP_TIMEOUT_SECONDS = 30.0  # EHLO, STARTTLS with its handshake, AUTH: each; a smaller command timeout of the server wins
KEEPALIVE_IDLE_SECONDS = 60
KEEPALIVE_INTERVAL_SECONDS = 15
KEEPALIVE_PROBES = 4
UNACKNOWLEDGED_SECONDS = 120  # written and not acknowledged for so long: the link is dead (TCP_USER_TIMEOUT)
_OWN_NAME_SECONDS = 2.0
_MAX_KEYWORDS = 100
_HEARD_LIMIT = 65536
_KEYWORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")

# The last good answer for each delivery server: a name server that is away must not stop mail to a host that is there.
_last_found: dict[tuple[str, int], Any] = {}

# The only answers of a resolver that speak about the name; every other one is about the resolver, or about us.
_NO_SUCH_HOST = frozenset(getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY") if hasattr(socket, name))

_T = TypeVar("_T")


class Connected(msgspec.Struct, kw_only=True):
    """An open SMTP connection on which no command is outstanding; reading is paused until `SmtpSession.start`.

    `capabilities` are the EHLO keywords in the server's order, upper case. `size` is the largest message it takes in octets,
    0 when it does not say. `tls` is the protocol version, empty without TLS.
    """

    transport: Any
    banner: str
    capabilities: tuple[str, ...]
    pipelining: bool
    chunking: bool
    eightbitmime: bool
    smtputf8: bool
    size: int
    peer_ip: str
    source_ip: str
    tls: str
    verified: bool


class _Ear(asyncio.Protocol):
    """Listens in between transport and aiosmtplib, which silently drops what a server says out of turn."""

    def __init__(self, inner: aiosmtplib.protocol.SMTPProtocol) -> None:
        self._inner = inner
        self.heard = bytearray()

    def data_received(self, data: bytes) -> None:
        if len(self.heard) < _HEARD_LIMIT:
            self.heard += data
        self._inner.data_received(data)

    def eof_received(self) -> bool:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def _count_replies(heard: bytes | bytearray) -> int:
    """Complete replies in `heard`; -1 when something follows the last of them."""
    lines = bytes(heard).split(b"\n")
    if lines.pop():
        return -1
    if lines and lines[-1][3:4] == b"-":
        return -1
    return sum(1 for line in lines if line[3:4] != b"-")


class _Handshake:
    """One connection attempt; its methods are the steps, in order."""

    def __init__(self, server: DeliveryServer, step_timeout: float) -> None:
        self.server = server
        self.where = f"{server.host}:{server.port}"
        self.step_timeout = step_timeout
        self.client: aiosmtplib.SMTP | None = None
        self.ear: _Ear | None = None

    def failed(self, stage: str, sentence: str, *, permanent: bool = False, reply: str = "") -> ConnectFailed:
        return ConnectFailed(stage, sentence, permanent=permanent, reply=reply)

    # --- TCP ---------------------------------------------------------------------------------------------------------
    async def open_socket(self, source_address: str | None) -> socket.socket:
        """Resolve the host and connect to the first address that answers, within the server's connect timeout."""
        server, loop = self.server, asyncio.get_running_loop()
        limit = loop.time() + server.connect_timeout_seconds
        key = (server.host, server.port)
        try:
            async with asyncio.timeout_at(limit):
                found = await loop.getaddrinfo(*key, type=socket.SOCK_STREAM)
            _last_found[key] = found
        except TimeoutError:
            if key not in _last_found:
                sentence = f"looking up {server.host} took longer than {server.connect_timeout_seconds:g} seconds"
                raise self.failed("resolve", sentence) from None
            limit += server.connect_timeout_seconds
            found = _last_found[key]
        except (OSError, UnicodeError) as error:
            # Without a descriptor the resolver reads neither its settings nor an answer, and says "no such host"
            lacking = _lacking()
            if not lacking and (isinstance(error, UnicodeError) or (isinstance(error, socket.gaierror) and error.errno in _NO_SUCH_HOST)):
                raise self.failed("resolve", f"there is no host {server.host}; check the host name", permanent=True) from None
            if key not in _last_found:
                reason = lacking or (one_line(str(error.strerror or error).encode()) if isinstance(error, OSError) else "")
                sentence = f"{server.host} could not be looked up ({reason}); it will be tried again"
                raise self.failed("resolve", sentence) from None
            found = _last_found[key]
        if source_address is not None:
            family = socket.AF_INET6 if ":" in source_address else socket.AF_INET
            found = [entry for entry in found if entry[0] == family]
        if not found:
            raise self.failed("resolve", f"{server.host} has no address of the kind of {source_address}", permanent=True)
        trouble = ""
        for index, (family, kind, proto, _, address) in enumerate(found[:_MAX_KEYWORDS]):
            try:
                sock = socket.socket(family, kind, proto)
            except OSError as error:  # no descriptor, no memory, no such address family
                trouble = f"cannot connect to {self.where}: this machine gives no socket: {error.strerror or error}"
                continue
            try:
                sock.setblocking(False)
                _keep_alive(sock)
                if source_address is not None:
                    sock.bind((source_address, 0))
                # A share of the time each: a first address that never answers must not cost the others their turn.
                now = loop.time()
                async with asyncio.timeout_at(now + (limit - now) / (len(found) - index)):
                    await loop.sock_connect(sock, address)
                return sock
            except TimeoutError:
                # asyncio.timeout and the kernel's ETIMEDOUT alike
                trouble = f"no answer from {self.where} ({address[0]}) within {server.connect_timeout_seconds:g} seconds"
                sock.close()
            except ConnectionRefusedError:
                trouble = f"{self.where} ({address[0]}) refused the connection; check that an SMTP server listens there"
                sock.close()
            except OSError as error:
                sock.close()
                trouble = f"cannot connect to {self.where} ({address[0]}): {error.strerror or error}"
            except BaseException:
                sock.close()
                raise
        raise self.failed("connect", trouble)

    # --- SMTP --------------------------------------------------------------------------------------------------------
    async def greet(self, sock: socket.socket, context: ssl.SSLContext | None, ehlo_name: str) -> str:
        """Read the greeting (after the TLS handshake with implicit TLS); the greeting's text is returned."""
        server = self.server
        implicit = server.security == "tls"
        try:
            client = aiosmtplib.SMTP(
                hostname=server.host,
                sock=sock,
                use_tls=implicit,
                start_tls=False,
                tls_context=context,
                local_hostname=ehlo_name,
                timeout=server.connect_timeout_seconds,
            )
        except ValueError as error:
            sock.close()
            raise self.failed("ehlo", f"cannot say EHLO as {ehlo_name!r:.80}: {error}", permanent=True) from None
        try:
            reply = await client.connect()
        except aiosmtplib.SMTPConnectResponseError as error:
            text = shown(error.code, error.message)
            raise self.failed("greeting", f"{self.where} turned us away at the greeting: {text}", reply=text) from None
        except aiosmtplib.SMTPConnectTimeoutError as error:
            if isinstance(error.__cause__, aiosmtplib.SMTPTimeoutError):
                seconds = f"{server.connect_timeout_seconds:g} seconds"
                raise self.failed("greeting", f"{self.where} is connected but sent no greeting within {seconds}") from None
            raise self.failed(
                "tls", f"the TLS handshake with {self.where} took longer than {server.connect_timeout_seconds:g} seconds"
            ) from None
        except aiosmtplib.SMTPConnectError as error:
            if isinstance(error.__cause__, aiosmtplib.SMTPServerDisconnected) or not implicit:
                raise self.failed("greeting", f"{self.where} closed the connection before its greeting") from None
            raise self._tls_failed(error.__cause__ or error) from None
        except aiosmtplib.SMTPResponseException as error:
            raise self.failed("greeting", f"{self.where} does not greet like an SMTP server: {shown(0, error.message)}") from None
        except (ssl.SSLError, OSError) as error:
            raise self._tls_failed(error) from None
        finally:
            if client.transport is None:
                sock.close()
        self.client = client
        client.timeout = self.step_timeout
        self._listen()
        return one_line(reply.message.encode("utf-8", "surrogateescape"))

    def _listen(self) -> None:
        assert self.client is not None
        assert self.client.protocol is not None
        self.ear = _Ear(self.client.protocol)
        transport: Any = self.client.transport
        transport.set_protocol(self.ear)

    async def step(self, stage: str, name: str, action: Awaitable[_T], replies: int = 1) -> _T:
        """Do one command and make sure that the server said `replies` replies and not an octet more."""
        assert self.ear is not None
        if self.ear.heard:
            raise self.failed(stage, f"{self.where} spoke before it was asked, before {name}: {one_line(bytes(self.ear.heard[:200]))}")
        try:
            async with asyncio.timeout(self.step_timeout + 1.0):
                result = await action
        except (aiosmtplib.SMTPTimeoutError, TimeoutError):
            raise self.failed(stage, f"{self.where} did not answer {name} within {self.step_timeout:g} seconds") from None
        except aiosmtplib.SMTPServerDisconnected:
            raise self.failed(stage, f"{self.where} closed the connection at {name}") from None
        if _count_replies(self.ear.heard) != replies:
            # Text behind the 220 to STARTTLS could be an attacker's, read as if it came over TLS (RFC 3207, S13);
            # anywhere else it means that replies and commands no longer match.
            raise self.failed(stage, f"{self.where} sent more than its reply to {name}; the connection was dropped")
        self.ear.heard.clear()
        return result

    async def hello(self) -> None:
        """EHLO, or HELO where EHLO is not understood and nothing of ours depends on it."""
        assert self.client is not None
        try:
            await self.step("ehlo", "EHLO", self.client.ehlo())
            return
        except aiosmtplib.SMTPHeloError as error:
            text = shown(error.code, error.message)
            plain = self.server.security == "none" and not self.server.username
            if not plain or not 500 <= error.code < 505 or not self.client.is_connected:
                raise self.failed("ehlo", f"{self.where} refused EHLO: {text}", reply=text) from None
        except (aiosmtplib.SMTPResponseException, ValueError) as error:
            raise self.failed("ehlo", f"{self.where} answered EHLO with something that is not a reply: {shown(0, str(error))}") from None
        assert self.ear is not None
        self.ear.heard.clear()
        try:
            await self.step("ehlo", "HELO", self.client.helo())
        except aiosmtplib.SMTPResponseException as error:
            text = shown(error.code, error.message)
            raise self.failed("ehlo", f"{self.where} refused EHLO and HELO: {text}", reply=text) from None

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """STARTTLS, handshake, EHLO again: nothing said before the handshake counts."""
        assert self.client is not None
        if not self.client.supports_extension("starttls"):
            raise self.failed(
                "tls",
                f"TLS is required but {self.where} does not offer STARTTLS; choose another port, implicit TLS, or security none",
                permanent=True,
            )
        try:
            await self.step("tls", "STARTTLS", self.client.starttls(tls_context=context))
        except aiosmtplib.SMTPResponseException as error:
            text = shown(error.code, error.message)
            raise self.failed("tls", f"{self.where} refused STARTTLS: {text}", reply=text, permanent=error.code >= 500) from None
        except (OSError, aiosmtplib.SMTPException) as error:
            raise self._tls_failed(error) from None
        self._listen()
        await self.hello()

    def _tls_failed(self, error: BaseException) -> ConnectFailed:
        return self.failed("tls", tls_sentence(self.where, error), permanent=isinstance(error, ssl.SSLCertVerificationError))

    async def authenticate(self, username: str, password: str, *, encrypted: bool) -> None:
        """One AUTH command by the best mechanism both sides have; a wrong password is tried once, not once per mechanism."""
        client = self.client
        assert client is not None
        if not client.supports_extension("auth"):
            hint = "" if encrypted else "; many servers offer it only over TLS"
            raise self.failed("auth", f"{self.where} does not offer authentication, but a user name is configured{hint}", permanent=True)
        offered = client.server_auth_methods
        chosen = choose_auth(offered, encrypted=encrypted)
        if chosen is None:
            names = one_line(" ".join(offered[:10]).encode()) or "none"
            raise self.failed("auth", f"{self.where} offers none of {AUTH_MECHANISMS} (it offers: {names})", permanent=True)
        action = {"plain": client.auth_plain, "login": client.auth_login, "cram-md5": client.auth_crammd5}[chosen]
        try:
            await self.step("auth", "AUTH", action(username, password), replies=1 if chosen == "plain" else 2)
        except aiosmtplib.SMTPResponseException as error:
            text = shown(error.code, error.message)
            if error.code in (535, 534, 530, 538):
                sentence = f"{self.where} refused the user name or password of {username!r}: {text}"
            else:
                sentence = f"{self.where} did not accept AUTH {chosen.upper()}: {text}"
            raise self.failed("auth", sentence, permanent=error.code >= 500, reply=text) from None
        except aiosmtplib.SMTPException:
            raise self.failed("auth", f"AUTH {chosen.upper()} with {self.where} failed") from None
        except ValueError:
            # Its text could quote what it could not encode: the password.
            raise self.failed("auth", "the user name or password holds characters that AUTH cannot carry", permanent=True) from None

    def release(self) -> Any:
        """Take the transport away from aiosmtplib. The emptied client must never be closed: it would close the transport."""
        assert self.client is not None
        assert self.ear is not None
        transport: Any = self.client.transport
        if transport is None or transport.is_closing():
            raise self.failed("ehlo", f"{self.where} closed the connection after the handshake")
        transport.pause_reading()
        if self.ear.heard:
            raise self.failed("ehlo", f"{self.where} spoke before it was asked: {one_line(bytes(self.ear.heard[:200]))}")
        self.client.transport = self.client.protocol = None
        return transport

    def drop(self) -> None:
        """Give the connection up at once."""
        if self.client is not None and self.client.transport is not None:
            transport: Any = self.client.transport
            transport.abort()
            self.client.close()


async def connect(
    server: DeliveryServer,
    *,
    password: str,
    ehlo_name: str,
    source_address: str | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> Connected:
    """Open a connection to `server`, ready for its first MAIL.

    `ssl_context` replaces the one chosen by the rules above (for a private certificate authority); it is used as it is.
    Raises ConnectFailed and nothing else but CancelledError; after either no socket is left open.
    """
    handshake = _Handshake(server, min(STEP_TIMEOUT_SECONDS, server.limits.command_timeout_seconds))
    context: ssl.SSLContext | None = None
    if server.security != "none":
        context = ssl_context or await asyncio.to_thread(_context, checks_certificate(server.host, server.username))
    verified = context is not None and context.verify_mode == ssl.CERT_REQUIRED
    try:
        sock = await handshake.open_socket(source_address)
        banner = await handshake.greet(sock, context, ehlo_name)
        await handshake.hello()
        if server.security == "starttls":
            assert context is not None
            await handshake.start_tls(context)
        if server.username:
            if context is not None and not verified and not is_loopback(server.host):
                sentence = f"the password is not sent to {handshake.where} because its certificate is not checked"
                raise handshake.failed("auth", sentence, permanent=True)
            await handshake.authenticate(server.username, password, encrypted=context is not None)
        extensions = handshake.client.esmtp_extensions if handshake.client is not None else {}
        transport = handshake.release()
    except BaseException:
        handshake.drop()
        raise
    peer, source = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    tls = transport.get_extra_info("ssl_object")
    return Connected(
        transport=transport,
        banner=banner,
        capabilities=tuple(word.upper() for word in extensions if _KEYWORD.fullmatch(word))[:_MAX_KEYWORDS],
        pipelining="pipelining" in extensions,
        chunking="chunking" in extensions,
        eightbitmime="8bitmime" in extensions,
        smtputf8="smtputf8" in extensions,
        size=_size(extensions.get("size", "")),
        peer_ip=peer[0] if peer else "",
        source_ip=source[0] if source else "",
        tls=tls.version() or "" if tls is not None else "",
        verified=verified,
    )


@functools.cache
def _context(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if lacking := _lacking():
        # It was made without the certificates it trusts, silently, and it would be kept (nothing that raises is)
        raise ConnectFailed("tls", f"the trusted certificates could not be read: {lacking}; it will be tried again", permanent=False)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def own_name() -> str:
    """The full name of this machine, for EHLO; what it calls itself where no name server answers within two seconds."""
    try:
        async with asyncio.timeout(_OWN_NAME_SECONDS):
            return await asyncio.to_thread(socket.getfqdn)
    except TimeoutError:
        return socket.gethostname()


def _lacking() -> str:
    """Why this process can open nothing just now, in words; empty when it can."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return f"this machine lacks something: {error.strerror}"
    return ""


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Linux names; elsewhere the system's own times hold.
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_SECONDS * 1000),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _size(value: str) -> int:
    digits = value.strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else 0
