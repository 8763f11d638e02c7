"""Mailboxes that are emptied: POP3 and IMAP, several at once, each message kept at least once and counted once.

A message is kept and remembered in one transaction, and only then deleted; so a crash in between finds it again, and knows it. One is
known by the server's identifier, which saves fetching it, and by its content, because servers renumber.
"""

import asyncio
import hashlib
from collections.abc import Iterable
from typing import Final

import structlog

from domain.errors import SluiceError
from domain.mailbox import Mailbox
from inbound.content import sender_of, with_crlf
from inbound.imap import Imap
from inbound.mailbox_link import MailStore, password_of
from inbound.policy import STORE_TIMEOUT_SECONDS, MailPolicy
from inbound.pop3 import Pop3
from store import inbound, mailboxes, postgres
from store.postgres import PooledConnection
from store.trouble import is_store_trouble, sentence

log = structlog.get_logger(__name__)

MAX_AT_ONCE: Final = 500  # messages of one POP3 session: it deletes only at its end
DISCARD_AT_ONCE: Final = 50
IDLE_SECONDS: Final = 600.0  # RFC 2177 allows 29 minutes, many firewalls ten
LONGEST_PAUSE_SECONDS: Final = 900.0
FORGET_SECONDS: Final = 86400.0
_KNOWN_AT_ONCE: Final = 10_000


class Collector:
    """Empties one mailbox for as long as the process lives."""

    def __init__(
        self, pool: postgres.Pool, policy: MailPolicy, mailbox: Mailbox, *, interval_seconds: float, max_message_bytes: int
    ) -> None:
        self.mailbox = mailbox
        self.kept = 0
        self._pool = pool
        self._policy = policy
        self._interval = interval_seconds
        self._max_bytes = max_message_bytes
        self._too_large: set[str] = set()
        self._failed = ""
        self._forgotten_at = 0.0

    @property
    def trouble(self) -> str:
        """Why it cannot be read now, in words; empty while it can."""
        return f"a mailbox cannot be read: {self._failed}" if self._failed else ""

    async def run(self) -> None:
        """Session after session; after a failure with growing pauses, said once for as long as it stays the same."""
        pause = self._interval
        while True:
            try:
                while await self._session():
                    pass
                pause = self._interval
                if self._failed:
                    log.info("a mailbox can be read again", mailbox=self.mailbox.name)
                    self._failed = ""
            except Exception as failure:
                if not isinstance(failure, SluiceError) and not is_store_trouble(failure):
                    log.exception("a mailbox session failed", mailbox=self.mailbox.name)
                said = str(failure) if isinstance(failure, SluiceError) else sentence(failure)
                if said != self._failed:
                    log.warning("a mailbox cannot be read; it is tried again", mailbox=self.mailbox.name, reason=said)
                self._failed = said
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _session(self) -> bool:
        store: MailStore = Imap(self.mailbox) if self.mailbox.protocol == "imap" else Pop3(self.mailbox)
        try:
            await store.open(password_of(self.mailbox))  # read anew each time: it may have been changed
            more = await self.collect(store)
            while store.idles:
                if not more:
                    await store.wait(min(IDLE_SECONDS, 10 * self._interval))
                more = await self.collect(store)
            await store.close()
            return more
        finally:
            store.abort()

    async def collect(self, store: MailStore) -> bool:
        """Keep what is new, and delete what is kept. True when there is more. Raises MailboxTrouble, Unavailable."""
        present = await store.messages()
        known = await self._known(list(present))
        new = [uid for uid in present if uid not in known and uid not in self._too_large]
        gone = [uid for uid in present if uid in known] if not self.mailbox.keep else []
        for start in range(0, len(gone), DISCARD_AT_ONCE):
            await store.discard(gone[start : start + DISCARD_AT_ONCE])  # kept before, and we died before they were deleted
        done: list[str] = []
        for uid in new[:MAX_AT_ONCE]:
            if present[uid] > self._max_bytes:
                self._too_large.add(uid)
                log.warning("a message is larger than inbound.max_message_bytes and stays in its mailbox",
                            mailbox=self.mailbox.name, uid=uid, size=present[uid])  # fmt: skip
                continue
            await self._keep(uid, await store.fetch(uid, max(present[uid], 65536)))
            done.append(uid)
            if len(done) == DISCARD_AT_ONCE and not self.mailbox.keep:
                await store.discard(done)
                done = []
        if done and not self.mailbox.keep:
            await store.discard(done)
        await self._forget(list(present))
        return len(new) > MAX_AT_ONCE

    async def _known(self, uids: list[str]) -> set[str]:
        found: set[str] = set()
        async with postgres.connection(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            for start in range(0, len(uids), _KNOWN_AT_ONCE):
                found |= await mailboxes.known(conn, self.mailbox.name, uids[start : start + _KNOWN_AT_ONCE])
        return found

    async def _keep(self, uid: str, message: bytes) -> None:
        message = with_crlf(message)
        digest = hashlib.sha256(message).digest()

        async def first(conn: PooledConnection) -> bool:
            return await mailboxes.remember(conn, self.mailbox.name, uid, digest)

        user = self.mailbox.user
        fallback = inbound.Received(recipient=user if "@" in user else f"{user}@{self.mailbox.host}")
        recipients = self._policy.named(message) or [fallback]
        ids = await self._policy.take("", sender_of(message), recipients, message, first)
        if ids:
            self.kept += 1
            log.info("message stored", mailbox=self.mailbox.name, uid=uid, size=len(message), id=ids[0])
        else:
            log.info("a message was taken before and is not counted again", mailbox=self.mailbox.name, uid=uid)

    async def _forget(self, present: list[str]) -> None:
        now = asyncio.get_running_loop().time()
        if self._forgotten_at and now - self._forgotten_at < FORGET_SECONDS:
            return
        self._forgotten_at = now
        async with postgres.connection(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            await mailboxes.forget(conn, self.mailbox.name, present)


def collectors(
    pool: postgres.Pool, policy: MailPolicy, configured: Iterable[Mailbox], *, interval_seconds: float, max_message_bytes: int
) -> list[Collector]:
    """One for each mailbox. Raises ConfigurationError when a password is not where the settings say."""
    made = []
    for mailbox in configured:
        password_of(mailbox)
        made.append(Collector(pool, policy, mailbox, interval_seconds=interval_seconds, max_message_bytes=max_message_bytes))
    return made
