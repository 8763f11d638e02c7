# What the C level of smtp_protocol shows to smtp_session; the words are explained in smtp_protocol.pyx.

cdef enum:
    PHASE_QUEUED_C = 0
    PHASE_ENVELOPE_C = 1
    PHASE_CONTENT_C = 2
    PHASE_FINAL_C = 3

cdef enum:
    STAGE_MAIL_C = 1
    STAGE_RCPT_C = 2
    STAGE_DATA_C = 3
    STAGE_CONTENT_C = 4
    STAGE_LOST_C = 5
    STAGE_UNSENT_C = 6

cdef enum:
    MODE_LOCK_STEP_C = 0
    MODE_PIPELINING_C = 1
    MODE_CHUNKING_C = 2

cdef enum:
    AWAIT_MAIL = 1
    AWAIT_RCPT = 2
    AWAIT_DATA = 3
    AWAIT_DOT = 4
    AWAIT_BDAT = 5
    AWAIT_LONE_DOT = 6
    AWAIT_RSET = 7
    AWAIT_QUIT = 8

cdef enum:
    RING = 256  # expected replies; a power of two, at least 4 x SLOTS
    SLOTS = 64  # messages held by one connection; a power of two


cdef class Message:
    cdef readonly bytes mail_from
    cdef readonly bytes rcpt
    cdef readonly bytes wire
    cdef readonly Py_ssize_t size
    cdef bytes dotted
    cdef readonly object ref
    cdef readonly bint smtputf8
    cdef readonly bint eight_bit
    cdef public bint alone
    cdef readonly int phase
    cdef int verdict_stage
    cdef int verdict_code
    cdef bytes verdict_text
    cdef bint answered


cdef Message new_message(bytes mail_from, bytes rcpt, bytes wire, object ref, bint smtputf8, bytes dotted, bint eight_bit)


cdef class Outcome:
    cdef readonly object session
    cdef readonly Message message
    cdef readonly int code
    cdef readonly bytes text
    cdef readonly int stage
    cdef readonly bint begun


cdef class SmtpProtocol:
    # set by the owner
    cdef public object session
    cdef readonly int mode
    cdef readonly int window
    cdef readonly int max_messages

    # messages: the first `started` of `count` have at least their MAIL on the wire, the others wait
    cdef list slots
    cdef int head
    cdef int count
    cdef int started
    cdef int loners
    cdef Py_ssize_t last_size
    cdef Message last_content

    # replies we are owed, in order
    cdef unsigned char expected[RING]
    cdef int expected_head
    cdef int expected_count

    # what may be written next
    cdef bint content_due
    cdef bint lone_dot_due
    cdef bint reset_due
    cdef bint envelope_out
    cdef bint unconfirmed
    cdef bint shifted
    cdef int next_command

    # what the last `commands` left out of its octets: contents, and before which octet each is to be written
    cdef list contents
    cdef Py_ssize_t places[SLOTS + 1]

    # the reply being read
    cdef bytearray partial
    cdef Py_ssize_t scanned
    cdef int reply_code
    cdef int reply_lines
    cdef Py_ssize_t reply_bytes
    cdef bytearray kept

    # first words of accepted replies, learned from the first accepted message
    cdef unsigned long long word_mail
    cdef unsigned long long word_rcpt
    cdef unsigned long long word_final
    cdef unsigned long long seen_rcpt
    cdef unsigned long long seen_mail
    cdef bint learned

    cdef readonly int sent
    cdef readonly int submitted
    cdef readonly bint quitting
    cdef readonly bint quit_answered
    cdef readonly bint closing
    cdef readonly bytes closing_reply
    cdef readonly object fault
    cdef readonly long replies

    cpdef submit(self, Message message)
    cpdef feed(self, bytes data, list outcomes)
    cpdef bytes output(self)
    cpdef lose(self, str reason, bint violation, list outcomes)
    cpdef unsend(self, str reason, list outcomes)
    cdef int effective_window(self) noexcept
    cdef int _room(self) noexcept
    cdef int _in_company(self, int wanted) noexcept
    cdef bint _sendable(self) noexcept
    cdef str awaited(self)

    cdef bytes commands(self)
    cdef bytes whole(self, bytes commands)
    cdef bytes _output_lock_step(self)
    cdef bytes _output_groups(self)
    cdef Py_ssize_t _scan(self, const unsigned char *start, Py_ssize_t length, Py_ssize_t searched, list outcomes) except -2
    cdef int _line(self, const unsigned char *line, Py_ssize_t length, list outcomes) except -1
    cdef int _reply(self, int code, const unsigned char *text, Py_ssize_t length, list outcomes) except -1
    cdef bytes _text(self, const unsigned char *text, Py_ssize_t length)
    cdef int _note(self, Message message, int stage, int code, const unsigned char *text, Py_ssize_t length) except -1
    cdef int _decide(self, int stage, int code, bytes text, list outcomes) except -1
    cdef int _decide_noted(self, list outcomes) except -1
    cdef int _violation(self, str reason) except -1
