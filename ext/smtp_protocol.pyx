# cython: language_level=3
"""Mail transactions of the SMTP client: bytes in, bytes and outcomes out (RFC 5321, 2920, 3030). No I/O, no clock.

Three modes. Lock-step: one command, one reply. PIPELINING: the content of message N, its dot and MAIL/RCPT/DATA of
message N+1 leave together (RFC 2920 §3.1: content may begin a group, DATA must end it), so a message costs one round
trip and at most one is ever in doubt. CHUNKING: MAIL, RCPT and BDAT n LAST of several whole messages leave together.

Replies are paired with what was asked strictly in order. A refusal counts only when the rest of its group has been
read and fits (P5): a peer that answers twice is found out before anybody is bounced for it. DATA is guarded by its own
code, 354; where DATA is refused too, the 2xx to a RSET confirms the verdict. BDAT has no such guard. So a connection
begins with DATA and turns to BDAT only after a message has been accepted and the first word of its content reply was
not that of its RCPT reply ("2.0.0" and "2.1.5", "queued" and "recipient"); from then on a content reply that reads like
a RCPT or MAIL reply is a loss of step. Every BDAT is followed by RSET: its 2xx confirms the verdict, for if a stray line
was taken for the reply to BDAT, the true one stands here; and a server may keep the transaction of a message whose
recipient it refused, and would then take the next one under the wrong return path.

After a violation nothing is read or written any more (R6).
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcpy

PHASE_QUEUED = PHASE_QUEUED_C
PHASE_ENVELOPE = PHASE_ENVELOPE_C
PHASE_CONTENT = PHASE_CONTENT_C
PHASE_FINAL = PHASE_FINAL_C

STAGE_MAIL = STAGE_MAIL_C
STAGE_RCPT = STAGE_RCPT_C
STAGE_DATA = STAGE_DATA_C
STAGE_CONTENT = STAGE_CONTENT_C
STAGE_LOST = STAGE_LOST_C
STAGE_UNSENT = STAGE_UNSENT_C

MODE_LOCK_STEP = MODE_LOCK_STEP_C
MODE_PIPELINING = MODE_PIPELINING_C
MODE_CHUNKING = MODE_CHUNKING_C

MAX_REPLY_BYTES = 65536
MAX_REPLY_LINES = 100
MAX_TEXT_BYTES = 2048
WINDOW_BYTES = 65536
MAX_WINDOW = 50

cdef enum:
    REPLY_BYTES_LIMIT = 65536
    REPLY_LINES_LIMIT = 100
    TEXT_LIMIT = 2048
    WINDOW_BYTES_LIMIT = 65536
    WINDOW_LIMIT = 50

cdef tuple _AWAITED = ("nothing", "MAIL", "RCPT", "DATA", "the end of the content", "BDAT", "the empty message", "RSET", "QUIT")


include "smtp_message.pxi"


@cython.auto_pickle(False)
cdef class SmtpProtocol:
    """The client side of one SMTP connection after EHLO: what may be written now, and what each reply means.

    `window` (1 to 50) bounds whole messages in flight with CHUNKING; as many as make up 64 kB, at least one.
    CHUNKING without PIPELINING is lock-step. `max_messages` 0: no limit.
    """

    def __cinit__(self, bint pipelining, bint chunking, int window=4, int max_messages=0):
        if window < 1:
            raise ValueError("window: must be at least 1")
        self.mode = MODE_LOCK_STEP_C if not pipelining else (MODE_CHUNKING_C if chunking else MODE_PIPELINING_C)
        self.window = window if window < WINDOW_LIMIT else WINDOW_LIMIT
        self.max_messages = max_messages
        self.slots = [None] * SLOTS
        self.contents = []
        self.partial = bytearray()
        self.kept = bytearray()
        self.closing_reply = b""

    # --- what the caller may ask -------------------------------------------------------------------------------------

    @property
    def room(self):
        """How many messages can leave at the next `output`; more may be submitted but would have to wait."""
        return self._room()

    @property
    def in_flight(self):
        """Messages begun and not decided."""
        return self.started

    @property
    def held(self):
        """Messages submitted and not decided."""
        return self.count

    @property
    def expecting(self):
        """Replies we are owed."""
        return self.expected_count

    @property
    def awaiting(self):
        """The command whose reply comes next, in words."""
        return self.awaited()

    @property
    def sendable(self):
        """Whether `output` would give bytes."""
        return self._sendable()

    @property
    def open_window(self):
        """Whole messages that may be in flight now: 1 until replies have been seen that can be told apart."""
        return self.effective_window()

    cdef str awaited(self):
        return _AWAITED[self.expected[self.expected_head]] if self.expected_count else _AWAITED[0]

    cdef int effective_window(self) noexcept:
        cdef Py_ssize_t w = self.window
        if not self.learned:
            return 1
        if self.last_size > 0 and WINDOW_BYTES_LIMIT // self.last_size < w:
            w = WINDOW_BYTES_LIMIT // self.last_size
        return <int> w if w > 1 else 1

    cdef int _room(self) noexcept:
        cdef int room, window
        if self.fault is not None or self.closing or self.quitting:
            return 0
        if self.mode == MODE_LOCK_STEP_C:
            room = 0 if self.count else 1
        elif self.mode == MODE_PIPELINING_C or not self.learned:
            # One envelope besides the message whose content leaves or is being answered.
            room = 0 if self.envelope_out or self.count > self.started else 1
        else:
            window = self.effective_window()
            room = 0 if self.envelope_out or self.count > window // 2 else window - self.count
        if self.loners:
            return 0
        if self.max_messages > 0 and self.max_messages - self.submitted < room:
            room = self.max_messages - self.submitted
        return room if room > 0 else 0

    cdef bint _sendable(self) noexcept:
        if self.fault is not None or self.closing or self.quit_answered:
            return False
        if self.mode == MODE_LOCK_STEP_C and self.expected_count:
            return False
        if self.content_due or self.lone_dot_due or self.next_command or (self.unconfirmed and self.reset_due):
            return True
        if self.count > self.started:
            if self.envelope_out or (self.learned and self.started >= self.effective_window()):
                return False
            return not self.loners or self._in_company(1) > 0
        return self.quitting and self.count == 0 and self.expected_count == 0

    cdef int _in_company(self, int wanted) noexcept:
        # How many of the next `wanted` messages may be begun now, when one of those held wants to be alone.
        cdef int i
        if self.started and (<Message> self.slots[self.head]).alone:
            return 0
        for i in range(wanted):
            if (<Message> self.slots[(self.head + self.started + i) & (SLOTS - 1)]).alone:
                return i if i or self.started else 1
        return wanted

    # --- messages in -------------------------------------------------------------------------------------------------

    cpdef submit(self, Message message):
        """Take a message. Raises ValueError when 64 are held already: the caller did not look at `room`; and for one that has left."""
        if self.count == SLOTS:
            raise ValueError(f"this connection holds {SLOTS} messages already")
        if message.wire is None:
            raise ValueError("this message has left before")
        message.phase = PHASE_QUEUED_C
        message.verdict_stage = 0
        message.answered = False
        self.slots[(self.head + self.count) & (SLOTS - 1)] = message
        self.count += 1
        self.submitted += 1
        self.loners += message.alone
        self.last_size = message.size

    def quit(self):
        """Take no more messages; QUIT leaves when those begun are decided."""
        self.quitting = True

    # --- bytes out ---------------------------------------------------------------------------------------------------

    cpdef bytes output(self):
        """Everything that may be written now, as one piece, or None. What is returned counts as written."""
        cdef bytes commands = self.commands(), out
        if commands is None:
            return None
        out = self.whole(commands)
        self.contents.clear()
        return out

    cdef bytes whole(self, bytes commands):
        """What the last `commands` gave, with the contents in their places."""
        cdef Py_ssize_t i, at = 0, size = PyBytes_GET_SIZE(commands)
        cdef const char *start = PyBytes_AS_STRING(commands)
        cdef bytes content, out
        cdef char *end
        if not self.contents:
            return commands
        for content in self.contents:
            size += PyBytes_GET_SIZE(content)
        out = PyBytes_FromStringAndSize(NULL, size)
        end = PyBytes_AS_STRING(out)
        for i in range(len(self.contents)):
            end = _put(end, start + at, self.places[i] - at)
            end = _put_bytes(end, <bytes> self.contents[i])
            at = self.places[i]
        _put(end, start + at, PyBytes_GET_SIZE(commands) - at)
        return out

    cdef bytes commands(self):
        """The commands of everything that may be written now, or None. What is returned counts as written.

        `contents[i]` is written before octet `places[i]` of them; those are left where they are, because copying them costs as much as
        all the rest.
        """
        self.contents.clear()
        if not self._sendable():
            return None
        if self.quitting and self.count == 0 and self.expected_count == 0 and not self.lone_dot_due:
            self.expected[self.expected_head] = AWAIT_QUIT
            self.expected_count = 1
            return b"QUIT\r\n"
        if self.mode == MODE_LOCK_STEP_C:
            return self._output_lock_step()
        return self._output_groups()

    cdef bytes _output_lock_step(self):
        cdef Message m
        cdef unsigned char kind
        cdef bytes out
        if self.lone_dot_due:
            self.lone_dot_due = False
            kind, out = AWAIT_LONE_DOT, b".\r\n"
        elif self.reset_due:
            self.reset_due = False
            kind, out = AWAIT_RSET, b"RSET\r\n"
        else:
            m = <Message> self.slots[self.head]
            if self.content_due:
                self.content_due = False
                m.phase = PHASE_FINAL_C
                self.last_content = m
                kind, out = AWAIT_DOT, b".\r\n"
                self.contents.append(take_content(m, True))
                self.places[0] = 0
            elif self.next_command == AWAIT_RCPT:
                kind, out = AWAIT_RCPT, b"RCPT TO:<" + m.rcpt + b">\r\n"
            elif self.next_command == AWAIT_DATA:
                kind, out = AWAIT_DATA, b"DATA\r\n"
            else:
                m.phase = PHASE_ENVELOPE_C
                self.started += 1
                self.sent += 1
                kind = AWAIT_MAIL
                out = b"MAIL FROM:<" + m.mail_from + b">" + (b" BODY=8BITMIME" if m.eight_bit else b"") + (b" SMTPUTF8\r\n" if m.smtputf8 else b"\r\n")
            self.next_command = 0
        self.expected[self.expected_head] = kind
        self.expected_count = 1
        return out

    cdef bytes _output_groups(self):
        cdef Message content = None
        cdef Message m
        cdef bint dot = self.lone_dot_due
        cdef bint chunking = self.learned
        cdef bint reset
        cdef Py_ssize_t size = 0, n
        cdef int i, envelopes = 0, window, digit
        cdef unsigned int tail
        cdef bytes out
        cdef char *start
        cdef char *at
        cdef char *end

        # Two passes: how long it is, then one allocation filled in place.
        if self.content_due:
            content = <Message> self.slots[self.head]
            size = 3
        elif dot:
            size = 3
        envelopes = self.count - self.started
        if chunking:
            window = self.effective_window()
            if envelopes > window - self.started:
                envelopes = window - self.started
        elif envelopes > 1:
            envelopes = 1
        if envelopes < 0 or self.envelope_out:
            envelopes = 0
        if self.loners and envelopes:
            envelopes = self._in_company(envelopes)
        reset = self.reset_due
        for i in range(envelopes):
            m = <Message> self.slots[(self.head + self.started + i) & (SLOTS - 1)]
            size += _envelope_size(m)
            if reset and i == 0:
                size += 6
            if chunking:
                n = m.size
                size += 18 + _digits(n)  # "BDAT " n " LAST\r\n" "RSET\r\n"
            else:
                size += 6

        if reset and envelopes == 0 and self.unconfirmed:
            size += 6
        if size == 0:
            return None
        out = PyBytes_FromStringAndSize(NULL, size)
        at = start = PyBytes_AS_STRING(out)
        tail = self.expected_head + self.expected_count
        if content is not None:
            self.places[0] = 0
            self.contents.append(take_content(content, True))
            at = _put(at, b".\r\n", 3)
            content.phase = PHASE_FINAL_C
            self.last_content = content
            self.content_due = False
            self.expected[tail & (RING - 1)] = AWAIT_DOT
            tail += 1
        elif dot:
            at = _put(at, b".\r\n", 3)
            self.lone_dot_due = False
            self.expected[tail & (RING - 1)] = AWAIT_LONE_DOT
            tail += 1
        for i in range(envelopes):
            m = <Message> self.slots[(self.head + self.started) & (SLOTS - 1)]
            if reset:
                at = _put(at, b"RSET\r\n", 6)
                self.expected[tail & (RING - 1)] = AWAIT_RSET
                tail += 1
                reset = False
            at = _put_mail(at, m)
            at = _put_rcpt(at, m)
            self.expected[tail & (RING - 1)] = AWAIT_MAIL
            self.expected[(tail + 1) & (RING - 1)] = AWAIT_RCPT
            if chunking:
                at = _put(at, b"BDAT ", 5)
                n = m.size
                end = at + _digits(n)
                at = end
                while True:
                    end -= 1
                    digit = <int> (n % 10)
                    end[0] = <char> (48 + digit)
                    n //= 10
                    if n == 0:
                        break
                at = _put(at, b" LAST\r\n", 7)
                self.places[len(self.contents)] = at - start
                self.contents.append(take_content(m, False))
                at = _put(at, b"RSET\r\n", 6)
                self.expected[(tail + 2) & (RING - 1)] = AWAIT_BDAT
                self.expected[(tail + 3) & (RING - 1)] = AWAIT_RSET
                tail += 1
                m.phase = PHASE_FINAL_C
                self.last_content = m
            else:
                at = _put(at, b"DATA\r\n", 6)
                self.expected[(tail + 2) & (RING - 1)] = AWAIT_DATA
                m.phase = PHASE_ENVELOPE_C
                self.envelope_out = True
            tail += 3
            self.started += 1
            self.sent += 1
        if reset and envelopes == 0 and self.unconfirmed:
            at = _put(at, b"RSET\r\n", 6)
            self.expected[tail & (RING - 1)] = AWAIT_RSET
            tail += 1
            self.reset_due = False
        if envelopes:
            self.reset_due = False
        self.expected_count = <int> (tail - <unsigned int> self.expected_head)
        return out

    # --- bytes in ----------------------------------------------------------------------------------------------------

    cpdef feed(self, bytes data, list outcomes):
        """Read what arrived; append an Outcome for each message it decides. Any cut of the input gives the same outcomes.

        A peer that breaks the protocol sets `fault` (a sentence): the caller must then abort the connection and call `lose`.
        """
        cdef Py_ssize_t used
        cdef Py_ssize_t length
        if self.fault is not None or self.quit_answered:
            return
        if self.partial and memchr(PyBytes_AS_STRING(data), 10, PyBytes_GET_SIZE(data)) == NULL:
            self.partial += data
            self.scanned = len(self.partial)
        elif not self.partial:
            length = PyBytes_GET_SIZE(data)
            used = self._scan(<const unsigned char *> PyBytes_AS_STRING(data), length, 0, outcomes)
            if used < length and self.fault is None and not self.quit_answered:
                self.partial += data[used:]
                self.scanned = length - used
        else:
            self.partial += data
            length = len(self.partial)
            # A copy, because nothing may hold the buffer while it is cut; only lines split over segments come here.
            data = bytes(self.partial)
            used = self._scan(<const unsigned char *> PyBytes_AS_STRING(data), length, self.scanned, outcomes)
            if used:
                del self.partial[:used]
            self.scanned = length - used
        if self.fault is None and self.reply_bytes + <Py_ssize_t> len(self.partial) >= REPLY_BYTES_LIMIT:
            self._violation(f"a reply of 64 KiB or more while {self.awaited()} was to be answered")

    cdef Py_ssize_t _scan(self, const unsigned char *start, Py_ssize_t length, Py_ssize_t searched, list outcomes) except -2:
        # Takes every complete line; returns how many octets were used. `searched`: so many at the front hold no LF.
        cdef Py_ssize_t at = 0, lf
        cdef const void *found
        while True:
            found = memchr(start + at + searched, 10, length - at - searched)
            searched = 0
            if found == NULL:
                return at
            lf = <Py_ssize_t> (<size_t> found - <size_t> start)
            if lf == at or start[lf - 1] != 13:
                self._violation(f"a line ended by a bare LF while {self.awaited()} was to be answered")
                return lf + 1
            self._line(start + at, lf - 1 - at, outcomes)
            at = lf + 1
            if self.fault is not None or self.quit_answered:
                return at

    cdef int _line(self, const unsigned char *line, Py_ssize_t length, list outcomes) except -1:
        cdef int code, lines
        cdef Py_ssize_t n
        cdef const unsigned char *text
        if (
            length < 3
            or line[0] < 48 or line[0] > 57 or line[1] < 48 or line[1] > 57 or line[2] < 48 or line[2] > 57
            or (length > 3 and line[3] != 32 and line[3] != 45)
        ):
            shown = PyBytes_FromStringAndSize(<const char *> line, length if length < 80 else 80)
            return self._violation(f"reply line {shown!r} has no three-digit code ({self.awaited()} was to be answered)")
        code = (line[0] - 48) * 100 + (line[1] - 48) * 10 + (line[2] - 48)
        if code < 200 or code > 599:
            return self._violation(f"reply code {code:03d} to {self.awaited()}")
        if self.reply_lines and code != self.reply_code:
            return self._violation(f"a reply to {self.awaited()} that begins with {self.reply_code} and goes on with {code}")
        self.reply_lines += 1
        self.reply_bytes += length + 2
        if self.reply_lines > REPLY_LINES_LIMIT:
            return self._violation(f"a reply of more than {REPLY_LINES_LIMIT} lines to {self.awaited()}")
        if self.reply_bytes >= REPLY_BYTES_LIMIT:
            return self._violation(f"a reply of 64 KiB or more to {self.awaited()}")
        text = line + 4
        n = length - 4 if length > 4 else 0
        if length > 3 and line[3] == 45:
            self.reply_code = code
            if len(self.kept) < TEXT_LIMIT:
                self.kept += PyBytes_FromStringAndSize(<const char *> text, n if n < TEXT_LIMIT else TEXT_LIMIT)
                self.kept += b"\n"
            return 0
        self._reply(code, text, n, outcomes)
        if self.reply_lines > 1:
            self.kept.clear()
        self.reply_lines = 0
        self.reply_bytes = 0
        return 0

    cdef bytes _text(self, const unsigned char *text, Py_ssize_t length):
        # The text of the whole reply of which `text` is the last line.
        if length > TEXT_LIMIT:
            length = TEXT_LIMIT
        if self.reply_lines <= 1:
            return PyBytes_FromStringAndSize(<const char *> text, length)
        return (bytes(self.kept) + PyBytes_FromStringAndSize(<const char *> text, length))[:TEXT_LIMIT]

    cdef int _violation(self, str reason) except -1:
        self.fault = reason
        return 0

    cdef int _note(self, Message message, int stage, int code, const unsigned char *text, Py_ssize_t length) except -1:
        # A verdict to be confirmed. The first refusal of a message is the one that counts: what follows is only its echo.
        if message.verdict_stage == 0:
            message.verdict_stage = stage
            message.verdict_code = code
            message.verdict_text = self._text(text, length)
        return 0

    cdef int _decide(self, int stage, int code, bytes text, list outcomes) except -1:
        # The oldest message in flight is done: replies come in order, so it is always the oldest.
        cdef Message m = <Message> self.slots[self.head]
        self.slots[self.head] = None
        self.head = (self.head + 1) & (SLOTS - 1)
        self.count -= 1
        self.started -= 1
        self.loners -= m.alone
        outcomes.append(Outcome.__new__(Outcome, self.session, m, code, text, stage, True))
        return 0

    cdef int _decide_noted(self, list outcomes) except -1:
        cdef Message m = <Message> self.slots[self.head]
        return self._decide(m.verdict_stage, m.verdict_code, m.verdict_text, outcomes)

    cdef int _reply(self, int code, const unsigned char *text, Py_ssize_t length, list outcomes) except -1:
        cdef Message m
        cdef unsigned char kind
        cdef bint accepted = code < 300
        cdef unsigned long long word
        if code == 421:
            # The server leaves. Whatever else it still answers is read and counts; nothing more is sent.
            self.closing = True
            self.closing_reply = self._text(text, length)
        if self.expected_count == 0:
            if code != 421:
                shown = self._text(text, length)
                return self._violation(f"a reply nobody asked for: {code} {shown!r:.80}")
            return 0
        kind = self.expected[self.expected_head]
        if 300 <= code < 400 and not (kind == AWAIT_DATA and code == 354):
            return self._violation(f"reply code {code} to {self.awaited()}")
        self.replies += 1

        if kind == AWAIT_BDAT:
            m = <Message> self.slots[self.head]
            if accepted:
                word = _first_word(text, length)
                if m.verdict_stage:
                    return self._violation(f"{code} to BDAT although its envelope was refused")
                if word != self.word_final and (word == self.word_rcpt or word == self.word_mail):
                    shown = self._text(text, length)
                    return self._violation(f"the reply to BDAT reads like one to another command: {code} {shown!r:.80}")
            self._note(m, STAGE_CONTENT_C, code, text, length)
            m.answered = True
            self.expected_head = (self.expected_head + 1) & (RING - 1)
            self.expected_count -= 1
            return 0

        if kind == AWAIT_DOT:
            if accepted and self.mode == MODE_CHUNKING_C and not self.learned:
                word = _first_word(text, length)
                if word != self.seen_rcpt:
                    self.word_final, self.word_rcpt, self.word_mail, self.learned = word, self.seen_rcpt, self.seen_mail, True
            self.expected_head = (self.expected_head + 1) & (RING - 1)
            self.expected_count -= 1
            return self._decide(STAGE_CONTENT_C, code, self._text(text, length), outcomes)

        if kind == AWAIT_DATA:
            m = <Message> self.slots[self.head]
            if accepted:
                return self._violation(f"reply code {code} to DATA")
            self.expected_head = (self.expected_head + 1) & (RING - 1)
            self.expected_count -= 1
            self.envelope_out = False
            if code == 354:
                if m.verdict_stage:
                    # No recipient, and yet it waits for content (RFC 2920 §3.1): only a lone dot keeps the connection in step.
                    self.lone_dot_due = True
                    return self._decide_noted(outcomes)
                self.content_due = True
                return 0
            self._note(m, STAGE_DATA_C, code, text, length)
            self.reset_due = True
            if self.mode == MODE_LOCK_STEP_C:
                return self._decide_noted(outcomes)
            # Three refusals in a row could be shifted by one: the reply to RSET, a 2xx, tells.
            self.unconfirmed = True
            return 0

        self.expected_head = (self.expected_head + 1) & (RING - 1)
        self.expected_count -= 1
        if kind == AWAIT_MAIL:
            if accepted:
                self.seen_mail = _first_word(text, length)
                if self.mode == MODE_LOCK_STEP_C:
                    self.next_command = AWAIT_RCPT
            else:
                self._note(<Message> self.slots[self.head], STAGE_MAIL_C, code, text, length)
                if self.mode == MODE_LOCK_STEP_C:
                    self._decide_noted(outcomes)
        elif kind == AWAIT_RCPT:
            if accepted:
                if (<Message> self.slots[self.head]).verdict_stage:
                    return self._violation(f"{code} to RCPT although MAIL was refused")
                self.seen_rcpt = _first_word(text, length)
                if self.mode == MODE_LOCK_STEP_C:
                    self.next_command = AWAIT_DATA
            else:
                self._note(<Message> self.slots[self.head], STAGE_RCPT_C, code, text, length)
                if self.mode == MODE_LOCK_STEP_C:
                    self.reset_due = True
                    self._decide_noted(outcomes)
        elif kind == AWAIT_LONE_DOT:
            pass  # whatever it says, the empty message is over (RFC 5321 §4.1.1.4)
        elif kind == AWAIT_RSET:
            if not accepted:
                if code != 421:
                    self.shifted = True
                    shown = self._text(text, length)
                    self._violation(f"RSET refused: {code} {shown!r:.80}")
            elif self.mode != MODE_LOCK_STEP_C:
                # Every RSET inside a group confirms the verdict before it.
                self.unconfirmed = False
                return self._decide_noted(outcomes)
        else:
            self.quit_answered = True
        return 0

    # --- the end -----------------------------------------------------------------------------------------------------

    cpdef lose(self, str reason, bint violation, list outcomes):
        """The connection is gone: decide every message begun, and hand back those not begun.

        A verdict that was read stands unless the peer is known to have lost step before it (`violation`). A message is in doubt when
        its final octet had left, unless a 421 was read before: a server that said so works on nothing sent after it.
        """
        cdef Message m
        cdef bytes text = reason.encode("utf-8", "replace")
        cdef bint in_doubt
        while self.started:
            m = <Message> self.slots[self.head]
            if m.verdict_stage and (not violation or (m.answered and not self.shifted)):
                self._decide_noted(outcomes)
                continue
            in_doubt = m.phase == PHASE_FINAL_C and (violation or not self.closing)
            self.slots[self.head] = None
            self.head = (self.head + 1) & (SLOTS - 1)
            self.count -= 1
            self.started -= 1
            self.loners -= m.alone
            outcomes.append(Outcome.__new__(Outcome, self.session, m, 0, text, STAGE_LOST_C if in_doubt else STAGE_UNSENT_C, True))
        self.unsend(reason, outcomes)
        if self.fault is None:
            self.fault = reason
        self.last_content = None

    cpdef unsend(self, str reason, list outcomes):
        """Hand back the messages of which nothing was sent, in the order they were submitted."""
        cdef Message m
        cdef int at
        if self.count == self.started:
            return
        text = reason.encode("utf-8", "replace")
        while self.count > self.started:
            at = (self.head + self.started) & (SLOTS - 1)
            m = <Message> self.slots[at]
            # Only the end of the ring is cut, so what is behind moves up by reading it first.
            for i in range(self.started, self.count - 1):
                self.slots[(self.head + i) & (SLOTS - 1)] = self.slots[(self.head + i + 1) & (SLOTS - 1)]
            self.slots[(self.head + self.count - 1) & (SLOTS - 1)] = None
            self.count -= 1
            self.submitted -= 1
            self.loners -= m.alone
            outcomes.append(Outcome.__new__(Outcome, self.session, m, 0, text, STAGE_UNSENT_C, False))
