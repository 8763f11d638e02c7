"""Wire and its inline functions: a growable buffer that quoted-printable text is written into (RFC 2045 §6.7).

Held by every module that writes message octets. What is written keeps four promises, whatever is merged in: no line is
longer than 76 octets, no line starts with a dot, no line ends with a blank, no two blanks stand side by side. So
dot-stuffing (RFC 5321 §4.5.2) and DKIM's relaxed body form (RFC 6376 §3.4.4) both leave the octets as they are.
`put_lines` alone keeps none of them.
"""

from cpython.object cimport PyObject
from libc.string cimport memcpy, memset


cdef struct Wire:
    unsigned char* data
    Py_ssize_t length
    Py_ssize_t capacity
    PyObject* holder # the bytes object that `data` is the inside of; NULL: memory of its own
    int column       # octets on the current line, never more than 75: one is kept for the "=" of a soft break
    bint after_cr    # the source text so far ended in a CR (written as CR LF): an LF that follows belongs to it


cdef inline void begin(Wire* wire) noexcept:
    """Nothing written, no memory yet: for a Wire on the stack; one in an object begins so."""
    memset(wire, 0, sizeof(Wire))


cdef inline int reserve(Wire* wire, Py_ssize_t more) except -1:
    """Make room for `more` octets."""
    return grow(wire, more) if wire.length + more > wire.capacity else 0


cdef inline int put(Wire* wire, const unsigned char* text, Py_ssize_t length) except -1:
    """Copy octets as they are; the column does not move."""
    reserve(wire, length)
    memcpy(wire.data + wire.length, text, length)
    wire.length += length
    return 0


cdef inline int put_bytes(Wire* wire, bytes text) except -1:
    return put(wire, <const unsigned char*>text, len(text))


cdef inline int put_plain(Wire* wire, const unsigned char* text, Py_ssize_t length) except -1:
    """Write text that holds nothing but letters, digits, `-` and `_`, as `put_text` would."""
    cdef Py_ssize_t room
    reserve(wire, length + length // 25 + 16)
    if length:
        wire.after_cr = False
    while length:
        if wire.column == 75:
            memcpy(wire.data + wire.length, b"=\r\n", 3)
            wire.length += 3
            wire.column = 0
        room = 75 - wire.column
        if room > length:
            room = length
        memcpy(wire.data + wire.length, text, room)
        wire.length += room
        wire.column += <int>room
        text += room
        length -= room
    return 0


cdef int start_bytes(Wire* wire, Py_ssize_t expected) except -1
cdef bytes taken(Wire* wire)
cdef void let_go(Wire* wire) noexcept
cdef int grow(Wire* wire, Py_ssize_t more) except -1
cdef int put_text(Wire* wire, const unsigned char* text, Py_ssize_t length, bint escape) except -1
cdef int put_base64(Wire* wire, const unsigned char* text, Py_ssize_t length) except -1
cdef int put_lines(Wire* wire, const unsigned char* text, Py_ssize_t length) except -1
cdef int put_url(Wire* wire, const unsigned char* text, Py_ssize_t length, bint component) except -1
cdef int put_piece(Wire* wire, const unsigned char* coded, Py_ssize_t length, int first, int last, bint one_line, bint leading_lf, int ending) except -1
cdef const unsigned char* utf8(object text, Py_ssize_t* length) except NULL


cdef class Piece:
    cdef bytes coded
    cdef int first, last, ending
    cdef bint one_line, leading_lf

    cdef int write(self, Wire* wire) except -1
