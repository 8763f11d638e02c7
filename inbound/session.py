"""One SMTP or LMTP connection: aiosmtpd, made fit for the open network.

What stock aiosmtpd 1.4.6 gets wrong is closed here: lines end with CRLF only and hold no control characters, the client waits for the
greeting and for the answers to EHLO, STARTTLS and DATA, every number of anything is limited, and so is time: for the TLS handshake, between
commands, in the content (a least rate) and in total. The content is read in chunks, not lines, so ten megabytes of empty lines cost ten
megabytes. TLS is the loop's own `start_tls`, over a stream that is known to be empty (RFC 3207 §6).
"""

import asyncio
import ipaddress
import logging
import re
import ssl
from collections import Counter, defaultdict
from typing import Any, Final

import structlog
from aiosmtpd.proxy_protocol import V2_CMD, get_proxy
from aiosmtpd.smtp import SMTP

from domain import address as addresses
from domain.errors import Invalid
from inbound.content import refusal
from inbound.door import Door, Patience, Policy, Refused
from inbound.sign_in import SignIn

log = structlog.get_logger(__name__)
logging.getLogger("mail.log").setLevel(logging.ERROR)  # aiosmtpd's own, which repeats what peers say

MAX_RECIPIENTS: Final = 100  # RFC 5321 §4.5.3.1.8
MAX_MESSAGES: Final = 100
MAX_COMMANDS: Final = 2000
MAX_ERRORS: Final = 20
MAX_IDLE_COMMANDS: Final = 30  # NOOP, RSET, VRFY, HELP: each of them
MAX_BUFFERED_BYTES: Final = 96 * 1024 * 1024  # content of all sessions together

_LINGER_SECONDS = 2.0  # for a peer to take our last words
_CHUNK = 65536
_END = b"\r\n.\r\n"
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_LIMITED = ("NOOP", "RSET", "VRFY", "HELP", "EHLO", "HELO", "EXPN")
_HTTP = ("GET", "POST", "PUT", "HEAD", "OPTIONS", "CONNECT", "DELETE", "PATCH", "TRACE", "PRI")

# Replies that aiosmtpd words without an enhanced status code (RFC 2034)
_STATUS = {
    "221": "2.0.0", "250": "2.0.0", "421": "4.7.0", "500": "5.5.1", "501": "5.5.4", "502": "5.5.1", "503": "5.5.1", "552": "5.3.4",
    "553": "5.1.3", "555": "5.5.4",
}  # fmt: skip


class Limits:
    """What all sessions of one process share."""

    def __init__(self, max_connections: int, patience: Patience) -> None:
        self.patience = patience
        self.max_connections = max_connections
        self.max_connections_per_peer = max(10, max_connections // 5)
        self.sessions: set[Session] = set()
        self.peers: Counter[str] = Counter()
        self.buffered_bytes = 0
        self.closing = False


class _Lines:
    """aiosmtpd's view of the stream: every command line is checked, every error of form ends the session."""

    def __init__(self, reader: asyncio.StreamReader, session: "Session") -> None:
        self._reader = reader
        self._session = session

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """One command line, CRLF included. Raises Refused on a bare LF, bare CR or another control character."""
        self._session.before_command()
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise Refused("500 5.5.2 Line too long") from None
        if not line.endswith(b"\r\n") or _CONTROL.search(line, 0, len(line) - 2):
            raise Refused("500 5.5.2 Lines end with CRLF and hold no control characters")
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


class Session(SignIn, SMTP):
    """One connection."""

    command_size_limit = 1024  # 512 and room for long local parts that some forwarders make
    line_length_limit = 4096  # of the stream: commands; the content has its own rule

    def __init__(self, policy: Policy, limits: Limits, door: Door) -> None:
        super().__init__(
            _Hooks(),
            data_size_limit=door.max_message_bytes,
            hostname=door.hostname,
            ident="LMTP" if door.lmtp else "ESMTP",
            timeout=limits.patience.idle,
            auth_exclude_mechanism=("LOGIN", "PLAIN"),
            command_call_limit=dict.fromkeys(_LIMITED, MAX_IDLE_COMMANDS) | {"*": MAX_COMMANDS},
            loop=asyncio.get_running_loop(),
        )
        self.command_size_limits = defaultdict(lambda: self.command_size_limit)
        self._policy = policy
        self._limits = limits
        self._door = door
        self.peer = ""
        self.recipients: list[Any] = []
        self.storing = False
        self.stored = asyncio.Event()
        self._encrypted = False
        self._commands = 0
        self._errors = 0
        self._messages = 0
        self._ending = False
        self._counted = 0
        self._counted_peer = ""
        self._session_timer: asyncio.TimerHandle | None = None

    # --- the life of a connection -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        address = transport.get_extra_info("peername")
        self.peer = _plain(str(address[0])) if isinstance(address, tuple) and address else ""
        self._limits.sessions.add(self)
        self._session_timer = self.loop.call_later(self._limits.patience.session, self._timeout_cb)

    def connection_lost(self, error: Exception | None) -> None:
        if self not in self._limits.sessions:
            return
        self._limits.sessions.discard(self)
        self._count_peer("")
        self._uncount()
        if self._session_timer is not None:
            self._session_timer.cancel()
        super().connection_lost(error)

    def _cb_client_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super()._cb_client_connected(reader, writer)
        self._stream = reader
        self._reader = _Lines(reader, self)

    def _count_peer(self, peer: str) -> None:
        """Count this session for `peer` and for nobody else; "" for nobody. Of IPv6 the first 64 bits count: one customer has them all."""
        peers = self._limits.peers
        if ":" in peer:
            peer = str(ipaddress.ip_network((peer, 64), strict=False))
        if self._counted_peer:
            peers[self._counted_peer] -= 1
            if peers[self._counted_peer] <= 0:
                del peers[self._counted_peer]
        self._counted_peer = peer
        if peer:
            peers[peer] += 1

    def _timeout_cb(self) -> None:
        if self.transport is not None:
            self.end("421 4.4.2 Timeout, closing")

    def end(self, reply: str) -> None:
        """Say why and close, without waiting for a peer that does not read."""
        transport: Any = self.transport
        if transport is None or transport.is_closing():
            return
        stuck = transport.get_write_buffer_size() > 0
        if not stuck:
            transport.write(reply.encode("ascii", "replace") + b"\r\n")
        if stuck or transport.get_write_buffer_size() > 0:
            transport.abort()  # close() would wait for it to read
        else:
            transport.close()
            self.loop.call_later(_LINGER_SECONDS, transport.abort)  # TLS waits for the peer's farewell, and it may go on sending

    async def _handle_client(self) -> None:
        limits = self._limits
        if limits.closing or len(limits.sessions) > limits.max_connections:
            self.end("421 4.7.0 Too many connections, come back later")
            return
        if not await self._proxied():
            self.end("421 4.7.0 This address is to send a PROXY header first")
            return
        if limits.peers[self._counted_peer] > limits.max_connections_per_peer:
            self.end("421 4.7.0 Too many connections, come back later")
            return
        await asyncio.sleep(limits.patience.greeting)
        if self._waiting():
            self.end("554 5.5.1 You talk before the greeting")
            return
        await super()._handle_client()

    async def _proxied(self) -> bool:
        """Learn who the peer is from the proxy it came through. False: a proxy that does not say."""
        if not self._door.proxies or not self.peer:
            self._count_peer(self.peer)
            return True
        address = ipaddress.ip_address(self.peer)
        if not any(address in network for network in self._door.proxies):
            self._count_peer(self.peer)
            return True
        self._reset_timeout(self._limits.patience.proxy)
        found = await get_proxy(self._stream)
        if not found.valid:
            log.warning("a proxy sent no PROXY header that can be read", peer=self.peer, reason=found.error)
            return False
        if found.src_addr and found.command != V2_CMD.LOCAL and not isinstance(found.src_addr, bytes):
            self.peer = _plain(str(found.src_addr))
            self._count_peer(self.peer)
        self._reset_timeout()
        return True

    def _waiting(self) -> bool:
        """Tell whether the peer has sent something already that we did not ask for."""
        return bool(self._stream._buffer)  # type: ignore[attr-defined]

    def before_command(self) -> None:
        """Count commands. Raises Refused over the limit, or when the process stops."""
        self._commands += 1
        if self._limits.closing:
            raise Refused("421 4.3.2 Shutting down")
        if self._commands > MAX_COMMANDS:
            raise Refused("421 4.7.0 Too many commands")

    async def push(self, status: Any, times: int = 1) -> None:
        """Answer, in LMTP once per recipient. A client that collects errors is shown out."""
        text = status if isinstance(status, str) else bytes(status).decode("ascii", "replace")
        # what aiosmtpd repeats of the peer's words must not become a line of its own
        text = "".join(char if " " <= char <= "~" else "?" for char in text)[:510]
        code, _, words = text.partition(" ")
        if code in _STATUS and words[1:2] != ".":
            text = f"{code} {_STATUS[code]} {words}"
        self._errors += text[:1] == "5"
        if self._errors > MAX_ERRORS and not self._ending:
            text, self._ending = "421 4.7.0 Too many errors", True
        if self._ending:
            self.end(text)
            raise asyncio.CancelledError
        await super().push("\r\n".join([text] * times))

    async def handle_exception(self, error: Exception) -> str:
        """A refused line and a bug of ours both end the session, in different words; `push` closes it."""
        self._ending = True
        if isinstance(error, Refused):
            return error.reply
        log.error("a session failed", peer=self.peer, error=repr(error))
        return "421 4.3.0 Internal error, closing"

    async def _must_wait(self, reply: str) -> None:
        """The client may send nothing behind this command before it was answered (RFC 2920 §3.1)."""
        if self._waiting():
            raise Refused(reply)

    # --- commands ---------------------------------------------------------------------------------------------------------

    async def smtp_EHLO(self, hostname: str) -> None:
        await self._hello("EHLO", hostname, extended=True)

    async def smtp_HELO(self, hostname: str) -> None:
        await self._hello("HELO", hostname)

    async def smtp_LHLO(self, hostname: str) -> None:
        await self._hello("LHLO", hostname, extended=True, lmtp=True)

    async def _hello(self, command: str, name: str | None, *, extended: bool = False, lmtp: bool = False) -> None:
        await self._must_wait(f"554 5.5.0 Wait for the answer to {command}")
        if lmtp != self._door.lmtp:
            await self.push(f"500 5.5.1 Say {'LHLO' if self._door.lmtp else 'EHLO'} here")
            return
        if not name:
            await self.push(f"501 5.5.4 Say {command} and your name")
            return
        self._set_rset_state()  # type: ignore[no-untyped-call]
        assert self.session is not None
        self.session.extended_smtp, self.session.host_name = extended, name
        offers = [self.hostname]
        if extended:
            offers += [f"SIZE {self.data_size_limit}", "8BITMIME", "PIPELINING", "ENHANCEDSTATUSCODES"]
            offers += ["STARTTLS"] if self._door.tls is not None and not self._encrypted else []
            offers += ["AUTH PLAIN LOGIN"] if self.may_sign_in() else []
        # the one reply that carries no enhanced status code (RFC 2034 §4)
        await super().push("\r\n".join(f"250{' ' if offer is offers[-1] else '-'}{offer}" for offer in offers))

    async def smtp_STARTTLS(self, arg: str) -> None:
        await self._must_wait("554 5.5.0 Wait for the answer to STARTTLS")
        if self._encrypted:
            await self.push("503 5.5.1 TLS is on already")
        elif self._door.tls is None:
            await self.push("502 5.5.1 TLS is not offered")
        elif arg:
            await self.push("501 5.5.4 STARTTLS takes no argument")
        else:
            await self._start_tls(self._door.tls)

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        assert self.transport is not None
        transport: Any = self.transport
        handshake = self._limits.patience.handshake
        self._reset_timeout(handshake + _LINGER_SECONDS)
        # No turn of the loop between the look at the buffer, this write and the change of protocol: what was sent in clear behind STARTTLS
        # is refused above or fails the handshake, and no octet of a fast client's handshake is lost
        transport.write(b"220 2.0.0 Ready to start TLS\r\n")
        try:
            secured = await self.loop.start_tls(
                transport, self, context, server_side=True, ssl_handshake_timeout=handshake, ssl_shutdown_timeout=_LINGER_SECONDS
            )
        except (OSError, ssl.SSLError) as failure:
            log.info("a TLS handshake failed", peer=self.peer, reason=str(failure))
            transport.abort()
            self.connection_lost(None)
            raise asyncio.CancelledError from None
        if secured is None:
            raise ConnectionResetError
        self.transport = secured
        for holder in (self._stream, self._writer, self):  # each keeps the transport for itself
            holder._transport = secured  # type: ignore[union-attr]
        self._encrypted = True
        assert self.session is not None
        self.session.ssl = secured.get_extra_info("ssl_object")
        self.session.host_name = None  # RFC 3207 §4.2: what was said before does not count
        self.account = None
        self._set_rset_state()  # type: ignore[no-untyped-call]
        self._reset_timeout()

    async def smtp_VRFY(self, arg: str) -> None:
        await self.push("252 2.5.0 Send some mail and see")

    async def smtp_HELP(self, arg: str) -> None:
        await self.push("214 2.0.0 See RFC 5321")

    def _getaddr(self, arg: str) -> tuple[str | None, str | None]:
        """`<address> parameters` taken apart, the address as it is: what it may be is for the policy to say, in constant time."""
        arg = (arg or "").lstrip()
        end = arg.rfind(">")
        if not arg.startswith("<") or end < 0:
            return None, None
        rest = arg[end + 1 :]
        if rest and not rest.startswith(" "):
            return None, None
        return arg[1:end] or "<>", rest.strip()

    def _set_post_data_state(self) -> None:
        super()._set_post_data_state()  # type: ignore[no-untyped-call]
        self.recipients = []

    async def smtp_MAIL(self, arg: str | None) -> None:
        if self._messages >= MAX_MESSAGES:
            raise Refused("421 4.7.0 Enough messages for one connection")
        if self.account is not None and arg:
            arg = _AUTH_PARAMETER.sub("", arg)  # RFC 4954 §5: whom a relay believes that it is from; we know
        await super().smtp_MAIL(arg)

    async def smtp_DATA(self, arg: str) -> None:
        if await self.check_helo_needed():
            return
        assert self.envelope is not None
        if not self.envelope.rcpt_tos:
            await self.push("503 5.5.1 Send RCPT first")
            return
        if arg:
            await self.push("501 5.5.4 DATA takes no argument")
            return
        await self._must_wait("554 5.5.0 Wait for the answer to DATA")
        self._messages += 1
        await self.push("354 End data with <CR><LF>.<CR><LF>")
        try:
            content, reply = await self._content()
            if not reply:
                self.storing = True
                self.stored.clear()
                self._reset_timeout(self._limits.patience.session)  # the store has limits of its own
                if self.account is not None and self._door.submissions is not None:
                    reply = await self._door.submissions.deliver(self.account, self.peer, self.recipients, content)
                else:
                    reply = await self._policy.deliver(self.peer, self._sender(), self.recipients, content)
        finally:
            self.storing = False
            self.stored.set()
            self._uncount()
        times = len(self.envelope.rcpt_tos) if self._door.lmtp else 1  # RFC 2033 §4.2
        self._set_post_data_state()
        self._reset_timeout()
        await self.push(reply, times)

    def _sender(self) -> str:
        sender = str(self.envelope.mail_from) if self.envelope is not None else ""
        return "" if sender == "<>" else sender

    # --- content ----------------------------------------------------------------------------------------------------------

    async def _content(self) -> tuple[bytes, str]:
        """Everything up to CRLF.CRLF with dots unstuffed, and "" or the reply that refuses it. Memory is bounded by the size limit."""
        reader = self._stream
        patience = self._limits.patience
        limit = self.data_size_limit or 0
        found = bytearray(b"\r\n")  # so that a dot in the first line is found like any other
        received = 0
        began = self.loop.time()
        too_large = False
        while True:
            allowed = began + patience.content + received / patience.content_bytes_per_second - self.loop.time()
            self._reset_timeout(max(0.01, min(allowed, patience.idle)))
            chunk = await reader.read(_CHUNK)
            if not chunk:
                raise ConnectionResetError
            received += len(chunk)
            searched = max(0, len(found) - len(_END))
            found += chunk
            end = found.find(_END, searched)
            if end >= 0:
                break
            if received > 4 * limit:
                raise Refused("552 5.3.4 Message far too large")
            if too_large or len(found) > limit:
                too_large = True
                del found[: -len(_END)]
            self._count(len(found))
        rest = bytes(found[end + len(_END) :])
        if rest:  # commands sent without waiting: answered in turn
            reader._buffer[:0] = rest  # type: ignore[attr-defined]
        if too_large or end > limit:
            return b"", f"552 5.3.4 Message larger than {limit} octets"
        del found[end + 2 :]
        content = bytes(found)
        found.clear()
        reason = refusal(content)
        return (b"", reason) if reason else (content.replace(b"\r\n.", b"\r\n")[2:], "")

    def _count(self, size: int) -> None:
        self._limits.buffered_bytes += size - self._counted
        self._counted = size
        if self._limits.buffered_bytes > MAX_BUFFERED_BYTES:
            raise Refused("421 4.3.1 Too much mail at once, come back later")

    def _uncount(self) -> None:
        self._limits.buffered_bytes -= self._counted
        self._counted = 0


def _plain(address: str) -> str:
    """An IP address without its zone; one of IPv4 as such, also where it came in by a socket of IPv6."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(found, "ipv4_mapped", None) or found)


class _Hooks:
    """aiosmtpd's handler: addresses are judged by the session's policy."""

    async def handle_MAIL(self, server: Session, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if address != "<>" and not _SENDER.fullmatch(address):
            return "553 5.1.7 Sender address not understood"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 OK"

    async def handle_RCPT(self, server: Session, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if len(envelope.rcpt_tos) >= MAX_RECIPIENTS:
            return "452 4.5.3 Too many recipients"
        recipient: Any
        if server.account is not None:
            try:
                recipient = addresses.parse(address).text
            except Invalid as error:
                return f"553 5.1.3 The address {error.reason}"
        else:
            recipient, reply = await server._policy.look_up(address)
            if reply:
                return reply
        if address not in envelope.rcpt_tos:
            server.recipients.append(recipient)
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"


_AUTH_PARAMETER = re.compile(r" AUTH=\S*", re.IGNORECASE)
_SENDER = re.compile(r"[\x21-\x3b\x3d\x3f-\x7e]{1,254}")  # printable, no spaces or angle brackets


async def _refuse_http(session: Session, arg: str) -> None:
    raise Refused("554 5.5.1 This is a mail server")


for _name in _HTTP:
    setattr(Session, f"smtp_{_name}", _refuse_http)
