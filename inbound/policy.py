"""Whom mail is taken for, and how it is kept: signed return paths, unsubscribe addresses, addresses of duty and aliases in our domains.

The same for every way in: SMTP and LMTP (`session`), mailboxes, and the pipe. Mail is kept together with what follows at once, its
forwarding, in one transaction; what it means is found out later.
"""

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import structlog

from config import load
from config.keys import Keyring
from config.settings import Settings
from domain import return_path
from domain.errors import Unavailable
from domain.forwarding import ROLES, Routes, read_rewritten, why_not
from inbound.content import ADDRESS, header_of
from inbound.door import Policy
from inbound.forwarding import Forwards
from store import forwarding, inbound, postgres
from store.postgres import PooledConnection

log = structlog.get_logger(__name__)

STORE_TIMEOUT_SECONDS: Final = 10.0
LOOK_UP_SECONDS: Final = 0.1  # between two readings for addresses nobody knows, however many are asked for
RETURN_PATH_DAYS: Final = 60  # reports come within days; later than this a stolen address is worth nothing
MAX_FIELDS: Final = 20  # that are looked at in the header of a mail without an envelope, of each ...
MAX_FIELD_BYTES: Final = 8192
MAX_NAMED: Final = 200  # ... and so many addresses
NOT_OURS: Final = "550 5.7.1 Relaying denied"

_TOKEN = re.compile(r"[bu]-[a-z0-9]{20,}")  # has our form: signed by us, or forged
_ENVELOPE_FIELD = re.compile(
    rb"^(?:delivered-to|x-original-to|envelope-to|x-envelope-to|x-delivered-to|to|cc)[ \t]*:((?:[^\n]*\n[ \t])*[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)


def today() -> int:
    """Days since 1970-01-01 UTC."""
    return int(time.time() // 86400)


class MailPolicy(Policy):
    """What is ours, as the store says it. `complaints` are local parts that complaints are sent to, besides abuse@."""

    def __init__(
        self, pool: postgres.Pool, keyring: Keyring, relay_domains: Iterable[str], complaints: frozenset[str] = frozenset(),
        hostname: str = "localhost",
    ) -> None:  # fmt: skip
        self._pool = pool
        self._keys = {
            return_path.BOUNCE: keyring.derive("return-path"),
            return_path.UNSUBSCRIBE: keyring.derive("unsubscribe"),
        }
        self.forwards = Forwards(keyring, hostname)
        self._own_domains = frozenset(domain.lower() for domain in relay_domains)
        self._domains = self._own_domains
        self._addresses: frozenset[str] = frozenset()
        self._complaints = complaints
        self.routes = Routes(complaints=complaints)
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")  # when the last reading began
        self._is_stale = False  # the last reading failed
        self.kept = 0
        self.refused_at_store = 0

    @classmethod
    def of(cls, settings: Settings, pool: postgres.Pool, keyring: Keyring) -> "MailPolicy":
        """As the settings want it."""
        mail = settings.mail
        given = [each.rpartition("@")[0].lower() for each in (mail.complaints_to, mail.cfbl_address) if each]
        domains = filter(None, (*settings.inbound.relay_domains, mail.sender_domain, mail.catch_all_domain))
        return cls(pool, keyring, domains, frozenset(given), load.node_name(settings))

    async def refresh(self) -> None:
        """Read domains and forwarding anew. Raises Unavailable; then what was known before stays."""
        self._read_at, self._is_stale = time.monotonic(), True
        domains, addresses = await inbound.return_addresses(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS)
        async with postgres.connection(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            found = await forwarding.get(conn)
        self._domains, self._addresses = self._own_domains | domains, addresses
        self.routes = found.routes(self._complaints)
        self._is_stale = False

    async def look_up(self, address: str) -> tuple[inbound.Received | None, str]:
        """As `recipient`; who is not known (the domain of a new server, an alias) is looked for in the store before the refusal."""
        received, reply = self.recipient(address)
        match = ADDRESS.fullmatch(address)
        if received is None and match is not None and (reply == NOT_OURS or not _TOKEN.fullmatch(match[1].lower())):  # forged stays forged
            if not await self._read_since(time.monotonic()):
                return None, "451 4.3.0 Cannot look this address up now, try again later"
            received, reply = self.recipient(address)
        return received, reply

    async def _read_since(self, moment: float) -> bool:
        """Whether all is known as the store says it after `moment`. One reading serves all who wait, a few in a second at most."""
        async with self._reading:
            if self._read_at < moment:
                await asyncio.sleep(max(0.0, self._read_at + LOOK_UP_SECONDS - time.monotonic()))
                with contextlib.suppress(Unavailable):
                    await self.refresh()
            return not self._is_stale

    def recipient(self, address: str) -> tuple[inbound.Received | None, str]:
        """What an address stands for, or the reply that refuses it."""
        match = ADDRESS.fullmatch(address)
        if match is None or match[2].lower() not in self._domains:
            return None, NOT_OURS
        local = match[1].lower()
        address = f"{match[1]}@{match[2].lower()}"
        for prefix, key in self._keys.items():
            path = return_path.read(key, local, prefix)
            # An unsubscribe address works as long as somebody keeps the message it stands in
            if path is not None and (prefix == return_path.UNSUBSCRIBE or -1 <= today() - path.day <= RETURN_PATH_DAYS):
                return inbound.Received(recipient=address, user_id=path.user_id, campaign_id=path.campaign_id, number=path.number), ""
        if not _TOKEN.fullmatch(local) and self._is_known(address, local):
            return inbound.Received(recipient=address), ""
        return None, "550 5.1.1 No such address here"

    def _is_known(self, address: str, local: str) -> bool:
        if local.startswith("srs0="):
            return read_rewritten(self.forwards.srs_key, address, today()) is not None
        if local in ROLES - {"root"} or local in self._complaints or address.lower() in self._addresses:
            return True
        return self.routes.target(address)[0] != ""

    def named(self, content: bytes) -> list[inbound.Received]:
        """Whom a mail without an envelope is for, by the fields that MTAs write when they deliver; the addresses that are ours."""
        header = header_of(content)
        found: dict[str, inbound.Received] = {}
        for field in itertools.islice(_ENVELOPE_FIELD.finditer(header), MAX_FIELDS):
            for match in itertools.islice(ADDRESS.finditer(field[1][:MAX_FIELD_BYTES].decode("latin-1")), MAX_NAMED):
                received, _ = self.recipient(match[0])
                if received is not None:
                    found.setdefault(received.recipient.lower(), received)
        signed = [each for each in found.values() if each.user_id is not None]
        return (signed or list(found.values()))[:1]  # one mail, one row: it was delivered once

    async def take(
        self, peer: str, mail_from: str, recipients: list[inbound.Received], content: bytes,
        first: Callable[[PooledConnection], Awaitable[bool]] | None = None,
    ) -> list[int]:  # fmt: skip
        """Keep a mail; the ids of its rows, durable when this returns. `first` runs in the transaction; where it says no, nothing is kept.

        Raises Unavailable.
        """
        async with postgres.transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            if first is not None and not await first(conn):
                return []
            ids = await inbound.keep_in(
                conn, peer=peer or None, mail_from=mail_from, recipients=recipients, raw=content, timeout_seconds=STORE_TIMEOUT_SECONDS
            )
            targets: set[str] = set()  # who reads several of its addresses gets it once
            for number, each in zip(ids, recipients, strict=True):
                await self._forward(conn, number, each, mail_from, content, targets)
        self.kept += 1
        return ids

    async def _forward(
        self, conn: PooledConnection, number: int, received: inbound.Received, mail_from: str, content: bytes, targets: set[str]
    ) -> None:
        if received.user_id is not None or received.recipient.lower().startswith("srs0="):
            return
        target, duty = self.routes.target(received.recipient)
        if not target or target in targets:
            return
        targets.add(target)
        reason = why_not(content, mail_from, duty=duty, installation=self.forwards.installation)
        if not reason:
            rule: forwarding.Rule = "duty" if duty else "alias"
            reason = await self.forwards.add(
                conn, number, rule, target, recipient=received.recipient, mail_from=mail_from, raw=content
            )  # fmt: skip
        if reason:
            log.info("a message is kept and not forwarded", id=number, recipient=received.recipient, reason=reason)

    async def deliver(self, peer: str, mail_from: str, recipients: list[inbound.Received], content: bytes) -> str:
        """Store the message; 250 only when it is durable (P11)."""
        try:
            ids = await self.take(peer, mail_from, recipients, content)
        except Unavailable as failure:
            self.refused_at_store += 1
            log.warning("a message could not be stored; its sender will try again", peer=peer, reason=str(failure))
            return "451 4.3.0 Cannot store it now, try again later"
        log.info("message stored", peer=peer, recipients=len(recipients), size=len(content), id=ids[0])
        return f"250 2.0.0 Stored as {ids[0]}"
