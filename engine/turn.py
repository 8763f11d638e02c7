"""One turn of the event loop: outcomes in, journal, messages out.

Connections only parse while bytes arrive. Once all that arrived in this turn has been parsed, `Turn.run` settles the outcomes,
builds the next messages for every connection with room, writes outcomes and intents to the journal with one write(2), and only
then lets the connections write (R1, R10). Nothing leaves a connection anywhere else.
"""

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Sequence

import structlog

from compose.campaign import CompiledCampaign, Envelope
from compose.campaign import Message as Built
from compose.raw import RawMessage
from domain import states
from domain.bounce import BounceClass, shipped_rules
from domain.campaign import Batch
from domain.errors import Invalid, JournalError
from domain.reply import SmtpReply, one_line
from engine import disposition, retry
from engine.clock import SteadyClock
from engine.egress_path import EgressPath
from engine.held import GUILTY_LOSSES, HeldBatch
from engine.suppression_set import SuppressionSet
from ext import turn_steps
from ext.journal_record import pack_outcome, pack_withdrawal
from ext.smtp_session import STAGE_CONTENT, STAGE_LOST, STAGE_MAIL, Message, Outcome, SmtpSession
from journal.segments import Journal

log = structlog.get_logger(__name__)

JOURNAL_RETRY_SECONDS = 1.0
BUG_EXIT_CODE = 70  # EX_SOFTWARE; the supervisor starts another one
# An answer to MAIL FROM that speaks of an unknown mailbox or domain means the sender's: the recipient was not named yet
_SENDER_REFUSED = BounceClass("invalid-sender", "sender", hard=False, rule="mail-from")
_SESSIONS_PER_TURN = 512  # more connections than this are filled over several turns, so no turn holds up the loop for long
_OCTETS_PER_TURN = 4 << 20  # of message content, composed and written


class Turn:
    """Gathers what the connections parsed and runs once for all of them."""

    def __init__(
        self,
        journal: Journal,
        suppressions: SuppressionSet,
        lease_margin: float,
        settled: Callable[[HeldBatch], None],
        overslept: Callable[[], None],
    ) -> None:
        self.outcomes: list[Outcome] = []  # appended to by the connections
        self.stopping = False  # drain: nothing new is begun
        self.trouble = ""  # why nothing is sent at all (R5)
        self.messages = 0  # outcomes of attempts that reached a server
        self.bounce_rules = shipped_rules()  # behind the operator's patterns, once those are read
        self.clock = SteadyClock()
        self._journal = journal
        self._suppressions = suppressions
        self._lease_margin = lease_margin
        self._settled = settled
        self._overslept = overslept
        self._ready: dict[SmtpSession, None] = {}
        self._closed: list[tuple[SmtpSession, str]] = []
        self._unflushed: list[SmtpSession] = []
        self._scheduled = False
        self._loop = asyncio.get_running_loop()
        self._awake_at = time.monotonic()
        self._stay_awake()
        self._now_us = 0

    # --- called by the connections ---------------------------------------------------------------------------------------
    def ready(self, session: SmtpSession) -> None:
        """`session` has parsed something, or can take a message."""
        self._ready[session] = None
        if not self._scheduled:
            self._schedule()

    def closed(self, session: SmtpSession, reason: str) -> None:
        """`session` has ended; the outcomes of what it had in flight are in `outcomes`."""
        self._closed.append((session, reason))
        self._ready.pop(session, None)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.run)

    def _stay_awake(self) -> None:
        self._look_at_the_clock()
        self._loop.call_later(self._lease_margin / 4, self._stay_awake)

    def _look_at_the_clock(self) -> None:
        """Notice that this process stood still (SIGSTOP, a suspended machine) before anything leaves under a lease that ended meanwhile.

        The timer and the turn look, because after such a pause either may come first, and the turn once more before it lets go of what
        it composed.
        """
        before, self._awake_at = self._awake_at, time.monotonic()
        if self._awake_at - before > self._lease_margin:
            self._overslept()

    # --- the turn ----------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Settle, fill, journal, flush. A bug in here ends the process at once."""
        try:
            self._run()
        except Exception:
            # Half a turn is done: what servers answered may stand in no record, and nothing more may leave before it does (R1).
            # To die like this is what the journal is for; to live on would be an engine that looks alive and sends nothing.
            log.exception("a turn failed half-way; the engine ends at once, its journal names who is in doubt")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(BUG_EXIT_CODE)

    def _run(self) -> None:
        self._scheduled = False
        self._look_at_the_clock()
        self._now_us = self.clock.now_us()
        outcomes, self.outcomes = self.outcomes, []
        if outcomes:
            others, delivered, settled = turn_steps.record_deliveries(outcomes, self._journal.records, self._now_us)
            self.messages += delivered
            for held in settled:
                self._settled(held)
            for outcome in others:
                self._settle(outcome)
        closed, self._closed = self._closed, []
        for session, reason in closed:
            session.owner.closed(session, reason, trouble=not session.graceful)
        ready = list(self._ready)
        self._ready.clear()
        if len(ready) > _SESSIONS_PER_TURN:
            self._ready = dict.fromkeys(ready[_SESSIONS_PER_TURN:])
            del ready[_SESSIONS_PER_TURN:]
            self._schedule()
        later = self._fill(ready) if not self.trouble and not self.stopping else ()
        self._unflushed.extend([session for session in ready if session not in later] if later else ready)
        self._write()

    def _write(self) -> None:
        try:
            self._journal.write()
        except JournalError as error:
            # R5: no outcome store, no sending. The records stay in the journal's buffer and no connection writes a byte.
            if not self.trouble:
                log.error("journal cannot be written; nothing is sent until it can", reason=str(error))
                self._loop.call_later(JOURNAL_RETRY_SECONDS, self._write_again)
            self.trouble = str(error)
            return
        unflushed, self._unflushed = self._unflushed, []
        self._look_at_the_clock()  # it may have stood still since the turn began
        turn_steps.flush_all(unflushed)

    def _write_again(self) -> None:
        try:
            self._journal.reopen()
            self._journal.write()
        except JournalError as error:
            self.trouble = str(error)
            self._loop.call_later(JOURNAL_RETRY_SECONDS, self._write_again)
            return
        log.info("journal can be written again")
        self.trouble = ""
        unflushed, self._unflushed = self._unflushed, []
        for session in unflushed:
            self.ready(session)

    # --- messages out --------------------------------------------------------------------------------------------------------
    def _fill(self, ready: list[SmtpSession]) -> set[SmtpSession]:
        """Give them messages. Returns those that have to wait for the next turn.

        Nothing of theirs leaves before: the content they owe and their next command go in one write, and both answers come in one read.
        """
        now = time.monotonic()
        later: set[SmtpSession] = set()
        path: EgressPath
        for path, sessions in turn_steps.by_owner(ready).items():
            rooms, wanted = turn_steps.rooms_of(sessions)
            if not wanted:
                continue
            if wanted > path.per_turn < path.ready:
                sessions, rooms, wanted = self._postpone(path, sessions, rooms, later)
            allowed = path.bucket.take(wanted, now)
            messages: list[Message] = []
            while len(messages) < allowed:
                slices = path.take(allowed - len(messages), now, self._lease_margin)
                if not slices:
                    break
                for held, indexes in slices:
                    self._compose(path, held, indexes, messages)
            if len(messages) < allowed:
                path.bucket.give_back(allowed - len(messages))
            if messages:
                path.per_turn = _per_turn(messages[-1])
            odd, starved = turn_steps.hand_out(sessions, rooms, messages, self._journal.records, path.server.id, self._now_us)
            for session, share in odd:
                if self._submit_sendable(path, session, share) < len(share):
                    self.ready(session)  # it has room left and nothing that would wake it
            for session in starved:
                path.wait_for_work(session)
            if starved:
                path.wake()  # it knows when the throttle lets the next message go, or when there is work again
        return later

    def _postpone(
        self, path: EgressPath, sessions: list[SmtpSession], rooms: list[int], later: set[SmtpSession]
    ) -> tuple[list[SmtpSession], list[int], int]:
        """The first sessions, with room for what a turn may compose on `path` and no more; the others with room are put into `later`."""
        left, count = path.per_turn, 0
        while left >= rooms[count]:
            left -= rooms[count]
            count += 1
        if left:  # begun now, and ready again for what its window still takes
            rooms[count] = left
            self.ready(sessions[count])
            count += 1
        for session, room in zip(sessions[count:], rooms[count:], strict=True):
            if room:
                later.add(session)
                self.ready(session)
        return sessions[:count], rooms[:count], path.per_turn

    def _compose(self, path: EgressPath, held: HeldBatch, indexes: list[int], into: list[Message]) -> None:
        batch, campaign = held.batch, held.campaign
        suppressed = self._suppressions.among(campaign.user_id, campaign.list_id, batch.recipients, indexes)
        if suppressed:
            for index in suppressed:
                self._local(path, held, index, states.KIND_SUPPRESSION, "5.7.1", "suppressed address", "")
            gone = set(suppressed)
            indexes = [i for i in indexes if i not in gone]
        if campaign.compiled is None:
            for index in indexes:
                self._local(
                    path, held, index, states.KIND_EXPIRY, "5.6.0", f"campaign content refused: {campaign.refusal}", "content-related"
                )
            return
        try:
            built = _build(campaign.compiled, batch, indexes, path.eight_bit)
        except Exception as bug:
            log.error("composing failed unexpectedly, trying one by one", campaign=campaign.id, reason=f"{type(bug).__name__}: {bug}")
            built = [_build_alone(campaign.compiled, batch, index) for index in indexes]
        made = len(into)
        for index, refusal in turn_steps.make_messages(built, held, indexes, into):
            self._local(path, held, index, states.KIND_EXPIRY, "5.6.0", str(refusal), "content-related")
        if held.losses or (batch.attempt > 1 and path.windows):
            # One of those tried again may be what ends its connections; nobody else is to be in doubt with it a second time
            for message in into[made:]:
                message.alone = (batch.attempt > 1 and path.windows) or held.is_suspect(message.ref[1])

    def _submit_sendable(self, path: EgressPath, session: SmtpSession, messages: list[Message]) -> int:
        """`session` lacks SMTPUTF8 or 8BITMIME: those that need it are composed without it or refused here, the others are sent.

        Returns how many are.
        """
        sendable: list[Message] = []
        for message in messages:
            held, index = message.ref
            if message.smtputf8 and not session.facts.smtputf8:
                sentence = "the address needs SMTPUTF8, which the delivery server does not offer"
                self._local(path, held, index, states.KIND_EXPIRY, "5.6.7", sentence, "bad-configuration")
            elif message.eight_bit and not message.smtputf8 and not session.facts.eight_bit:
                if isinstance(held.campaign.compiled, CompiledCampaign):  # another connection of the server offers it
                    self._compose_7bit(path, message, held.campaign.compiled, sendable)
                    continue
                sentence = "the message needs 8BITMIME, which the delivery server does not offer"
                self._local(path, held, index, states.KIND_EXPIRY, "5.6.3", sentence, "bad-configuration")
            else:
                sendable.append(message)
        turn_steps.begin(session, sendable, self._journal.records, path.server.id, self._now_us)
        return len(sendable)

    def _compose_7bit(self, path: EgressPath, message: Message, compiled: CompiledCampaign, into: list[Message]) -> None:
        held, index = message.ref
        refused = turn_steps.make_messages([_build_alone(compiled, held.batch, index)], held, [index], into)
        for _, refusal in refused:
            self._local(path, held, index, states.KIND_EXPIRY, "5.6.0", str(refusal), "content-related")
        if not refused:
            into[-1].alone = message.alone

    # --- outcomes in ---------------------------------------------------------------------------------------------------------
    def _settle(self, outcome: Outcome) -> None:
        session, message = outcome.session, outcome.message
        path: EgressPath = session.owner
        held, index = message.ref
        code = outcome.code
        text = one_line(outcome.text)
        if outcome.stage == STAGE_CONTENT and 200 <= code < 300:
            path.delivered += 1
            path.answers += 1
            self.messages += 1
            if path.health.failures:
                path.answered(session)
            self._record(
                path, session, message, held, index, states.KIND_DELIVERY, f"{code} {text}", str(SmtpReply(code, text).enhanced), ""
            )
            self._close(held)
            return
        reason = self.bounce_rules.classify(code, text) if code >= 400 else None
        if reason is not None and outcome.stage == STAGE_MAIL and reason.fault == "recipient" and not reason.by_operator:
            reason = _SENDER_REFUSED
        limits, first_attempt_at, guilty = path.server.limits, held.batch.first_attempt_at, False
        unanswered = code in (0, 421, 503)
        if unanswered and outcome.begun:
            path.came_back(session, in_doubt=outcome.stage == STAGE_LOST)
            suspect, now = message.alone and held.is_suspect(index), self._now_us / 1e6
            losses = held.lost_with(index, path.answers, now)
            first_attempt_at = first_attempt_at or losses.since
            # On a connection of its own, or so often that the end of a connection others had used up is no excuse
            guilty = suspect and path.lively and (session.sent == 1 or losses.counted >= GUILTY_LOSSES)
            guilty = guilty or now - first_attempt_at > limits.max_age_seconds
        what = disposition.decide(outcome.stage, code, reason, begun=outcome.begun, guilty=guilty, on_uncertain=limits.on_uncertain)
        diagnostic = f"{code} {text}" if code else text
        if what.path == "suspend":
            path.suspend(f"{path.server.host} answered {diagnostic}", session)
        elif what.path == "throttle":
            path.slow_down(diagnostic)
        if what.connection == "close":
            session.quit()
        if what.recipient == disposition.REQUEUED:
            self._withdraw(path, session, held, index)
            path.returned(held, index)
            return
        self.messages += 1
        if not unanswered:
            path.answers += 1
            path.answered(session)
        status = str(SmtpReply(code, text).enhanced) if code else "4.4.2"
        category = reason.category if reason else ""
        kind, due_at = what.kind, 0
        in_doubt = what.uncertain_first or kind == states.KIND_UNCERTAIN
        if in_doubt:
            path.uncertain += 1
            doubt = f"lost connection after end of data, possible duplicate: {diagnostic}"
            self._record(path, session, message, held, index, states.KIND_UNCERTAIN, doubt, "4.4.2", "bad-connection")
            if kind == states.KIND_UNCERTAIN:
                kind, diagnostic, category = states.KIND_TRANSIENT, doubt, "bad-connection"
        if kind == states.KIND_TRANSIENT:
            due = retry.next_due(limits, held.batch.attempt, self._now_us / 1e6, random.random(), first_attempt_at)
            if due is None:
                kind, category = states.KIND_EXPIRY, "message-expired"
                status = "4.4.7"
            elif held.lease_until <= time.monotonic():
                # Its batch may be somebody else's by now, who sends it on: a retry of ours would be one copy more (P3)
                if not in_doubt:
                    self._withdraw(path, session, held, index)
                path.returned(held, index)
                return
            else:
                due_at = int(due * 1e6)
                path.deferred += 1
        elif kind == states.KIND_BOUNCE:
            path.bounced += 1
        elif kind == states.KIND_DELIVERY:
            path.delivered += 1
        self._record(path, session, message, held, index, kind, diagnostic, status, category, due_at)
        self._close(held)

    def _record(
        self, path: EgressPath, session: SmtpSession, message: Message, held: HeldBatch, index: int, kind: str, diagnostic: str,
        status: str, category: str, due_at: int = 0,
    ) -> None:  # fmt: skip
        batch, facts = held.batch, session.facts
        recipient = batch.recipients[index]
        email = recipient.email
        self._journal.append(
            pack_outcome(
                kind, batch.campaign_id, batch.batch, recipient.number, batch.positions[index], batch.attempt, held.epoch,
                session.connection_id, path.server.id, self._now_us, held.campaign.queued_at_us,
                int(batch.first_attempt_at * 1e6) or self._now_us, due_at, message.size, email, message.mail_from.decode(),
                status, diagnostic, category, facts.mta, facts.source_ip, facts.destination_ip, facts.esmtp,
                email[email.rfind("@") + 1 :] + facts.queue_suffix,
            )
        )  # fmt: skip

    def _withdraw(self, path: EgressPath, session: SmtpSession, held: HeldBatch, index: int) -> None:
        """Take an intent back: the message certainly did not leave whole, so after a crash it is not in doubt."""
        batch = held.batch
        self._journal.append(
            pack_withdrawal(
                batch.campaign_id, batch.batch, batch.recipients[index].number, batch.positions[index], batch.attempt, held.epoch,
                session.connection_id, path.server.id, self._now_us,
            )
        )  # fmt: skip

    def _local(self, path: EgressPath, held: HeldBatch, index: int, kind: str, status: str, diagnostic: str, category: str) -> None:
        """Record an outcome that no server had a part in."""
        batch = held.batch
        recipient = batch.recipients[index]
        self._journal.append(
            pack_outcome(
                kind, batch.campaign_id, batch.batch, recipient.number, batch.positions[index], batch.attempt, held.epoch, 0,
                path.server.id, self._now_us, held.campaign.queued_at_us, int(batch.first_attempt_at * 1e6), 0, 0,
                recipient.email, "", status, one_line(diagnostic.encode("utf-8", "replace")), category, "", "", "", "",
                recipient.email.rpartition("@")[2] + "/" + path.server.name,
            )
        )  # fmt: skip
        self._close(held)

    def _close(self, held: HeldBatch) -> None:
        if held.settle():
            self._settled(held)


def _per_turn(message: Message) -> int:
    """How many messages like this one a turn may compose for a path, so that it does not hold up the loop for long; at least one."""
    most = max(1, _OCTETS_PER_TURN // max(1, message.size))
    held: HeldBatch = message.ref[0]
    compiled = held.campaign.compiled
    return most if compiled is None or compiled.signer is None else min(most, compiled.signer.at_once)


def _build(
    compiled: CompiledCampaign | RawMessage, batch: Batch, indexes: list[int], eight_bit: bool = False
) -> Sequence[Built | Envelope | Invalid]:
    recipients = [batch.recipients[index] for index in indexes]
    if eight_bit and isinstance(compiled, CompiledCampaign) and compiled.has_8bit:
        return compiled.build_8bit(recipients, composed_at=batch.composed_at, attempt=batch.attempt)
    return compiled.build(recipients, composed_at=batch.composed_at, attempt=batch.attempt)


def _build_alone(compiled: CompiledCampaign | RawMessage, batch: Batch, index: int) -> Built | Envelope | Invalid:
    """One recipient whose data nobody foresaw must cost neither the others their mail nor the engine its life."""
    try:
        return _build(compiled, batch, [index])[0]
    except Exception as bug:
        return Invalid("content", f"could not be composed for this recipient: {type(bug).__name__}")
