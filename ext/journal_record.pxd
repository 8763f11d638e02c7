"""The byte format of a journal record, for the modules that read blocks of records: see `journal_record`.

What is called once per record and costs next to nothing is inline; `record_end` and `open_outcome` are exported functions.
"""

from libc.stdint cimport int16_t, int32_t, int64_t


cdef enum:
    FRAME = 8
    HEAD = 48
    OUTCOME_HEAD = 80
    STRINGS = 10
    DIAGNOSTIC = 3
    LONGEST_STRING = 1000
    LONGEST_DIAGNOSTIC = 512
    LONGEST_PAYLOAD = 32768

cdef struct Slice:
    const char *start
    Py_ssize_t size

cdef struct Outcome:
    char kind
    int16_t attempt
    int32_t batch
    int32_t number
    int32_t position
    int32_t epoch
    int32_t connection
    int64_t campaign
    int64_t delivery_server
    int64_t at
    int64_t queued_at
    int64_t first_attempt_at
    int64_t due_at
    int64_t size
    Slice text[STRINGS]


cdef inline int32_t fit32(int64_t value) noexcept nogil:
    if value > 2147483647:
        return 2147483647
    if value < -2147483648:
        return -2147483648
    return <int32_t>value


cdef inline int16_t fit16(int64_t value) noexcept nogil:
    return <int16_t>(32767 if value > 32767 else 0 if value < 0 else value)


cdef inline Py_ssize_t cut(const char *text, Py_ssize_t size, Py_ssize_t longest) noexcept nogil:
    """How much of a UTF-8 text of `size` bytes there is room for, cut between two characters."""
    if size <= longest:
        return size
    while longest > 0 and (text[longest] & 0xC0) == 0x80:
        longest -= 1
    return longest


cdef inline bint is_outcome(char kind) noexcept nogil:
    return kind == b"d" or kind == b"b" or kind == b"x" or kind == b"s" or kind == b"c" or kind == b"t" or kind == b"u"


cdef inline bint is_terminal(char kind) noexcept nogil:
    return kind == b"d" or kind == b"b" or kind == b"x" or kind == b"s" or kind == b"c"


cdef Py_ssize_t record_end(const unsigned char *block, Py_ssize_t offset, Py_ssize_t end) noexcept nogil
cdef void open_outcome(const unsigned char *payload, Outcome *into) noexcept nogil
cdef int take_text(str text, Slice *into, Py_ssize_t longest, list kept) except -1


cdef class Records:
    cdef unsigned char *start
    cdef Py_ssize_t used
    cdef Py_ssize_t capacity

    cdef unsigned char *room(self, Py_ssize_t size) except NULL
    cdef int intend(self, const Outcome *o) except -1
    cdef int settle(self, const Outcome *o) except -1
