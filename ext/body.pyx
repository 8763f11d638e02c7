"""Encoded bodies: UTF-8 text in, lines in CR LF out: quoted-printable, safe for DATA and BDAT alike (RFC 2045 §6.7, RFC 5321 §4.5.2), base64, 8bit.

Owns the encoding of merge values at run time, of template text ahead of time (`Piece`), and of whole texts.
"""

cimport cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcpy

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject** holder, Py_ssize_t size) except -1  # on failure the object is gone and `holder[0]` NULL


class Unsendable(ValueError):
    """Text that no encoding makes fit for a message: a NUL anywhere, a control character in a header."""


class Unfit(ValueError):
    """Text that cannot go as 8bit, but can in another form: one of its lines is too long."""


cdef enum:
    LONGEST_LINE = 998  # octets without CR LF (RFC 5322 §2.1.1, RFC 2045 §2.8)

cdef enum:  # classes of an octet
    PLAIN, CODED, BLANK, CARRIAGE_RETURN, LINE_FEED, DOT, MARKUP, ZERO

cdef unsigned char[256] KIND         # octet -> its class in quoted-printable text
cdef unsigned char[256] KIND_MARKUP  # the same, with & < > " ' set apart to be escaped for HTML
cdef unsigned char[256] IN_URL       # 1: may stand in the part of a URL that a value fills, 2: in a URL that is a value as a whole
cdef const unsigned char* HEX = b"0123456789ABCDEF"
cdef const unsigned char* BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


cdef int _fill_tables() except -1:
    cdef int octet
    for octet in range(256):
        KIND[octet] = PLAIN if 33 <= octet <= 126 and octet != 61 else CODED
    KIND[0] = ZERO
    KIND[32] = BLANK
    KIND[13] = CARRIAGE_RETURN
    KIND[10] = LINE_FEED
    KIND[46] = DOT
    for octet in range(256):
        KIND_MARKUP[octet] = MARKUP if octet in b"&<>\"'" else KIND[octet]
    for octet in range(256):
        IN_URL[octet] = 0 if octet <= 32 or octet == 127 or octet in b'"<>\\^`{|}' else 2
    for octet in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~":
        IN_URL[octet] = 3


_fill_tables()


cdef int start_bytes(Wire* wire, Py_ssize_t expected) except -1:
    """Begin a bytes object that is written in its place and then `taken`: no copy of it is made."""
    cdef bytes made
    wire.length = 0
    wire.column = 0
    wire.after_cr = False
    if wire.holder == NULL:
        made = PyBytes_FromStringAndSize(NULL, expected)
        Py_INCREF(made)
        wire.holder = <PyObject*>made
        wire.data = <unsigned char*>PyBytes_AS_STRING(made)
        wire.capacity = expected
    return 0


cdef bytes taken(Wire* wire):
    """What was written since `start_bytes`."""
    cdef bytes made
    _resize(wire, wire.length)
    made = <bytes>wire.holder
    let_go(wire)
    return made


cdef void let_go(Wire* wire) noexcept:
    """Give the memory back."""
    if wire.holder == NULL:
        free(wire.data)
    else:
        Py_XDECREF(wire.holder)
    begin(wire)


cdef int _resize(Wire* wire, Py_ssize_t size) except -1:
    cdef PyObject* holder = wire.holder
    wire.holder, wire.data, wire.capacity = NULL, NULL, 0
    _PyBytes_Resize(&holder, size)
    wire.holder, wire.data, wire.capacity = holder, <unsigned char*>PyBytes_AS_STRING(<bytes>holder), size
    return 0


cdef int grow(Wire* wire, Py_ssize_t more) except -1:
    """Make room for `more` octets where there is too little."""
    cdef Py_ssize_t wanted = (wire.length + more) * 3 // 2 + 1024
    cdef unsigned char* grown
    if wire.holder != NULL:
        return _resize(wire, wanted)
    grown = <unsigned char*>realloc(wire.data, wanted)
    if grown == NULL:
        raise MemoryError()
    wire.data, wire.capacity = grown, wanted
    return 0


cdef int put_text(Wire* wire, const unsigned char* text, Py_ssize_t length, bint escape) except -1:
    """Write `length` octets of UTF-8 as quoted-printable, escaped for HTML first where asked (as markupsafe does).

    CR LF, CR and LF each become one CR LF, also when the pair is split between two calls. Raises Unsendable on NUL.
    """
    cdef const unsigned char* kinds = &KIND_MARKUP[0] if escape else &KIND[0]
    cdef const unsigned char* entity
    cdef unsigned char* out
    cdef Py_ssize_t at = 0, run, room
    cdef unsigned char kind, octet
    cdef int column = wire.column, width
    cdef bint blank = False   # the octet before, on this line, is a blank that stands as itself
    if length == 0:
        return 0
    reserve(wire, length * 6 + 16)  # an entity is 5 octets, a coded octet 3; each 75 octets may add a soft break of 3
    out = wire.data + wire.length
    if wire.after_cr and text[0] == 10:
        at = 1
    wire.after_cr = text[length - 1] == 13
    while at < length:
        octet = text[at]
        kind = kinds[octet]
        if kind == PLAIN:
            if column == 75:
                memcpy(out, b"=\r\n", 3)
                out += 3
                column = 0
            room = at + 75 - column
            if room > length:
                room = length
            run = at
            while run < room and kinds[text[run]] == PLAIN:
                out[0] = text[run]
                out += 1
                run += 1
            column += <int>(run - at)
            at = run
            blank = False
            continue
        if kind == BLANK:
            if column == 75:
                memcpy(out, b"=\r\n", 3)
                out += 3
                column = 0
            if not blank and at + 1 < length and text[at + 1] != 13 and text[at + 1] != 10:
                out[0] = 32
                out += 1
                column += 1
                at += 1
                blank = True
                continue
        elif kind == LINE_FEED or kind == CARRIAGE_RETURN:
            out[0] = 13
            out[1] = 10
            out += 2
            column = 0
            at += 2 if kind == CARRIAGE_RETURN and at + 1 < length and text[at + 1] == 10 else 1
            blank = False
            continue
        elif kind == DOT:
            if column == 75:
                memcpy(out, b"=\r\n", 3)
                out += 3
                column = 0
            if column:
                out[0] = 46
                out += 1
                column += 1
                at += 1
                blank = False
                continue
        elif kind == MARKUP:
            if octet == 38:
                entity = b"&amp;"
            elif octet == 60:
                entity = b"&lt;"
            elif octet == 62:
                entity = b"&gt;"
            elif octet == 34:
                entity = b"&#34;"
            else:
                entity = b"&#39;"
            width = 4 if octet == 60 or octet == 62 else 5
            if column + width > 75:
                memcpy(out, b"=\r\n", 3)
                out += 3
                column = 0
            memcpy(out, entity, width)
            out += width
            column += width
            at += 1
            blank = False
            continue
        elif kind == ZERO:
            raise Unsendable("it holds a NUL")
        if column + 3 > 75:
            memcpy(out, b"=\r\n", 3)
            out += 3
            column = 0
        out[0] = 61
        out[1] = HEX[octet >> 4]
        out[2] = HEX[octet & 15]
        out += 3
        column += 3
        at += 1
        blank = False
    wire.length = out - wire.data
    wire.column = column
    return 0


cdef int put_base64(Wire* wire, const unsigned char* text, Py_ssize_t length) except -1:
    """Write octets as base64 in lines of 76, without the last line's end (RFC 2045 §6.8)."""
    cdef Py_ssize_t at = 0
    cdef int column = 0
    cdef unsigned int group
    cdef unsigned char* out
    reserve(wire, length * 3 // 2 + 16)
    out = wire.data + wire.length
    while at < length:
        if column == 76:
            out[0] = 13
            out[1] = 10
            out += 2
            column = 0
        group = <unsigned int>text[at] << 16
        if at + 1 < length:
            group |= <unsigned int>text[at + 1] << 8
        if at + 2 < length:
            group |= text[at + 2]
        out[0] = BASE64[group >> 18]
        out[1] = BASE64[(group >> 12) & 63]
        out[2] = BASE64[(group >> 6) & 63] if at + 1 < length else 61
        out[3] = BASE64[group & 63] if at + 2 < length else 61
        out += 4
        column += 4
        at += 3
    wire.length = out - wire.data
    return 0


cdef int put_lines(Wire* wire, const unsigned char* text, Py_ssize_t length) except -1:
    """Write UTF-8 as it is, 8bit (RFC 2045 §2.8): CR LF, CR and LF each become CR LF, nothing else changes.

    The dots and blanks that quoted-printable hides are there: the message needs dot-stuffing for DATA, and DKIM's relaxed form is another
    one. Raises Unsendable on NUL, Unfit on a line of more than 998 octets; what was written by then is to be thrown away.
    """
    cdef Py_ssize_t at = 0, line = 0
    cdef unsigned char* out
    cdef unsigned char octet
    reserve(wire, 2 * length)
    out = wire.data + wire.length
    while at < length:
        octet = text[at]
        at += 1
        if octet == 13 or octet == 10:
            if octet == 13 and at < length and text[at] == 10:
                at += 1
            out[0] = 13
            out[1] = 10
            out += 2
            line = 0
            continue
        if octet == 0:
            raise Unsendable("it holds a NUL")
        line += 1
        if line > LONGEST_LINE:
            raise Unfit(f"a line has more than {LONGEST_LINE} octets")
        out[0] = octet
        out += 1
    wire.length = out - wire.data
    return 0


cdef Py_ssize_t _encode(const unsigned char* text, Py_ssize_t length, bint component, unsigned char* out) except -1:
    """Percent-encode up to 256 octets into `out`, which has room for three times as many; returns how many it got."""
    cdef int allowed = 1 if component else 2
    cdef Py_ssize_t at, written = 0
    for at in range(length):
        if IN_URL[text[at]] & allowed:
            out[written] = text[at]
            written += 1
            continue
        if text[at] == 0:
            raise Unsendable("it holds a NUL")
        out[written] = 37
        out[written + 1] = HEX[text[at] >> 4]
        out[written + 2] = HEX[text[at] & 15]
        written += 3
    return written


cdef int put_url(Wire* wire, const unsigned char* text, Py_ssize_t length, bint component) except -1:
    """Write a value into a URL of an HTML attribute: percent-encoded (RFC 3986 §2), then escaped for HTML.

    `component`: the URL has begun before it, so it may hold no delimiter; else it is (the beginning of) a URL of its own, in which only
    what no URL may hold is encoded. Letters beyond ASCII stay in the latter: its host may have some. Raises Unsendable on NUL.
    """
    cdef unsigned char[768] coded
    cdef Py_ssize_t part
    while length:
        part = length if length < 256 else 256
        put_text(wire, coded, _encode(text, part, component, coded), not component)
        text += part
        length -= part
    return 0


def url_encoded(str text not None, *, bint component) -> str:
    """`text` as `put_url` writes it, before it is escaped for HTML."""
    cdef unsigned char[768] coded
    cdef Py_ssize_t length, part
    cdef const unsigned char* source = utf8(text, &length)
    cdef list parts = []
    while length:
        part = length if length < 256 else 256
        parts.append(PyBytes_FromStringAndSize(<const char*>coded, _encode(source, part, component, coded)))
        source += part
        length -= part
    return b"".join(parts).decode("utf-8")


cdef int put_piece(
    Wire* wire, const unsigned char* coded, Py_ssize_t length, int first, int last, bint one_line, bint leading_lf, int ending
) except -1:
    """Write text that was encoded ahead of time, from column 0, as `Piece` holds it."""
    if length == 0:
        return 0
    reserve(wire, length + 3)
    if leading_lf and wire.after_cr:
        coded += 2
        length -= 2
    elif wire.column and wire.column + first > 75:
        memcpy(wire.data + wire.length, b"=\r\n", 3)
        wire.length += 3
        wire.column = 0
    memcpy(wire.data + wire.length, coded, length)
    wire.length += length
    wire.column = wire.column + last if one_line else last
    wire.after_cr = ending == 13
    return 0


cdef const unsigned char* utf8(object text, Py_ssize_t* length) except NULL:
    """The UTF-8 form of `text`; raises UnicodeEncodeError (a ValueError) on a lone surrogate."""
    return <const unsigned char*>PyUnicode_AsUTF8AndSize(text, length)


@cython.final
cdef class Piece:
    """Template text encoded ahead of time, to be written at any column.

    `first` is the length of its first line up to a line end of either kind, `last` that of its last line.
    """

    def __cinit__(self, str text not None):
        cdef Wire wire
        cdef Py_ssize_t length
        cdef const unsigned char* source = utf8(text, &length)
        cdef const unsigned char* end
        begin(&wire)
        try:
            put_text(&wire, source, length, False)
            self.coded = PyBytes_FromStringAndSize(<char*>wire.data, wire.length)
            self.last = wire.column
        finally:
            free(wire.data)
        self.ending = source[length - 1] if length else 0
        self.leading_lf = length > 0 and source[0] == 10
        end = <const unsigned char*>memchr(<const char*>self.coded, 13, len(self.coded))
        self.one_line = end == NULL
        if end == NULL:
            self.first = self.last
        else:
            self.first = <int>(end - <const unsigned char*>self.coded)
            if self.first and (end - 1)[0] == 61:
                self.first -= 1

    cdef int write(self, Wire* wire) except -1:
        put_piece(
            wire, self.coded, len(self.coded), self.first, self.last, self.one_line, self.leading_lf, self.ending
        )
        return 0


def quoted_printable(str text not None, *, bint escape=False) -> bytes:
    """The whole of `text` as quoted-printable lines; no line end is added at the end.

    Raises Unsendable on NUL and UnicodeEncodeError on a lone surrogate.
    """
    return joined([text], escape=escape)


def joined(list values not None, *, bint escape=False) -> bytes:
    """`values` one after the other, each `str` encoded as it comes and each `Piece` as it was encoded ahead of time."""
    cdef Wire wire
    cdef Py_ssize_t length
    cdef const unsigned char* source
    begin(&wire)
    try:
        for value in values:
            if isinstance(value, Piece):
                (<Piece>value).write(&wire)
            else:
                source = utf8(value, &length)
                put_text(&wire, source, length, escape)
        return PyBytes_FromStringAndSize(<char*>wire.data, wire.length)
    finally:
        free(wire.data)
