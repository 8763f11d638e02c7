# Message and Outcome, the values that go in and come out of smtp_protocol, and the octets of an envelope.
# Included there: one module, so that the hot path calls nothing through another module's door.


cdef unsigned char[256] STANDS  # 1: this octet may stand in any address, quoted or not


cdef int _fill_stands() except -1:
    cdef int octet
    for octet in range(256):
        STANDS[octet] = 32 < octet < 127 and octet not in (60, 62)


_fill_stands()


cdef int _check_address(bytes address, bint smtputf8, str name) except -1:
    # An address becomes part of a command line: whatever could end or extend that line is refused, never stripped (S2).
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(address)
    cdef Py_ssize_t i, n = PyBytes_GET_SIZE(address)
    cdef unsigned char c
    cdef bint quoted = n > 0 and p[0] == 34
    if n > 1000:
        raise ValueError(f"{name}: longer than 1000 octets")
    for i in range(n):
        c = p[i]
        if STANDS[c]:
            continue
        if c < 32 or c == 127 or (c >= 128 and not smtputf8) or (not quoted and (c == 32 or c == 60 or c == 62)):
            raise ValueError(f"{name}: octet {c} at position {i} cannot be part of an address")
    return 0


@cython.freelist(256)
@cython.auto_pickle(False)
cdef class Message:
    """One message for one recipient, ready to leave.

    `wire` is the complete header and body, ended by CRLF, `size` octets; None once it has left, because nobody needs it any more.
    `dotted`: the same for DATA (RFC 5321 §4.5.2), None where no line starts with a dot. `eight_bit`: it needs 8BITMIME.
    `mail_from` may be empty (the null sender). `ref` is the caller's and never looked at. `phase` tells how much of it has left.
    `alone`, to be set before it is submitted: nothing else is in flight on its connection, so that a lost link tells something
    about this message.
    Raises ValueError for an address that would break a command line and for content not ended by CRLF.
    """

    def __init__(
        self, bytes mail_from not None, bytes rcpt not None, bytes wire not None, object ref, bint smtputf8=False, bytes dotted=None,
        bint eight_bit=False,
    ):
        _fill(self, mail_from, rcpt, wire, ref, smtputf8, dotted, eight_bit)

    def __repr__(self):
        return f"<Message to {self.rcpt!r}, {self.size} octets, phase {self.phase}>"


cdef int _fill(
    Message m, bytes mail_from, bytes rcpt, bytes wire, object ref, bint smtputf8, bytes dotted, bint eight_bit
) except -1:
    cdef Py_ssize_t n = PyBytes_GET_SIZE(wire)
    cdef const char *p = PyBytes_AS_STRING(wire)
    _check_address(mail_from, smtputf8, "mail_from")
    _check_address(rcpt, smtputf8, "rcpt")
    if PyBytes_GET_SIZE(rcpt) == 0:
        raise ValueError("rcpt: empty")
    if n < 2 or p[n - 2] != 13 or p[n - 1] != 10:
        raise ValueError("wire: does not end with CRLF")
    if p[0] == 46 and dotted is None:
        raise ValueError("wire: starts with a dot")
    m.mail_from = mail_from
    m.rcpt = rcpt
    m.wire = wire
    m.size = n
    m.dotted = wire if dotted is None else dotted
    m.ref = ref
    m.smtputf8 = smtputf8
    m.eight_bit = smtputf8 or eight_bit
    m.phase = PHASE_QUEUED_C
    m.verdict_stage = 0
    return 0


cdef bytes take_content(Message m, bint stuffed):
    """What is to be written; the message lets go of it, so that its memory is free as soon as it has left."""
    cdef bytes content = m.dotted if stuffed else m.wire
    m.wire = m.dotted = None
    return content


cdef Message new_message(bytes mail_from, bytes rcpt, bytes wire, object ref, bint smtputf8, bytes dotted, bint eight_bit):
    """A Message made from C, with the checks of its constructor."""
    cdef Message m = Message.__new__(Message)
    _fill(m, mail_from, rcpt, wire, ref, smtputf8, dotted, eight_bit)
    return m


@cython.freelist(256)
@cython.auto_pickle(False)
cdef class Outcome:
    """What became of one message on one connection. Every message submitted gets exactly one.

    `stage` STAGE_MAIL, STAGE_RCPT, STAGE_DATA, STAGE_CONTENT: `code` and `text` are the server's reply to that command
    (a 2xx only at STAGE_CONTENT). STAGE_LOST: the connection ended after the final octet had left and before the reply was
    read (`in_doubt`). STAGE_UNSENT: it ended before that, so the server cannot have the message; `begun` tells whether its
    MAIL had left. For both `code` is 0 and `text` says why. `text` is at most 2 KiB, lines joined by LF.
    """

    def __cinit__(self, object session, Message message, int code, bytes text, int stage, bint begun=True):
        self.session = session
        self.message = message
        self.code = code
        self.text = text
        self.stage = stage
        self.begun = begun

    @property
    def in_doubt(self):
        """The server may or may not have taken the message."""
        return self.stage == STAGE_LOST_C

    def __repr__(self):
        return f"<Outcome stage {self.stage} code {self.code} {self.text!r:.80}>"


cdef inline Py_ssize_t _digits(Py_ssize_t number) noexcept:
    cdef Py_ssize_t n = 1
    while number >= 10:
        number //= 10
        n += 1
    return n


cdef inline char *_put(char *at, const char *text, Py_ssize_t n) noexcept:
    memcpy(at, text, n)
    return at + n


cdef inline char *_put_bytes(char *at, bytes text) noexcept:
    cdef Py_ssize_t n = PyBytes_GET_SIZE(text)
    memcpy(at, PyBytes_AS_STRING(text), n)
    return at + n


cdef inline unsigned long long _first_word(const unsigned char *text, Py_ssize_t length) noexcept:
    # At most its first eight octets: enough for "2.1.5", "Accepted", "recipien".
    cdef unsigned long long word = 0
    cdef Py_ssize_t i
    for i in range(length if length < 8 else 8):
        if text[i] <= 32:
            break
        word = (word << 8) | text[i]
    return word


cdef inline Py_ssize_t _envelope_size(Message m) noexcept:
    # "MAIL FROM:<" ">\r\n" "RCPT TO:<" ">\r\n"
    cdef Py_ssize_t n = 26 + PyBytes_GET_SIZE(m.mail_from) + PyBytes_GET_SIZE(m.rcpt)
    if m.eight_bit:
        n += 23 if m.smtputf8 else 14
    return n


cdef inline char *_put_mail(char *at, Message m) noexcept:
    at = _put(at, b"MAIL FROM:<", 11)
    at = _put_bytes(at, m.mail_from)
    if m.eight_bit:
        return _put(at, b"> BODY=8BITMIME SMTPUTF8\r\n", 26) if m.smtputf8 else _put(at, b"> BODY=8BITMIME\r\n", 17)
    return _put(at, b">\r\n", 3)


cdef inline char *_put_rcpt(char *at, Message m) noexcept:
    at = _put(at, b"RCPT TO:<", 9)
    at = _put_bytes(at, m.rcpt)
    return _put(at, b">\r\n", 3)
