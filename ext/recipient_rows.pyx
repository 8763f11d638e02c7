# cython: language_level=3
"""Turns a COPY of recipients into the packed list of a batch (msgpack), without an object per recipient.

What is written is what msgspec writes for a list of domain.campaign.Recipient, or reads as one: arrays of four.
"""

cimport cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free
from libc.stdint cimport int64_t, uint8_t, uint64_t

from ext.text_output cimport Output, put, reserve, start_output

cdef enum:
    LIST_HEAD = 5
    HEADER = 19      # of a COPY, without its extension
    LONGEST_HEADS = 40  # of one recipient's four values and the array they stand in


@cython.overflowcheck(False)
cdef inline int64_t _number(const char *at, int octets) noexcept nogil:
    """A big-endian integer of 2, 4 or 8 octets, with its sign."""
    cdef uint64_t value = 0
    cdef int i
    for i in range(octets):
        value = value << 8 | <uint8_t>at[i]
    return <int64_t>(value << (64 - 8 * octets)) >> (64 - 8 * octets)


cdef inline void _put_number(Output *out, unsigned char mark, uint64_t value, int octets) noexcept nogil:
    cdef int i
    out.start[out.used] = <char>mark
    for i in range(octets):
        out.start[out.used + octets - i] = <char>(value & 0xFF)
        value >>= 8
    out.used += octets + 1


@cython.final
cdef class RecipientRows:
    """The recipients of one batch whose numbers follow each other from `first` on; those with a bit set in `done` are left out.

    `feed_copy` takes a binary COPY of (number int, subscriber id bigint, email text, data json) in order of numbers, cut anywhere;
    after it `positions` holds the bit of each recipient in `done`.
    """

    cdef readonly list positions
    cdef bytes done
    cdef int64_t first
    cdef Output out
    cdef bytes carry
    cdef bint begun, ended, broken

    def __cinit__(self, bytes done not None, int64_t first):
        self.positions = []
        self.done = done
        self.first = first
        self.carry = b""
        start_output(&self.out, LIST_HEAD + 4096 * len(done))  # 512 octets for each: seldom more
        self.out.used = LIST_HEAD  # filled in by `packed`

    def __dealloc__(self):
        PyMem_Free(self.out.start)

    def feed_copy(self, bytes block not None):
        """Read a part. Garbage is remembered and said by `packed`: a COPY that is broken off would not end."""
        cdef bytes data = self.carry + block if self.carry else block
        cdef const char *start = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data), at = 0, used
        if not self.begun:
            if size < HEADER:
                self.carry = data
                return
            at = HEADER + <Py_ssize_t>_number(start + 15, 4)
            self.begun = True
            self.broken = data[:11] != b"PGCOPY\n\xff\r\n\x00" or at != HEADER
        while not self.broken and not self.ended:
            used = self._row(start + at, size - at)
            if used == 0:
                break
            at += used
        self.carry = data[at:]

    cdef Py_ssize_t _row(self, const char *row, Py_ssize_t size) except -1:
        """Take one row, of which `size` octets are there. How many it has; 0: not all of them are there, or there is no row."""
        cdef Py_ssize_t at, email, data
        cdef int64_t number, position
        if size < 2:
            return 0
        if _number(row, 2) == -1:
            self.ended = True
            return 0
        if size < 26:
            return 0
        email = <Py_ssize_t>_number(row + 22, 4)
        if _number(row, 2) != 4 or _number(row + 2, 4) != 4 or _number(row + 10, 4) != 8 or email < 0:
            self.broken = True
            return 0
        at = 26 + email
        if size < at + 4:
            return 0
        data = <Py_ssize_t>_number(row + at, 4)
        if data < 0:
            self.broken = True
            return 0
        if size < at + 4 + data:
            return 0
        number = _number(row + 6, 4)
        position = number - self.first
        if position < 0 or position >= 8 * PyBytes_GET_SIZE(self.done):
            self.broken = True
            return 0
        if not PyBytes_AS_STRING(self.done)[position >> 3] & (0x80 >> (position & 7)):
            self.positions.append(position)
            reserve(&self.out, LONGEST_HEADS + email + data)
            self.out.start[self.out.used] = <char>0x94  # array of 4
            self.out.used += 1
            _put_number(&self.out, 0xD2, <uint64_t>number, 4)  # int 32
            _put_number(&self.out, 0xD3, <uint64_t>_number(row + 14, 8), 8)  # int 64
            _put_number(&self.out, 0xDB, <uint64_t>email, 4)  # str 32
            put(&self.out, row + 26, email)
            _put_number(&self.out, 0xC6, <uint64_t>data, 4)  # bin 32
            put(&self.out, row + at + 4, data)
        return at + 4 + data

    def packed(self):
        """The whole list. Raises ValueError when what came was no such COPY, or not all of one."""
        cdef Output head
        if self.broken or not self.ended:
            raise ValueError("not a whole COPY in binary form of number, subscriber id, email, data")
        head.start, head.used = self.out.start, 0
        _put_number(&head, 0xDD, <uint64_t>len(self.positions), 4)  # array 32
        return PyBytes_FromStringAndSize(self.out.start, self.out.used)
