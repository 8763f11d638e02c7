"""Reads what was received and does what follows: one transaction for a group of messages, so each counts once however often we die.

    inbound_messages ─▶ triage process ─▶ handling.judge ─▶ bounces.record ─▶ engines are told
    refusals (ledger) ────────────────────────────────────▶ bounces.take_refusals ─▶ engines are told

Several may run, in one process or many: a row that one has locked is passed by. Mail that takes too much to be read is kept raw and
flagged. A message at which a bug of ours shows is found by taking the group apart, and flagged as well: it never holds up the others.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import asyncpg
import structlog

from domain import feedback
from domain.bounce import shipped_rules
from domain.errors import Invalid, Unavailable
from inbound.forwarding import Forwards
from inbound.handling import Keys, Verdict, judge
from inbound.summary import Summary
from inbound.triage_process import Question, TriageProcess, Unreadable
from store import bounce_patterns, bounces, forwarding, received
from store.bounces import Changes, Rules
from store.postgres import Pool, PooledConnection, transaction
from store.received import Settled, Waiting
from store.trouble import is_store_trouble, sentence

log = structlog.get_logger(__name__)

POLL_SECONDS: Final = 0.25  # who keeps mail in another process tells nobody
MOST_MESSAGES: Final = 200  # of one group
MOST_READING_SECONDS: Final = 5.0  # of one group: what is left over is taken by the next
STORE_TIMEOUT_SECONDS: Final = 30.0
PATTERNS_SECONDS: Final = 1.0  # how soon a changed bounce pattern counts
PRUNE_SECONDS: Final = 600.0
PRUNED_AT_ONCE: Final = 1000
NOTICES_PER_HOUR: Final = 10
_LONGEST_PAUSE_SECONDS: Final = 5.0


class Worker:
    """One of them. `changed` tells the engines of changed "suppressions" or "campaigns"; it must not fail."""

    def __init__(
        self,
        pool: Pool,
        keys: Keys,
        rules: Rules,
        changed: Callable[[str], Awaitable[None]],
        *,
        keep_days: float = 30.0,
        admin_address: str = "",
        forwards: Forwards | None = None,
        triage: TriageProcess | None = None,
    ) -> None:
        self.trouble = ""  # why nothing is read now, in words
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (kind, outcome) since the start
        self.refusals = 0
        self._pool = pool
        self._keys = keys
        self._rules = rules
        self._changed = changed
        self._keep_days = keep_days
        self._admin_address = admin_address
        self._forwards = forwards
        self._triage = triage or TriageProcess()
        self._wake = asyncio.Event()
        self._one_by_one = 0  # so many messages are taken alone: one of them made us fail
        self._pruned_at = 0.0
        self._bounce_rules = shipped_rules()
        self._patterns_version = -1
        self._looked_for_patterns_at = -PATTERNS_SECONDS

    @property
    def restarts(self) -> int:
        """How often the triage process had to be replaced."""
        return self._triage.restarts

    def wake(self) -> None:
        """There is something to read."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        pause = POLL_SECONDS
        try:
            while True:
                self._wake.clear()
                try:
                    busy = await self.once()
                except Exception as error:
                    pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)
                    self._note(error)
                else:
                    self.trouble, pause = "", POLL_SECONDS
                    if busy:
                        continue
                try:
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            await self._triage.close()

    def _note(self, error: Exception) -> None:
        if is_store_trouble(error):
            if not self.trouble:
                log.warning("received mail waits in the store", reason=sentence(error))
        else:
            log.error("handling received mail failed", reason=f"{type(error).__name__}: {error}"[:500])
        self.trouble = f"received mail is kept but not read: {sentence(error)}"

    async def once(self) -> bool:
        """Handle one group of messages and one of refusals; whether there may be more."""
        await self._follow_patterns()
        messages = await self._messages()
        refused = await self._refusals()
        if time.monotonic() - self._pruned_at > PRUNE_SECONDS and not messages and not refused:
            if not await self._prune():
                self._pruned_at = time.monotonic()
        return bool(messages or refused)

    async def _follow_patterns(self) -> None:
        """Take over the operator's bounce patterns, as the engines do."""
        if time.monotonic() - self._looked_for_patterns_at < PATTERNS_SECONDS:
            return
        async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
            if await bounce_patterns.version(self._pool) != self._patterns_version:
                version, patterns = await bounce_patterns.load(self._pool)
                try:
                    self._bounce_rules = shipped_rules().with_patterns(patterns)
                    await self._triage.use(patterns)
                except Invalid as error:  # not by way of the API: somebody wrote into the table
                    log.error("bounce patterns refused, the ones before stay in force", reason=str(error))
                self._patterns_version = version
        self._looked_for_patterns_at = time.monotonic()

    # --- messages ---------------------------------------------------------------------------------------------------------------

    async def _messages(self) -> int:
        changes = Changes()
        waiting: list[Waiting] = []
        try:
            async with transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
                waiting = await received.take(conn, 1 if self._one_by_one else MOST_MESSAGES, timeout_seconds=STORE_TIMEOUT_SECONDS)
                if not waiting:
                    return 0
                settled = await self._handle(conn, waiting, changes)
                await received.settle(conn, settled, timeout_seconds=STORE_TIMEOUT_SECONDS)
        except Exception as error:
            if is_expected(error) or not waiting:
                raise
            if len(waiting) > 1:
                self._one_by_one = len(waiting)
                raise
            await self._flag(waiting[0], error)
            settled = []
        self._one_by_one = max(0, self._one_by_one - 1)
        for each in settled:
            self.outcomes[each.kind, each.outcome] += 1
        await self._tell(changes)
        return len(waiting)

    async def _handle(self, conn: PooledConnection, waiting: list[Waiting], changes: Changes) -> list[Settled]:
        readings: list[Summary | Unreadable] = []
        started = time.monotonic()
        reading = self._triage.read([Question(not message.mail_from, message.raw) for message in waiting])
        try:
            async for answer in reading:
                readings.append(answer)
                if time.monotonic() - started > MOST_READING_SECONDS:
                    break
        finally:
            await reading.aclose()
        verdicts = [self._judge(message, answer) for message, answer in zip(waiting, readings, strict=False)]
        events = [verdict.event for verdict in verdicts if verdict.event is not None]
        answers = iter(await bounces.record(conn, events, self._rules, changes) if events else ())
        settled = []
        for message, answer, verdict in zip(waiting, readings, verdicts, strict=False):
            outcome, reason = verdict.outcome, verdict.reason
            if verdict.event is not None:
                outcome, remark = next(answers)
                reason = f"{reason}; {remark}" if remark else reason
            path = verdict.path
            kind = answer.kind if isinstance(answer, Summary) else "unreadable"
            settled.append(
                Settled(
                    id=message.id, kind=kind, outcome=outcome, reason=reason, reading=answer if isinstance(answer, Summary) else {},
                    user_id=path.user_id if path and outcome != feedback.UNPROVEN else None,
                    campaign_id=path.campaign_id if path else None, number=path.number if path else None,
                )
            )  # fmt: skip
        troublesome = {each.id for each in settled if each.outcome in feedback.TROUBLESOME}
        await self._notify(conn, [message for message in waiting if message.id in troublesome])
        return settled

    def _judge(self, message: Waiting, answer: Summary | Unreadable) -> Verdict:
        if isinstance(answer, Unreadable):
            log.warning("a message could not be read; it is kept raw", id=message.id, reason=answer.why)
            return Verdict(outcome=feedback.UNREADABLE, reason=answer.why)
        return judge(message, answer, self._keys)

    async def _flag(self, message: Waiting, error: Exception) -> None:
        """A message at which handling fails by itself: kept raw, and out of the way."""
        reason = f"handling it failed: {type(error).__name__}: {error}"[:500]
        log.error("a message could not be handled; it is kept raw", id=message.id, reason=reason)
        flagged = Settled(id=message.id, kind="unreadable", outcome=feedback.UNREADABLE, reason=reason, reading={})
        async with transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            await received.settle(conn, [flagged], timeout_seconds=STORE_TIMEOUT_SECONDS)
            await self._notify(conn, [message])
        self.outcomes[flagged.kind, flagged.outcome] += 1

    async def _notify(self, conn: PooledConnection, mails: list[Waiting]) -> None:
        """Send what could not be processed to the administrator (69), a few an hour; all of it is counted in the status."""
        if not self._admin_address or self._forwards is None or not mails:
            return
        room = NOTICES_PER_HOUR - await forwarding.lately(conn, self._admin_address)
        for mail in mails[: max(0, room)]:
            reason = await self._forwards.add(
                conn, mail.id, "notice", self._admin_address, recipient=mail.recipient, mail_from=mail.mail_from, raw=mail.raw
            )
            if reason:
                log.warning("the administrator is not sent a message that could not be processed", id=mail.id, reason=reason)

    # --- refusals ---------------------------------------------------------------------------------------------------------------

    async def _refusals(self) -> int:
        changes = Changes()
        async with transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            taken = await bounces.take_refusals(conn, MOST_MESSAGES, self._rules, changes, self._bounce_rules)
        self.refusals += taken
        await self._tell(changes)
        return taken

    async def _prune(self) -> int:
        async with transaction(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            await forwarding.prune(conn)
            return await received.prune(conn, self._keep_days, PRUNED_AT_ONCE, timeout_seconds=STORE_TIMEOUT_SECONDS)

    async def _tell(self, changes: Changes) -> None:
        if changes.suppressions:
            await self._changed("suppressions")
        if changes.campaigns:
            await self._changed("campaigns")


# Classes of SQLSTATE that pass: connection, read only, rolled back (deadlock), resources, state of an object (locks), intervention, disk
_PASSING: Final = frozenset({"08", "25", "40", "53", "55", "57", "58"})


def is_expected(error: Exception) -> bool:
    """Trouble that passes by itself. A statement that PostgreSQL refuses for what is in it is a bug of ours, and would come again."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "")[:2] in _PASSING
    return isinstance(error, Unavailable) or is_store_trouble(error)
