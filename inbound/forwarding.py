"""Sends on what the rules say: a received mail becomes a raw message of the administrator's user, which the engines send as any other.

The mail goes as it came, so that its signature holds; only trace fields are put in front. The envelope sender is rewritten to an address
of ours (SRS). Nobody is told where a mail went, nor that it could not be sent on: who writes to abuse@ gets no answer from a machine.
"""

import email.utils
from datetime import UTC, datetime

import structlog

from compose.header_rules import address_octets
from config.keys import Keyring
from domain.egress import DeliveryServer
from domain.errors import Invalid, NotFound
from domain.forwarding import MARKER, rewritten, unsendable
from store import egress, forwarding, messages, users
from store.forwarding import Rule
from store.postgres import PooledConnection

log = structlog.get_logger(__name__)


class Forwards:
    """Puts mail into the queue, in the transaction that keeps it."""

    def __init__(self, keyring: Keyring, hostname: str) -> None:
        self.srs_key = keyring.derive("srs")
        self.installation = keyring.fingerprint
        self._hostname = hostname

    async def add(
        self, conn: PooledConnection, inbound_id: int, rule: Rule, target: str, *, recipient: str, mail_from: str, raw: bytes
    ) -> str:
        """Queue a kept mail for `target`; "", or why it is not sent on."""
        if await forwarding.lately(conn) >= forwarding.MAX_PER_HOUR:
            return f"{forwarding.MAX_PER_HOUR} mails were sent on in the last hour already"
        server = await _server(conn)
        reason = unsendable(raw) or ("" if server is not None else "there is no delivery server that is enabled")
        if server is None or reason:
            await forwarding.add(conn, inbound_id, rule, target, None, reason)
            return reason
        now = datetime.now(UTC)
        date = email.utils.format_datetime(now)
        trace = f"Received: by {self._hostname} (Sluice) id {inbound_id};\r\n {date}\r\n{MARKER}: {self.installation}\r\n"
        part = messages.Part(
            name=f"forward of received message {inbound_id}", subject="", sign=False,
            mail_from=_usable(rewritten(self.srs_key, mail_from, recipient.rpartition("@")[2], int(now.timestamp() // 86400))),
        )  # fmt: skip
        way = messages.Target(user_id=await users.admin_id(conn), delivery_server_id=server.id, mail_class="transactional", list_id=None)
        made = await messages.add(conn, way, part, {}, [(target, "{}")], trace.encode("ascii", "replace") + raw)
        await forwarding.add(conn, inbound_id, rule, target, made.id, "")
        log.info("a message is sent on", id=inbound_id, message=made.id, rule=rule)
        return ""


def _usable(sender: str) -> str:
    """An envelope sender that SMTP can carry; the null one where it cannot."""
    try:
        return sender and address_octets("sender", sender)[0].decode()
    except Invalid:
        return ""


async def _server(conn: PooledConnection) -> DeliveryServer | None:
    """The way out: what the rules name, else the first that is enabled. One that is switched off keeps its mail until it is on again."""
    chosen = (await forwarding.get(conn)).delivery_server_id
    if chosen is None:
        return next(iter(await egress.list_enabled(conn, None)), None)
    try:
        return await egress.get(conn, None, chosen)
    except NotFound:
        return None
