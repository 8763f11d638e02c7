"""The connection to a mail store that POP3 and IMAP share: TLS from the start or by STARTTLS, bounded lines, a time limit on every wait."""

import asyncio
import os
import ssl
from pathlib import Path
from typing import Final, Protocol

from domain.errors import ConfigurationError, Unavailable
from domain.mailbox import Mailbox

STEP_TIMEOUT_SECONDS: Final = 60.0
MAX_LINE_BYTES: Final = 256 * 1024
MAX_LISTED: Final = 200_000  # messages of one mailbox that are looked at
_CHUNK: Final = 65536


class MailboxTrouble(Unavailable):
    """The server cannot be reached, refused a command, or said what cannot be understood. Never quotes the password."""


class MailStore(Protocol):
    """What `mailboxes` needs of a protocol. Identifiers are stable over sessions. Every method raises MailboxTrouble."""

    idles: bool

    async def open(self, password: str) -> None:
        """Connect and sign in."""

    async def messages(self) -> dict[str, int]:
        """Identifier and size in bytes of everything that is there, oldest first, at most MAX_LISTED."""

    async def fetch(self, uid: str, max_bytes: int) -> bytes:
        """One message as it is stored."""

    async def discard(self, uids: list[str]) -> None:
        """Take messages away; with POP3 it counts from `close` on."""

    async def wait(self, seconds: float) -> None:
        """Wait until there is news, at most so long."""

    async def close(self) -> None:
        """Say goodbye; what was discarded is gone when this returns without an error."""

    def abort(self) -> None:
        """Drop the connection."""


class Link:
    """One connection. Lines end with CRLF; what a server says about an error is cut and cleaned before it is repeated."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self) -> None:
        """Open it; with TLS when the mailbox wants that at once. Raises MailboxTrouble."""
        mailbox = self.mailbox
        context = _context(mailbox) if mailbox.tls == "tls" else None
        try:
            async with asyncio.timeout(STEP_TIMEOUT_SECONDS):
                self._reader, self._writer = await asyncio.open_connection(mailbox.host, mailbox.port, ssl=context, limit=MAX_LINE_BYTES)
        except (OSError, ssl.SSLError, TimeoutError) as failure:
            raise self.trouble(f"cannot connect: {_said(failure)}") from failure

    async def start_tls(self) -> None:
        """Change to TLS after the server has agreed. Raises MailboxTrouble, also when it has sent more than its agreement."""
        assert self._writer is not None
        if self._reader._buffer:  # type: ignore[attr-defined]
            raise self.trouble("the server sent something in clear behind its answer to STARTTLS")
        try:
            async with asyncio.timeout(STEP_TIMEOUT_SECONDS):
                await self._writer.start_tls(_context(self.mailbox), server_hostname=self.mailbox.host)
        except (OSError, ssl.SSLError, TimeoutError) as failure:
            raise self.trouble(f"TLS failed: {_said(failure)}") from failure

    async def send(self, data: bytes) -> None:
        """Raises MailboxTrouble."""
        assert self._writer is not None
        try:
            self._writer.write(data)
            async with asyncio.timeout(STEP_TIMEOUT_SECONDS):
                await self._writer.drain()
        except (OSError, TimeoutError) as failure:
            raise self.trouble(f"the connection is lost: {_said(failure)}") from failure

    async def line(self, seconds: float = STEP_TIMEOUT_SECONDS) -> bytes:
        """The next line without its CRLF. Raises MailboxTrouble; TimeoutError is the caller's to ask for with `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return (await self._reader.readuntil(b"\n")).rstrip(b"\r\n")
        except TimeoutError:
            raise
        except asyncio.LimitOverrunError:
            raise self.trouble(f"a line of more than {MAX_LINE_BYTES} bytes") from None
        except (OSError, EOFError) as failure:
            raise self.trouble("the server closed the connection") from failure

    async def answer(self) -> bytes:
        """The next line; being late is trouble."""
        try:
            return await self.line()
        except TimeoutError:
            raise self.trouble(f"no answer within {STEP_TIMEOUT_SECONDS:g} s") from None

    async def exactly(self, size: int) -> bytes:
        """So many octets, as long as some arrive in every minute. Raises MailboxTrouble."""
        found = bytearray()
        while len(found) < size:
            found += await self.some(size - len(found))
        return bytes(found)

    async def some(self, most: int = _CHUNK) -> bytes:
        """At least one octet. Raises MailboxTrouble."""
        try:
            async with asyncio.timeout(STEP_TIMEOUT_SECONDS):
                chunk = await self._reader.read(min(most, _CHUNK))
        except (OSError, TimeoutError) as failure:
            raise self.trouble(f"the message stopped arriving: {_said(failure)}") from failure
        if not chunk:
            raise self.trouble("the server closed the connection in a message")
        return chunk

    def trouble(self, reason: str) -> MailboxTrouble:
        """An error that names the mailbox."""
        return MailboxTrouble(f"{self.mailbox.name}: {reason}")

    def refused(self, command: str, reply: bytes) -> MailboxTrouble:
        """An error that repeats what the server said."""
        text = "".join(char if char.isprintable() else "?" for char in reply.decode("utf-8", "replace"))
        return self.trouble(f"{command} was refused: {text[:200]}")

    def abort(self) -> None:
        """Drop the connection."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None


def password_of(mailbox: Mailbox) -> str:
    """The password, from where the settings say it is. Raises ConfigurationError, which names the place and never the value."""
    if mailbox.password_env:
        place, found = f"the variable {mailbox.password_env}", os.environ.get(mailbox.password_env, "")
        if not found:
            raise ConfigurationError([f"inbound.mailboxes: {mailbox.name}: {place} is not set"])
    else:
        place = mailbox.password_file
        try:
            found = Path(mailbox.password_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as failure:
            reason = getattr(failure, "strerror", None) or "not UTF-8 text"
            raise ConfigurationError([f"inbound.mailboxes: {mailbox.name}: cannot read {mailbox.password_file}: {reason}"]) from failure
    found = found.rstrip("\r\n")
    if not found or "\n" in found or "\r" in found or "\0" in found:
        raise ConfigurationError([f"inbound.mailboxes: {mailbox.name}: {place} must hold the password in one line"])
    return found


def _context(mailbox: Mailbox) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=mailbox.ca_file or None)
    except (OSError, ssl.SSLError) as failure:
        raise MailboxTrouble(f"{mailbox.name}: cannot use ca_file {mailbox.ca_file}: {_said(failure)}") from failure
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _said(failure: BaseException) -> str:
    if isinstance(failure, ssl.SSLCertVerificationError):
        return f"the certificate does not hold: {failure.verify_message}"
    if isinstance(failure, TimeoutError) and not str(failure):
        return f"no answer within {STEP_TIMEOUT_SECONDS:g} s"
    return (getattr(failure, "strerror", None) or str(failure) or type(failure).__name__)[:200]
