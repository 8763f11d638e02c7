"""What a signed token asks for over HTTP: unsubscribing, reporting abuse, and postbacks that came while PostgreSQL was away.

Web ─▶ journal, durable ─▶ its reader ─▶ one transaction: what was asked for, and the cursor ─▶ whoever waits for the answer

The token alone proves whose it is, so nobody is asked before it is written down: a mailbox provider that sends a one-click POST gets its
200 whether PostgreSQL is there or not. While it is there, the answer waits for the transaction and knows what became of it.
"""

import asyncio
import contextlib
import secrets
import time
from typing import Final, Literal

import asyncpg
import structlog

from domain.links import LinkParts
from inbound import abuse
from inbound.postback import Postbacks
from inbound.worker import is_expected
from journal.visits import Held, Settled, Visits
from store import inbound
from store.postgres import Pool, PooledConnection

log = structlog.get_logger(__name__)

# fresh: done now; again: it was done before; unknown: about nobody; kept: will be done; refused: cannot be kept, or failed for good
Outcome = Literal["fresh", "again", "unknown", "kept", "refused"]

ANSWER_SECONDS: Final = 1.0  # so long an answer waits for PostgreSQL
CARRY_OUT_SECONDS: Final = 10.0
LOCK_MILLISECONDS: Final = 300  # so long one request may hold up the others because somebody has its rows locked, an import for example


class Requests:
    """Those of one inbound process, in a journal of their own: no backlog of opens and clicks stands before them."""

    def __init__(
        self, journal: Visits, postbacks: Postbacks, unsubscribe_copy_to: str = "", *, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        self._journal = journal
        self._answer_seconds = answer_seconds
        self._reading = True  # what is kept is carried out soon
        self._postbacks = postbacks
        self._copy_to = unsubscribe_copy_to
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}

    async def take(self, kind: Literal["unsubscribe", "abuse"], parts: LinkParts, body: bytes = b"") -> Outcome:
        """Write it down for good; what became of it within a moment."""
        held = Held(kind, *parts, b"", body, time.time(), secrets.token_hex(8))
        decided: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[held.id] = decided
        try:
            if not await self._journal.hold(held):
                return "refused"
            if self._journal.trouble or not self._reading:
                return "kept"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._answer_seconds):
                    return await decided
            return "kept"
        finally:
            del self._waiting[held.id]

    async def keep(self, held: Held) -> bool:
        """Write it down for good, to be carried out when PostgreSQL is there; False where the disk does not take it."""
        return await self._journal.hold(held)

    async def run(self, pool: Pool) -> None:
        """Carry out until cancelled."""
        self._reading = True
        try:
            await self._journal.run(pool, self.carry_out, self._let_go)
        finally:
            self._reading = False
            self._let_go()

    def _let_go(self) -> None:
        for decided in self._waiting.values():
            if not decided.done():
                decided.set_result("kept")

    async def carry_out(self, conn: PooledConnection, held: Held) -> Settled:
        """Do it, in the caller's transaction; the function returned tells who waits, and is called behind the commit.

        Raises only what passes. What can never be done is said in the log, and done with.
        """
        outcome: Outcome = "refused"
        try:
            async with asyncio.timeout(CARRY_OUT_SECONDS), conn.transaction():
                await conn.execute(f"set local lock_timeout = {LOCK_MILLISECONDS}")
                outcome = await self._do(conn, held)
        except asyncpg.LockNotAvailableError:
            # Behind the others. Should we die before the cursor has moved it is there twice, and done a second time changes nothing
            if not await self._journal.hold(held):
                raise
            return lambda: None
        except Exception as failure:
            if is_expected(failure):
                raise
            log.error("what a link asked for cannot be carried out", kind=held.kind, user=held.user_id, campaign=held.campaign_id,
                      number=held.number, reason=f"{type(failure).__name__}: {failure}"[:300])  # fmt: skip

        def settled() -> None:
            if outcome == "fresh":
                log.info("carried out", kind=held.kind, user=held.user_id, campaign=held.campaign_id, number=held.number)
            decided = self._waiting.get(held.id)
            if decided is not None and not decided.done():
                decided.set_result(outcome)

        return settled

    async def _do(self, conn: PooledConnection, held: Held) -> Outcome:
        parts = LinkParts(held.user_id, held.campaign_id, held.number)
        if held.kind == "postback":
            status, words = await self._postbacks.act(conn, held.user_id, held.query, held.body, held.at)
            if status != 200:
                log.warning("a postback that was kept is refused", user=held.user_id, reason=words.decode().strip())
            return "again"
        if held.kind == "abuse":
            fresh = await abuse.report(conn, parts, held.body)
        else:
            note = f"one-click, campaign {held.campaign_id}"
            fresh = await inbound.unsubscribe(conn, *parts, note=note, timeout_seconds=CARRY_OUT_SECONDS, copy_to=self._copy_to, at=held.at)
        return "unknown" if fresh is None else "fresh" if fresh else "again"
