"""DKIM-Signature fields (RFC 6376, 8301, 8463): canonical forms, body hash and header hash of a message, and the field around a signature.

Owns which fields are covered. Knows no keys: it says what is to be signed (`prepare`) and puts the signatures in their place
(`complete`). Canonicalisation is relaxed/relaxed, the hash SHA-256, and there is no `l=`: what is added to a message breaks it.
"""

cimport cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdlib cimport free
from libc.string cimport memchr, memcmp, memcpy

from ext.body cimport Wire, begin, let_go, put, put_bytes, reserve
from ext.digest cimport sha256, sha256_pair

cdef extern from "<string.h>" nogil:
    void* memmem(const void* text, size_t length, const void* wanted, size_t wanted_length)

HASH_OCTETS = 32
BASE64_LINE = 72  # characters of a signature on one line

cdef const char* BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
cdef int _LINE = BASE64_LINE, _FOLD = 70

# Covered when present; the first five are named once more than they occur, so that a second one added later breaks the
# signature (RFC 6376 §8.15). Every field that begins with List- or CFBL- is covered too.
ONCE_MORE = (b"from", b"to", b"subject", b"date", b"message-id")
WHEN_PRESENT = (
    b"reply-to", b"sender", b"cc", b"in-reply-to", b"references", b"mime-version", b"content-type", b"content-transfer-encoding",
    b"content-id", b"content-description", b"resent-date", b"resent-from", b"resent-to", b"resent-cc", b"resent-message-id",
    b"feedback-id", b"x-fblid", b"x-complaints-to",
)

cdef enum:
    FIELDS = 512, NAMES = 32

cdef struct Name:
    const char* text
    Py_ssize_t length

cdef struct Field:
    Py_ssize_t start, colon, end   # `end` is behind its last CR LF

cdef Name[NAMES] _NAMES
cdef int _ONCE_MORE = len(ONCE_MORE), _COVERED = len(ONCE_MORE) + len(WHEN_PRESENT)
cdef list _KEPT = [*ONCE_MORE, *WHEN_PRESENT]


cdef int _fill_table() except -1:
    cdef int at
    if _COVERED > NAMES:
        raise AssertionError("NAMES is too small")
    for at in range(_COVERED):
        _NAMES[at].text = _KEPT[at]
        _NAMES[at].length = len(_KEPT[at])


_fill_table()


cdef inline unsigned char _lower(unsigned char octet) noexcept nogil:
    return octet + 32 if 65 <= octet <= 90 else octet


cdef inline bint _is_blank(unsigned char octet) noexcept nogil:
    return octet == 32 or octet == 9


cdef bint _is_covered(const unsigned char* name, Py_ssize_t length) noexcept nogil:
    """Whether a field of this name, in any case, is part of what is signed."""
    cdef unsigned char[32] lower
    cdef Py_ssize_t at
    cdef int entry
    if length > 5 and (name[4] == 45):
        lower[0], lower[1], lower[2], lower[3] = _lower(name[0]), _lower(name[1]), _lower(name[2]), _lower(name[3])
        if memcmp(lower, b"list", 4) == 0 or memcmp(lower, b"cfbl", 4) == 0:
            return True
    if length > 32:
        return False
    for at in range(length):
        lower[at] = _lower(name[at])
    for entry in range(_COVERED):
        if _NAMES[entry].length == length and memcmp(_NAMES[entry].text, lower, length) == 0:
            return True
    return False


cdef int _put_base64(Wire* wire, const unsigned char* data, Py_ssize_t length, int width) except -1:
    """`length` octets in base64, a line break and a blank after every `width` characters (0: none)."""
    cdef Py_ssize_t at = 0
    cdef unsigned int held
    cdef int count, column = 0, each
    cdef unsigned char* out
    reserve(wire, length * 2 + 16)
    out = wire.data + wire.length
    while at < length:
        if width and column == width:
            memcpy(out, b"\r\n ", 3)
            out += 3
            column = 0
        count = <int>(length - at) if length - at < 3 else 3
        held = <unsigned int>data[at] << 16
        if count > 1:
            held |= <unsigned int>data[at + 1] << 8
        if count > 2:
            held |= data[at + 2]
        for each in range(4):
            out[each] = BASE64[held >> (18 - 6 * each) & 63] if each <= count else 61
        out += 4
        column += 4
        at += count
    wire.length = out - wire.data
    return 0


cdef int _put_relaxed_header(Wire* wire, const unsigned char* text, Py_ssize_t colon, Py_ssize_t length) except -1:
    """One field in the relaxed form (RFC 6376 §3.4.2): `text[colon]` is its colon; no line end is written."""
    cdef Py_ssize_t at, end = colon
    cdef unsigned char* out
    cdef unsigned char octet
    cdef bint blank = False, begun = False
    reserve(wire, length + 2)
    out = wire.data + wire.length
    while end and _is_blank(text[end - 1]):
        end -= 1
    for at in range(end):
        out[at] = _lower(text[at])
    out += end
    out[0] = 58
    out += 1
    for at in range(colon + 1, length):
        octet = text[at]
        if octet == 10 or (octet == 13 and at + 1 < length and text[at + 1] == 10):
            continue
        if _is_blank(octet):
            blank = True
            continue
        if blank and begun:
            out[0] = 32
            out += 1
        blank = False
        begun = True
        out[0] = octet
        out += 1
    wire.length = out - wire.data
    return 0


cdef bint _is_relaxed(const unsigned char* text, Py_ssize_t length) noexcept nogil:
    """Whether every line stands in the relaxed form already: no tab, no blank before a blank or a line end, a line end at the end."""
    cdef Py_ssize_t at
    cdef unsigned char bad = 0
    if length < 2 or text[length - 1] != 10 or text[length - 2] != 13:
        return length == 0
    for at in range(length - 1):  # no way out in the middle: the compiler makes 16 comparisons of it at once
        bad |= (text[at] == 9) | ((text[at] == 32) & ((text[at + 1] == 32) | (text[at + 1] == 13)))
    return bad == 0


cdef Py_ssize_t _without_empty_end(const unsigned char* text, Py_ssize_t length) noexcept nogil:
    """The length without empty lines at the end; 0 for a body of nothing but those."""
    while length >= 4 and text[length - 1] == 10 and text[length - 2] == 13 and text[length - 3] == 10 and text[length - 4] == 13:
        length -= 2
    if length == 2 and text[0] == 13 and text[1] == 10:
        return 0
    return length


cdef int _put_relaxed_body(Wire* wire, const unsigned char* text, Py_ssize_t length) except -1:
    """A body in the relaxed form (RFC 6376 §3.4.4), empty lines at the end still there."""
    cdef Py_ssize_t at = 0
    cdef unsigned char* out
    cdef bint blank = False
    reserve(wire, length + 2)
    out = wire.data + wire.length
    while at < length:
        if _is_blank(text[at]):
            blank = True
        elif text[at] == 13 and at + 1 < length and text[at + 1] == 10:
            memcpy(out, b"\r\n", 2)
            out += 2
            at += 1
            blank = False
        else:
            if blank:
                out[0] = 32
                out += 1
                blank = False
            out[0] = text[at]
            out += 1
        at += 1
    wire.length = out - wire.data
    if wire.length and not (wire.length >= 2 and (out - 1)[0] == 10 and (out - 2)[0] == 13):
        put(wire, <const unsigned char*>b"\r\n", 2)
    return 0


@cython.final
cdef class Fields:
    """Makes the DKIM-Signature fields of one set of keys for one message after the other.

    `keys` are (algorithm, domain, selector, octets of a signature), in the order in which their fields shall stand. As the
    length of a signature is fixed by its key, so is the length of everything that `complete` adds to messages with the
    same fields. Not to be used by two threads at once.
    """

    cdef list beginnings, sizes
    cdef Wire header, body, field

    def __init__(self, list keys not None):
        self.beginnings = []
        self.sizes = []
        for algorithm, domain, selector, octets in keys:
            self.beginnings.append(
                b"DKIM-Signature: v=1; a=%b; c=relaxed/relaxed;\r\n d=%b;\r\n s=%b; t=" % (algorithm, domain, selector)
            )
            self.sizes.append(octets)

    def __dealloc__(self):
        free(self.header.data)
        free(self.body.data)
        free(self.field.data)

    def prepare(self, list messages not None, unsigned long long timestamp) -> tuple:
        """(hashes, fields): for each key the SHA-256 hashes that it has to sign, and for each message the fields up to its signatures.

        A message is header and body in CR LF lines; `timestamp` POSIX seconds. For one without a From field, or whose header is not
        made of fields, a ValueError stands among the fields, and there are no hashes of it.
        """
        cdef list hashes = [[] for _ in self.sizes], fields = []
        cdef bytes body_hashes = self.body_hashes(messages)
        cdef const unsigned char* body_hash = <const unsigned char*>PyBytes_AS_STRING(body_hashes)
        for message in messages:
            try:
                fields.append(self.unfinished(message, timestamp, body_hash, hashes))
            except ValueError as error:
                fields.append(error)
            body_hash += 32
        return hashes, fields

    def complete(self, list messages not None, list fields not None, list signatures not None) -> list:
        """The messages with their fields in front, the signatures in them: for each key those of its hashes, in their order.

        Where a ValueError stands among the fields it is the answer. Raises ValueError for a wrong number of signatures, or of octets.
        """
        cdef list answers = []
        cdef Py_ssize_t at = 0, wanted = sum([isinstance(field, list) for field in fields])
        if [len(of_key) for of_key in signatures] != [wanted] * len(self.sizes):
            raise ValueError(f"{wanted} messages and {len(self.sizes)} keys need as many signatures of each")
        for message, field in zip(messages, fields, strict=True):
            if isinstance(field, list):
                answers.append(self.finished(message, field, signatures, at))
                at += 1
            else:
                answers.append(field)
        return answers

    cdef list unfinished(self, bytes message, unsigned long long timestamp, const unsigned char* body_hash, list hashes):
        """The fields of one message up to the signatures; its hashes are appended, one to those of each key."""
        cdef const unsigned char* text = <const unsigned char*>PyBytes_AS_STRING(message)
        cdef Py_ssize_t length = len(message), at = 0, line = 0, covered
        cdef const unsigned char* found
        cdef Field[FIELDS] fields
        cdef int count = 0, each
        cdef unsigned char[32] digest
        cdef bint from_seen = False
        cdef list made = []
        cdef bytes names, stamp
        while True:
            found = <const unsigned char*>memchr(text + at, 10, length - at) if at < length else NULL
            if found == NULL:
                raise ValueError("the message has no empty line behind its header")
            line = at
            at = found - text + 1
            if at - line < 2 or text[at - 2] != 13:
                raise ValueError("a line of the header does not end in CR LF")
            if at - line == 2:
                break
            if _is_blank(text[line]):
                if not count:
                    raise ValueError("the header begins with a continuation line")
                fields[count - 1].end = at
                continue
            if count == FIELDS:
                raise ValueError(f"the header has more than {FIELDS} fields")
            found = <const unsigned char*>memchr(text + line, 58, at - line)
            if found == NULL:
                raise ValueError("a line of the header has no colon")
            fields[count].start = line
            fields[count].colon = found - text
            fields[count].end = at
            count += 1

        self.header.length = 0
        self.field.length = 0
        self.field.column = 0
        for each in range(count - 1, -1, -1):  # of a name that occurs twice the last comes first (RFC 6376 §5.4.2)
            covered = fields[each].colon - fields[each].start
            while covered and _is_blank(text[fields[each].start + covered - 1]):
                covered -= 1
            if not _is_covered(text + fields[each].start, covered):
                continue
            if covered == 4 and _lower(text[fields[each].start]) == 102:
                from_seen = True
            self.name(text + fields[each].start, covered)
            _put_relaxed_header(
                &self.header, text + fields[each].start, fields[each].colon - fields[each].start, fields[each].end - fields[each].start
            )
            put(&self.header, <const unsigned char*>b"\r\n", 2)
        if not from_seen:
            raise ValueError("the message has no From field")
        for each in range(_ONCE_MORE):
            self.name(<const unsigned char*>_NAMES[each].text, _NAMES[each].length)
        names = PyBytes_FromStringAndSize(<const char*>self.field.data, self.field.length)

        stamp = b"%d" % timestamp
        covered = self.header.length
        for each in range(len(self.sizes)):
            self.field.length = 0
            put_bytes(&self.field, self.beginnings[each])
            put_bytes(&self.field, stamp)
            put_bytes(&self.field, b";\r\n h=")
            put_bytes(&self.field, names)
            put_bytes(&self.field, b";\r\n bh=")
            _put_base64(&self.field, body_hash, 32, 0)
            put_bytes(&self.field, b";\r\n b=")
            self.header.length = covered
            _put_relaxed_header(&self.header, self.field.data, 14, self.field.length)
            sha256(self.header.data, self.header.length, digest)
            (<list>hashes[each]).append(PyBytes_FromStringAndSize(<const char*>digest, 32))
            made.append(PyBytes_FromStringAndSize(<const char*>self.field.data, self.field.length))
        if self.header.capacity + self.body.capacity > 1048576:  # one huge message must not hold on to its memory
            let_go(&self.header)
            let_go(&self.body)
        return made

    cdef bytes finished(self, bytes message, list fields, list signatures, Py_ssize_t row):
        cdef bytes signature
        cdef Py_ssize_t each
        self.field.length = 0
        for each in range(len(self.sizes)):
            signature = signatures[each][row]
            if len(signature) != self.sizes[each]:
                raise ValueError(f"a signature has {len(signature)} octets instead of {self.sizes[each]}")
            put_bytes(&self.field, fields[each])
            _put_base64(&self.field, <const unsigned char*>PyBytes_AS_STRING(signature), len(signature), _LINE)
            put_bytes(&self.field, b"\r\n")
        cdef bytes whole = PyBytes_FromStringAndSize(NULL, self.field.length + len(message))
        memcpy(PyBytes_AS_STRING(whole), self.field.data, self.field.length)
        memcpy(PyBytes_AS_STRING(whole) + self.field.length, PyBytes_AS_STRING(message), len(message))
        return whole

    cdef int name(self, const unsigned char* text, Py_ssize_t length) except -1:
        """Add one name to `h=`."""
        cdef Py_ssize_t at
        if self.field.length:
            put(&self.field, <const unsigned char*>b":", 1)
            self.field.column += 1
            if self.field.column + length > _FOLD:
                put(&self.field, <const unsigned char*>b"\r\n ", 3)
                self.field.column = 0
        reserve(&self.field, length)
        for at in range(length):
            self.field.data[self.field.length + at] = _lower(text[at])
        self.field.length += length
        self.field.column += <int>length
        return 0

    cdef bytes body_hashes(self, list messages):
        """The SHA-256 hashes of their relaxed bodies, one behind the other. Bodies that are relaxed as they stand are hashed in pairs."""
        cdef bytes message, made = PyBytes_FromStringAndSize(NULL, 32 * len(messages))
        cdef unsigned char* digest = <unsigned char*>PyBytes_AS_STRING(made)
        cdef const unsigned char* text
        cdef const unsigned char* found
        cdef const unsigned char* waiting = NULL
        cdef unsigned char* digest_of_waiting = NULL
        cdef Py_ssize_t length, length_of_waiting = 0
        for message in messages:
            text = <const unsigned char*>PyBytes_AS_STRING(message)
            length = len(message)
            found = <const unsigned char*>memmem(text, length, b"\r\n\r\n", 4)
            found = text + length if found == NULL else found + 4  # a header without an end is refused by `unfinished`
            length -= found - text
            if not _is_relaxed(found, length):
                self.body.length = 0
                _put_relaxed_body(&self.body, found, length)
                sha256(self.body.data, _without_empty_end(self.body.data, self.body.length), digest)
            elif waiting == NULL:
                waiting, length_of_waiting, digest_of_waiting = found, _without_empty_end(found, length), digest
            else:
                sha256_pair(waiting, length_of_waiting, digest_of_waiting, found, _without_empty_end(found, length), digest)
                waiting = NULL
            digest += 32
        if waiting != NULL:
            sha256(waiting, length_of_waiting, digest_of_waiting)
        return made


def relaxed_header(bytes field not None) -> bytes:
    """One field in the relaxed form (RFC 6376 §3.4.2), without its line end. Raises ValueError when it has no colon."""
    cdef Wire wire
    begin(&wire)
    try:
        _put_relaxed_header(&wire, <const unsigned char*>PyBytes_AS_STRING(field), field.index(b":"), len(field))
        return PyBytes_FromStringAndSize(<const char*>wire.data, wire.length)
    finally:
        free(wire.data)


def relaxed_body(bytes body not None) -> bytes:
    """A body in the relaxed form (RFC 6376 §3.4.4), as it is hashed."""
    cdef Wire wire
    begin(&wire)
    try:
        _put_relaxed_body(&wire, <const unsigned char*>PyBytes_AS_STRING(body), len(body))
        return PyBytes_FromStringAndSize(<const char*>wire.data, _without_empty_end(wire.data, wire.length))
    finally:
        free(wire.data)


def is_relaxed(bytes body not None) -> bool:
    """Whether the body can be hashed as it stands, but for empty lines at its end: true of all that `ext.body` writes, but for 8bit."""
    return _is_relaxed(<const unsigned char*>PyBytes_AS_STRING(body), len(body))
