"""The SMTP listener: aiosmtpd, made fit for the open network. Takes mail for our own addresses only and answers 250 once it is stored.

What stock aiosmtpd 1.4.6 gets wrong (reliability.md §7) is closed in `Session`: lines end with CRLF only and hold no control characters,
the client waits for the greeting and for the answers to EHLO and DATA, every number of anything is limited, and so is time: between
commands, in the content (a least rate) and in total. The content is read in chunks, not lines, so ten megabytes of empty lines cost ten
megabytes.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import structlog
from aiosmtpd.smtp import SMTP

log = structlog.get_logger(__name__)

MAX_RECIPIENTS: Final = 100  # RFC 5321 §4.5.3.1.8
MAX_MESSAGES: Final = 100
MAX_COMMANDS: Final = 2000
MAX_ERRORS: Final = 20
MAX_IDLE_COMMANDS: Final = 30  # NOOP, RSET, VRFY, HELP: each of them
MAX_LINE_OCTETS: Final = 1000  # RFC 5321 §4.5.3.1.6, without the dot that is doubled
MAX_RECEIVED_HEADERS: Final = 100  # RFC 5321 §6.3
MAX_BUFFERED_BYTES: Final = 96 * 1024 * 1024  # content of all sessions together

_CHUNK = 65536
_END = b"\r\n.\r\n"
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_LIMITED = ("NOOP", "RSET", "VRFY", "HELP", "EHLO", "HELO", "EXPN")
_HTTP = ("GET", "POST", "PUT", "HEAD", "OPTIONS", "CONNECT", "DELETE", "PATCH", "TRACE", "PRI")

Deliver = Callable[[str, str, list[Any], bytes], Awaitable[str]]


class Refused(Exception):
    """A line that ends the session. `reply` is sent first."""

    def __init__(self, reply: str) -> None:
        self.reply = reply
        super().__init__(reply)


class Policy:
    """What the listener asks the rest of the process. `recipient` says whom an address belongs to, or how it is refused."""

    def recipient(self, address: str) -> tuple[Any, str]:
        """(what to keep with the message, "") or (None, a reply)."""
        raise NotImplementedError

    async def deliver(self, peer: str, mail_from: str, recipients: list[Any], content: bytes) -> str:
        """Store the message; the reply to the final dot."""
        raise NotImplementedError


class Patience(NamedTuple):
    """How long a session is waited for, in seconds."""

    greeting: float = 0.15  # long enough to catch a client that talks before it
    idle: float = 25.0  # for one command
    session: float = 900.0
    content: float = 20.0  # for the first of it; then ...
    content_bytes_per_second: float = 8192.0  # ... at least this on average


class Limits:
    """What all sessions of one listener share."""

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


class Session(SMTP):
    """One connection."""

    command_size_limit = 1024  # 512 and room for long local parts that some forwarders make
    line_length_limit = 4096  # of the stream: commands; the content has its own rule

    def __init__(self, policy: Policy, limits: Limits, hostname: str, max_message_bytes: int) -> None:
        super().__init__(
            _Hooks(),
            data_size_limit=max_message_bytes,
            hostname=hostname,
            ident="ESMTP",
            timeout=limits.patience.idle,
            auth_exclude_mechanism=("LOGIN", "PLAIN"),
            command_call_limit=dict.fromkeys(_LIMITED, MAX_IDLE_COMMANDS) | {"*": MAX_COMMANDS},
            loop=asyncio.get_running_loop(),
        )
        self._policy = policy
        self._limits = limits
        self.peer = ""
        self.recipients: list[Any] = []
        self.storing = False
        self.stored = asyncio.Event()
        self._commands = 0
        self._errors = 0
        self._messages = 0
        self._ending = False
        self._counted = 0
        self._session_timer: asyncio.TimerHandle | None = None

    # --- the life of a connection -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        address = transport.get_extra_info("peername")
        self.peer = str(address[0]) if isinstance(address, tuple) and address else ""
        self._limits.sessions.add(self)
        self._limits.peers[self.peer] += 1
        self._session_timer = self.loop.call_later(self._limits.patience.session, self._timeout_cb)

    def connection_lost(self, error: Exception | None) -> None:
        self._limits.sessions.discard(self)
        self._limits.peers[self.peer] -= 1
        if self._limits.peers[self.peer] <= 0:
            del self._limits.peers[self.peer]
        self._uncount()
        if self._session_timer is not None:
            self._session_timer.cancel()
        super().connection_lost(error)

    def _cb_client_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super()._cb_client_connected(reader, writer)
        self._stream = reader
        self._reader = _Lines(reader, self)  # type: ignore[assignment]

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

    async def _handle_client(self) -> None:
        limits = self._limits
        if limits.closing or len(limits.sessions) > limits.max_connections or limits.peers[self.peer] > limits.max_connections_per_peer:
            self.end("421 4.7.0 Too many connections, come back later")
            return
        await asyncio.sleep(limits.patience.greeting)
        if self._waiting():
            self.end("554 5.5.1 You talk before the greeting")
            return
        await super()._handle_client()

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

    async def push(self, status: Any) -> None:
        """Answer. A client that collects errors is shown out."""
        text = status if isinstance(status, str) else bytes(status).decode("ascii", "replace")
        # what aiosmtpd repeats of the peer's words must not become a line of its own
        text = "".join(char if " " <= char <= "~" else "?" for char in text)[:510]
        self._errors += text[:1] == "5"
        if self._errors > MAX_ERRORS and not self._ending:
            text, self._ending = "421 4.7.0 Too many errors", True
        if self._ending:
            self.end(text)
            raise asyncio.CancelledError
        await super().push(text)

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
        await self._must_wait("554 5.5.0 Wait for the answer to EHLO")
        await super().smtp_EHLO(hostname)

    async def smtp_HELO(self, hostname: str) -> None:
        await self._must_wait("554 5.5.0 Wait for the answer to HELO")
        await super().smtp_HELO(hostname)

    async def smtp_AUTH(self, arg: str) -> None:
        await self.push("502 5.5.1 This server takes no credentials")

    async def smtp_STARTTLS(self, arg: str) -> None:
        await self._must_wait("554 5.5.0 Wait for the answer to STARTTLS")
        await self.push("502 5.5.1 TLS is not offered")

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
                reply = await self._policy.deliver(self.peer, self._sender(), self.recipients, content)
        finally:
            self.storing = False
            self.stored.set()
            self._uncount()
        self._set_post_data_state()
        self._reset_timeout()
        await self.push(reply)

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
        recipient, reply = server._policy.recipient(address)
        if reply:
            return reply
        if address not in envelope.rcpt_tos:
            server.recipients.append(recipient)
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"


_SENDER = re.compile(r"[\x21-\x3b\x3d\x3f-\x7e]{1,254}")  # printable, no spaces or angle brackets


async def _refuse_http(session: Session, arg: str) -> None:
    raise Refused("554 5.5.1 This is a mail server")


for _name in _HTTP:
    setattr(Session, f"smtp_{_name}", _refuse_http)


def refusal(content: bytes) -> str:
    """The reply for content that breaks RFC 5321 §2.3.8 or §4.5.3.1.6, "" for content that is fine. Begins with CRLF, ends with CRLF.

    Bare CR, bare LF and NUL are how one message becomes two somewhere behind us (S1).
    """
    lines = content.count(b"\r\n")
    if content.count(b"\n") != lines or content.count(b"\r") != lines:
        return "550 5.6.0 Bare CR or LF in the message"
    if b"\0" in content:
        return "550 5.6.0 NUL in the message"
    start = 2
    while start < len(content):  # jumps as far as a line may reach, so the number of lines does not matter
        end = content.rfind(b"\r\n", start, start + MAX_LINE_OCTETS + 1)
        if end < 0:
            return "550 5.6.0 Line longer than 998 octets"
        start = end + 2
    header = content[: content.find(b"\r\n\r\n", 2) + 1 or len(content)][: 1 << 20]
    if header.lower().count(b"\r\nreceived:") > MAX_RECEIVED_HEADERS:
        return "554 5.4.6 Mail loop: too many Received headers"
    return ""


class Listener:
    """The listening socket and its sessions."""

    def __init__(
        self,
        policy: Policy,
        *,
        host: str,
        port: int,
        hostname: str,
        max_message_bytes: int,
        max_connections: int,
        patience: Patience | None = None,
    ) -> None:
        self._policy = policy
        self._host = host
        self._port = port
        self._hostname = hostname
        self._max_message_bytes = max_message_bytes
        self.limits = Limits(max_connections, patience or Patience())
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Session(self._policy, self.limits, self._hostname, self._max_message_bytes), self._host, self._port, backlog=512
        )

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return str(host), int(port)

    async def stop(self, timeout_seconds: float = 1.0) -> None:
        """Take no more; let messages that are being stored get their answer, within `timeout_seconds`."""
        self.limits.closing = True
        if self._server is not None:
            self._server.close()
        for session in list(self.limits.sessions):
            if not session.storing:
                session.end("421 4.3.2 Shutting down")
        storing = [session.stored.wait() for session in self.limits.sessions if session.storing]
        if storing:
            await asyncio.wait([asyncio.ensure_future(each) for each in storing], timeout=timeout_seconds)
            await asyncio.sleep(0)  # their answers leave
        for session in list(self.limits.sessions):
            session.end("421 4.3.2 Shutting down")
