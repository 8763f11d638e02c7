"""Mail that programs of our users hand in by SMTP: who may, and how a message becomes a raw part of a message stream.

The password is an API key of user scope. A message is answered 250 once it and its recipients are committed (P11); then it is mail like
any other, with leases, retries, suppressions and records. The client's MAIL FROM is not used: the return path is ours.
"""

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final, get_args

import structlog

from compose import raw
from compose.header_rules import address_octets
from config.keys import Keyring
from config.settings import Settings
from domain.campaign import CampaignContent
from domain.egress import DeliveryServer
from domain.errors import Invalid, NotFound, Unavailable
from domain.sender_domain import parents
from inbound.door import Account, Submissions
from store import dkim, egress, messages, postgres, users
from store.custom_headers import MailClass
from store.postgres import Pool, PooledConnection
from store.trouble import is_store_trouble, sentence

log = structlog.get_logger(__name__)

STORE_TIMEOUT_SECONDS: Final = 15.0

_JOB = re.compile(r"[!-~]{1,100}")
_NO_HASH: Final = b"\0" * 32


class Submission(Submissions):
    """Takes mail from those who signed in. `tell` says to the engines that there is something to send."""

    def __init__(self, pool: Pool, keyring: Keyring, settings: Settings, tell: Callable[[str], Awaitable[None]]) -> None:
        self._pool = pool
        self._keyring = keyring
        self._mail = settings.mail
        self._tell = tell
        self.clear_from_loopback = settings.inbound.submission_clear_from_loopback

    async def sign_in(self, name: str, password: str) -> Account | None:
        """`name` is that of the user whose API key, of user scope, the password is. Raises Unavailable."""
        prefix = users.prefix_of(password)
        user = owner = None
        if prefix is not None:
            async with postgres.connection(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
                owner = await users.find_key(conn, prefix)
                user = await users.get_user(conn, owner.user_id) if owner is not None else None
        right = hmac.compare_digest(users.hash_key(password), owner.hash if owner is not None else _NO_HASH)
        if not right or owner is None or user is None or owner.scope != "user" or user.name.casefold() != name.casefold():
            return None
        return Account(user.id, user.name)

    async def deliver(self, account: Account, peer: str, recipients: list[str], content: bytes) -> str:
        """Queue a message for everybody it is for, or say why not."""
        try:
            taken = await asyncio.to_thread(raw.take, content, time.time())
            async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
                async with postgres.transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
                    made = await self._queue(conn, account, recipients, taken)
        except Invalid as refusal:
            log.info("a submitted message was refused", user=account.name, peer=peer, reason=str(refusal))
            return f"550 5.7.1 {refusal}"
        except (Unavailable, TimeoutError, NotFound) as failure:
            return self._later(peer, failure)
        except Exception as failure:
            if not is_store_trouble(failure):
                raise
            return self._later(peer, failure)
        await self._tell("campaigns")
        log.info("message submitted", user=account.name, peer=peer, recipients=made.recipients, size=len(content), id=made.id)
        return f"250 2.0.0 Queued as message {made.id}"

    def _later(self, peer: str, failure: Exception) -> str:
        log.warning("a submitted message could not be stored; its sender will try again", peer=peer, reason=sentence(failure))
        return "451 4.3.0 Cannot store it now, try again later"

    async def _queue(self, conn: PooledConnection, account: Account, recipients: list[str], taken: raw.Taken) -> messages.Message:
        job = taken.controls.get("x-job", "")
        if job and not _JOB.fullmatch(job):
            raise Invalid("X-Job", "must be at most 100 printable characters without spaces", job)
        mail_class = _mail_class(taken.controls.get("x-mail-class", "transactional"))
        server = await _server(conn, account, taken.controls.get("x-virtual-mta", ""))
        part = messages.Part(name=job or taken.subject[:100], subject=taken.subject, from_email=taken.from_email)
        domain = address_octets("From", taken.from_email)[0].rpartition(b"@")[2].decode("ascii").lower()
        theirs = await dkim.foreign_domain(conn, account.user_id, parents(domain))
        if theirs is not None:
            raise Invalid("From", f"{theirs} belongs to another user of this system, who has proved it by a DNS record")
        content = CampaignContent(
            id=1, version=1, part=1, user_id=account.user_id, list_id=0, delivery_server_id=server.id, name=part.name, subject=part.subject,
            from_name="", from_email=taken.from_email, reply_to="", html="", text="", list_name="", list_sender_email="",
            list_sender_name="", queued_at=0.0, mail_class=mail_class, raw=taken.raw,
        )  # fmt: skip
        raw.RawMessage(content, server, self._keyring, mail=self._mail)
        target = messages.Target(user_id=account.user_id, delivery_server_id=server.id, mail_class=mail_class, list_id=None)
        return await messages.add(conn, target, part, {}, [(each, "{}") for each in recipients], taken.raw)


def _mail_class(text: str) -> MailClass:
    found: MailClass | None = next((each for each in get_args(MailClass) if each == text.lower()), None)
    if found is None:
        raise Invalid("X-Mail-Class", f"must be one of {', '.join(get_args(MailClass))}", text)
    return found


async def _server(conn: PooledConnection, account: Account, name: str) -> DeliveryServer:
    """The delivery server of that name, the first enabled one where no name is given. Raises Invalid."""
    servers = await egress.list_enabled(conn, account.user_id)
    found = next((each for each in servers if not name or each.name.casefold() == name.casefold()), None)
    if found is None and name:
        raise Invalid("X-Virtual-MTA", "is no enabled delivery server of this user", name)
    if found is None:
        raise Invalid("delivery server", f"user {account.name} has none that is enabled")
    return found
