"""What a listening socket is like: whom it asks, how long it waits, what it offers."""

import ipaddress
import ssl
from typing import Any, NamedTuple

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refused(Exception):
    """A line that ends the session. `reply` is sent first."""

    def __init__(self, reply: str) -> None:
        self.reply = reply
        super().__init__(reply)


class Policy:
    """What the listener asks the rest of the process. `look_up` says whom an address belongs to, or how it is refused."""

    async def look_up(self, address: str) -> tuple[Any, str]:
        """(what to keep with the message, "") or (None, a reply)."""
        raise NotImplementedError

    async def deliver(self, peer: str, mail_from: str, recipients: list[Any], content: bytes) -> str:
        """Store the message; the reply to the final dot."""
        raise NotImplementedError


class Account(NamedTuple):
    """Who has signed in."""

    user_id: int
    name: str


class Submissions:
    """What the submission listener asks the rest of the process. Raises Unavailable."""

    clear_from_loopback = False  # whether a program on this machine may sign in without TLS

    async def sign_in(self, name: str, password: str) -> Account | None:
        """Whose name and password these are; None: nobody's."""
        raise NotImplementedError

    async def deliver(self, account: Account, peer: str, recipients: list[str], content: bytes) -> str:
        """Queue the message; the reply to the final dot."""
        raise NotImplementedError


class Patience(NamedTuple):
    """How long a session is waited for, in seconds."""

    greeting: float = 0.15  # long enough to catch a client that talks before it
    proxy: float = 5.0  # for the PROXY header
    handshake: float = 10.0  # of TLS
    idle: float = 25.0  # for one command
    session: float = 900.0
    content: float = 20.0  # for the first of it; then ...
    content_bytes_per_second: float = 8192.0  # ... at least this on average


class Door(NamedTuple):
    """What one listening socket is like. Peers in `proxies` begin with a PROXY header (v1 or v2); from others it is no command."""

    hostname: str
    max_message_bytes: int
    tls: ssl.SSLContext | None = None
    proxies: tuple[Network, ...] = ()
    lmtp: bool = False
    submissions: Submissions | None = None  # None: no AUTH
