"""The web view: the HTML part of one message, rendered again from the data that was kept when its campaign was started.

It says what the message said, octet for octet; pages of strangers run no programs on our domains (the policy of the answer sees to it).
"""

import asyncio
from collections import OrderedDict
from typing import Final

from compose.campaign import CompiledCampaign
from config.keys import Keyring
from config.settings import Mail
from domain import links
from domain.errors import Invalid
from store import inbound
from store.postgres import Pool

STORE_TIMEOUT_SECONDS: Final = 5.0
MAX_COMPILED: Final = 50

# Images and styles from anywhere, as in a mail program; no scripts, no forms, no frames
POLICY: Final = (
    "default-src 'none'; img-src * data:; style-src * 'unsafe-inline'; font-src *; media-src *; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox allow-popups allow-popups-to-escape-sandbox allow-top-navigation-by-user-activation"
)


class WebView:
    """Renders messages again; keeps the campaigns it compiled last."""

    def __init__(self, pool: Pool, keyring: Keyring, public_url: str, mail: Mail) -> None:
        self._pool = pool
        self._keyring = keyring
        self._key = keyring.derive("web-view")
        self._public_url = public_url
        self._mail = mail
        self._compiled: OrderedDict[tuple[int, int, int, int], CompiledCampaign] = OrderedDict()

    async def page(self, text: str) -> bytes | None:
        """The page at `/w/<text>`; None when it is none of ours or was never sent. Raises Unavailable."""
        parts = links.read(self._key, text)
        if parts is None:
            return None
        sent = await inbound.sent(self._pool, *parts, timeout_seconds=STORE_TIMEOUT_SECONDS)
        if sent is None:
            return None
        key = sent.content.id, sent.content.version, sent.server.id, sent.server.version
        try:
            compiled = self._compiled.get(key)
            if compiled is None:
                # in a thread: a large template takes a while, and clicks need not wait for it
                compiled = await asyncio.to_thread(
                    CompiledCampaign, sent.content, sent.server, self._keyring, self._public_url, mail=self._mail
                )
                self._compiled[key] = compiled
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            found = compiled.page(sent.recipient, composed_at=sent.composed_at)
        except Invalid:
            return None  # then no message was made of it either
        return None if found is None else found.encode("utf-8")
