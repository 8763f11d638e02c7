"""Tells a URL of the operator of each unsubscribe (requirement 97): a signed JSON POST, repeated until it is answered 2xx.

The rows are in PostgreSQL (`store.unsubscribe_copies`), so none is lost and several processes share them. A POST may arrive twice, when
we die before its answer is noted: its `webhook-id` is then the same. Headers and signature follow the Standard Webhooks specification.
The URL is the operator's own, so it may be a private address; redirects are not followed, so nobody else chooses where we connect.
"""

import asyncio
import base64
import hmac
import ssl
import time
from typing import Final
from urllib.parse import urlsplit

import httpx
import structlog

from store import unsubscribe_copies as rows
from store.postgres import Pool, transaction
from store.trouble import is_store_trouble, sentence
from store.unsubscribe_copies import CopiesReport, Copy, Failure

log = structlog.get_logger(__name__)

AT_ONCE: Final = 8
POST_SECONDS: Final = 10.0  # for one, with its answer
HOLD_SECONDS: Final = 60.0  # after which another process may try, where this one died
FIRST_PAUSE_SECONDS: Final = 15.0  # doubled after each failure
LONGEST_PAUSE_SECONDS: Final = 3600.0
MAX_AGE_SECONDS: Final = 3 * 86400.0
POLL_SECONDS: Final = 1.0
REPORT_SECONDS: Final = 10.0
PRUNE_SECONDS: Final = 3600.0
STORE_TIMEOUT_SECONDS: Final = 30.0


def signature(key: bytes, copy_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`."""
    said = f"{copy_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(key, said, 'sha256')).decode()}"


class UnsubscribeCopies:
    """Posts them, for as long as the process lives. `url` empty: none is posted, what waits is only counted."""

    def __init__(
        self,
        pool: Pool,
        url: str,
        key: bytes,
        *,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        max_age_seconds: float = MAX_AGE_SECONDS,
        post_seconds: float = POST_SECONDS,
    ) -> None:
        self.report: CopiesReport | None = None  # not known yet
        self._pool = pool
        self._url = url
        self._key = key
        self._first_pause = first_pause_seconds
        self._max_age = max_age_seconds
        self._post_seconds = post_seconds
        self._reported_at = -REPORT_SECONDS
        self._pruned_at = 0.0

    @property
    def trouble(self) -> list[str]:
        """What an operator should know, in words."""
        found, host = self.report, urlsplit(self._url).hostname
        if found is None:
            return []
        said = []
        if found.waiting and not self._url:
            said.append(f"{found.waiting} copies of unsubscribes wait for a URL in mail.list_unsubscribe_to")
        elif found.waiting and found.waiting_because:
            said.append(f"{found.waiting} copies of unsubscribes wait for {host}: {found.waiting_because}")
        if found.given_up:
            advice = "`sluice inbound copies --retry` sends them"
            said.append(f"{found.given_up} copies of unsubscribes were given up: {found.given_up_because}; {advice}")
        return said

    async def run(self) -> None:
        """Work until cancelled."""
        async with self.client() as client:
            pause = POLL_SECONDS
            while True:
                try:
                    if await self.once(client):
                        continue
                    pause = POLL_SECONDS
                except Exception as error:
                    pause = min(2 * pause, POST_SECONDS)
                    if not is_store_trouble(error):
                        log.exception("sending copies of unsubscribes failed", reason=sentence(error))
                await asyncio.sleep(pause)

    def client(self) -> httpx.AsyncClient:
        """Certificates are checked against those of the system; no proxy and no password comes from the environment."""
        return httpx.AsyncClient(timeout=self._post_seconds, trust_env=False, verify=ssl.create_default_context())

    async def once(self, client: httpx.AsyncClient) -> bool:
        """Post what is due, a few at once; whether there may be more."""
        copies: list[Copy] = []
        if self._url:
            async with transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
                copies = await rows.take(conn, AT_ONCE, HOLD_SECONDS)
        if copies:
            answers = await asyncio.gather(*(self._post(client, copy) for copy in copies))
            failed = [self._failure(copy, reason) for copy, reason in zip(copies, answers, strict=True) if reason]
            done = [copy.id for copy, reason in zip(copies, answers, strict=True) if not reason]
            async with transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
                await rows.settle(conn, done, failed)
        if time.monotonic() - self._reported_at > REPORT_SECONDS:
            async with transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
                if time.monotonic() - self._pruned_at > PRUNE_SECONDS:
                    await rows.prune(conn)
                    self._pruned_at = time.monotonic()
                self.report = await rows.report(conn)
            self._reported_at = time.monotonic()
        return len(copies) == AT_ONCE

    async def _post(self, client: httpx.AsyncClient, copy: Copy) -> str:
        """Why it failed; "" where it did not."""
        body, now = copy.body.encode(), int(time.time())
        headers = {
            "content-type": "application/json", "user-agent": "Sluice", "webhook-id": str(copy.id), "webhook-timestamp": str(now),
            "webhook-signature": signature(self._key, str(copy.id), now, body),
        }  # fmt: skip
        try:
            async with asyncio.timeout(self._post_seconds), client.stream("POST", self._url, content=body, headers=headers) as answer:
                return "" if answer.is_success else f"it answered {answer.status_code}"
        except (TimeoutError, httpx.TimeoutException):
            return f"no answer within {self._post_seconds:g} s"
        except (httpx.HTTPError, OSError, ssl.SSLError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

    def _failure(self, copy: Copy, reason: str) -> Failure:
        pause = min(LONGEST_PAUSE_SECONDS, self._first_pause * 2 ** min(copy.attempts - 1, 20))
        if copy.age_seconds + pause > self._max_age:
            log.error("the copy of an unsubscribe is given up", id=str(copy.id), attempts=copy.attempts, reason=reason)
            return Failure(copy.id, reason, None)
        return Failure(copy.id, reason, pause)
