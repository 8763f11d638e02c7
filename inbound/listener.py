"""The sockets where mail comes in. Takes mail for our own addresses only and answers 250 once it is stored (P11).

What a connection may do is in `session`, whom mail is taken for in `policy`; here are the sockets, TLS certificates and the end.
"""

import asyncio
import ssl
from pathlib import Path

from domain.errors import ConfigurationError
from inbound.door import Door, Policy
from inbound.session import Limits, Session


class Certificate:
    """Certificate chain and key in files, read again when they change, so that a renewed one needs no restart."""

    def __init__(self, certificate_file: str, key_file: str) -> None:
        """Raises ConfigurationError when they cannot be used."""
        self._files = (certificate_file, key_file or certificate_file)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._changed = self._stamp()
        try:
            self.context.load_cert_chain(*self._files)
        except (OSError, ssl.SSLError) as failure:
            reason = getattr(failure, "strerror", None) or getattr(failure, "reason", None) or "not usable"
            raise ConfigurationError(
                [f"inbound.tls_certificate_file: cannot use {self._files[0]} with key {self._files[1]}: {reason}"]
            ) from failure

    def _stamp(self) -> tuple[int, ...]:
        try:
            return tuple(Path(each).stat().st_mtime_ns for each in self._files)
        except OSError:
            return ()

    def refresh(self) -> None:
        """Look whether the files changed. Raises OSError, ssl.SSLError while they do not fit; the old certificate stays in use."""
        stamp = self._stamp()
        if stamp and stamp != self._changed:
            self._changed = stamp
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files)  # a pair that does not fit must not replace one that does
            self.context.load_cert_chain(*self._files)


class Listener:
    """One listening socket and its sessions. `limits` may be shared: what is counted, is counted over all who share it."""

    def __init__(self, policy: Policy, limits: Limits, door: Door, *, host: str, port: int) -> None:
        self._policy = policy
        self._host = host
        self.port = port
        self._door = door
        self.limits = limits
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Session(self._policy, self.limits, self._door), self._host, self.port, backlog=512)

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
