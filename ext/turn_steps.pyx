# cython: language_level=3
"""The steps of an engine's turn that every message takes, each for a whole group in one call.

`engine.turn` decides; what it would do message by message in the ordinary case (content accepted, nothing suppressed, nothing to be
looked at) is done here, because a Python frame and thirty attribute look-ups per message cost as much as sending it. Whatever is
not the ordinary case is handed back untouched. Records are packed by `journal_record`, so their format has one owner.

`message.ref` is (held, index). What stands behind `session.owner` and `held` is duck-typed, as far as these names are used:
held.batch .epoch .campaign.queued_at_us .in_flight .open; batch.campaign_id .batch .attempt .first_attempt_at .positions .recipients[index];
recipient.number .email; owner.server.id .health.failures .delivered .answers. `session.facts` is a Peer.
"""

cimport cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memcpy

from ext.journal_record cimport DIAGNOSTIC, LONGEST_STRING, Outcome as Record, Records, Slice, cut, fit16, fit32, take_text
from ext.smtp_protocol cimport STAGE_CONTENT_C, Message, Outcome, new_message
from ext.smtp_session cimport SmtpSession

cdef enum:
    LONGEST_PLAIN = 120  # a reply of so many ASCII octets needs no cutting, whatever `domain.reply.one_line` allows


cdef bint _is_plain(const char *text, Py_ssize_t length) noexcept nogil:
    """Tell whether a reply's text is one line of printable ASCII without blanks at its ends, and short."""
    cdef Py_ssize_t i
    if length > LONGEST_PLAIN or length == 0 or text[0] == c" " or text[length - 1] == c" ":
        return False
    for i in range(length):
        if text[i] < 32 or text[i] > 126:
            return False
    return True


cdef Py_ssize_t _status_end(const char *text, Py_ssize_t length) noexcept nogil:
    """Where the enhanced status (RFC 3463) of a 2xx reply ends; 0: it has none; -1: written in a way that needs a closer look."""
    cdef Py_ssize_t i = 1, digits
    cdef int part
    if length < 5 or text[0] < c"0" or text[0] > c"9" or text[1] != c".":
        return 0
    if text[0] != c"2":
        return -1
    for part in range(2):
        if i >= length or text[i] != c".":
            return -1
        i += 1
        digits = 0
        while i < length and c"0" <= text[i] <= c"9":
            if digits == 1 and text[i - 1] == c"0":
                return -1
            i += 1
            digits += 1
        if digits < 1 or digits > 3:
            return -1
    if i < length and text[i] != c" ":
        return -1
    return i


cdef int _queue_name(char *into, Slice *email, Slice *suffix) noexcept nogil:
    """The domain of an address and behind it the suffix, no longer than a text may be."""
    cdef Py_ssize_t start = email.size
    cdef Py_ssize_t length, more
    while start > 0 and email.start[start - 1] != c"@":
        start -= 1
    length = email.size - start
    memcpy(into, email.start + start, length)
    more = cut(suffix.start, suffix.size, LONGEST_STRING - length)
    memcpy(into + length, suffix.start, more)
    return <int>(length + more)


@cython.auto_pickle(False)
cdef class Peer:
    """What the records of one connection's messages have in common, and what its server can do."""

    cdef readonly str mta, source_ip, destination_ip, esmtp, queue_suffix
    cdef readonly bint smtputf8, eight_bit
    cdef Slice[4] text
    cdef Slice suffix
    cdef list kept

    def __init__(
        self, str mta not None, str source_ip not None, str destination_ip not None, str esmtp not None, str queue_suffix not None,
        bint smtputf8, bint eight_bit,
    ):
        self.mta, self.source_ip, self.destination_ip, self.esmtp, self.queue_suffix = mta, source_ip, destination_ip, esmtp, queue_suffix
        self.smtputf8, self.eight_bit = smtputf8, eight_bit
        self.kept = []
        take_text(mta, &self.text[0], LONGEST_STRING, self.kept)
        take_text(source_ip, &self.text[1], LONGEST_STRING, self.kept)
        take_text(destination_ip, &self.text[2], LONGEST_STRING, self.kept)
        take_text(esmtp, &self.text[3], LONGEST_STRING, self.kept)
        take_text(queue_suffix, &self.suffix, LONGEST_STRING, self.kept)


cdef class _Run:
    """What the records of one batch have in common, taken out of its objects once."""

    cdef object held
    cdef list positions, recipients
    cdef long long count  # of outcomes, not yet subtracted from what is open

    cdef int begin(self, object held, Record *o) except -1:
        cdef object batch = held.batch
        self.held = held
        self.positions, self.recipients = batch.positions, batch.recipients
        o.campaign, o.batch, o.attempt = batch.campaign_id, fit32(batch.batch), fit16(batch.attempt)
        o.epoch = fit32(held.epoch)
        self.count = 0
        return 0

    cdef object recipient(self, Py_ssize_t index, Record *o):
        cdef object recipient = self.recipients[index]
        o.number, o.position = fit32(recipient.number), fit32(self.positions[index])
        return recipient

    cdef int end(self, list settled) except -1:
        if self.count:
            self.held.in_flight -= self.count
            self.held.open -= self.count
            self.count = 0
            if not self.held.open:
                settled.append(self.held)
        return 0


def record_deliveries(list outcomes not None, Records records not None, long long now):
    """Record every plain delivery among `outcomes` (content answered 2xx in one short line, on a path without failures).

    `now` is the time of the records in microseconds. Counts on owner and held as `engine.turn` would.
    Returns (outcomes that are not plain, in order; how many were recorded; held batches of which none is open any more).
    """
    cdef list others = [], settled = [], kept = []
    cdef Outcome outcome
    cdef Message message
    cdef SmtpSession session = None
    cdef bytes reply
    cdef const char *text
    cdef const char *standard = b"2.0.0"
    cdef Py_ssize_t length, end
    cdef long long count = 0, run = 0
    cdef object path = None
    cdef Peer peer = None
    cdef _Run held = _Run()
    cdef Record o
    cdef char[LONGEST_PLAIN + 4] diagnostic
    cdef char[LONGEST_STRING] queue
    cdef bint usable = False
    o.kind, o.at, o.due_at = c"d", now, 0
    o.text[4].size = 0  # no category
    o.text[4].start = b""
    o.text[DIAGNOSTIC].start = diagnostic
    o.text[9].start = queue
    diagnostic[3] = c" "
    for outcome in outcomes:
        reply = outcome.text
        text = PyBytes_AS_STRING(reply)
        length = PyBytes_GET_SIZE(reply)
        if outcome.stage != STAGE_CONTENT_C or outcome.code < 200 or outcome.code > 299 or not _is_plain(text, length):
            others.append(outcome)
            continue
        end = _status_end(text, length)
        if end < 0:
            others.append(outcome)
            continue
        if outcome.session is not session:
            session = <SmtpSession?> outcome.session
            peer = <Peer?> session.facts
            o.connection = fit32(session.connection_id)
            memcpy(&o.text[5], peer.text, sizeof(peer.text))
            if session.owner is not path:
                if run:
                    path.delivered += run
                    path.answers += run
                    run = 0
                path = session.owner
                o.delivery_server = path.server.id
                usable = not path.health.failures
        if not usable:
            others.append(outcome)
            continue
        message = outcome.message
        if (<tuple> message.ref)[0] is not held.held:
            held.end(settled)
            held.begin((<tuple> message.ref)[0], &o)
            o.queued_at = held.held.campaign.queued_at_us
            o.first_attempt_at = <long long> (<double> held.held.batch.first_attempt_at * 1e6)
            if not o.first_attempt_at:
                o.first_attempt_at = now
        take_text(held.recipient((<tuple> message.ref)[1], &o).email, &o.text[0], LONGEST_STRING, kept)
        o.size = message.size
        if message.smtputf8:
            sender = message.mail_from.decode("utf-8")
            kept.append(sender)
            take_text(sender, &o.text[1], LONGEST_STRING, kept)
        else:  # ASCII: its Message was made of it
            o.text[1].start = PyBytes_AS_STRING(message.mail_from)
            o.text[1].size = min(PyBytes_GET_SIZE(message.mail_from), LONGEST_STRING)
        o.text[2].start = text if end else standard
        o.text[2].size = end if end else 5
        diagnostic[0], diagnostic[1], diagnostic[2] = 48 + outcome.code // 100, 48 + outcome.code // 10 % 10, 48 + outcome.code % 10
        memcpy(diagnostic + 4, text, length)
        o.text[DIAGNOSTIC].size = 4 + length
        o.text[9].size = _queue_name(queue, &o.text[0], &peer.suffix)
        records.settle(&o)
        run += 1
        count += 1
        held.count += 1
    if run:
        path.delivered += run
        path.answers += run
    held.end(settled)
    return others, count, settled


def make_messages(list built not None, held, list indexes not None, list into not None):
    """Append a Message for every composed recipient to `into`; `built[i]` belongs to recipient `indexes[i]` of `held`.

    Composed is (MAIL FROM, RCPT, wire, smtputf8), or a tuple of another class with `dotted` and `eight_bit` behind. Returns the
    (index, what it is instead) of those that are neither.
    """
    cdef list refused = []
    cdef Py_ssize_t i
    cdef object one
    for i in range(len(indexes)):
        one = built[i]
        if type(one) is tuple:
            into.append(new_message((<tuple> one)[0], (<tuple> one)[1], (<tuple> one)[2], (held, indexes[i]), (<tuple> one)[3], None, False))
        elif isinstance(one, tuple):
            into.append(new_message(one[0], one[1], one[2], (held, indexes[i]), one[3], one[4], one[5]))
        else:
            refused.append((indexes[i], one))
    return refused


cdef int _begin(SmtpSession session, list messages, Records records, Record *o, _Run held) except -1:
    cdef Message message
    o.connection = fit32(session.connection_id)
    for message in messages:
        if (<tuple> message.ref)[0] is not held.held:
            held.begin((<tuple> message.ref)[0], o)
        held.recipient((<tuple> message.ref)[1], o)
        records.intend(o)
    return session.take(messages)


def begin(SmtpSession session not None, list messages not None, Records records not None, long long server_id, long long at):
    """Record the intent of every message (R10) and hand them to the session, which sends nothing before its `flush`."""
    cdef Record o
    o.kind, o.delivery_server, o.at = c"i", server_id, at
    _begin(session, messages, records, &o, _Run())


def hand_out(list sessions not None, list rooms not None, list messages not None, Records records not None, long long server_id, long long at):
    """`begin` for all of them: session i gets the next `rooms[i]` of `messages`, as far as they reach.

    Returns ((session, messages) where one needs SMTPUTF8 or 8BITMIME and the connection does not have it: not begun; sessions left
    with room).
    """
    cdef list odd = [], starved = [], share
    cdef Py_ssize_t i, start = 0, room, count = len(messages)
    cdef Message message
    cdef SmtpSession session
    cdef Peer peer
    cdef _Run held = _Run()
    cdef Record o
    cdef bint fits
    o.kind, o.delivery_server, o.at = c"i", server_id, at
    for i in range(len(sessions)):
        room = rooms[i]
        if room == 0:
            continue
        session = <SmtpSession?> sessions[i]
        if start < count:
            share = messages[start:start + room]
            fits = True
            for message in share:
                if message.eight_bit:
                    peer = <Peer?> session.facts
                    if not (peer.smtputf8 if message.smtputf8 else peer.eight_bit):
                        fits = False
                        break
            if fits:
                _begin(session, share, records, &o, held)
            else:
                odd.append((session, share))
        start += room
        if start > count:
            starved.append(session)
    return odd, starved


def by_owner(sessions):
    """The sessions of each owner, in order."""
    cdef dict found = {}
    cdef list group = None
    cdef object owner = None
    cdef SmtpSession session
    for session in sessions:
        if session.owner is not owner:
            owner = session.owner
            group = found.setdefault(owner, [])
        group.append(session)
    return found


def flush_all(list sessions not None):
    """Let every session write what it holds."""
    cdef SmtpSession session
    for session in sessions:
        session.turned()


def rooms_of(list sessions not None):
    """How many messages each session can take now, and their sum."""
    cdef list rooms = []
    cdef long total = 0
    cdef int room
    cdef SmtpSession session
    for session in sessions:
        room = session.open_room()
        rooms.append(room)
        total += room
    return rooms, total
