# cython: language_level=3
"""The steps of an engine's turn that every message takes, each for a whole group in one call.

`engine.turn` decides; what it would do message by message in the ordinary case (content accepted, nothing suppressed, nothing to be
looked at) is done here, because a Python frame and thirty attribute look-ups per message cost as much as sending it. Whatever is
not the ordinary case is handed back untouched. Records are packed by `journal_record`, so their format has one owner.

What is passed in is duck-typed, as far as the names below are used. `message.ref` is (held, index):
held.batch .epoch .campaign.queued_at_us .in_flight .open; batch.campaign_id .batch .attempt .first_attempt_at .positions .recipients[index];
recipient.number .email; session.owner .facts .connection_id .room .submit(messages) .flush();
owner.server.id .health.failures .delivered .answers; facts.mta .source_ip .destination_ip .esmtp .queue_suffix .smtputf8 .eight_bit.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII, PyUnicode_FindChar, PyUnicode_Substring

from ext.smtp_protocol cimport STAGE_CONTENT_C, Message, Outcome

from ext.journal_record import pack_intent as _pack_intent
from ext.journal_record import pack_outcome as _pack_outcome

cdef object pack_intent = _pack_intent
cdef object pack_outcome = _pack_outcome

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


def record_deliveries(list outcomes not None, append not None, long long now):
    """Record every plain delivery among `outcomes` (content answered 2xx in one short line, on a path without failures).

    `append` takes the packed records, `now` is their time in microseconds. Counts on owner and held as `engine.turn` would.
    Returns (outcomes that are not plain, in order; how many were recorded; held batches of which none is open any more).
    """
    cdef list others = [], settled = []
    cdef Outcome outcome
    cdef Message message
    cdef bytes reply
    cdef const char *text
    cdef Py_ssize_t length, end, index, split
    cdef long long count = 0, run = 0, first_attempt
    cdef object path = None, held = None, batch = None, session = None, facts = None, server_id = None
    cdef object connection = None, recipient, email, queue, diagnostic, status, queued_at = None, campaign_id = None, number_of_batch = None
    cdef object attempt = None, epoch = None, at = now, first_at = None, held_now, open_left
    cdef list positions = None, recipients = None
    cdef bint usable = False
    cdef str standard = "2.0.0"
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
            session = outcome.session
            facts = session.facts
            connection = session.connection_id
            if session.owner is not path:
                if run:
                    path.delivered += run
                    path.answers += run
                    run = 0
                path = session.owner
                server_id = path.server.id
                usable = not path.health.failures
        if not usable:
            others.append(outcome)
            continue
        message = outcome.message
        held_now = (<tuple> message.ref)[0]
        index = (<tuple> message.ref)[1]
        if held_now is not held:
            held = held_now
            batch = held.batch
            epoch, queued_at = held.epoch, held.campaign.queued_at_us
            campaign_id, number_of_batch, attempt = batch.campaign_id, batch.batch, batch.attempt
            positions, recipients = batch.positions, batch.recipients
            first_attempt = <long long> (<double> batch.first_attempt_at * 1e6)
            first_at = first_attempt if first_attempt else at
        recipient = recipients[index]
        email = recipient.email
        split = PyUnicode_FindChar(email, 64, 0, len(email), -1)
        queue = PyUnicode_Substring(email, split + 1, len(email)) + facts.queue_suffix
        diagnostic = f"{outcome.code} {PyUnicode_DecodeASCII(text, length, NULL)}"
        if end == 5 and text[2] == c"0" and text[4] == c"0":
            status = standard
        else:
            status = PyUnicode_DecodeASCII(text, end, NULL) if end else standard
        append(
            pack_outcome(
                "d", campaign_id, number_of_batch, recipient.number, positions[index], attempt, epoch, connection, server_id, at, queued_at,
                first_at, 0, PyBytes_GET_SIZE(message.wire), email, message.mail_from.decode("utf-8"), status, diagnostic, "",
                facts.mta, facts.source_ip, facts.destination_ip, facts.esmtp, queue,
            )
        )
        run += 1
        count += 1
        held.in_flight -= 1
        open_left = held.open - 1
        held.open = open_left
        if not open_left:
            settled.append(held)
    if run:
        path.delivered += run
        path.answers += run
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
            into.append(Message((<tuple> one)[0], (<tuple> one)[1], (<tuple> one)[2], (held, indexes[i]), (<tuple> one)[3]))
        elif isinstance(one, tuple):
            into.append(Message(one[0], one[1], one[2], (held, indexes[i]), one[3], one[4], one[5]))
        else:
            refused.append((indexes[i], one))
    return refused


cpdef begin(session, list messages, append, server_id, at):
    """Record the intent of every message (R10) and hand them to the session, which sends nothing before its `flush`."""
    cdef Message message
    cdef object held = None, held_now, batch = None, connection = session.connection_id
    cdef object campaign_id = None, number_of_batch = None, attempt = None, epoch = None
    cdef Py_ssize_t index
    for message in messages:
        held_now = (<tuple> message.ref)[0]
        index = (<tuple> message.ref)[1]
        if held_now is not held:
            held = held_now
            batch = held.batch
            epoch, campaign_id, number_of_batch, attempt = held.epoch, batch.campaign_id, batch.batch, batch.attempt
        append(
            pack_intent(
                campaign_id, number_of_batch, batch.recipients[index].number, batch.positions[index], attempt, epoch, connection, server_id, at
            )
        )
    session.submit(messages)


def hand_out(list sessions not None, list rooms not None, list messages not None, append not None, server_id, at):
    """`begin` for all of them: session i gets the next `rooms[i]` of `messages`, as far as they reach.

    Returns ((session, messages) where one needs SMTPUTF8 or 8BITMIME and the connection does not have it: not begun; sessions left
    with room).
    """
    cdef list odd = [], starved = [], share
    cdef Py_ssize_t i, start = 0, room, count = len(messages)
    cdef Message message
    cdef bint fits
    for i in range(len(sessions)):
        room = rooms[i]
        if room == 0:
            continue
        if start < count:
            share = messages[start:start + room]
            fits = True
            for message in share:
                if message.eight_bit:
                    facts = sessions[i].facts
                    if not (facts.smtputf8 if message.smtputf8 else facts.eight_bit):
                        fits = False
                        break
            if fits:
                begin(sessions[i], share, append, server_id, at)
            else:
                odd.append((sessions[i], share))
        start += room
        if start > count:
            starved.append(sessions[i])
    return odd, starved


def flush_all(list sessions not None):
    """Let every session write what it holds."""
    for session in sessions:
        session.flush()


def rooms_of(list sessions not None):
    """How many messages each session can take now, and their sum."""
    cdef list rooms = []
    cdef long total = 0
    cdef object room
    for session in sessions:
        room = session.room
        rooms.append(room)
        total += <long> room
    return rooms, total
